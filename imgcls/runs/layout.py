"""Output folder of a run: names of its files and folders, and how they are written and read.

out/_run.json                    identity, plan and settings; written before any work
out/_lease/                      the driver that owns the output now
out/_progress.json               the driver's last progress report; removed at the end
out/_staging/manifest/           the manifest, cut into one shard per part
out/_staging/part-00000/         finished chunks of a part
out/_staging/archives/           indexes of the archives that contain the images
out/predictions/part-00000.parquet
out/metrics/*.parquet
out/_since/*.parquet             with --since: images that were deleted, broken or failed before
out/_SUCCESS                     written last
out/_explanations/               with --explain: pictures of some rows, and their table; after that
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.formats import EXPLANATIONS_FOLDER
from imgcls.data.storage import filesystem
from imgcls.data.storage.filesystem import join
from imgcls.errors import OutputError, RunFailed, StorageError, StorageMissing, request_error

RUN_FORMAT_VERSION = 1
_PART_NAME = re.compile(r"part-\d{5,}\.parquet")

RUN_FILE = "_run.json"
STAGING_FOLDER = "_staging"
PREDICTIONS_FOLDER = "predictions"
METRICS_FOLDER = "metrics"
PROGRESS_FILE = "_progress.json"
SINCE_FOLDER = "_since"
SUCCESS_FILE = "_SUCCESS"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
"""Result of an evaluation, a comparison or a selection; an evaluation writes it next to the run."""
SELECTION_FILE = "selection.parquet"
CHECKPOINT_FOLDER = "_train"
"""Folder of an unfinished training in the folder of its bundle."""
IDENTITY_FILE = "run.json"
"""In it: settings, data and initial weights of the training."""
VALIDATION_PREDICTIONS_FILE = "validation_predictions.parquet"
"""In the folder of a trained bundle: the predictions of its validation images."""
PREDICTIONS_METADATA = b"imgcls"
"""Key in the metadata of this file, of a JSON object: `created`, as in the bundle's provenance."""
VALIDATION_TOP_K = 5
"""Number of labels per image in this file."""


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def is_part_name(name: str) -> bool:
    """Whether a file in the folder of predictions is a part, not a file of another program."""
    return _PART_NAME.fullmatch(name) is not None


def measure_parts(output: str, count: int) -> dict[str, int]:
    """The size of each of a run's parts by name, in bytes; RunFailed where one is missing.

    count: of the plan; a run without rows has one part without rows
    """
    folder = join(output, PREDICTIONS_FOLDER)
    names = [part_name(part) for part in range(max(1, count))]
    missing = sorted(set(names) - set(filesystem.list_names(folder)))
    if missing:
        raise RunFailed(
            f"output {output}: {PREDICTIONS_FOLDER}/{missing[0]} is missing; nothing was "
            "committed. Start over with --overwrite"
        )
    return {name: filesystem.size(join(folder, name)) for name in names}


def part_url(output: str, part: int) -> str:
    return join(output, PREDICTIONS_FOLDER, part_name(part))


def shard_url(output: str, part: int) -> str:
    """The manifest rows of a part; each of its chunks is one or more row groups."""
    return join(output, STAGING_FOLDER, "manifest", part_name(part))


def index_folder(output: str) -> str:
    """The indexes of archives, which all workers of a run share, see `archive_index`."""
    return join(output, STAGING_FOLDER, "archives")


def part_staging_folder(output: str, part: int) -> str:
    return join(output, STAGING_FOLDER, f"part-{part:05d}")


def chunk_url(output: str, part: int, chunk: int, run_id: str) -> str:
    return join(part_staging_folder(output, part), f"chunk-{chunk:08d}.{run_id}.parquet")


def retry_url(output: str, part: int, chunk: int, run_id: str) -> str:
    return join(part_staging_folder(output, part), f"retry-{chunk:08d}.{run_id}.parquet")


def check_no_run(output: str) -> None:
    """Raise OutputError where a folder has a run, whose files others would replace."""
    if filesystem.exists(join(output, RUN_FILE)):
        raise OutputError(
            f"output {output}: is the folder of a run, whose files would be replaced; pass "
            "another --output"
        )


def check_output_writable(output: str) -> None:
    """Raise OutputError where an output folder cannot be written, and as `request_error` does."""
    try:
        filesystem.check_writable(output)
    except StorageError as error:
        raise request_error(
            OutputError,
            f"output {output}: cannot be written: {error}; pass another --output",
            error,
        ) from error


def remove_run(output: str) -> None:
    """Remove a run: `_SUCCESS` first and `_run.json` last, so that it can resume after a kill."""
    for name in (
        SUCCESS_FILE,
        REPORT_FILE,
        SUMMARY_FILE,
        PREDICTIONS_FOLDER,
        METRICS_FOLDER,
        EXPLANATIONS_FOLDER,
        STAGING_FOLDER,
        PROGRESS_FILE,
        SINCE_FOLDER,
        RUN_FILE,
    ):
        filesystem.remove(join(output, name))


def remove_unfinished_files(output: str) -> None:
    """Remove what killed drivers were writing into a run's folders; the caller has its lease."""
    for folder in (PREDICTIONS_FOLDER, METRICS_FOLDER, SINCE_FOLDER, ""):
        filesystem.remove_temporary_files(join(output, folder))


def write_tables(folder: str, tables: Mapping[str, pa.Table]) -> None:
    """Write each table to `NAME.parquet`, atomically."""
    for name, table in tables.items():
        write_table(join(folder, f"{name}.parquet"), table, compression="snappy")


def write_table(url: str, table: pa.Table, *, compression: str = "zstd") -> None:
    """Write a Parquet file, atomically."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression)
    filesystem.write(url, sink.getvalue())


def write_run(output: str, run: Mapping[str, Any]) -> None:
    """Write `_run.json`: the run's identity, plan, settings and decisions."""
    body = json.dumps({"format_version": RUN_FORMAT_VERSION, **run}, indent=2) + "\n"
    filesystem.write(join(output, RUN_FILE), body.encode())


def write_progress(output: str, fields: Mapping[str, Any]) -> None:
    """Write `_progress.json`."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    filesystem.write(join(output, PROGRESS_FILE), json.dumps({**fields, "time": now}).encode())


def load_progress(output: str) -> dict[str, Any] | None:
    """Read `_progress.json`; None when there is none."""
    with contextlib.suppress(StorageMissing, ValueError):
        fields: dict[str, Any] = json.loads(filesystem.read(join(output, PROGRESS_FILE)))
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
    """Read `_run.json`; None when there is none.

    Raises OutputError when it is damaged or of another format version.
    """
    url = join(output, RUN_FILE)
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
