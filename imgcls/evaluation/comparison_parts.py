"""Parts of a comparison of two runs of any task: differing rows, messages and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.metrics.columns import Ints
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun

MAX_DIFFERING = 1_000_000
_RIGHT = np.array(["neither", "b", "a", "both"])


class _Tables(Protocol):
    """The tables of a comparison."""

    @property
    def per_class(self) -> pa.Table: ...
    @property
    def slices(self) -> pa.Table: ...
    @property
    def differing(self) -> pa.Table: ...
    @property
    def num_differing(self) -> int: ...


class DifferingRows:
    """Rows with different predictions: all are counted, at most MAX_DIFFERING are kept.

    schema: of the rows that are kept, with the columns row and right
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.count = 0
        self._kept = 0
        self._tables = [schema.empty_table()]

    def keep(self, rows: Ints) -> Ints:
        """Count differing rows, and return those of them to `add`."""
        kept = rows[: MAX_DIFFERING - self._kept]
        self.count += len(rows)
        self._kept += len(kept)
        return kept

    def add(self, columns: Sequence[pa.Array | pa.ChunkedArray]) -> None:
        """Add rows, as columns of the schema."""
        self._tables.append(pa.table(list(columns), schema=self.schema))

    def sort(self) -> pa.Table:
        """Sort rows: first those that only A predicts correctly, then only B, then the others."""
        rows = pa.concat_tables(self._tables)
        rank = pc.fill_null(pc.index_in(rows["right"], value_set=pa.array(["a", "b"])), 2)
        order = pa.table({"rank": rank, "row": rows["row"]})
        keys = [("rank", "ascending"), ("row", "ascending")]
        return rows.take(pc.sort_indices(order, sort_keys=keys))


def name_right(is_right_a: np.ndarray, is_right_b: np.ndarray) -> pa.Array:
    """The column right, "neither", "b", "a" or "both", of bool arrays."""
    return pa.array(_RIGHT[2 * is_right_a + is_right_b].tolist(), pa.string())


def log_cut_rows(comparison: _Tables) -> None:
    """Log a note if only the first of the differing rows are written."""
    if comparison.num_differing > comparison.differing.num_rows:
        log.emit(
            "note",
            f"only the first {comparison.differing.num_rows:,} of the differing rows are "
            "written; the counts include all",
        )


def log_worst_groups(
    comparison: _Tables, min_loss: float, describe: Callable[[dict[str, Any]], str]
) -> None:
    """Log the classes and slices with the largest losses, at most five of each.

    min_loss: loss that is shown, such as 0.001
    describe: text for a row of the table
    """
    for name, table in (("class", comparison.per_class), ("slice", comparison.slices)):
        for row in table.slice(0, 5).to_pylist():
            difference = row["difference"]
            if difference is not None and difference < 0 and -difference >= min_loss:
                what = row.get("label") or f"{row['slice_by']}={row['value']}"
                log.show(f"  worse {name}: {what}  {100 * difference:+.1f} points{describe(row)}")


def write_comparison(
    output: str, a: CommittedRun, b: CommittedRun, comparison: _Tables, summary: dict[str, Any]
) -> None:
    """Write the tables and summary.json."""
    names = ("per_class", "slices", "differing")
    layout.write_tables(output, {name: getattr(comparison, name) for name in names})
    body = {"run_a": a.url, "run_b": b.url, **summary}
    url = filesystem.join(output, layout.SUMMARY_FILE)
    filesystem.write(url, (json.dumps(body, indent=2) + "\n").encode())
