"""What an epoch came to, and its line on the terminal while the workers still run.

Owns the record of one epoch and the way it takes from the first worker to the driver. The lines are
for the eye alone: losing one changes nothing, the history itself comes back with the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SelectionMetric = Literal["val_loss", "val_accuracy"]


@dataclass(frozen=True)
class EpochMetrics:
    """One pass over the training rows, judged on all validation rows.

    losses in nats per image (train_loss as it is minimised, with weights still moving), accuracies
    in [0, 1]; lr is the highest of the last step; images_per_second counts training images over
    training time of all workers together; seconds is the whole epoch, validation included.
    epoch 0 is the linear probe, whose lr does not apply (NaN)

    val_balanced_accuracy: mean recall over the classes that validation has
    wait_seconds, compute_seconds: training time spent waiting for images, and on the rest, per
        worker
    train_failed, val_failed: images left out because they could not be decoded
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float
    images_per_second: float
    seconds: float
    train_rows: int
    val_rows: int
    val_balanced_accuracy: float = math.nan
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    train_failed: int = 0
    val_failed: int = 0
    phase: Literal["probe", "train"] = "train"

    def format_line(self, epochs: int) -> str:
        width = len(str(epochs))
        judged = (
            f"  train loss {self.train_loss:.3f} acc {100 * self.train_accuracy:5.1f} %"
            f"  val loss {self.val_loss:.3f} acc {100 * self.val_accuracy:5.1f} %"
        )
        if self.phase == "probe":
            return f"probe {'':{2 * width + 1}}{judged}  {self.seconds:.1f} s"
        busy = self.wait_seconds + self.compute_seconds
        waiting = self.wait_seconds / busy if busy else 0.0
        return (
            f"epoch {self.epoch:{width}}/{epochs}{judged}  lr {self.lr:.1e}"
            f"  {self.images_per_second:,.0f} images/s (waiting {waiting:.0%})"
            f"  {self.seconds:.1f} s"
        )

    @property
    def name(self) -> str:
        return "the probe" if self.phase == "probe" else f"epoch {self.epoch}"

    def is_better_than(self, other: EpochMetrics | None, by: SelectionMetric) -> bool:
        """Lower validation loss, or higher validation accuracy and among equals lower loss."""
        if other is None:
            return True
        if by == "val_loss":
            return self.val_loss < other.val_loss
        return (self.val_accuracy, -self.val_loss) > (other.val_accuracy, -other.val_loss)


def format_probe_note(
    history: Sequence[EpochMetrics], best: EpochMetrics, *, lr: float
) -> str | None:
    """The note about a fine-tuning that ended no better than its linear probe; None otherwise.

    best: the epoch whose weights are kept
    lr:   optim.lr
    """
    probe, last = history[0], history[-1]
    if probe.phase != "probe" or len(history) == 1:
        return None
    remedy = (
        "Fine-tuning on few images overfits, or moves the weights too far: lower optim.lr "
        f"({lr:g}), freeze lower layers (finetune.unfreeze_every), add images, or keep the probe "
        "alone (--strategy probe)"
    )
    if best.phase == "probe":
        return (
            f"no epoch was better than the probe; the bundle holds the probe (val acc "
            f"{probe.val_accuracy:.1%}, loss {probe.val_loss:.3f}; after the last epoch "
            f"{last.val_accuracy:.1%}, loss {last.val_loss:.3f}). {remedy}"
        )
    if best.val_accuracy < probe.val_accuracy:
        return (
            f"{best.name} has a better loss than the probe ({best.val_loss:.3f}, the probe "
            f"{probe.val_loss:.3f}), but a lower val acc ({best.val_accuracy:.1%}, the probe "
            f"{probe.val_accuracy:.1%}); pass --best-by val_accuracy to keep the more accurate "
            f"one. {remedy}"
        )
    return None


class DriverChannel:
    """A Ray actor between workers and driver.

    From the workers: lines, epochs, their handles, and a failure that no restart would mend. From
    the driver: the wish to stop.
    """

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._posts: list[str | EpochMetrics] = []
        self._failure: str | None = None
        self._closed = False
        self._stop = asyncio.Event()
        self._changed = asyncio.Condition()

    async def enlist(self, worker: Any) -> None:
        self._workers.append(worker)

    async def workers(self) -> list[Any]:
        return self._workers

    async def fail(self, reason: str) -> None:
        self._failure = self._failure or reason

    async def failure(self) -> str | None:
        return self._failure

    async def stop(self) -> None:
        self._stop.set()

    async def stopping(self) -> None:
        """Returns once the driver wants the workers to save and end."""
        await self._stop.wait()

    async def post(self, item: str | EpochMetrics) -> None:
        async with self._changed:
            self._posts.append(item)
            self._changed.notify_all()

    async def close(self) -> None:
        self._stop.set()
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def after(self, seen: int) -> tuple[list[str | EpochMetrics], bool]:
        """Posts beyond the first `seen`, once there are any or the board is closed; and whether."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._posts) > seen)
            return self._posts[seen:], self._closed


@contextlib.contextmanager
def open_driver_channel(epochs: int, on_epoch: Callable[[EpochMetrics], None]) -> Iterator[Any]:
    """A board whose lines and epochs are printed here as they are posted; epochs are passed on.

    epochs: how many there will be at most
    """
    here = ray.get_runtime_context().get_node_id()
    # Ray's types do not know the methods of an async actor
    board: Any = (
        ray.remote(num_cpus=0)(DriverChannel)
        # no machine but the driver's own can take it away
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        .remote()
    )

    def follow() -> None:
        seen, closed = 0, False
        with contextlib.suppress(ray.exceptions.RayError):
            while not closed:
                posts, closed = ray.get(board.after.remote(seen))
                seen += len(posts)
                for post in posts:
                    print(
                        post.format_line(epochs) if isinstance(post, EpochMetrics) else post,
                        flush=True,
                    )
                    if isinstance(post, EpochMetrics):
                        on_epoch(post)

    follower = threading.Thread(target=follow, name="epoch lines", daemon=True)
    follower.start()
    try:
        yield board
    finally:
        board.close.remote()
        follower.join(timeout=5)
        ray.kill(board)
