"""Metric logger for TensorBoard: event files below the output folder.

A value is in the file when the call returns. A training that was killed and resumed shows one
point per epoch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from imgcls.data.storage import filesystem

if TYPE_CHECKING:
    from imgcls.training.config import TrackConfig

EVENTS_FOLDER = "tensorboard"


class TensorBoardLogger:
    """Event files in `<output>/tensorboard`: written in place, or locally and then uploaded.

    When epochs are logged again after a crash, TensorBoard drops the earlier points itself, because
    a resumed run begins with a START event.
    """

    name = "tensorboard"

    def __init__(self, output: str, state: Mapping[str, Any] | None) -> None:
        self.state: dict[str, Any] = dict(state or {})
        self._folder = filesystem.join(output, EVENTS_FOLDER)
        self._events: Any = None
        self._local: str = ""
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._last_epoch = -1

    @classmethod
    def from_config(
        cls, config: TrackConfig, output: str, state: Mapping[str, Any] | None
    ) -> TensorBoardLogger:
        return cls(output, state)

    def check(self) -> None:
        """Nothing to check: the output folder is known to be writable."""

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import text

        if not self.state:
            # files of a training that this one replaces
            for name in filesystem.list_names(self._folder):
                if ".tfevents." in name:
                    filesystem.remove(filesystem.join(self._folder, name))
        self._local = self._folder
        if not filesystem.is_local(self._folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="imgcls-tensorboard-")
            self._local = self._temporary.name
        os.makedirs(self._local, exist_ok=True)
        # files are read in the order of their names, in which the time is in whole seconds
        suffix = f".{time.time_ns()}"
        # not SummaryWriter: its thread writes later, and hides write errors
        self._events = EventsWriter(os.path.join(self._local, "events"), suffix)
        if self.state:
            self._write_event(first, session_log=SessionLog(status=SessionLog.START))
        else:
            shown = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
            indented = "".join(f"    {line}\n" for line in shown.splitlines())
            self._write_event(0, summary=text("settings", indented))
        self._upload()
        self.state = {"folder": self._folder}
        return f"tensorboard --logdir {self._folder}"

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        if number > self._last_epoch:  # otherwise it was written, and only the upload failed
            points = [Summary.Value(tag=build_tag(n), simple_value=v) for n, v in values.items()]
            self._write_event(number, summary=Summary(value=points))
            self._last_epoch = number
        self._upload()

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        self._close()

    def stop(self, *, interrupted: bool) -> None:
        self._close()

    def _write_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def _upload(self) -> None:
        self._events.flush()
        if self._temporary is not None:
            for name in filesystem.list_names(self._local):
                data = filesystem.read(filesystem.join(self._local, name))
                filesystem.write(filesystem.join(self._folder, name), data)

    def _close(self) -> None:
        self._upload()
        self._events.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def build_tag(name: str) -> str:
    """A column of the history as a tag, grouped by kind: `train_loss` becomes `loss/train`."""
    split, _, metric = name.partition("_")
    if split in ("train", "val"):
        return f"{metric}/{split}"
    if name in ("images_per_second", "seconds") or name.endswith("_seconds"):
        return f"speed/{name}"
    return name
