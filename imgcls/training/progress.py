"""What an epoch came to, and its line on the terminal while the workers still run.

Owns the record of one epoch and the way it takes from the first worker to the driver. The lines are
for the eye alone: losing one changes nothing, the history itself comes back with the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows, judged on all validation rows.

    losses in nats per image (train_loss with label smoothing and weights still moving), accuracies
    in [0, 1]; lr is that of the last step; images_per_second counts training images over training
    time of all workers together; seconds is the whole epoch, validation included
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

    def line(self, epochs: int) -> str:
        width = len(str(epochs))
        return (
            f"epoch {self.epoch:{width}}/{epochs}"
            f"  train loss {self.train_loss:.3f} acc {100 * self.train_accuracy:5.1f} %"
            f"  val loss {self.val_loss:.3f} acc {100 * self.val_accuracy:5.1f} %"
            f"  {self.images_per_second:,.0f} images/s  {self.seconds:.1f} s"
        )

    def better_than(self, other: Epoch | None) -> bool:
        """Higher validation accuracy; among equals, lower validation loss."""
        if other is None:
            return True
        return (self.val_accuracy, -self.val_loss) > (other.val_accuracy, -other.val_loss)


class Board:
    """A Ray actor between workers and driver: lines of the first, handles of all of them."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._lines: list[str] = []
        self._closed = False
        self._changed = asyncio.Condition()

    async def enlist(self, worker: Any) -> None:
        self._workers.append(worker)

    async def workers(self) -> list[Any]:
        return self._workers

    async def post(self, line: str) -> None:
        async with self._changed:
            self._lines.append(line)
            self._changed.notify_all()

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def after(self, seen: int) -> tuple[list[str], bool]:
        """Lines beyond the first `seen`, once there are any or the board is closed; and whether."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._lines) > seen)
            return self._lines[seen:], self._closed


@contextlib.contextmanager
def printed_board() -> Iterator[Any]:
    """A board whose lines are printed here as they are posted."""
    # Ray's types do not know the methods of an async actor
    board: Any = ray.remote(num_cpus=0)(Board).remote()

    def follow() -> None:
        seen, closed = 0, False
        with contextlib.suppress(ray.exceptions.RayError):
            while not closed:
                lines, closed = ray.get(board.after.remote(seen))
                seen += len(lines)
                for line in lines:
                    print(line, flush=True)

    follower = threading.Thread(target=follow, name="epoch lines", daemon=True)
    follower.start()
    try:
        yield board
    finally:
        board.close.remote()
        follower.join(timeout=5)
        ray.kill(board)
