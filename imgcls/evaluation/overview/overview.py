"""All outputs in a folder as one table: runs, bundles, evaluations, searches, selections."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import (
    StorageConfig,
    create_thread_pool,
    use_settings,
)
from imgcls.errors import RequestError
from imgcls.evaluation.config import DEFAULT_DEPTH
from imgcls.evaluation.overview.entry import RunEntry
from imgcls.evaluation.overview.readers import read_entry
from imgcls.evaluation.overview.search import READ_THREADS, find_outputs
from imgcls.formatting import format_count, format_share
from imgcls.inference.nights import RunOrder, compute_order
from imgcls.metrics.formatting import format_interval, format_percent
from imgcls.models.bundle import is_registry_uri

if TYPE_CHECKING:
    import pandas as pd

_MAX_CELL = 60
_SHORT_HASH = 12
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:\.\d+)?")


@dataclass(frozen=True, repr=False, eq=False)
class RunList:
    """The outputs in a folder, as `imgcls.list_runs` returns them.

    Attributes
    ----------
    folder : str
        The folder that was searched.
    entries : tuple of RunEntry
        The outputs, in order of their paths.
    notes : tuple of str
        What was not searched, and which links point to an output.
    """

    folder: str
    entries: tuple[RunEntry, ...]
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """The entries as a table: a row per output, a column per field of `RunEntry`.

        The main metric has the columns metric, value, lower, upper and labeled_rows.
        """
        import pandas as pd

        rows = [_flatten(entry) for entry in self.entries]
        return pd.DataFrame(rows, columns=list(rows[0]) if rows else _flatten(_EMPTY).keys())

    def format_table(self) -> str:
        """The entries as text for a terminal."""
        return format_entries(self.entries)

    def find(self, url: str) -> RunEntry | None:
        """The entry at a path or URL; None if there is none."""
        below = filesystem.absolute(filesystem.join(self.folder, url.rstrip("/")))
        wanted = {filesystem.absolute(url).rstrip("/"), below}
        return next((each for each in self.entries if each.url.rstrip("/") in wanted), None)

    def __repr__(self) -> str:
        return f"<RunList of {self.folder}: {describe_counts(self.entries)}>"

    def _repr_html_(self) -> str:
        from imgcls.evaluation.overview.page import render_notebook_list

        return render_notebook_list(self)


_EMPTY = RunEntry(kind="unknown", state="foreign", path="", url="")


def list_runs(
    folder: str | os.PathLike[str],
    *,
    depth: int = DEFAULT_DEPTH,
    storage: StorageConfig | Mapping[str, Any] | None = None,
) -> RunList:
    """List the outputs in a folder: runs, bundles, evaluations, searches and selections.

    Reads a few small files per output and no table of predictions. A damaged output is an entry
    with the reason.

    Parameters
    ----------
    folder
        Path or URL of the folder.
    depth
        Maximum number of levels below it.
    storage
        Storage settings, e.g. `{"endpoint_url": "http://localhost:9000"}`.

    Returns
    -------
    RunList
        The outputs; in a notebook a table is shown.

    Raises
    ------
    RequestError
        If there is no such folder.
    StorageError
        If the folder cannot be listed, or a store does not answer.

    Examples
    --------
    >>> import imgcls
    >>> runs = imgcls.list_runs("demo")  # doctest: +SKIP
    >>> runs.to_pandas()[["path", "kind", "state", "value"]]  # doctest: +SKIP
    """
    if depth < 0:
        raise RequestError(f"depth {depth}: must be at least 0")
    with use_settings(storage):
        if is_registry_uri(os.fspath(folder)):
            raise RequestError(f"folder {folder}: is a registered model; pass a folder of outputs")
        url = filesystem.absolute(os.fspath(folder))
        found = find_outputs(url, depth)
        with create_thread_pool(READ_THREADS, "read") as pool:
            read = [each for each in pool.map(read_entry, found.outputs) if each is not None]
        entries = mark_current(read)
        links = [f"{path} is a link to {target}" for path, target in sorted(found.links.items())]
        return RunList(url, tuple(entries), (*found.notes, *links))


def mark_current(entries: Sequence[RunEntry]) -> list[RunEntry]:
    """Mark the newest committed run of predictions of each folder of runs, and its bundle.

    The order is that of `predict --since`: by the sequence number, then by date. Folders that
    differ in a date alone are one folder of runs.
    """
    newest: dict[str, tuple[RunOrder, RunEntry]] = {}
    for entry in entries:
        if entry.kind == "predictions" and entry.state == "committed":
            order, above = compute_entry_order(entry), find_series(entry)
            if above not in newest or order > newest[above][0]:
                newest[above] = (order, entry)
    current = {entry.url for _, entry in newest.values()}
    bundles = {entry.bundle_sha256 for _, entry in newest.values()} - {None}
    return [
        dataclasses.replace(
            entry,
            is_current=entry.url in current
            or (entry.kind == "bundle" and entry.bundle_sha256 in bundles),
        )
        for entry in entries
    ]


def find_series(entry: RunEntry) -> str:
    """The folder of runs that a run is in, with {date} for dates as of `--output a/{date}/b`."""
    return _DATE.sub("{date}", filesystem.parent(entry.url))


def compute_entry_order(entry: RunEntry) -> RunOrder:
    """The position of a run among others, as `predict --since` orders them."""
    sequence = entry.record.get("sequence")
    known = {
        "sequence": sequence if isinstance(sequence, int) else 0,
        "began": entry.record.get("began"),
    }
    return compute_order(entry.url, known, entry.date or "")


def describe_counts(entries: Sequence[RunEntry]) -> str:
    """Numbers of entries by kind and of those that are not committed or finished."""
    if not entries:
        return "no outputs"
    kinds = dict.fromkeys(entry.kind for entry in entries)
    texts = [f"{kind} {sum(each.kind == kind for each in entries):,}" for kind in sorted(kinds)]
    open_states = [each.state for each in entries if each.state not in ("committed", "finished")]
    states = [f"{open_states.count(state):,} {state}" for state in sorted(set(open_states))]
    total = format_count(len(entries), "output")
    return f"{total} ({', '.join(texts)})" + (f"; {', '.join(states)}" if states else "")


def _flatten(entry: RunEntry) -> dict[str, Any]:
    values = entry.to_json()
    headline = values.pop("headline") or {}
    names = {
        "metric": "name",
        "value": "value",
        "lower": "lower",
        "upper": "upper",
        "labeled_rows": "rows",
    }
    return values | {column: headline.get(name) for column, name in names.items()}


# ---------------------------------------------------------------------- text


def format_entries(entries: Sequence[RunEntry]) -> str:
    """A table of entries for a terminal, with the problems below it."""
    head = ("path", "kind", "state", "date", "model", "rows", "metric", "errors", "PSI")
    lines = [head] + [_list_cells(entry) for entry in entries]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numbers = {head.index(name) for name in ("rows", "errors", "PSI")}
    texts = [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    texts += [f"{each.path}: {escape_text(each.problem)}" for each in entries if each.problem]
    return "\n".join(texts)


def _list_cells(entry: RunEntry) -> tuple[str, ...]:
    return (
        _shorten(escape_text(entry.path)),
        entry.kind,
        entry.state,
        escape_text((entry.date or "")[:16].replace("T", " ")),
        _shorten(escape_text(format_model(entry))),
        "" if entry.rows is None else f"{entry.rows:,}",
        format_headline(entry),
        "" if entry.error_rate is None else format_share(entry.error_rate),
        "" if entry.psi is None else f"{entry.psi:.3f}",
    )


def format_model(entry: RunEntry) -> str:
    """Name, start of the hash, and whether it is the current model."""
    sha256 = (entry.bundle_sha256 or "")[:_SHORT_HASH]
    current = "current" if entry.is_current else ""
    name = "" if entry.kind == "bundle" else entry.model_name
    return " ".join(text for text in (name, sha256, current) if text)


def format_headline(entry: RunEntry) -> str:
    """The main metric with its interval and its number of rows."""
    found = entry.headline
    if found is None:
        return ""
    text = f"{found.label} {format_percent(found.value)}"
    if found.interval is not None:
        text += f" ({format_interval(found.name, found.interval)})"
    return text if found.rows is None else f"{text}, n {found.rows:,}"


def escape_text(text: str) -> str:
    """Text for a terminal: control characters of a name are shown as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CELL else f"...{text[3 - _MAX_CELL :]}"
