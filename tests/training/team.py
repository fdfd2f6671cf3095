"""Worker processes for tests: a new process group of any size for each call."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120


class Team:
    """Processes that wait for calls."""

    def __init__(self, folder: Path, lines: list[Connection]) -> None:
        self._folder, self._lines, self._calls = folder, lines, 0

    @classmethod
    @contextlib.contextmanager
    def start(cls, size: int, folder: Path) -> Iterator[Team]:
        context = multiprocessing.get_context("forkserver")
        # forks of one process, which imports torch's compiler and what calls this once
        users = [
            name
            for name, module in sys.modules.items()
            if "Team" in getattr(module, "__dict__", {})
        ]
        context.set_forkserver_preload(["torch._dynamo", *users])
        pairs = [context.Pipe() for _ in range(size)]
        processes = [
            context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs
        ]
        for process in processes:
            process.start()
        try:
            yield cls(folder, [ours for ours, _ in pairs])
        finally:
            for process in processes:
                process.kill()
                process.join()

    def call(
        self, workers: int, function: Callable[..., Any], *args: Any, backend: str = "gloo"
    ) -> list[Any]:
        """What a module's `function(rank, workers, *args)` returns in each worker."""
        self._calls += 1
        store = str(self._folder / f"store-{self._calls}")
        for rank, line in enumerate(self._lines[:workers]):
            line.send_bytes(pickle.dumps((function, rank, workers, store, args, backend)))
        results = []
        for rank, line in enumerate(self._lines[:workers]):
            assert line.poll(SECONDS), f"worker {rank} did not answer"
            failure, result = pickle.loads(line.recv_bytes())
            assert failure is None, f"worker {rank} of {workers}: {failure}"
            results.append(result)
        return results


def _serve(line: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, rank, workers, store, args, backend = pickle.loads(line.recv_bytes())
        try:
            shared = dist.FileStore(store, workers)
            dist.init_process_group(backend, store=shared, rank=rank, world_size=workers)
            answer = (None, function(rank, workers, *args))
        except Exception:  # noqa: BLE001  the test gets the traceback
            answer = (traceback.format_exc(), None)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        line.send_bytes(pickle.dumps(answer))
