"""Store the images of a manifest in shards: `imgcls manifest fetch`.

Every row of the manifest is in exactly one shard, with the status of its image. The shards are
planned by rows, in order, before anything is fetched, so a fetch that was killed is resumed by the
same command, and writes the same bytes as one that was not. Runs in one process, without Ray.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from imgcls import log
from imgcls.curation.config import FetchConfig
from imgcls.curation.fetch_pass import FetchPass, ShardTask
from imgcls.curation.fetched_columns import STATUS_COLUMN, check_added_columns
from imgcls.curation.scan import HeldOutput, hold_output
from imgcls.curation.shards import ShardStore
from imgcls.data.manifests.manifest import Manifest, make_paths_absolute, open_manifest
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool, with_config_storage
from imgcls.errors import OK, OutputError
from imgcls.execution.plan import (
    Plan,
    RunIdentity,
    make_plan,
    parse_plan,
    read_shard_chunk,
    restore_shards,
)
from imgcls.execution.progress import Progress
from imgcls.execution.runner import add_resume_hint
from imgcls.formatting import format_count, format_counts
from imgcls.runs import layout
from imgcls.runs.error_limits import check_status_counts
from imgcls.runs.provenance import build_provenance

FETCH_FOLDER = "_fetch"
"""Folder of the plan, below the output."""
_PLANNED_ROWS = 1_000_000
"""Maximum number of rows of a file of the planned manifest."""
_COUNT_THREADS = 16
_RETRYING = "retrying"
"""Entry of `_run.json` while failed rows are fetched again."""


@with_config_storage
def fetch(config: FetchConfig) -> dict[str, int]:
    """Fetch the images of a manifest; returns the number of rows by status.

    Raises RequestError when the request is wrong or the output holds another run, OutputLocked
    when another fetch writes to it, RunFailed when it was interrupted (rerun to resume), and
    TooManyErrors when more rows failed than allowed.
    """
    output = filesystem.absolute(config.output)
    manifest = open_manifest(config.manifest)
    check_added_columns(manifest)
    identity = _build_identity(manifest, config)
    rows = make_paths_absolute(manifest, manifest.schema.empty_table())
    store = ShardStore(
        output, config.format, rows.schema, manifest.label_column, manifest.label_columns
    )
    with hold_output(output) as held, add_resume_hint(output, held.lease):
        _check_content(output, store)
        if config.overwrite:
            _remove_fetch(output, store)
        run = _load_or_start_run(output, manifest, identity, config)
        counts = _fetch_remaining(config, held, store, manifest, run)
        if layout.is_committed(output):  # and nothing was fetched
            log.emit("note", f"{output}: is complete; pass --retry-errors to fetch failed rows")
            return counts
        check_status_counts(
            output,
            counts,
            config.max_error_rate,
            config.max_error_rates,
            outcome=f"all images that were found are stored. See the column {STATUS_COLUMN}",
        )
        _commit(held, counts)
    statuses = format_counts(dict(sorted(counts.items())))
    log.emit("fetched", f"{format_count(sum(counts.values()), 'row')} ({statuses}): {output}")
    return counts


def _build_identity(manifest: Manifest, config: FetchConfig) -> RunIdentity:
    return RunIdentity(
        manifest=manifest.describe_identity(),
        bundle={},
        settings={
            "format": config.format,
            "shard_rows": config.shard_rows,
            "max_pixels": config.max_pixels,
            "max_bytes": config.max_bytes,
            "robots_opt_outs": sorted(config.storage.robots_opt_outs),
        },
    )


def _get_plan_folder(output: str) -> str:
    """The folder of the plan, which is no run for other commands, such as `status`."""
    return filesystem.join(output, FETCH_FOLDER)


def _check_content(output: str, store: ShardStore) -> None:
    """Raise OutputError for a folder with files of others, which a fetch could replace."""
    names = set(filesystem.list_names(output))
    if layout.RUN_FILE in filesystem.list_names(_get_plan_folder(output)):
        names -= {layout.SUCCESS_FILE, *store.list_own_files()}
    if names:
        raise OutputError(
            f"output {output}: contains files that no fetch wrote ({min(names)}); pass another "
            "--output"
        )


def _remove_fetch(output: str, store: ShardStore) -> None:
    """Remove a fetch: `_SUCCESS` first and the plan last, so that a kill leaves its mark."""
    for name in (layout.SUCCESS_FILE, *store.list_own_files(), FETCH_FOLDER):
        filesystem.remove(filesystem.join(output, name))


def _load_or_start_run(
    output: str, manifest: Manifest, identity: RunIdentity, config: FetchConfig
) -> dict[str, Any]:
    """The content of `_run.json`: of an earlier run of the same identity, else of a new one."""
    folder = _get_plan_folder(output)
    stored = layout.load_run(folder)
    if stored is not None:
        identity.check_same_run(output, stored["identity"])
        return stored
    make_plan(
        folder,
        manifest,
        identity,
        chunk_rows=config.shard_rows,
        part_rows=_PLANNED_ROWS,
        row_bytes=128,
        limit=None,
        provenance=build_provenance(config.model_dump(mode="json")),
        classes=None,
    )
    started = layout.load_run(folder)
    assert started is not None
    return started


def _fetch_remaining(
    config: FetchConfig,
    held: HeldOutput,
    store: ShardStore,
    manifest: Manifest,
    run: Mapping[str, Any],
) -> dict[str, int]:
    """Fetch the shards that are not complete, and failed rows to retry; returns rows by status."""
    output, folder, plan = held.url, _get_plan_folder(held.url), parse_plan(run)
    shards = set(range(plan.num_chunks))
    complete = store.list_complete() & shards
    counts = _count_statuses(store, complete)
    # an interrupted retry may have replaced an archive and not its table
    retries = config.retry_errors or _RETRYING in run
    failed = [at for at in complete if retries and counts[at].total() > counts[at][OK]]
    remaining = sorted(shards - complete)
    if remaining or failed:
        filesystem.remove(filesystem.join(output, layout.SUCCESS_FILE))
        if failed:
            layout.write_run(folder, {**run, _RETRYING: True})
        filesystem.remove_temporary_files(output)  # of a fetch that was killed
        if remaining:
            restore_shards(folder, manifest, plan)
        to_fetch = sum(counts[at].total() - counts[at][OK] for at in failed)
        to_fetch += sum(len(plan.rows_of(at)) for at in remaining)
        if to_fetch < plan.rows:
            log.emit("resume", f"{to_fetch:,} of {format_count(plan.rows, 'row')} left to fetch")
        progress = Progress(
            plan.rows, plan.rows - to_fetch, config.progress_seconds, event="fetching"
        )
        tasks = itertools.chain(
            _iter_new_tasks(folder, manifest, plan, remaining),
            _iter_retry_tasks(store, manifest, plan, sorted(failed)),
        )
        fetch_pass = FetchPass(
            store,
            held,
            tasks,
            in_flight=config.io_concurrency,
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
        )
        with contextlib.closing(progress):
            counts |= fetch_pass.run(progress)
    if _RETRYING in run or failed:
        layout.write_run(folder, {name: run[name] for name in run if name != _RETRYING})
    filesystem.remove(filesystem.join(folder, layout.STAGING_FOLDER))
    return dict(sum(counts.values(), Counter()))


def _iter_new_tasks(
    folder: str, manifest: Manifest, plan: Plan, shards: Iterable[int]
) -> Iterator[ShardTask]:
    for shard in shards:
        part = plan.part_of(shard)
        with filesystem.open_read(layout.shard_url(folder, part)) as stream:
            index = shard - plan.chunks_of(part).start
            rows = read_shard_chunk(pq.ParquetFile(stream), plan, index)
        rows = make_paths_absolute(manifest, rows)
        yield ShardTask(shard, rows, plan.rows_of(shard).start, manifest.path_column)


def _iter_retry_tasks(
    store: ShardStore, manifest: Manifest, plan: Plan, shards: Iterable[int]
) -> Iterator[ShardTask]:
    for shard in shards:
        rows, results = store.read_rows(shard)
        start = plan.rows_of(shard).start
        yield ShardTask(shard, rows, start, manifest.path_column, results)


def _count_statuses(store: ShardStore, shards: Iterable[int]) -> dict[int, Counter[str]]:
    """Rows by status of each complete shard."""
    numbers = sorted(shards)
    with create_thread_pool(_COUNT_THREADS, "count") as pool:
        statuses = pool.map(store.read_statuses, numbers)
        return {at: Counter(each) for at, each in zip(numbers, statuses, strict=True)}


def _commit(held: HeldOutput, counts: Mapping[str, int]) -> None:
    body = {
        "rows": sum(counts.values()),
        "status": dict(sorted(counts.items())),
        "committed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    held.lease.check()
    mark = filesystem.join(held.url, layout.SUCCESS_FILE)
    filesystem.write(mark, (json.dumps(body, indent=2) + "\n").encode())
