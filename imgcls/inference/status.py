"""Status of a run, read from its output folder alone, on any machine, also after the driver died.

Rows and statuses come from the written files, the rate from the driver's last progress file, and
whether there is a driver from its lease. Nothing is written, and Ray is not needed.
"""

from __future__ import annotations

import collections
import json
from typing import Any, ClassVar

import pyarrow.parquet as pq

from imgcls import log
from imgcls.config import Section
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import (
    StorageConfig,
    create_thread_pool,
    with_config_storage,
)
from imgcls.errors import OutputError, StorageMissing
from imgcls.execution.completed import CompletedChunks
from imgcls.execution.plan import Plan, parse_plan
from imgcls.formatting import format_count, format_duration, format_share
from imgcls.runs import layout, lease
from imgcls.runs.lease import LeaseHolder

_READ_THREADS = 16


class StatusConfig(Section):
    """Show the progress of a predict run."""

    positional: ClassVar[tuple[str, ...]] = ("output",)
    output: str
    """Output folder of the run."""
    json_lines: bool = False
    """Print one JSON object instead of text."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def status(config: StatusConfig) -> dict[str, Any]:
    """Print the progress of a run, and return it; see `read_status`.

    Raises OutputError when there is no run.
    """
    found = read_status(filesystem.absolute(config.output))
    log.show(json.dumps(found) if config.json_lines else _format_status(found))
    return found


def read_status(output: str) -> dict[str, Any]:
    """The status of the run in an output folder.

    Its `state` is committed; starting (the driver waits for nodes, or plans); running; waiting (the
    driver was stopped or died, the run can be resumed); or refused (all rows are labeled, but a
    quality gate refused the commit).
    """
    run = layout.load_run(output)
    if run is None:
        holder = lease.find_holder(output)
        if holder is not None and holder.is_alive:
            return {"output": output, "state": "starting", "driver": _format_driver(holder)}
        raise OutputError(
            f"output {output}: holds no {layout.RUN_FILE}, so no run was started here. "
            "Pass the --output folder of a run"
        )
    plan = parse_plan(run)
    found: dict[str, Any] = {
        "output": output,
        "run_id": plan.run_id,
        "rows": plan.rows,
        "began": run.get("began"),
    }
    success = _read_success(output)
    if success is not None:
        return found | {
            "state": "committed",
            "rows": success["rows"],  # a compacted history has the plan of its newest run
            "rows_done": success["rows"],
            "status": success["status"],
            "committed": success["committed"],
            "seconds": success["seconds"],
            "wall_seconds": success["seconds"]["wall"],
            "images_per_second": success.get("steady_images_per_second"),
        }
    holder = lease.find_holder(output)
    alive = holder is not None and holder.is_alive
    completed = CompletedChunks.load(output, plan)
    found |= {
        "state": "running" if alive else "refused" if "refused" in run else "waiting",
        "driver": _format_driver(holder) if holder is not None else None,
        "rows_done": completed.rows_done,
        "files_done": len(completed.parts),
        "files": plan.num_parts,
        "refused": None if alive else run.get("refused"),
        "status": _count_statuses(output, plan, completed),
    }
    progress = layout.load_progress(output)
    if progress is not None:
        rate = progress["images_per_second"]
        found |= {"images_per_second": rate, "updated": progress["time"]}
        if alive and rate:
            found["seconds_left"] = round((plan.rows - completed.rows_done) / rate, 1)
    return found


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


def _count_statuses(output: str, plan: Plan, completed: CompletedChunks) -> dict[str, int]:
    """Written rows by status. A file that is being rolled up may be counted nowhere."""
    urls = [layout.part_url(output, part) for part in completed.parts]
    urls += [
        layout.chunk_url(output, part, chunk, plan.run_id)
        for part, chunks in completed.chunks.items()
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


def _format_status(status: dict[str, Any]) -> str:
    if status["state"] == "starting":
        return (
            f"run        {status['output']}\n"
            f"state      starting on {status['driver']}: waiting for nodes, or reading the manifest"
        )
    rows, done = status["rows"], status["rows_done"]
    lines = [f"run        {status['run_id']}, {format_count(rows, 'row')}: {status['output']}"]
    if status["state"] == "committed":
        lines.append(
            f"state      committed {status['committed']}, after "
            f"{format_duration(status['wall_seconds'])}"
        )
    elif status["state"] == "running":
        lines.append(f"state      running on {status['driver']}")
    elif status["state"] == "refused":
        lines.append(f"state      finished, not committed: {status['refused']}")
    else:
        driver = f" (driver on {status['driver']} exited)" if status["driver"] else ""
        lines.append(f"state      not running{driver}; rerun the same command to resume")
    share = format_share(done / rows if rows else 1.0)
    files = ""
    if "files" in status:
        files = f", {status['files_done']:,} of {format_count(status['files'], 'final file')}"
    lines.append(f"rows       {done:,} done ({share}){files}")
    lines += [f"status     {name} {count:,}" for name, count in status["status"].items()]
    rate = status.get("images_per_second")
    if rate:
        left = status.get("seconds_left")
        eta = f", {format_duration(left)} left" if left is not None else ""
        when = f" at {status['updated']}" if "updated" in status else ", without start-up"
        lines.append(f"rate       {rate:,.1f} images/s{when}{eta}")
    return "\n".join(lines)
