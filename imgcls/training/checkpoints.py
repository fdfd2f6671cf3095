"""Checkpoints of an unfinished run, in the folder `_train` of its output.

The folder holds the identity that a resumed run must match, the states (each written in the
background and completed by a marker file with its digest) and the best weights, with their
predictions of the validation images. A missing, truncated or damaged state is skipped in favor of
the one before it, and reading a state runs no code. Ray Train's own checkpoints are not used: it
rewrites its snapshot file in place, so that a kill can truncate it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import BundleError, OutputError, StorageMissing
from imgcls.runs.layout import CHECKPOINT_FOLDER, IDENTITY_FILE
from imgcls.training.epoch_metrics import EpochMetrics

KEPT_STATES = 2
"""Number of states that are kept, so that a damaged one has a predecessor."""
_MARKER = re.compile(r"state-(\d{6})\.json")

TrainState = dict[str, Any]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TrainProgress:
    """Progress of a run. The field names are keys in the marker files.

    epoch:   current epoch, counted from 1; 0 before the first
    step:    completed steps of the current epoch
    totals:  sums over these steps and all workers (`trainer.EpochTotals`)
    history: completed epochs
    best:    index in `history` of the epoch whose weights are kept; None before the first
    """

    epoch: int = 0
    step: int = 0
    totals: tuple[float, ...] = ()
    history: tuple[EpochMetrics, ...] = ()
    best: int | None = None

    @property
    def best_epoch(self) -> EpochMetrics | None:
        return None if self.best is None else self.history[self.best]


@dataclass(frozen=True)
class SavedState:
    """A state as its marker file describes it.

    number: position among the states of the run; a run resumes from the highest complete one
    best:   file name of the best weights
    """

    number: int
    sha256: str
    best: str | None
    progress: TrainProgress = field(default_factory=TrainProgress)


class Checkpoints:
    """The states of one run, for one writer at a time and any number of readers."""

    def __init__(self, output: str) -> None:
        self.folder = filesystem.join(output, CHECKPOINT_FOLDER)
        self._pool = create_thread_pool(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._number = max((each.number for each in self.list_states()), default=0)
        self._best: str | None = None

    # ------------------------------------------------------------------ the run's identity

    def read_identity(self) -> dict[str, Any] | None:
        """The identity of the run in this folder; None when there is no run."""
        url = filesystem.join(self.folder, IDENTITY_FILE)
        try:
            stored: dict[str, Any] = json.loads(filesystem.read(url))
            return stored
        except StorageMissing:
            return None
        except ValueError as error:
            raise OutputError(
                f"{url} is damaged ({error}). Pass --overwrite to start over."
            ) from error

    def start_run(self, identity: Mapping[str, Any]) -> None:
        """Empty the folder and store the identity of a new run."""
        filesystem.remove(self.folder)
        body = json.dumps(identity, indent=2, ensure_ascii=False) + "\n"
        filesystem.write(filesystem.join(self.folder, IDENTITY_FILE), body.encode())
        self._number, self._best = 0, None

    # ------------------------------------------------------------------ reading

    def list_states(self) -> list[SavedState]:
        """All states with a valid marker, newest first; their contents are not checked."""
        found = []
        for name in filesystem.list_names(self.folder):
            if _MARKER.fullmatch(name):
                try:
                    body = json.loads(filesystem.read(filesystem.join(self.folder, name)))
                    found.append(_parse_marker(body))
                except (ValueError, TypeError, KeyError, StorageMissing):
                    continue
        return sorted(found, key=lambda each: -each.number)

    def load_latest(self, at_most: int | None = None) -> tuple[SavedState, TrainState] | None:
        """The newest complete state and its tensors; None when there is none.

        at_most: highest number to consider
        """
        for saved in self.list_states():
            if at_most is not None and saved.number > at_most:
                continue
            try:
                data = filesystem.read(self._state_url(saved.number))
            except StorageMissing:
                continue
            if hashlib.sha256(data).hexdigest() != saved.sha256:
                continue
            if saved.best is not None and not filesystem.exists(self._url(saved.best)):
                continue
            self._best = saved.best
            state: TrainState = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return saved, state
        return None

    def load_best_weights(self, saved: SavedState) -> dict[str, torch.Tensor]:
        """The weights of the best epoch so far."""
        if saved.best is None:
            raise BundleError(f"{self.folder} holds no weights yet")
        return dict(load(filesystem.read(self._url(saved.best))))

    def load_best_predictions(self, saved: SavedState) -> bytes | None:
        """The predictions of the best epoch; None for a run that an earlier version started."""
        if saved.best is None:
            return None
        try:
            return filesystem.read(self._url(_name_predictions(saved.best)))
        except StorageMissing:
            return None

    # ------------------------------------------------------------------ writing

    def save(
        self,
        progress: TrainProgress,
        state: TrainState,
        best: Weights | None,
        predictions: bytes | None = None,
    ) -> None:
        """Write a state in the background; waits for the previous state first.

        best: new best weights, if any; the caller must not change the tensors afterwards
        predictions: of the validation images, with these weights
        Raises the error of the previous write, if it failed.
        """
        self.wait_until_saved()
        self._number += 1
        if best is not None:
            self._best = f"best-{self._number:06d}.safetensors"
        self._pending = self._pool.submit(
            self._write, self._number, self._best, progress, state, best, predictions
        )

    def discard_after(self, number: int) -> None:
        """Remove the states after the one that a run resumes from; they are damaged."""
        for name in filesystem.list_names(self.folder):
            if _parse_number(name) > number:
                filesystem.remove(self._url(name))

    def wait_until_saved(self) -> None:
        """Wait until the last state is written; raises its StorageError if that failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(
        self,
        number: int,
        best_name: str | None,
        progress: TrainProgress,
        state: TrainState,
        best: Weights | None,
        predictions: bytes | None,
    ) -> None:
        if best is not None and best_name is not None:
            if predictions is not None:
                filesystem.write(self._url(_name_predictions(best_name)), predictions)
            filesystem.write(self._url(best_name), save(dict(best)))
        sink = io.BytesIO()
        torch.save(state, sink)
        data = sink.getvalue()
        filesystem.write(self._state_url(number), data)
        saved = SavedState(number, hashlib.sha256(data).hexdigest(), best_name, progress)
        marker = json.dumps(_build_marker(saved)) + "\n"
        filesystem.write(self._url(f"state-{number:06d}.json"), marker.encode())
        self._prune()

    def _prune(self) -> None:
        kept = self.list_states()[:KEPT_STATES]
        if len(kept) < KEPT_STATES:
            return
        names = {
            self._state_name(each.number, suffix) for each in kept for suffix in ("json", "pt")
        }
        best = [each.best for each in kept if each.best is not None]
        names |= {*best, *map(_name_predictions, best)}
        newest = kept[0].number
        for name in filesystem.list_names(self.folder):
            # files with a higher number belong to a state whose marker is not written yet; files
            # without a number are not of a state
            if name not in names and 0 < _parse_number(name) <= newest:
                filesystem.remove(self._url(name))
        filesystem.remove_temporary_files(self.folder, older_than=60)

    def _state_url(self, number: int) -> str:
        return self._url(self._state_name(number, "pt"))

    @staticmethod
    def _state_name(number: int, suffix: str) -> str:
        return f"state-{number:06d}.{suffix}"

    def _url(self, name: str) -> str:
        return filesystem.join(self.folder, name)


def _build_marker(saved: SavedState) -> dict[str, Any]:
    """The contents of a marker file, in which the progress has the key `standing`."""
    body = asdict(saved)
    body["standing"] = body.pop("progress")
    return body


def _parse_marker(body: Any) -> SavedState:
    standing = dict(body["standing"])
    history = tuple(EpochMetrics(**epoch) for epoch in standing.pop("history"))
    totals = tuple(standing.pop("totals"))
    progress = TrainProgress(**standing, totals=totals, history=history)
    return SavedState(body["number"], body["sha256"], body["best"], progress)


def _name_predictions(best: str) -> str:
    """The file of the predictions with the best weights in a file."""
    return f"{best.partition('.')[0]}.parquet"


def _parse_number(name: str) -> int:
    digits = re.search(r"-(\d{6})\.", name)
    return int(digits[1]) if digits else 0
