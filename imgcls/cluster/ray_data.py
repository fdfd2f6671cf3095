"""Ray Data executions of a job: settings of their own, and a way to stop them from another thread.

Ray Data keeps its current settings per process, and gives its executor to callbacks only. Here the
settings of one job apply neither to another job of the process nor to the program that calls it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import ray.data

from imgcls.cluster import ray_internals
from imgcls.cluster.session import is_private_session

ray_internals.keep_data_actors_local(is_private_session)

_lock = threading.Lock()


@contextlib.contextmanager
def own_data_settings() -> Iterator[ray.data.DataContext]:
    """The settings of the datasets that are made in the block; a dataset keeps them afterwards.

    They are a copy of the program's, without progress bars, and with the original errors of
    functions. Errors are raised and not logged. Threads wait for each other, so only make datasets
    in the block and run them after it.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with _lock:
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        with ray.data.DataContext.current(context):
            yield context


class _ExecutorRegistry(ray_internals.ExecutionCallback):
    """Gives an execution its executor before the first result; Ray Data itself gives it after.

    Ray Data constructs the callback from its class, so the two find each other by a name in the
    context of the datasets.
    """

    KEY: ClassVar[str] = "imgcls.execution"
    executors: ClassVar[dict[str, Any]] = {}

    def before_execution_starts(self, executor: Any) -> None:
        self.executors[ray_internals.get_execution_config(executor, self.KEY)] = executor


class DataExecution:
    """The executions of a job's datasets, one after another, which another thread may stop."""

    def __init__(self) -> None:
        self._name = secrets.token_hex(8)

    @contextlib.contextmanager
    def own_settings(self) -> Iterator[ray.data.DataContext]:
        """As `own_data_settings`; `stop` stops the datasets that are made in the block."""
        with own_data_settings() as context:
            context.set_config(_ExecutorRegistry.KEY, self._name)
            context.custom_execution_callback_classes.append(_ExecutorRegistry)
            yield context

    def stop(self) -> None:
        """Kill the actors and cancel the tasks of the execution that runs, so that it ends.

        Call it again until it has ended: it has no effect in the moment before Ray Data starts.
        """
        executor = _ExecutorRegistry.executors.get(self._name)
        if executor is not None:
            executor.shutdown(force=True)

    def close(self) -> None:
        """Forget the executor; to be called when the last execution has ended."""
        _ExecutorRegistry.executors.pop(self._name, None)
