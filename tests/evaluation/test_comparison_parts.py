"""Differing rows of two runs: all are counted, the first of them are kept and sorted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from imgcls.evaluation import comparison_parts
from imgcls.evaluation.comparison_parts import DifferingRows, name_right


def test_at_most_the_maximum_is_kept_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_parts, "MAX_DIFFERING", 5)
    rows = DifferingRows(pa.schema([("row", pa.int64()), ("right", pa.string())]))
    for start in (0, 4, 8):
        kept = rows.keep(np.arange(start, start + 4))
        if len(kept):
            rows.add([pa.array(kept), name_right(kept % 4 == 1, kept % 4 >= 2)])
    assert rows.count == 12
    assert rows.sort().to_pydict() == {
        "row": [1, 2, 3, 0, 4],
        "right": ["a", "b", "b", "neither", "neither"],
    }


def test_without_differing_rows_the_table_has_its_columns() -> None:
    schema = pa.schema([("row", pa.int64()), ("right", pa.string())])
    assert DifferingRows(schema).sort().schema == schema
