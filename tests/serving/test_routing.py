"""Requests are not kept for replicas that do not come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest

from imgcls.serving import routing
from imgcls.serving.routing import ROUTER_CLASS, FailFastRouter

DEPLOYMENT = DeploymentID(name="endpoint", app_name="imgcls")


def router() -> Any:
    return FailFastRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)


def request() -> PendingRequest:
    metadata = RequestMetadata(request_id="1", internal_request_id="1")
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


def run(check: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REPLICA_TIMEOUT_S", 0.2)
    asyncio.run(check())


def test_it_is_the_router_of_the_deployment() -> None:
    config = RequestRouterConfig(request_router_class=ROUTER_CLASS)
    assert config.get_request_router_class().__name__ == "Router"


def test_a_request_that_finds_no_replica_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        routed = router()
        routed._has_served = True
        with pytest.raises(DeploymentUnavailableError):
            await routed._choose_replica_for_request(request())

    run(check, monkeypatch)


def test_a_request_that_waits_when_the_last_replica_dies_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        routed = router()
        routed._has_served, routed._replicas = True, {"r": SimpleNamespace()}
        waiting = request()
        routed._pending_requests_to_fulfill.append(waiting)
        routed.on_replica_actor_died("r")
        with pytest.raises(DeploymentUnavailableError):
            await waiting.future

    run(check, monkeypatch)


def test_a_refused_request_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        routed = router()
        choosing = asyncio.ensure_future(routed._choose_replica_for_request(request()))
        await asyncio.sleep(0)
        assert len(routed._pending_requests_by_id) == 1
        routed._has_served = True
        routed._reject_pending()
        with pytest.raises(DeploymentUnavailableError):
            await choosing
        assert not routed._pending_requests_by_id

    run(check, monkeypatch)


def test_before_the_first_replica_a_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        with pytest.raises(TimeoutError):  # ours: the router would wait on
            async with asyncio.timeout(0.5):
                await router()._choose_replica_for_request(request())

    run(check, monkeypatch)
