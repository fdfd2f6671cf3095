"""Lineage of one image: its newest prediction and label, and what made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from imgcls.data.manifests.image_urls import normalize_url
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError, StorageUnavailable
from imgcls.evaluation.overview.entry import RunEntry
from imgcls.evaluation.overview.label_provenance import (
    PROVENANCE_COLUMNS,
    Facts,
    describe_label_row,
    match_image,
)
from imgcls.evaluation.overview.lineage import LineageBuilder, LineageNode
from imgcls.evaluation.overview.overview import RunList, compute_entry_order, find_series
from imgcls.evaluation.overview.records import UNREADABLE, explain_problem
from imgcls.evaluation.row_lookup import read_part_rows
from imgcls.formatting import format_count
from imgcls.inference.nights import compute_run_order
from imgcls.metrics.formatting import format_percent
from imgcls.runs.committed import CommittedRun, iter_tables, open_run

_MAX_PROBLEMS = 10
"""Runs that could not be read and are named."""
_HitOrder = tuple[Any, ...]
_LABEL_SCORES = ("confidence", "label_score")
_MERGED_COLUMNS = ("run", "bundle_sha256")
"""Columns of a history."""


def build_image_lineage(runs: RunList, image: str) -> LineageNode:
    """The newest prediction of an image, and the tree of the run that made it.

    Reads the paths of the committed runs of each folder of runs, the newest first, until one has
    the image. Of several folders, whose order is their own, the last commit counts; of several
    histories, the newest run that they merged. Runs that cannot be read are facts of the tree.
    Raises RequestError if no run has it.
    """
    url = normalize_url(filesystem.absolute(image))
    builder = LineageBuilder(runs, url)
    problems = [
        f"{each.path}: {each.problem}"
        for each in runs.entries
        if each.state == "damaged" and each.kind in ("predictions", "history", "unknown")
    ]
    for kind in ("predictions", "history"):
        hits = list(_find_hits(runs, kind, url, problems))
        if hits:
            _, entry, facts = max(hits, key=lambda hit: hit[0])
            facts += [("not searched", each) for each in problems[:_MAX_PROBLEMS]]
            return LineageNode("", f"image {url}", tuple(facts), (builder.build(entry, "run"),))
    count = sum(each.state == "committed" for each in runs.entries)
    damaged = f" ({problems[0]})" if problems else ""
    raise RequestError(
        f"lineage {image}: is no output in {runs.folder}, and none of "
        f"{format_count(count, 'committed run')} there has an image of this path{damaged}. Pass "
        "the path of an output, or the path of an image as in a manifest"
    )


def _find_hits(
    runs: RunList, kind: str, image: str, problems: list[str]
) -> Iterator[tuple[_HitOrder, RunEntry, Facts]]:
    """The newest run of each folder that has the image, and each history; facts of the row."""
    series: dict[str, list[RunEntry]] = {}
    for entry in runs.entries:
        if entry.state == "committed" and entry.kind == kind:
            place = entry.url if kind == "history" else find_series(entry)
            series.setdefault(place, []).append(entry)
    for entries in series.values():
        for entry in sorted(entries, key=compute_entry_order, reverse=True):
            try:
                run = open_run(entry.url)
                row = _find_row(run, image)
                if row is None:
                    continue
                order = compute_run_order(run) if kind == "history" else ()
                hit = (*order, entry.date or ""), entry, _describe_row(run, row)
            except StorageUnavailable:
                raise
            except UNREADABLE as error:
                problems.append(f"{entry.path}: {explain_problem(error)}")
                continue
            yield hit
            break


def _find_row(run: CommittedRun, image: str) -> dict[str, Any] | None:
    """The columns of `_describe_row` of an image; None if the run does not have it."""
    for file in run.files:
        start = 0
        for table in iter_tables(replace(run, files=(file,)), [run.path_column]):
            hits = match_image(table[run.path_column], run.root, image)
            place = pc.index(hits, True).as_py()
            if place >= 0:
                wanted = [*_list_result_columns(run), *_MERGED_COLUMNS, *PROVENANCE_COLUMNS]
                names = [name for name in dict.fromkeys(wanted) if name in run.schema.names]
                found = read_part_rows(file, names, np.array([start + place]))
                row: dict[str, Any] = found.to_pylist()[0]
                return row
            start += table.num_rows
    return None


def _list_result_columns(run: CommittedRun) -> list[str]:
    labels = () if run.label_columns is None else run.label_columns.names
    names = [run.label_column or "", *labels, "predicted_label", "predicted_labels", "confidence"]
    return [*names, "label_score", "accepted", "is_ood", "status", "error"]


def _describe_row(run: CommittedRun, row: dict[str, Any]) -> Facts:
    """Prediction, label and label provenance of a row."""
    facts = []
    for name in dict.fromkeys(_list_result_columns(run)):
        value = row.get(name)
        if value is None or (name == "status" and value == "ok"):
            continue
        shown = format_percent(value) if name in _LABEL_SCORES else _format_value(value)
        facts.append((name.replace("_", " "), shown))
    if run.merged_runs:
        facts += [(name, str(row[name])) for name in _MERGED_COLUMNS if row.get(name)]
    return facts + describe_label_row(row)


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def find_entry(runs: RunList, lineage: str) -> RunEntry | None:
    """The output that `--lineage` names: by its path, or by 8 or more digits of a bundle's hash."""
    entry = runs.find(lineage)
    if entry is None and len(lineage) >= 8:
        bundles = (each for each in runs.entries if each.kind == "bundle")
        entry = next((e for e in bundles if (e.bundle_sha256 or "").startswith(lineage)), None)
    return entry
