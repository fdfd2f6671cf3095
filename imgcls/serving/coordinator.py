"""Coordinator: one process with the state that all replicas share.

Holds the rate limits, the summed metrics, and the commands to reload or drain. If the process dies,
Ray Serve restarts it with empty state; requests that need it meanwhile are answered with 503 and
Retry-After.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from imgcls.serving.metrics import MetricSample, MetricTotals
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import TokenBuckets

COORDINATOR = "coordinator"
CALL_TIMEOUT_S = 5.0
"""Timeout of a call to the coordinator, which answers within milliseconds if it runs."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ReplicaReport:
    """Report of one replica, sent every second.

    sha256:      SHA-256 of the bundle in use
    settings_id: ID of the settings that the replica applied last
    error:       why it could not load their bundle; None if it could
    """

    replica: str
    samples: list[MetricSample]
    sha256: str
    settings_id: str
    error: str | None


@dataclass(frozen=True)
class Commands:
    """Commands to all replicas, returned to each report.

    reload_count: number of reloads requested; a replica that sees it grow reloads its bundle
    """

    reload_count: int
    is_draining: bool


@serve.deployment(
    name=COORDINATOR,
    num_replicas=1,
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=2,
)
class Coordinator:
    """The shared state, as a Ray Serve deployment with a single replica."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets()
        self._totals = MetricTotals()
        self._reports: dict[str, ReplicaReport] = {}
        self._reload_count = 0
        self._is_draining = False

    async def take_tokens(
        self, name: str, per_second: float, needed: int, prefetch: float, held: float
    ) -> tuple[float, float]:
        return self._buckets.take(name, per_second, needed, prefetch, held)

    async def report(self, report: ReplicaReport) -> Commands:
        self._totals.report(report.replica, report.samples)
        self._reports[report.replica] = report
        return await self.get_commands()

    async def get_commands(self) -> Commands:
        return Commands(self._reload_count, self._is_draining)

    async def list_reports(self) -> list[ReplicaReport]:
        """The last report of every active replica."""
        active = self._totals.find_active_replicas()
        self._reports = {name: last for name, last in self._reports.items() if name in active}
        return list(self._reports.values())

    async def request_reload(self) -> int:
        self._reload_count += 1
        return self._reload_count

    async def start_draining(self) -> None:
        self._is_draining = True

    async def render_metrics(self) -> bytes:
        return self._totals.render()


class CoordinatorClient:
    """The coordinator as seen by a replica; every call raises a Problem while it is unavailable."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def take_tokens(
        self, name: str, per_second: float, needed: int, prefetch: float, held: float
    ) -> tuple[float, float]:
        taken: tuple[float, float] = await self._call(
            "take_tokens", name, per_second, needed, prefetch, held
        )
        return taken

    async def report(self, report: ReplicaReport) -> Commands:
        commands: Commands = await self._call("report", report)
        return commands

    async def get_commands(self) -> Commands:
        commands: Commands = await self._call("get_commands")
        return commands

    async def request_reload(self) -> int:
        count: int = await self._call("request_reload")
        return count

    async def render_metrics(self) -> bytes:
        text: bytes = await self._call("render_metrics")
        return text

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await getattr(self._handle, method).remote(*arguments)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the coordinator does not respond: %s", type(error).__name__)
            raise Problem(
                503,
                "starting",
                "a part of the service is restarting; retry later",
                retry_after=2,
            ) from error
