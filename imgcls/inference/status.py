"""How far a labelling run is, told from its output folder alone: from any machine, alive or dead.

Rows and errors are read from the files that are durable, the rate from what the driver said last,
and whether there is a driver from its lease. Nothing is written, and no Ray is needed.
"""

from __future__ import annotations

import collections
import json
from typing import Any, ClassVar

import pyarrow.parquet as pq

from imgcls import log
from imgcls.config import Section
from imgcls.data import filesystem
from imgcls.data.storage_settings import StorageConfig, create_thread_pool, with_config_storage
from imgcls.errors import OutputError, StorageMissing
from imgcls.execution.completed import CompletedChunks
from imgcls.execution.plan import Plan, parse_plan
from imgcls.execution.progress import format_duration
from imgcls.runs import layout, lease
from imgcls.runs.lease import LeaseHolder

_READ_THREADS = 16


class StatusConfig(Section):
    """Tell how far a labelling run is."""

    positional: ClassVar[tuple[str, ...]] = ("output",)
    output: str
    """The run's folder."""
    json_lines: bool = False
    """Tell it as one JSON object."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def status(config: StatusConfig) -> dict[str, Any]:
    """Tell how far a labelling run is, from its output alone.

    Raises OutputError when there is no run.
    """
    told = read_status(filesystem.absolute(config.output))
    log.show(json.dumps(told) if config.json_lines else _format_status(told))
    return told


def read_status(output: str) -> dict[str, Any]:
    """What an output folder says of its run.

    state: committed; starting (its driver waits for machines, or plans); running; waiting (for a
        driver: it was stopped, or died); refused (all rows are labeled, a gate kept it from being
        committed)
    """
    run = layout.load_run(output)
    if run is None:
        holder = lease.find_holder(output)
        if holder is not None and holder.is_alive:
            return {"output": output, "state": "starting", "driver": _format_driver(holder)}
        raise OutputError(
            f"output {output}: holds no {layout.RUN_FILE}, so no labelling run began here"
        )
    plan = parse_plan(run)
    told: dict[str, Any] = {
        "output": output,
        "run_id": plan.run_id,
        "rows": plan.rows,
        "began": run.get("began"),
    }
    success = _read_success(output)
    if success is not None:
        return told | {
            "state": "committed",
            "rows_done": success["rows"],
            "status": success["status"],
            "committed": success["committed"],
            "seconds": success["seconds"],
            "wall_seconds": success["seconds"]["wall"],
            "images_per_second": success.get("steady_images_per_second"),
        }
    holder = lease.find_holder(output)
    alive = holder is not None and holder.is_alive
    book = CompletedChunks.load(output, plan)
    told |= {
        "state": "running" if alive else "refused" if "refused" in run else "waiting",
        "driver": _format_driver(holder) if holder is not None else None,
        "rows_done": book.rows_done,
        "files_done": len(book.parts),
        "files": plan.num_parts,
        "refused": None if alive else run.get("refused"),
        "status": _count_statuses(output, plan, book),
    }
    progress = layout.load_progress(output)
    if progress is not None:
        rate = progress["images_per_second"]
        told |= {"images_per_second": rate, "told": progress["time"]}
        if alive and rate:
            told["seconds_left"] = round((plan.rows - book.rows_done) / rate, 1)
    return told


def _format_driver(holder: LeaseHolder) -> str:
    return f"{holder.host}, process {holder.pid}"


def _read_success(output: str) -> dict[str, Any] | None:
    mark = filesystem.join(output, layout.SUCCESS_FILE)
    try:
        data = filesystem.read(mark)
    except StorageMissing:
        return None
    if not data:  # see `layout.is_committed`
        return None
    try:
        body: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise OutputError(layout.damaged_success_message(output, str(error))) from error
    return body


def _count_statuses(output: str, plan: Plan, book: CompletedChunks) -> dict[str, int]:
    """Durable rows by status. A file that is rolled up meanwhile is counted in neither place."""
    urls = [layout.part_url(output, part) for part in book.parts]
    urls += [
        layout.chunk_url(output, part, chunk, plan.run_id)
        for part, chunks in book.chunks.items()
        for chunk in chunks
    ]
    with create_thread_pool(_READ_THREADS, "read") as pool:
        total = sum(pool.map(_count_file, urls), collections.Counter())
    return dict(sorted(total.items()))


def _count_file(url: str) -> collections.Counter[str]:
    counted: collections.Counter[str] = collections.Counter()
    try:
        with filesystem.open_read(url) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(columns=["status"]):
                values = batch.column("status").value_counts()
                counted.update({str(pair["values"]): pair["counts"].as_py() for pair in values})
    except StorageMissing:
        pass  # rolled up since it was listed
    return counted


def _format_status(told: dict[str, Any]) -> str:
    if told["state"] == "starting":
        return (
            f"run        {told['output']}\n"
            f"state      starting on {told['driver']}: it waits for machines, or reads the manifest"
        )
    rows, done = told["rows"], told["rows_done"]
    lines = [f"run        {told['run_id']}, {rows:,} rows: {told['output']}"]
    if told["state"] == "committed":
        lines.append(
            f"state      committed {told['committed']}, after "
            f"{format_duration(told['wall_seconds'])}"
        )
    elif told["state"] == "running":
        lines.append(f"state      running on {told['driver']}")
    elif told["state"] == "refused":
        lines.append(f"state      finished, not committed: {told['refused']}")
    else:
        died = f": {told['driver']} died or was cut off" if told["driver"] else ""
        lines.append(f"state      nobody is at work{died}; the same command goes on from here")
    share = done / rows if rows else 1.0
    files = f", {told['files_done']:,} of {told['files']:,} final files" if "files" in told else ""
    lines.append(f"rows       {done:,} done ({share:.1%}){files}")
    lines += [f"status     {name} {count:,}" for name, count in told["status"].items()]
    rate = told.get("images_per_second")
    if rate:
        left = told.get("seconds_left")
        eta = f", {format_duration(left)} left" if left is not None else ""
        when = f" at {told['told']}" if "told" in told else ", without start-up"
        lines.append(f"rate       {rate:,.1f} images/s{when}{eta}")
    return "\n".join(lines)
