"""Whether the cluster can hold the training that was asked for: arithmetic, before anything waits.

Ray would wait without end, and without a word, for a CPU that no machine has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import PositiveFloat, PositiveInt

from imgcls.cluster import Node
from imgcls.config import Section
from imgcls.errors import ResourcesError

STORE_SHARE = 0.8
"""Share of an object store that decoded images may fill; beyond it Ray would spill them to disk."""


class ScaleConfig(Section):
    """How many workers, and on what."""

    num_workers: PositiveInt = 1
    """Training workers; each batch is shared out among them."""
    use_gpu: bool | None = None
    """One GPU per worker; if none, whenever there are enough for all."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that each worker reserves; may be a fraction."""


@dataclass(frozen=True)
class Workers:
    """A group of workers that fits the cluster."""

    count: int
    cpus: float
    gpus: int

    def __str__(self) -> str:
        per = f"{self.cpus:g} CPU" + (f" + {self.gpus} GPU" if self.gpus else "")
        return f"{self.count} x ({per})"


def plan_workers(nodes: Sequence[Node], config: ScaleConfig) -> Workers:
    """The workers that were asked for.

    Raises ResourcesError, with the arithmetic, when they do not fit the machines.
    """
    use_gpu = config.use_gpu
    if use_gpu is None:
        use_gpu = _places(nodes, config.cpus_per_worker, 1) >= config.num_workers
    gpus = 1 if use_gpu else 0
    places = _places(nodes, config.cpus_per_worker, gpus)
    workers = Workers(config.num_workers, config.cpus_per_worker, gpus)
    if places < config.num_workers:
        machines = ", ".join(f"{node.cpus:g} CPU + {node.gpus:g} GPU" for node in nodes) or "none"
        raise ResourcesError(
            f"scale.num_workers {config.num_workers}: {workers} do not fit the machines of the "
            f"cluster ({machines}), which hold {places}; give fewer workers, a smaller "
            "scale.cpus_per_worker, or add machines"
        )
    return workers


def check_store(needed: int, capacity: int) -> None:
    """Refuse images that would not fit in memory.

    needed:   bytes of all decoded images
    capacity: bytes of the smallest object store among the machines
    """
    if needed > STORE_SHARE * capacity:
        raise ResourcesError(
            f"the decoded images take {needed / 1e9:.1f} GB, and the smallest object store of the "
            f"cluster has {capacity / 1e9:.1f} GB of which {STORE_SHARE:.0%} may be filled; start "
            "Ray with a larger --object-store-memory, give fewer images or a smaller "
            "model.image_size"
        )


def _places(nodes: Sequence[Node], cpus: float, gpus: int) -> int:
    """Workers that the machines hold, each worker whole on one of them."""
    return sum(
        # the tolerance keeps ten times 0.1 CPU on one CPU
        min(math.floor(node.cpus / cpus + 1e-6), math.floor(node.gpus / gpus) if gpus else 2**31)
        for node in nodes
    )
