"""Requests do not wait for replicas that do not start."""

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

from imgcls.serving.routing import ROUTER_CLASS, FailFastRouter

DEPLOYMENT = DeploymentID(name="endpoint", app_name="imgcls")


def build_router() -> Any:
    return FailFastRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)


def request() -> PendingRequest:
    metadata = RequestMetadata(request_id="1", internal_request_id="1")
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


def run(check: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # not by the module: Ray pickles the class by value, and gives its methods other globals
    names = FailFastRouter._wait_for_replica.__globals__
    monkeypatch.setitem(names, "REPLICA_TIMEOUT_S", 0.2)
    asyncio.run(check())


def test_ray_serve_imports_the_router_by_its_path() -> None:
    config = RequestRouterConfig(request_router_class=ROUTER_CLASS)
    assert config.get_request_router_class().__name__ == "FailFastRouter"


def test_a_request_without_a_replica_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        router = build_router()
        router._has_served = True
        with pytest.raises(DeploymentUnavailableError):
            await router._choose_replica_for_request(request())

    run(check, monkeypatch)


def test_a_waiting_request_is_rejected_when_the_last_replica_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        router = build_router()
        router._has_served, router._replicas = True, {"r": SimpleNamespace()}
        waiting = request()
        router._pending_requests_to_fulfill.append(waiting)
        router.on_replica_actor_died("r")
        with pytest.raises(DeploymentUnavailableError):
            await waiting.future

    run(check, monkeypatch)


def test_a_rejected_request_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        router = build_router()
        choosing = asyncio.ensure_future(router._choose_replica_for_request(request()))
        await asyncio.sleep(0)
        assert len(router._pending_requests_by_id) == 1
        router._has_served = True
        router._reject_pending()
        with pytest.raises(DeploymentUnavailableError):
            await choosing
        assert not router._pending_requests_by_id

    run(check, monkeypatch)


def test_before_the_first_replica_a_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        with pytest.raises(TimeoutError):  # of this test: the router would wait longer
            async with asyncio.timeout(0.3):
                await build_router()._choose_replica_for_request(request())

    run(check, monkeypatch)
