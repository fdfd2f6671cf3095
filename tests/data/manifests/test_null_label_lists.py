"""Labels of rows without a value, in columns whose other rows have one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from imgcls.data.manifests.label_columns import LabelColumns

OFFSETS = pa.array([0, 1, 3, 4], pa.int32())
COLUMNS = {
    "plain text": pa.array(["cat", None, "dog"]),
    # the null row has a range of values, which Parquet readers may leave there
    "lists": pa.ListArray.from_arrays(
        OFFSETS, pa.array(["cat", "dog", "dog", "dog"]), mask=pa.array([False, True, False])
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_null_row_is_unknown_and_moves_no_other(name: str) -> None:
    columns = LabelColumns("label")
    table = pa.table({"label": COLUMNS[name]})
    found = columns.encode(table, ["cat", "dog"])
    assert found.targets.tolist() == [[1, 0], [-1, -1], [0, 1]]
    assert not found.has_unknown_name.any()
    assert columns.read_names(table).to_pylist() == [["cat"], None, ["dog"]]
    assert columns.count_names(table) == {"cat": 1, "dog": 1}
    assert np.array_equal(columns.encode(table.slice(1), ["dog"]).targets, [[-1], [1]])
