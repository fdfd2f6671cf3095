"""Request router that answers 503 when no replica is left.

Ray Serve's own router keeps a request until a replica starts, up to the request timeout: health
probes and clients would wait for a service that cannot start.

Subclasses a private class of Ray 2.60: `RequestRouterConfig` takes custom routers, but the public
base class has no default to extend. Check `_choose_replica_for_request`,
`_pending_requests_to_fulfill` and `_remove_pending_request_from_indices` when Ray is upgraded.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from imgcls.cluster import ray_internals

REPLICA_TIMEOUT_S = 5.0
"""Maximum wait of a request for a replica, before it is answered with 503."""


class FailFastRouter(ray_internals.PowerOfTwoChoicesRequestRouter):
    """Ray Serve's default router with a short wait when there is no replica.

    Requests wait without that limit until the first replica is known: a proxy learns of the
    application before it learns of its replicas.
    """

    _has_served = False

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._has_served |= bool(replicas)
        self._reject_pending()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._reject_pending()

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, **options: Any
    ) -> RunningReplica:
        if self._has_served:
            await self._wait_for_replica()
        try:
            return await super()._choose_replica_for_request(pending_request, **options)
        except DeploymentUnavailableError:
            # Ray Serve removes canceled requests only; this one would stay in memory with its body
            ray_internals.forget_pending_request(self, pending_request)
            raise

    async def _wait_for_replica(self) -> None:
        try:
            async with asyncio.timeout(REPLICA_TIMEOUT_S):
                while not ray_internals.list_router_replicas(self):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise self._build_error() from None

    def _reject_pending(self) -> None:
        if not self._has_served or ray_internals.list_router_replicas(self):
            return
        for pending in ray_internals.iter_pending_requests(self):
            if not pending.future.done():
                pending.future.set_exception(self._build_error())

    def _build_error(self) -> DeploymentUnavailableError:
        return DeploymentUnavailableError(ray_internals.get_router_deployment(self))


ROUTER_CLASS = f"{__name__}:{FailFastRouter.__name__}"
