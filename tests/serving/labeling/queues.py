"""Queues to label, and clients of the labeling routes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import requests

from tests.conftest import COLORS, draw, save, write_manifest
from tests.serving.app import Running

FILES = ("0.jpg", "1.png", "2.tif", "cut.jpg", "text.jpg", "gone.jpg")


def draw_queue(folder: Path, count: int = 8) -> Path:
    """A manifest of good images; the colors are their classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        save(draw(list(COLORS)[i % 3], seed=i), folder / f"{i}.jpg", quality=90)
    return write_manifest(folder / "m.csv", [(f"{i}.jpg",) for i in range(count)], ("path",))


def draw_mixed_queue(folder: Path) -> Path:
    """A manifest of images of several formats, and of files that are none."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(FILES[:3]):
        save(draw("red", seed=i), folder / name)
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("no image")
    return write_manifest(folder / "m.csv", [(name,) for name in FILES], ("path",))


def label_settings(manifest: Path) -> dict[str, Any]:
    """Settings of a server whose labels are next to the manifest."""
    return {
        "labeling__manifest": str(manifest),
        "labeling__output": str(manifest.parent / "labels"),
    }


def read_submissions(output: Path) -> list[str]:
    """The submissions in the newest record of each annotator, sorted."""
    newest = {
        file.name.rsplit(".", 2)[0]: file for file in sorted((output / "_decisions").iterdir())
    }
    return sorted(
        submission
        for file in newest.values()
        for submission in pq.read_table(file)["submission"].to_pylist()
    )


def read_table(output: Path) -> pa.Table:
    """The labels table that is read: all files in the folder."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(output.glob("*.parquet"))])


@dataclass
class Annotator:
    """An annotator who uses the routes."""

    running: Running
    key: str | None = None
    name: str | None = None

    @property
    def queue(self) -> str:
        """ID of the queue; empty for a key that may not see it."""
        found: str = self.get("queue").json().get("queue", "")
        return found

    def get_image(self, row: object, queue: str | None = None) -> requests.Response:
        return self.get(f"images/{self.queue if queue is None else queue}/{row}")

    def get(self, path: str) -> requests.Response:
        url = f"{self.running.url}/v1/labeling/{path}"
        return requests.get(url, headers=self._headers(), timeout=60)

    def post(self, path: str, **body: Any) -> requests.Response:
        named = {} if self.name is None else {"annotator": self.name}
        if "queue" not in body:
            named["queue"] = self.queue
        named |= body
        url = f"{self.running.url}/v1/labeling/{path}"
        return requests.post(url, json=named, headers=self._headers(), timeout=60)

    def decide(
        self, row: int, labels: list[str] | None, submission: str | None = None
    ) -> requests.Response:
        submission = submission or uuid.uuid4().hex
        return self.post("decisions", row=row, labels=labels, submission=submission)

    def _headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
