"""What the replicas of a service have in common: rates, counts and orders, in one process of Ray's.

Lost, it is started anew, and forgets. A request that needs it meanwhile is told to come again.
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

COORDINATOR = "hub"
CALL_TIMEOUT_S = 5.0
"""The hub answers within milliseconds, or is not there."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says of itself every second.

    sha256: of the bundle that it answers with
    asked:  names the settings that it has tried last
    error:  why it could not take them up
    """

    replica: str
    samples: list[MetricSample]
    sha256: str
    settings_id: str
    error: str | None


@dataclass(frozen=True)
class Commands:
    """What a replica is told in return."""

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
    """The process; everything in it is of all replicas together."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets()
        self._totals = MetricTotals()
        self._reports: dict[str, ReplicaReport] = {}
        self._reload_count = 0
        self._is_draining = False

    async def take_tokens(
        self, name: str, per_second: float, need: int, ahead: float
    ) -> tuple[float, float]:
        return self._buckets.take(name, per_second, need, ahead)

    async def report(self, report: ReplicaReport) -> Commands:
        self._totals.report(report.replica, report.samples)
        self._reports[report.replica] = report
        return await self.get_commands()

    async def get_commands(self) -> Commands:
        return Commands(self._reload_count, self._is_draining)

    async def list_reports(self) -> list[ReplicaReport]:
        """The last one of every replica that is there."""
        there = self._totals.find_active_replicas()
        self._reports = {name: said for name, said in self._reports.items() if name in there}
        return list(self._reports.values())

    async def request_reload(self) -> int:
        self._reload_count += 1
        return self._reload_count

    async def start_draining(self) -> None:
        self._is_draining = True

    async def render_metrics(self) -> bytes:
        return self._totals.render()


class CoordinatorClient:
    """The hub as a replica sees it; every call raises a Problem while it is not there."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def take_tokens(
        self, name: str, per_second: float, need: int, ahead: float
    ) -> tuple[float, float]:
        taken: tuple[float, float] = await self._call("take", name, per_second, need, ahead)
        return taken

    async def report(self, report: ReplicaReport) -> Commands:
        orders: Commands = await self._call("report", report)
        return orders

    async def get_commands(self) -> Commands:
        orders: Commands = await self._call("orders")
        return orders

    async def request_reload(self) -> int:
        count: int = await self._call("reload")
        return count

    async def render_metrics(self) -> bytes:
        text: bytes = await self._call("metrics")
        return text

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await getattr(self._handle, method).remote(*arguments)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the hub does not answer: %s", type(error).__name__)
            raise Problem(
                503,
                "starting",
                "a part of the service is being started anew; try again later",
                retry_after=2,
            ) from error
