"""One interface through which others see a training: TensorBoard always, MLflow and W&B if asked.

Owns whom to tell and what becomes of it when they do not answer: before the training that is a
RequestError, within it a line on the terminal, and what was missed is told again later. How each of
them is told is in `events` and `trackers`. Runs in the
driver.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import field_validator

from imgcls.config import Section
from imgcls.data import filesystem
from imgcls.errors import Interrupted, one_line
from imgcls.training.loggers.remote import MLflowLogger, WandbLogger
from imgcls.training.loggers.tensorboard import TensorBoardLogger

RETRY_PAUSE_SECONDS = 60.0
"""For which a tracker is left alone that failed, lest every epoch wait for its time-out."""


class TrackConfig(Section):
    """Who is told of every epoch, besides TensorBoard."""

    mlflow: str | None = None
    """Tracking URI of MLflow, e.g. http://mlflow:5000 or sqlite:///mlflow.db."""
    wandb: str | None = None
    """Project of Weights & Biases, as PROJECT or ENTITY/PROJECT."""
    experiment: str = "imgcls"
    """The MLflow experiment that the run belongs to."""
    run: str | None = None
    """The run's name in MLflow and Weights & Biases; the output folder's if none."""

    @field_validator("mlflow")
    @classmethod
    def _check_mlflow(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password:
            raise ValueError(
                "holds a password, and settings are written into the bundle; give it as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri

    @field_validator("wandb")
    @classmethod
    def _check_wandb(cls, project: str | None) -> str | None:
        if project is not None and (project.count("/") > 1 or not all(project.split("/"))):
            raise ValueError(f"{project!r} is neither PROJECT nor ENTITY/PROJECT")
        return project


class MetricLogger(Protocol):
    """One who is told of a training; any method may raise whatever it likes.

    name:  what the terminal calls it
    state: what a resumed training needs to go on in the same run, ready for JSON
    """

    name: str
    state: dict[str, Any]

    def check(self) -> None:
        """Raises RequestError with the remedy when it cannot be told: no package, no server."""

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        """Begin a run, or go on with that of `state`; returns where it can be seen.

        settings: the configuration by dotted key
        first:    number of the first epoch to be told
        """

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Values by the names of the history's columns, none of them NaN."""

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """The training is done. files: name below the output folder -> URL"""

    def stop(self, *, interrupted: bool) -> None:
        """The training broke off: it was interrupted, or it failed."""


class MetricLoggers:
    """Tells all trackers, from one thread at a time, and lets none of them stop the training.

    state: of all trackers by name, to be kept with the checkpoints; it may change with every call
    """

    def __init__(self, trackers: Sequence[MetricLogger], output: str) -> None:
        self._queues = [_LoggerQueue(tracker) for tracker in trackers]
        self._output = output
        self._is_open = False
        self._lock = threading.Lock()

    @property
    def state(self) -> dict[str, Any]:
        return {each.logger.name: dict(each.logger.state) for each in self._queues}

    def start(self, settings: Mapping[str, Any], first: int = 1) -> None:
        """Begin, or go on after a stop; prints where the training can be seen.

        settings: the resolved configuration, nested or flat
        first:    number of the first epoch that will be told; points from there on that a killed
            driver had told before its last checkpoint are replaced
        """
        flat = flatten_settings(settings)

        def start(tracker: MetricLogger) -> None:
            print(f"{tracker.name}: {tracker.start(flat, first)}", flush=True)

        with self._lock:
            self._is_open = True
            self._send(start)

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Tell what an epoch came to, under the names of the history's columns; NaN is left out.

        Nothing happens once the training is over.
        """
        known = _drop_nan(values)
        with self._lock:
            if self._is_open:
                self._send(lambda tracker: tracker.log_epoch(number, known))

    def finish(self, summary: Mapping[str, float], files: Sequence[str] = ()) -> None:
        """Tell that the training is done.

        summary: e.g. best_epoch, best_val_accuracy; names that no epoch has
        files:   names below the output folder, e.g. "plots/curves.png"; kept by MLflow and W&B
        """
        urls = {name: filesystem.join(self._output, name) for name in files}
        known = _drop_nan(summary)
        with self._lock:
            self._is_open = False
            self._send(lambda tracker: tracker.finish(known, urls), last=True)

    def stop(self, *, interrupted: bool) -> None:
        """Tell that the training broke off; nothing happens before `start` or after `finish`."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._send(lambda tracker: tracker.stop(interrupted=interrupted), last=True)

    def _send(self, call: Callable[[MetricLogger], None], last: bool = False) -> None:
        for listener in self._queues:
            listener.send(call, last)


@contextlib.contextmanager
def open_loggers(
    config: TrackConfig, output: str, state: Mapping[str, Any] | None = None
) -> Iterator[MetricLoggers]:
    """All trackers of a configuration; an exception within tells them that the training broke off.

    output: the bundle folder, below which TensorBoard's files are written
    state:  `Tracking.state` as it was kept, to go on with the same runs
    """
    tracked = MetricLoggers(_build_loggers(config, output, state or {}), output)
    try:
        yield tracked
    except BaseException as error:
        tracked.stop(interrupted=isinstance(error, (Interrupted, KeyboardInterrupt)))
        raise
    tracked.stop(interrupted=False)


def check_loggers(config: TrackConfig, output: str) -> None:
    """Raises RequestError when a tracker's package is missing or its server does not answer."""
    for tracker in _build_loggers(config, output, {}):
        tracker.check()


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
    """A tracker and what it has yet to be told, of which the first call is the start."""

    def __init__(self, tracker: MetricLogger) -> None:
        self.logger = tracker
        self._pending: deque[Callable[[MetricLogger], None]] = deque()
        self._is_started = False
        self._is_failing = False
        self._retry_at = -math.inf

    def send(self, call: Callable[[MetricLogger], None], last: bool) -> None:
        """Make this call after those that failed before; the last one is not put off."""
        self._pending.append(call)
        if time.monotonic() < self._retry_at and not last:
            return
        try:
            while self._pending:
                self._pending[0](self.logger)
                self._pending.popleft()
                self._is_started = True
        except Exception as error:  # noqa: BLE001 - of a library, and the training matters more
            self._handle_failure(error, last)
        else:
            self._handle_recovery()

    def _handle_failure(self, error: Exception, last: bool) -> None:
        self._retry_at = time.monotonic() + RETRY_PAUSE_SECONDS
        if last:
            # state: a start that failed halfway has made a run, too
            if (self._is_started or self.logger.state) and len(self._pending) > 1:
                # whatever was lost, the run should not seem to go on
                with contextlib.suppress(Exception):
                    self._pending[-1](self.logger)
            self._report(
                f"{len(self._pending):,} of its messages were lost ({one_line(error, 200)})"
            )
        elif not self._is_failing:
            self._report(
                f"cannot be told ({one_line(error, 200)}); the training goes on, and it is "
                "tried again"
            )
        self._is_failing = True

    def _handle_recovery(self) -> None:
        if self._is_failing:
            self._is_failing = False
            self._report("answers again and was told what it missed")

    def _report(self, text: str) -> None:
        print(f"{self.logger.name}: {text}", flush=True)


def _drop_nan(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if not math.isnan(value)}


def _build_loggers(
    config: TrackConfig, output: str, state: Mapping[str, Any]
) -> list[MetricLogger]:
    run = config.run or output.rstrip("/").rpartition("/")[2]
    found: list[MetricLogger] = [TensorBoardLogger(output, state.get(TensorBoardLogger.name))]
    if config.mlflow is not None:
        found.append(
            MLflowLogger(config.mlflow, config.experiment, run, state.get(MLflowLogger.name))
        )
    if config.wandb is not None:
        found.append(WandbLogger(config.wandb, run, state.get(WandbLogger.name)))
    return found
