"""Metric loggers of a training: TensorBoard always, MLflow and Weights & Biases if configured.

Before the training, a logger that cannot be reached is a RequestError. During the training its
failures are reported, never raised, and the calls that failed are repeated later. Runs in the
driver.

To add a logger, write a `MetricLogger` in a module of its own, and add it to `LOGGERS`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.errors import Interrupted, one_line
from imgcls.training.config import TrackConfig
from imgcls.training.loggers.mlflow import MLflowLogger
from imgcls.training.loggers.tensorboard import TensorBoardLogger
from imgcls.training.loggers.wandb import WandbLogger

RETRY_PAUSE_S = 60.0
"""Pause after a failure of a logger, so that not every epoch waits for its timeout."""


class MetricLogger(Protocol):
    """One place that the metrics of a training are logged to; any method may raise any exception.

    name:  its name in messages, and the key of its state
    state: what a resumed training needs to continue the same run, as JSON values
    """

    name: str
    state: dict[str, Any]

    @classmethod
    def from_config(
        cls, config: TrackConfig, output: str, state: Mapping[str, Any] | None
    ) -> Self | None:
        """The logger of a configuration; None if it is not configured.

        output: the bundle folder
        state:  `state` of the run to continue
        """

    def check(self) -> None:
        """Raise RequestError if it cannot be used: package missing, server not reachable."""

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        """Begin a run, or continue the one in `state`; return where it can be seen.

        settings: the configuration by dotted key
        first:    number of the first epoch to log
        """

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Log the metrics of an epoch, named as the columns of history.parquet; no NaN."""

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """End the run of a finished training. files: name below the output folder -> URL"""

    def stop(self, *, interrupted: bool) -> None:
        """End the run of a training that was interrupted, or failed."""


LOGGERS: tuple[type[MetricLogger], ...] = (
    TensorBoardLogger,
    MLflowLogger,
    WandbLogger,
)


class MetricLoggers:
    """All loggers of a training, called from one thread at a time; none can stop the training.

    state: of every logger by name, to store with the checkpoints; any call may change it
    """

    def __init__(self, loggers: Sequence[MetricLogger], output: str) -> None:
        self._queues = [_LoggerQueue(logger) for logger in loggers]
        self._output = output
        self._is_open = False
        self._last = -1
        self._lock = threading.Lock()

    @property
    def state(self) -> dict[str, Any]:
        return {queue.logger.name: dict(queue.logger.state) for queue in self._queues}

    def start(self, settings: Mapping[str, Any], first: int = 0) -> None:
        """Begin the runs, or continue them; print where the training can be seen.

        settings: the resolved configuration, nested or flat
        first:    number of the first epoch to log; replaces the points from there on that a killed
            driver logged after its last checkpoint
        """
        flat = flatten_settings(settings)

        def start(logger: MetricLogger) -> None:
            log.show(f"{logger.name}: {logger.start(flat, first)}")

        with self._lock:
            self._is_open = True
            self._last = first - 1
            self._send(start)

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Log the metrics of an epoch, named as the columns of history.parquet, without NaN.

        Does nothing after `finish` or `stop`, and for an epoch that is not after the last one.
        """
        known = _drop_nan(values)
        with self._lock:
            if self._is_open and number > self._last:
                self._last = number
                self._send(lambda logger: logger.log_epoch(number, known))

    def finish(self, summary: Mapping[str, float], files: Sequence[str] = ()) -> None:
        """End the runs of a finished training.

        summary: e.g. best_epoch, best_val_accuracy; names that no epoch uses
        files:   names below the output folder, e.g. "plots/curves.png"; stored by MLflow and W&B
        """
        urls = {name: filesystem.join(self._output, name) for name in files}
        known = _drop_nan(summary)
        with self._lock:
            self._is_open = False
            self._send(lambda logger: logger.finish(known, urls), last=True)

    def stop(self, *, interrupted: bool) -> None:
        """End the runs of a training that did not finish; does nothing before `start` or after
        `finish`."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._send(lambda logger: logger.stop(interrupted=interrupted), last=True)

    def _send(self, call: Callable[[MetricLogger], None], last: bool = False) -> None:
        for queue in self._queues:
            queue.send(call, last)


@contextlib.contextmanager
def open_loggers(
    config: TrackConfig, output: str, state: Mapping[str, Any] | None = None
) -> Iterator[MetricLoggers]:
    """All configured loggers; an exception in the block ends their runs as failed or interrupted.

    output: the bundle folder, below which TensorBoard's files are written
    state:  `MetricLoggers.state` of the runs to continue
    """
    opened = MetricLoggers(_build_loggers(config, output, state or {}), output)
    try:
        yield opened
    except BaseException as error:
        opened.stop(interrupted=isinstance(error, (Interrupted, KeyboardInterrupt)))
        raise
    opened.stop(interrupted=False)


def check_loggers(config: TrackConfig, output: str) -> None:
    """Raise RequestError if the package of a logger is missing or its server does not answer."""
    for logger in _build_loggers(config, output, {}):
        logger.check()


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys; empty sections stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class _LoggerQueue:
    """A logger and the calls that are still to be made, the first of which is `start`."""

    def __init__(self, logger: MetricLogger) -> None:
        self.logger = logger
        self._pending: deque[Callable[[MetricLogger], None]] = deque()
        self._is_started = False
        self._is_failing = False
        self._retry_at = -math.inf

    def send(self, call: Callable[[MetricLogger], None], last: bool) -> None:
        """Make this call after those that failed before; the last call is never postponed."""
        self._pending.append(call)
        if time.monotonic() < self._retry_at and not last:
            return
        try:
            while self._pending:
                self._pending[0](self.logger)
                self._pending.popleft()
                self._is_started = True
        except Exception as error:  # noqa: BLE001 - a library's error must not stop the training
            self._handle_failure(error, last)
        else:
            self._handle_recovery()

    def _handle_failure(self, error: Exception, last: bool) -> None:
        self._retry_at = time.monotonic() + RETRY_PAUSE_S
        if last:
            # state: a start that failed halfway may have created a run
            if (self._is_started or self.logger.state) and len(self._pending) > 1:
                # whatever was lost, the run must not appear to be running
                with contextlib.suppress(Exception):
                    self._pending[-1](self.logger)
            self._report(f"lost {len(self._pending):,} of its updates ({one_line(error, 200)})")
        elif not self._is_failing:
            self._report(
                f"logging failed ({one_line(error, 200)}); the training continues, and the next "
                f"epoch after {RETRY_PAUSE_S:.0f} s retries it"
            )
        self._is_failing = True

    def _handle_recovery(self) -> None:
        if self._is_failing:
            self._is_failing = False
            self._report("reachable again; the missing updates were logged")

    def _report(self, text: str) -> None:
        log.emit("note", f"{self.logger.name}: {text}")


def _drop_nan(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if not math.isnan(value)}


def _build_loggers(
    config: TrackConfig, output: str, state: Mapping[str, Any]
) -> list[MetricLogger]:
    """The configured loggers, each with its own part of `state`."""
    built = (each.from_config(config, output, state.get(each.name)) for each in LOGGERS)
    return [logger for logger in built if logger is not None]
