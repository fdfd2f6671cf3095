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

from imgcls.serving.metrics import Sample, Totals
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import Purse

HUB = "hub"
ANSWER_SECONDS = 5.0
"""The hub answers within milliseconds, or is not there."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Report:
    """What a replica says of itself every second.

    sha256: of the bundle that it answers with
    asked:  names the settings that it has tried last
    error:  why it could not take them up
    """

    replica: str
    samples: list[Sample]
    sha256: str
    asked: str
    error: str | None


@dataclass(frozen=True)
class Orders:
    """What a replica is told in return."""

    reload: int
    draining: bool


@serve.deployment(
    name=HUB,
    num_replicas=1,
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=2,
)
class Hub:
    """The process; everything in it is of all replicas together."""

    def __init__(self) -> None:
        self._purse = Purse()
        self._totals = Totals()
        self._reports: dict[str, Report] = {}
        self._reload = 0
        self._draining = False

    async def take(
        self, name: str, per_second: float, need: int, ahead: float
    ) -> tuple[float, float]:
        return self._purse.take(name, per_second, need, ahead)

    async def report(self, report: Report) -> Orders:
        self._totals.report(report.replica, report.samples)
        self._reports[report.replica] = report
        return await self.orders()

    async def orders(self) -> Orders:
        return Orders(self._reload, self._draining)

    async def reports(self) -> list[Report]:
        """The last one of every replica that is there."""
        there = self._totals.names()
        self._reports = {name: said for name, said in self._reports.items() if name in there}
        return list(self._reports.values())

    async def reload(self) -> int:
        self._reload += 1
        return self._reload

    async def drain(self) -> None:
        self._draining = True

    async def metrics(self) -> bytes:
        return self._totals.text()


class Line:
    """The hub as a replica sees it; every call raises a Problem while it is not there."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def take(
        self, name: str, per_second: float, need: int, ahead: float
    ) -> tuple[float, float]:
        taken: tuple[float, float] = await self._ask("take", name, per_second, need, ahead)
        return taken

    async def report(self, report: Report) -> Orders:
        orders: Orders = await self._ask("report", report)
        return orders

    async def orders(self) -> Orders:
        orders: Orders = await self._ask("orders")
        return orders

    async def reload(self) -> int:
        count: int = await self._ask("reload")
        return count

    async def metrics(self) -> bytes:
        text: bytes = await self._ask("metrics")
        return text

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await getattr(self._handle, method).remote(*arguments)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the hub does not answer: %s", type(error).__name__)
            raise Problem(
                503,
                "starting",
                "a part of the service is being started anew; try again later",
                retry_after=2,
            ) from error
