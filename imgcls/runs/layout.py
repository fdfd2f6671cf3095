"""The output of a labelling run as all rooms know it: what lies where, and the columns.

out/_run.json                    what the run is; written before any work
out/_lease/                      who works on it now
out/_progress.json               how far its driver was when it last said so; gone in the end
out/_staging/manifest/           the manifest, cut into one shard per part
out/_staging/part-00000/         finished chunks of a part
out/predictions/part-00000.parquet
out/metrics/*.parquet
out/_since/*.parquet             with --since: images deleted, known to be broken, failed before
out/_SUCCESS                     written last
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data import filesystem
from imgcls.data.filesystem import join
from imgcls.errors import OutputError, StorageError, StorageMissing, request_error
from imgcls.models.task import SINGLE_LABEL, Task

RUN_FORMAT_VERSION = 1

RUN_FILE = "_run.json"
STAGING_FOLDER = "_staging"
PREDICTIONS_FOLDER = "predictions"
METRICS_FOLDER = "metrics"
PROGRESS_FILE = "_progress.json"
SINCE_FOLDER = "_since"
SUCCESS_FILE = "_SUCCESS"

OK = "ok"
PREDICTION_COLUMNS = (
    "row",
    "predicted_label",
    "confidence",
    "accepted",
    "topk_labels",
    "topk_scores",
    "label_score",
    "label_rank",
    "scores",
    "embedding",
    "width",
    "height",
    "status",
    "error",
)

PROVENANCE_COLUMNS = ("run", "bundle_sha256", "labelled_at")
"""Columns that `history compact` adds to the rows of many runs."""


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def part_url(output: str, part: int) -> str:
    return join(output, PREDICTIONS_FOLDER, part_name(part))


def shard_url(output: str, part: int) -> str:
    """The manifest rows of a part; row group g is chunk g of the part."""
    return join(output, STAGING_FOLDER, "manifest", part_name(part))


def part_staging_folder(output: str, part: int) -> str:
    return join(output, STAGING_FOLDER, f"part-{part:05d}")


def chunk_url(output: str, part: int, chunk: int, run_id: str) -> str:
    return join(part_staging_folder(output, part), f"chunk-{chunk:08d}.{run_id}.parquet")


def retry_url(output: str, part: int, chunk: int, run_id: str) -> str:
    return join(part_staging_folder(output, part), f"retry-{chunk:08d}.{run_id}.parquet")


def build_prediction_schema(
    *,
    labelled: bool,
    scores: int | None = None,
    scores_type: str = "float32",
    embedding: int | None = None,
    task: Task = SINGLE_LABEL,
) -> pa.Schema:
    """Columns that labelling adds to a manifest.

    scores:      number of classes when every class's score is asked for
    scores_type: float32, or float16, which Spark cannot read
    embedding:   width of the embedding when it is asked for
    """
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        *task.build_fields(has_labels=labelled, classes=scores, scores_type=scores_type),
    ]
    if embedding is not None:
        fields.append(pa.field("embedding", pa.list_(pa.float32(), embedding)))
    fields += [
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("error", pa.string()),
    ]
    return pa.schema(fields)


def check_output_writable(output: str) -> None:
    """Raise OutputError where an output folder cannot be written, and as `request_error` does."""
    try:
        filesystem.check_writable(output)
    except StorageError as error:
        raise request_error(
            OutputError,
            f"output {output}: cannot be written: {error}; give another --output",
            error,
        ) from error


def remove_run(output: str) -> None:
    """Remove a run, its mark first and its identity last, so that a kill in between can resume."""
    for name in (
        SUCCESS_FILE,
        PREDICTIONS_FOLDER,
        METRICS_FOLDER,
        STAGING_FOLDER,
        PROGRESS_FILE,
        SINCE_FOLDER,
        RUN_FILE,
    ):
        filesystem.remove(join(output, name))


def write_tables(folder: str, tables: Mapping[str, pa.Table]) -> None:
    """Write each table as `NAME.parquet`, whole or not at all."""
    for name, table in tables.items():
        write_table(join(folder, f"{name}.parquet"), table, compression="snappy")


def write_table(url: str, table: pa.Table, *, compression: str = "zstd") -> None:
    """Write a Parquet file, whole or not at all."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression)
    filesystem.write(url, sink.getvalue())


def write_run(output: str, run: Mapping[str, Any]) -> None:
    """Write `_run.json`: what the run is, and what it has decided."""
    body = json.dumps({"format_version": RUN_FORMAT_VERSION, **run}, indent=2) + "\n"
    filesystem.write(filesystem.join(output, RUN_FILE), body.encode())


def write_progress(output: str, fields: Mapping[str, Any]) -> None:
    """Write `_progress.json`."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    filesystem.write(
        filesystem.join(output, PROGRESS_FILE), json.dumps({**fields, "time": now}).encode()
    )


def load_progress(output: str) -> dict[str, Any] | None:
    """`_progress.json` of an output folder; None when there is none."""
    with contextlib.suppress(StorageMissing, ValueError):
        fields: dict[str, Any] = json.loads(filesystem.read(filesystem.join(output, PROGRESS_FILE)))
        return fields
    return None


def is_committed(output: str) -> bool:
    """Whether a run has its `_SUCCESS`.

    An empty one was left by a driver that was killed while it created the file, on a disk without
    hard links.
    """
    try:
        return filesystem.size(join(output, SUCCESS_FILE)) > 0
    except StorageMissing:
        return False


def damaged_success_message(output: str, why: str) -> str:
    """The message for a `_SUCCESS` that cannot be read."""
    return (
        f"{join(output, SUCCESS_FILE)}: is damaged, or another tool wrote over it ({why}); "
        "remove it and rerun `imgcls predict` with the same --output, which commits the run again"
    )


def load_run(output: str) -> dict[str, Any] | None:
    """`_run.json` of an output folder; None when there is none."""
    url = filesystem.join(output, RUN_FILE)
    try:
        run: dict[str, Any] = json.loads(filesystem.read(url))
    except StorageMissing:
        return None
    except ValueError as error:
        raise OutputError(f"{url}: is damaged ({error}); start over with --overwrite") from error
    if run.get("format_version") != RUN_FORMAT_VERSION:
        raise OutputError(
            f"{url}: was written by another version of imgcls; start over with --overwrite"
        )
    return run
