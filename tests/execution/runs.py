"""Small runs: a manifest on disk, its plan, and the spec that a worker would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.manifests.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.completed import CompletedChunks, write_chunk
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.plan import Plan, RunIdentity, make_plan
from imgcls.inference import rollup
from imgcls.inference.specs import PredictSpec
from imgcls.runs.schema import build_prediction_schema
from imgcls.runs.table_counts import TableCounter

CLASSES = ["red", "green", "blue"]


def manifest_of(folder: Path, table: pa.Table, **config: Any) -> Manifest:
    """The table as a Parquet manifest in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.parquet"
    pq.write_table(table, path)
    return open_manifest(ManifestConfig(path=str(path), **config))


def identity_of(manifest: Manifest, **settings: Any) -> RunIdentity:
    return RunIdentity(
        manifest={"fingerprint": manifest.fingerprint(), "path_column": manifest.path_column},
        bundle={"sha256": "b" * 64},
        settings=settings,
    )


def plan_at(
    output: Path,
    manifest: Manifest,
    *,
    chunk_rows: int | None = None,
    part_rows: int = 1_000_000,
    row_bytes: int = 128,
    limit: int | None = None,
    classes: Sequence[str] = CLASSES,
    identity: RunIdentity | None = None,
    any_labels: bool = False,
) -> Plan:
    """Plan a run in an output folder, as `predict` does."""
    return make_plan(
        str(output),
        manifest,
        identity or identity_of(manifest, limit=limit),
        chunk_rows=chunk_rows,
        part_rows=part_rows,
        row_bytes=row_bytes,
        limit=limit,
        provenance={"made by": "a test"},
        any_labels=any_labels,
        classes=list(classes),
    )


def spec_of(
    output: Path, plan: Plan, manifest: Manifest, bundle: str, **changes: Any
) -> PredictSpec:
    """What a worker needs to know to process the chunks of a plan."""
    spec = PredictSpec(
        output=str(output),
        plan=plan,
        bundle_url=bundle,
        bundle_sha256="",
        path_column=manifest.path_column,
        label_column=manifest.label_column,
        root=manifest.root,
        top_k=2,
        thresholds=(0.0,) * len(CLASSES),
        scores=False,
        embeddings=False,
        decode="fast",
        precision="fp32",
        compile=False,
        batch_size=8,
        max_pixels=100_000_000,
        max_bytes=100_000_000,
        io_concurrency=4,
        storage=StorageConfig(),
        session="a-test",
        crash_retries=1,
    )
    return dataclasses.replace(spec, **changes)


def predictions(
    rows: Sequence[int], seed: int, *, failing: float = 0.3, wide: bool = False
) -> pa.Table:
    """Prediction columns as predict writes them for these manifest rows, drawn from a seed.

    wide: with every class's score and an embedding
    """
    rng = np.random.default_rng(seed)
    failed = rng.random(len(rows)) < failing
    scores = rng.dirichlet(np.ones(len(CLASSES)), len(rows)).astype(np.float32)
    order = np.argsort(-scores, axis=1)
    names = np.array(CLASSES)
    best = np.take_along_axis(scores, order, axis=1)
    columns: dict[str, pa.Array] = {
        "row": pa.array(list(rows), pa.int64()),
        "predicted_label": pa.array(names[order[:, 0]], mask=failed),
        "confidence": pa.array(best[:, 0], mask=failed),
        "accepted": pa.array(~failed & (best[:, 0] > 0.5)),
        "topk_labels": _unless(failed, names[order[:, :2]].tolist()),
        "topk_scores": _unless(failed, best[:, :2].tolist()),
        "label_score": pa.array(scores[:, 0], mask=failed),
        "label_rank": pa.array((order == 0).argmax(1) + 1, pa.int32(), mask=failed),
        "scores": _unless(failed, scores.astype(np.float16)),
        "embedding": _unless(failed, rng.normal(size=(len(rows), 4)).tolist()),
        "width": pa.array(rng.integers(1, 99, len(rows)), pa.int32(), mask=failed),
        "height": pa.array(rng.integers(1, 99, len(rows)), pa.int32(), mask=failed),
        "status": pa.array(np.where(failed, rng.choice(["missing", "truncated"], len(rows)), "ok")),
        "error": _unless(~failed, [f"error {seed} of row {row}" for row in rows]),
    }
    schema = build_prediction_schema(
        labeled=True, scores=len(CLASSES) if wide else None, embedding=4 if wide else None
    )
    arrays = [columns[name] for name in schema.names]
    return pa.table(
        [
            a.dictionary_encode() if field.name == "status" else pa.array(a.to_pylist(), field.type)
            for a, field in zip(arrays, schema, strict=True)
        ],
        schema=schema,
    )


def _unless(null: npt.NDArray[np.bool_], values: Any) -> pa.Array:
    return pa.array([None if n else v for n, v in zip(null, values, strict=True)])


@dataclass
class DrawnRun:
    """A planned run whose predictions are drawn rather than computed."""

    folder: Path
    manifest: Manifest
    table: pa.Table
    plan: Plan
    spec: PredictSpec

    @classmethod
    def planned(cls, folder: Path, rows: int, **sizes: Any) -> DrawnRun:
        table = pa.table(
            {
                "path": [f"{i}.jpg" for i in range(rows)],
                "label": [("red", None, "green", "mauve")[i % 4] for i in range(rows)],
                "camera": pa.array([f"camera {i // 5}" for i in range(rows)]).dictionary_encode(),
                "tags": [[{"site": i}] * (i % 3) if i % 7 else None for i in range(rows)],
            }
        )
        manifest = manifest_of(folder, table)
        plan = plan_at(folder / "out", manifest, **sizes)
        return cls(folder, manifest, table, plan, spec_of(folder / "out", plan, manifest, ""))

    @property
    def output(self) -> str:
        return self.spec.output

    def commit(self, chunk: int, table: pa.Table, offsets: Sequence[int] | None = None) -> None:
        task = ChunkTask(chunk, None if offsets is None else tuple(offsets))
        write_chunk(self.spec, task, table, StageTimings())

    def label(self, chunks: Sequence[int] | None = None, **options: Any) -> None:
        """Commit drawn predictions of some chunks, or of all."""
        for chunk in range(self.plan.num_chunks) if chunks is None else chunks:
            self.commit(chunk, predictions(self.plan.rows_of(chunk), seed=chunk, **options))

    def roll_up(self, part: int) -> Any:
        return rollup.roll_up(self.output, self.plan, part, TableCounter(tuple(CLASSES), "label"))

    def part(self, part: int) -> Path:
        return Path(self.output) / "predictions" / f"part-{part:05d}.parquet"

    def staged(self, part: int) -> Path:
        return Path(self.output) / "_staging" / f"part-{part:05d}"

    def rolled_up(self) -> pa.Table:
        for part in range(self.plan.num_parts):
            self.roll_up(part)
            CompletedChunks.load(self.output, self.plan).mark_rolled_up(part)
        return self.read()

    def read(self) -> pa.Table:
        parts = [pq.read_table(self.part(part)) for part in range(self.plan.num_parts)]
        return pa.concat_tables(parts).unify_dictionaries()
