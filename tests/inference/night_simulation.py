"""The three commands of a nightly job, executed in this process, and the folder they run over.

Planning, comparing, labeling a chunk, committing and compacting are the functions that the commands
call; only Ray, which would send the chunks to workers, is left out.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.config import build
from imgcls.curation.build import build_manifest
from imgcls.curation.config import ManifestBuildConfig
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import TooManyErrors
from imgcls.execution.completed import CompletedChunks, read_chunk_rows, write_chunk
from imgcls.execution.messages import StageTimings
from imgcls.execution.plan import RunIdentity, make_plan, parse_plan
from imgcls.inference import commit, stages
from imgcls.inference.config import SinceConfig
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.nightly import NightlyRequest, PredictJob, label_new, load_planned_manifest
from imgcls.inference.nights import OutputSeries
from imgcls.inference.rollup import roll_up, write_empty_part
from imgcls.inference.specs import PredictSpec
from imgcls.metrics import PredictionCounts
from imgcls.models.classifier import Classifier
from imgcls.runs import layout
from imgcls.runs.schema import build_prediction_schema
from imgcls.runs.table_counts import TableCounter
from tests.conftest import COLORS, draw, save

SETTINGS = {"top_k": 2, "scores": False}
CHUNK_ROWS = 4


class Killed(BaseException):
    """The process ended here: what is on disk stays as it is."""


class Images:
    """A folder of images that changes from day to day; its clock runs an hour a write."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self._drawn = 0
        self._clock = 1_700_000_000

    def write(self, name: str, data: bytes | None = None) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drawn += 1
        if data is None:
            save(draw(list(COLORS)[self._drawn % 3], seed=self._drawn), path)
        else:
            path.write_bytes(data)
        self._clock += 3600
        os.utime(path, (self._clock, self._clock))

    def names(self, *, broken: bool) -> list[str]:
        files = sorted(path for path in self.folder.rglob("*.png"))
        return [
            str(file.relative_to(self.folder))
            for file in files
            if (file.stat().st_size < 100) == broken
        ]

    def day(self, number: int, new: int, spoilt: int = 1) -> None:
        """New, changed, deleted, broken and repaired images."""
        for name in self.names(broken=True)[:1]:
            self.write(name)
        sound = self.names(broken=False)
        if len(sound) > 4:
            first, second, *others = self.rng.permutation(len(sound))[: 2 + spoilt]
            self.write(sound[first])
            (self.folder / sound[second]).unlink()
            for other in others:
                self.write(sound[other], b"spoilt")
        for at in range(new):
            self.write(f"camera-{at % 2}/{number:02d}-{at:02d}.png")


class Nightly:
    """`manifest build`, `predict --since` and `history compact` over one folder."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder = folder
        self.labels, self.manifest = folder / "labels", folder / "tonight"
        self.latest = folder / "latest"
        self.classifier = Classifier.load(str(bundle), precision="fp32", device="cpu")
        self.bundle = str(bundle)
        self.labeled = 0
        self.column: Callable[[int], pa.Array] | None = None

    def build(self, images: Images) -> None:
        build_manifest(
            ManifestBuildConfig(
                source=str(images.folder), output=str(self.manifest), overwrite=True
            )
        )
        if self.column is not None:
            for part in self.manifest.glob("*.parquet"):
                table = pq.read_table(part)
                pq.write_table(table.append_column("site", self.column(table.num_rows)), part)

    def predict(
        self, day: str, *, killed: str | None = None, clock: float = 0, **options: Any
    ) -> str:
        """Label what is new; returns the newest output folder, or "refused" for exit code 3.

        killed: the step after which the process ends: planned, labeled or rolled up
        clock:  hours that this machine's clock is ahead
        """
        self.labeled = 0

        def label(job: PredictJob) -> str:
            self._label(job, killed, clock, settings=options.get("settings"))
            return job.output

        request = NightlyRequest(
            bundle_sha256="b" * 64,
            **{
                "manifest": options.get("manifest")
                or open_manifest(ManifestConfig(path=str(self.manifest))),
                "series": OutputSeries(
                    f"{self.labels}/date={{date}}", datetime.date.fromisoformat(day)
                ),
                "since": SinceConfig(path=str(self.labels)),
                "settings": SETTINGS,
                "relabel": False,
                "retry_failed": False,
                "retry_errors": False,
                "overwrite": False,
                **options,
            },
        )
        try:
            return label_new(request, label, lambda place, _: place)
        except TooManyErrors:
            return "refused"

    def compact(self, **options: Any) -> dict[str, dict[str, Any]]:
        """The newest row of each image, by its path."""
        config = {"source": str(self.labels), "output": str(self.latest), "overwrite": True}
        compact(build(CompactConfig, config | options))
        return rows_of(self.latest)

    def from_scratch(self) -> dict[str, dict[str, Any]]:
        """Label all that the manifest lists."""
        output = self.folder / "scratch"
        listed = open_manifest(ManifestConfig(path=str(self.manifest)))
        self._label(PredictJob(str(output), listed), None, 0, max_error_rate=1)
        return rows_of(output)

    def _label(
        self,
        job: PredictJob,
        killed: str | None,
        clock: float,
        max_error_rate: float = 0.01,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """A run from its plan to its commit, in the order of the job."""
        output = job.output
        if job.start_over:
            layout.remove_run(output)
        run = layout.load_run(output)
        if run is None:
            if job.comparison is not None:
                job.comparison.write_tables(output)
            manifest = job.manifest
            make_plan(
                output,
                manifest,
                RunIdentity(
                    manifest.describe_identity(),
                    {"sha256": "b" * 64},
                    SETTINGS if settings is None else settings,
                ),
                chunk_rows=CHUNK_ROWS,
                part_rows=CHUNK_ROWS * 2,
                row_bytes=128,
                limit=None,
                provenance={"config": {}, "versions": {}},
                classes=list(COLORS),
                may_be_empty=job.comparison is not None,
                notes=job.build_run_entries(),
            )
            run = layout.load_run(output)
            assert run is not None
            run["began"] = _shifted(run["began"], clock)
            layout.write_run(output, run)
        else:  # a resumed run has the manifest of its plan
            assert job.manifest.describe_identity() == run["identity"]["manifest"]
        if killed == "planned":
            raise Killed
        plan, manifest = parse_plan(run), load_planned_manifest(output, run, job.manifest)
        spec = PredictSpec(
            output=output, plan=plan, bundle_url=self.bundle, bundle_sha256="b" * 64,
            path_column=manifest.path_column, label_column=None, root=manifest.root, top_k=2,
            thresholds=(0.0,) * 3, scores=False, embeddings=None, decode="exact", precision="fp32",
            compile=False, batch_size=8, max_pixels=10**6, io_concurrency=4,
            storage=StorageConfig(), session="", crash_retries=1,
        )  # fmt: skip
        book, counts = CompletedChunks.load(output, plan), PredictionCounts.empty(tuple(COLORS))
        for work in book.list_remaining():
            rows = read_chunk_rows(spec, work)
            write_chunk(
                spec,
                work,
                stages.predict_chunk(spec, self.classifier, rows, work, StageTimings()),
                StageTimings(),
            )
            self.labeled += rows.num_rows
            book.add(work.chunk)
            if killed == "labeled":
                raise Killed
        for part in range(plan.num_parts):
            if part not in book.parts:
                roll_up(output, plan, part, TableCounter(tuple(COLORS)))
                book.mark_rolled_up(part)
                if killed == "rolled up":
                    raise Killed
        if not plan.rows:
            added = build_prediction_schema(labeled=False)
            write_empty_part(output, plan, pa.schema([*manifest.schema, *added]).empty_table())
        for part in range(plan.num_parts):
            table = pq.read_table(layout.part_url(output, part))
            counts += PredictionCounts.from_table(table, label_column=None, classes=tuple(COLORS))
        commit.write_metric_tables(output, plan, counts, top_k=2, path_column=manifest.path_column)
        repeated = commit.count_repeated_failures(output, plan, manifest.path_column)
        try:
            commit.check_error_rates(
                output, counts, max_error_rate, {}, max_errors=2, repeated=repeated
            )
        except TooManyErrors as error:
            layout.write_run(output, run | {"refused": str(error)})
            raise
        commit.write_success(
            output,
            run=run,
            counts=counts,
            seconds={"wall": 1.0},
            steady_rate=None,
            precision=[],
            engine=[],
        )
        mark = Path(output) / layout.SUCCESS_FILE
        success = json.loads(mark.read_text())
        success["committed"] = _shifted(success["committed"], clock)
        mark.write_text(json.dumps(success))


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """A run's rows by path, each of which stands there once: what must not depend on the nights."""
    table = pq.read_table(output / "predictions")
    names = ["status", "predicted_label", "confidence", "topk_labels", "size", "mtime", "etag"]
    rows = table.select(["path", *names]).to_pylist()
    found = {row.pop("path"): row for row in rows}
    assert len(found) == table.num_rows
    for row in found.values():
        row["confidence"] = row["confidence"] and round(row["confidence"], 5)
    return found


def _shifted(time: str, hours: float) -> str:
    there = datetime.datetime.fromisoformat(time) + datetime.timedelta(hours=hours)
    return there.isoformat(timespec="seconds")
