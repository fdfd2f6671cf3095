"""Reading columns: any encoding of names, any slice of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.metrics.columns import NULL_LABEL, UNKNOWN_LABEL, encode_classes, take_scores

NAMES = st.lists(st.sampled_from(["ant", "bee", "no class", None]), max_size=20)
CODES = {"ant": 0, "bee": 1, "no class": UNKNOWN_LABEL, None: NULL_LABEL}


@given(parts=st.lists(NAMES, max_size=4), encoded=st.booleans())
def test_names_become_codes_in_any_encoding(parts: list[list[str | None]], encoded: bool) -> None:
    chunks = [pa.array(part, pa.string()) for part in parts]
    if encoded:
        chunks = [chunk.dictionary_encode() for chunk in chunks]
    kind = pa.dictionary(pa.int32(), pa.string()) if encoded else pa.string()
    column = pa.chunked_array(chunks, type=kind)
    got = encode_classes(column, ["ant", "bee"])
    assert got.tolist() == [CODES[name] for part in parts for name in part]


def test_a_null_entry_of_a_dictionary_is_no_name() -> None:
    encoded = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None], pa.int32()), pa.array(["ant", None])
    )
    assert encode_classes(pa.chunked_array([encoded]), ["ant"]).tolist() == [
        0,
        NULL_LABEL,
        NULL_LABEL,
    ]


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("start", [0, 3])
def test_scores_are_those_of_the_rows_after_any_slice_and_next_to_nulls(
    start: int, kind: type[np.floating[Any]]
) -> None:
    values = np.random.default_rng(0).random((8, 3)).astype(kind)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 3)
    holed = lists.take(pa.array([0, 1, None, 3, 4, None, 6, 7]))
    column = pa.chunked_array([holed.slice(start, 2), holed.slice(start + 2, 3)])
    rows = np.flatnonzero(column.is_valid().to_numpy())
    found = take_scores(column, rows)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, values[start + rows])


def test_names_are_compared_in_nfc_and_a_blank_one_is_null() -> None:
    column = pa.chunked_array([["caf\u00e9", "cafe\u0301", "", " ", "\u3000", "ant "]])
    for classes in (["ant", "caf\u00e9"], ["ant", "cafe\u0301"]):
        assert encode_classes(column, classes).tolist() == [
            1,
            1,
            NULL_LABEL,
            NULL_LABEL,
            NULL_LABEL,
            UNKNOWN_LABEL,
        ]
        encoded = encode_classes(column.dictionary_encode(), classes)
        assert encoded.tolist() == [1, 1, NULL_LABEL, NULL_LABEL, NULL_LABEL, UNKNOWN_LABEL]
