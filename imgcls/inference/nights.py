"""The runs in a folder of nights: which are committed, their order, and the next output folder.

Nights are ordered by a logical clock: a planned run takes the number after the highest one of all
runs that were committed or started by then, and keeps it when it is resumed. Clocks of machines and
the order of commits do not matter. Runs without a number, of earlier versions, come first, ordered
by the date in their path, then by their start.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from imgcls import log
from imgcls.data.formats import LISTING_FILE
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import OutputError, RequestError, StorageForbidden, StorageMissing
from imgcls.execution.plan import Plan, parse_plan
from imgcls.models.bundle import TaskName
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run

RunOrder = tuple[int, str, int, str, str]
"""Sequence number (0 if none), date, number of the run on that date, time of the start, URL."""

_READ_THREADS = 16
_MAX_NAMED_RUNS = 3
_DATE_PATTERN = re.compile(r"(\d{4}-\d{2}-\d{2})(?:\.(\d+))?")


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run that was planned, committed or not.

    run_record: its `_run.json`
    """

    url: str
    run_record: dict[str, Any]

    @property
    def order(self) -> RunOrder:
        """Its position among other runs."""
        return compute_order(self.url, self.run_record)

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return parse_plan(self.run_record)

    @property
    def has_shards(self) -> bool:
        """Whether all shards of its manifest exist, as until the run is committed."""
        return self._has_parts(filesystem.parent(layout.shard_url(self.url, 0)))

    @property
    def has_table(self) -> bool:
        """Whether its table is whole, as when a gate refused the run or a retry was interrupted."""
        return self._has_parts(filesystem.join(self.url, layout.PREDICTIONS_FOLDER))

    @property
    def has_rows(self) -> bool:
        """Whether its rows can be read; not after a start-over that was interrupted."""
        return self.has_shards or self.has_table

    @property
    def files(self) -> list[str]:
        """The files of its manifest rows: its shards until it is committed, then its table."""
        get_url = layout.shard_url if self.has_shards else layout.part_url
        return [get_url(self.url, part) for part in range(self.plan.num_parts)]

    def _has_parts(self, folder: str) -> bool:
        present = filesystem.list_names(folder)
        return {layout.part_name(part) for part in range(self.plan.num_parts)} <= set(present)

    @property
    def is_refused(self) -> bool:
        """Whether all its rows are labeled, and a quality gate refused the commit."""
        return "refused" in self.run_record


@dataclass(frozen=True, eq=False)
class PastRuns:
    """The runs in or below a folder.

    committed: oldest first
    """

    committed: tuple[CommittedRun, ...]
    unfinished: tuple[PlannedRun, ...]

    def select(self, *, has_predictions: bool) -> PastRuns:
        """The runs with predictions, or those with embeddings alone; a note names the others."""
        command = "embed" if has_predictions else "predict"
        _log_run_names(
            f"ignored, of `imgcls {command}`",
            [run.url for run in self.committed if run.has_predictions != has_predictions],
        )
        return replace(
            self,
            committed=tuple(r for r in self.committed if r.has_predictions == has_predictions),
            unfinished=tuple(
                run
                for run in self.unfinished
                if has_predictions
                == run.run_record["identity"]["settings"].get("has_predictions", True)
            ),
        )

    def check_task(self, place: str, task: TaskName | None = None) -> None:
        """Raise RequestError if runs have predictions of another task.

        place: what found the runs, with which the error begins
        task:  of the run to add; None if the runs are only to have one task
        """
        tasks = {run.url: run.task for run in self.committed if run.has_predictions}
        for planned in self.unfinished:
            if planned.run_record["identity"]["settings"].get("has_predictions", True):
                tasks[planned.url] = planned.run_record.get("task", "single_label")
        urls = {name: [url for url in tasks if tasks[url] == name] for name in tasks.values()}
        if len(urls.keys() | {task or next(iter(urls), None)}) < 2:
            return
        texts = [
            f"{name}: {', '.join(each[:_MAX_NAMED_RUNS])}"
            + (f" and {len(each) - _MAX_NAMED_RUNS:,} more" if len(each) > _MAX_NAMED_RUNS else "")
            for name, each in urls.items()
        ]
        new = "" if task is None else f", and the new run is {task}"
        raise RequestError(
            f"{place}: runs of different tasks cannot be merged ({'; '.join(texts)}{new}). Keep "
            "the runs of each task in a folder of their own"
        )

    @property
    def last_sequence(self) -> int:
        """The highest sequence number of all runs; 0 if there is none."""
        orders = [order for run in self.committed for order in find_origins(run).values()]
        orders += [run.order for run in self.unfinished]
        return max((order[0] for order in orders), default=0)


def find_past_runs(url: str, exclude: str | None = None) -> PastRuns:
    """The runs in a folder or below it; a `_SUCCESS` file without a run is ignored.

    exclude: a run to leave out
    Raises OutputError when a run's own files are damaged.
    """
    url = filesystem.absolute(url)
    try:
        found = {name.rpartition("/")[::2] for name in filesystem.walk(url)}
    except StorageMissing:
        found = set()
    planned = {folder for folder, name in found if name == layout.RUN_FILE}
    marked = {folder for folder, name in found if name == layout.SUCCESS_FILE}
    listings = {folder for folder, name in found if name == LISTING_FILE}
    _log_run_names(
        "ignored, not written by a predict run",
        [filesystem.join(url, each, layout.SUCCESS_FILE) for each in marked - planned - listings],
    )
    with create_thread_pool(_READ_THREADS, "read") as pool:
        finished = _list_run_folders(url, planned & marked, exclude)
        runs = list(pool.map(_open_if_committed, finished))
        committed = tuple(sorted(filter(None, runs), key=compute_run_order))
        started = _list_run_folders(url, planned - marked, exclude)
        started += [each for each, run in zip(finished, runs, strict=True) if run is None]
        records = zip(started, pool.map(layout.load_run, started), strict=True)
        unfinished = [PlannedRun(each, run) for each, run in records if run is not None]
    _log_run_names(
        "not finished, so the rows do not count as labeled", [each.url for each in unfinished]
    )
    return PastRuns(committed, tuple(sorted(unfinished, key=lambda run: run.order)))


def _open_if_committed(url: str) -> CommittedRun | None:
    """A run with a `_SUCCESS`; None where that is empty, see `layout.is_committed`."""
    try:
        return open_run(url)
    except OutputError:
        if layout.is_committed(url):
            raise
        return None


def _list_run_folders(url: str, folders: set[str], exclude: str | None) -> list[str]:
    found = [filesystem.join(url, each) if each else url for each in sorted(folders)]
    return [folder for folder in found if folder != (exclude or "").rstrip("/")]


def _log_run_names(message: str, urls: Sequence[str]) -> None:
    if urls:
        shown = ", ".join(sorted(urls)[:_MAX_NAMED_RUNS])
        more = f" and {len(urls) - _MAX_NAMED_RUNS:,} more" if len(urls) > _MAX_NAMED_RUNS else ""
        log.emit("note", f"{message}: {shown}{more}")


def compute_order(url: str, run_record: dict[str, Any], committed: str = "") -> RunOrder:
    """The position of a run among others.

    run_record: its `_run.json`
    committed:  time of the commit, for runs that have no time of the start
    """
    began = str(run_record.get("began") or committed)
    found = _DATE_PATTERN.findall(url)
    day, again = found[-1] if found else (began[:10], "")
    return int(run_record.get("sequence") or 0), day, int(again or 1), began, url


def compute_run_order(run: CommittedRun) -> RunOrder:
    """The position of a committed run; a compacted history has that of its newest rows."""
    if run.merged_runs:
        return max(find_origins(run).values())
    return compute_order(run.url, run.run_record, str(run.success_record["committed"]))


def find_origins(run: CommittedRun) -> dict[str, RunOrder]:
    """The runs whose rows a run has, by URL: itself, or those that were merged into it."""
    if not run.merged_runs:
        return {run.url: compute_run_order(run)}
    known = run.run_record.get("origins")
    if known:
        return {url: _parse_order(values) for url, values in known.items()}
    # merged by an earlier version, without numbers
    until = str(run.success_record.get("labelled_until", run.success_record["committed"]))
    return {url: compute_order(url, {}, until) for url in run.merged_runs}


def _parse_order(values: Sequence[Any]) -> RunOrder:
    sequence, day, again, began, url = values
    return int(sequence), str(day), int(again), str(began), str(url)


def compute_next_sequence(output: str, past_runs: PastRuns | None) -> int:
    """The sequence number of a run that is planned now.

    past_runs: those that `--since` found; None reads the runs in the parent folder of the output
    """
    highest = past_runs.last_sequence if past_runs is not None else 0
    above = filesystem.parent(output)
    try:
        pages = list(filesystem.iter_pages(above, deep=False))
    except (StorageMissing, StorageForbidden):
        return highest + 1
    folders = [filesystem.absolute(name) for page in pages for name in page.folders]
    with create_thread_pool(_READ_THREADS, "read") as pool:
        return 1 + max([highest, *pool.map(_read_sequence, folders)])


def _read_sequence(folder: str) -> int:
    try:
        run_record = json.loads(filesystem.read(filesystem.join(folder, layout.RUN_FILE)))
    except (StorageMissing, StorageForbidden, ValueError):
        return 0
    known = run_record.get("sequence") if isinstance(run_record, dict) else None
    return known if isinstance(known, int) else 0


def format_date(date: datetime.date | None) -> str:
    """The date as YYYY-MM-DD; today in UTC if None."""
    return (date or datetime.datetime.now(datetime.UTC).date()).isoformat()


@dataclass(frozen=True)
class OutputSeries:
    """The output folders of one date: `date=2026-11-27`, then `date=2026-11-27.2` and so on."""

    template: str
    date: datetime.date | None

    def resolve_folder(self, number: int) -> str:
        """The folder of the date's n-th run, counted from 1."""
        day = format_date(self.date) + (f".{number}" if number > 1 else "")
        return filesystem.absolute(self.template.replace("{date}", day).rstrip("/"))

    @property
    def has_date(self) -> bool:
        """Whether the output contains {date}, so that a date may have further folders."""
        return "{date}" in self.template

    def load_runs(self) -> list[tuple[str, dict[str, Any]]]:
        """The folders that hold a run, oldest first, each with its `_run.json`."""
        found: list[tuple[str, dict[str, Any]]] = []
        while not found or self.has_date:
            folder = self.resolve_folder(len(found) + 1)
            run_record = layout.load_run(folder)
            if run_record is None:
                break
            found.append((folder, run_record))
        return found

    def find_next_folder(self, folder: str) -> str:
        """The folder after `folder`; raises OutputError when the output contains no {date}."""
        if not self.has_date:
            raise OutputError(
                f"output {folder}: holds a run of other rows. Put {{date}} in --output, as in "
                "labels/date={date}, so that each run gets its own folder"
            )
        number = 1
        while self.resolve_folder(number) != folder:
            number += 1
        return self.resolve_folder(number + 1)
