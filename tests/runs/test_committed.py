"""Columns of committed runs, as later commands read them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from imgcls.runs.committed import iter_tables, open_run
from tests.evaluation.runs import commit, drawn


def test_views_in_a_run_of_an_earlier_version_are_read_as_plain_types(tmp_path: Path) -> None:
    table = drawn(3)
    names = pa.array(["a", None, "c"], pa.string_view())
    table = table.append_column("note", names).append_column("mark", names.cast(pa.binary_view()))
    run = open_run(str(commit(tmp_path / "out", table)))
    (found,) = iter_tables(run, ["note", "mark"])
    assert found.schema.types == [pa.string(), pa.binary()]
    rows = found.take(pa.array([2, 1])).to_pylist()
    assert rows == [{"note": "c", "mark": b"c"}, {"note": None, "mark": None}]
