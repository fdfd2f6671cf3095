"""HTML pages of the overview: the table of all outputs, and the lineage of one."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from typing import Any

from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.evaluation.overview.entry import RunEntry
from imgcls.evaluation.overview.lineage import LineageNode
from imgcls.evaluation.overview.overview import RunList, describe_counts
from imgcls.evaluation.report_parts import TEMPLATES, base_name, format_optional_percent
from imgcls.formatting import format_duration
from imgcls.html import render_page
from imgcls.metrics.formatting import format_interval, format_percent
from imgcls.runs import layout

_OPEN_STATES = ("damaged", "foreign", "refused")
_MAX_NOTEBOOK_ROWS = 200


def render_list(runs: RunList, target: str | None = None) -> str:
    """Render the page of all outputs.

    target: local path of the page, from which reports are linked; None links none
    """
    return render_page(TEMPLATES, "runs.html.j2", _build_values(runs, target))


def render_notebook_list(runs: RunList) -> str:
    """Render the table for a notebook, with up to 200 outputs."""
    values = _build_values(runs, None)
    omitted = max(0, len(values["rows"]) - _MAX_NOTEBOOK_ROWS)
    values["rows"] = values["rows"][:_MAX_NOTEBOOK_ROWS]
    return render_page(TEMPLATES, "runs_notebook.html.j2", values | {"omitted_rows": omitted})


def render_lineage(runs: RunList, tree: LineageNode) -> str:
    """Render the page of one lineage."""
    values = {
        "title": tree.title,
        "subtitle": f"lineage, in {hide_credentials(runs.folder)}",
        "tree": tree,
    }
    return render_page(TEMPLATES, "lineage.html.j2", values)


def _build_values(runs: RunList, target: str | None) -> dict[str, Any]:
    return {
        "title": f"{base_name(runs.folder)}: all runs",
        "subtitle": f"{hide_credentials(runs.folder)}: {describe_counts(runs.entries)}",
        "cards": list(_list_cards(runs)),
        "rows": [_build_row(entry, target) for entry in runs.entries],
        "notes": runs.notes,
    }


def _list_cards(runs: RunList) -> Iterator[dict[str, str]]:
    """A card per current run: its model, metric and date."""
    for entry in runs.entries:
        if entry.is_current and entry.kind == "predictions":
            found = entry.headline
            value = "committed" if found is None else format_percent(found.value)
            interval = _format_interval(entry)
            what = "" if found is None else f"{found.label} " + (interval and f"{interval}, ")
            yield {
                "name": f"newest run: {entry.path}",
                "value": value,
                "note": f"{what}model {entry.model_name} {(entry.bundle_sha256 or '')[:12]}",
            }
    open_states = sum(entry.state in _OPEN_STATES for entry in runs.entries)
    if open_states:
        yield {
            "name": "damaged, foreign or refused",
            "value": f"{open_states:,}",
            "note": "outputs",
        }


def _build_row(entry: RunEntry, target: str | None) -> dict[str, Any]:
    found = entry.headline
    return {
        "entry": entry,
        "is_bad": entry.state in _OPEN_STATES,
        "link": _find_report(entry, target),
        "model": "" if entry.kind == "bundle" else entry.model_name,
        "sha256": (entry.bundle_sha256 or "")[:12],
        "date": (entry.date or "")[:16].replace("T", " "),
        "metric": None if found is None else found.label,
        "value": None if found is None else found.value,
        "value_text": "" if found is None else format_percent(found.value),
        "interval": _format_interval(entry),
        "labeled": None if found is None else found.rows,
        "errors": format_optional_percent(entry.error_rate),
        "duration": "" if entry.seconds is None else format_duration(entry.seconds),
        "version": entry.versions.get("imgcls", ""),
        "versions": ", ".join(f"{name} {text}" for name, text in entry.versions.items()),
        "commit": (entry.git_commit or "")[:12],
    }


def _format_interval(entry: RunEntry) -> str:
    found = entry.headline
    if found is None or found.interval is None:
        return ""
    return format_interval(found.name, found.interval)


def _find_report(entry: RunEntry, target: str | None) -> str | None:
    """Relative link from the page to the report of an entry, if both lie on a disk."""
    if target is None or not entry.has_report:
        return None
    if not filesystem.is_local(target) or not filesystem.is_local(entry.url):
        return None
    report = os.path.join(filesystem.local_path(entry.url), layout.REPORT_FILE)
    start = os.path.dirname(filesystem.absolute(target))
    return "./" + urllib.parse.quote(os.path.relpath(report, start), errors="surrogateescape")
