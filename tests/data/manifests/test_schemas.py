"""Schemas of several tables: unified without loss, or refused by name."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.manifests.schemas import conform_table, unify_schemas, widen_types
from imgcls.errors import ManifestError

TEXT8 = pa.dictionary(pa.int8(), pa.string())
TEXT32 = pa.dictionary(pa.int32(), pa.string())


def unified(one: pa.Array, other: pa.Array) -> tuple[pa.DataType, list[Any]]:
    """The type of both columns together, and the values of both in it."""
    tables = [pa.table({"x": array}) for array in (one, other)]
    schema = unify_schemas([("a", tables[0].schema), ("b", tables[1].schema)], "manifest")
    both = pa.concat_tables(conform_table(table, schema, "a") for table in tables)
    return schema.field("x").type, both["x"].to_pylist()


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (pa.nulls(2), pa.array(["a"]), pa.string()),
        (pa.array(["a"]), pa.nulls(2), pa.string()),
        (pa.nulls(1), pa.array(["a"]).cast(TEXT8), TEXT32),
        (pa.array(["a"]).cast(TEXT8), pa.array(["b", None]).cast(TEXT8), TEXT32),
        (pa.array(["a"]).cast(TEXT8), pa.array(["b"]), pa.string()),
        (pa.array(["a"]), pa.array(["b"]).cast(pa.large_string()), pa.large_string()),
        (pa.array(["a"]), pa.array(["b"]).cast(pa.string_view()), pa.string()),
        (pa.array([1], pa.int8()), pa.array([300], pa.int64()), pa.int64()),
        (pa.array([200], pa.uint8()), pa.array([-3], pa.int8()), pa.int16()),
        (pa.array([2**64 - 1], pa.uint64()), pa.array([3], pa.uint8()), pa.uint64()),
        (pa.array([1, None]), pa.array([2.5, None]), pa.float64()),
        (pa.array([1.5], pa.float32()), pa.array([0.1], pa.float64()), pa.float64()),
        (
            pa.array([Decimal("1.25")], pa.decimal128(5, 2)),
            pa.array([Decimal(7)], pa.decimal128(10, 0)),
            pa.decimal128(12, 2),
        ),
        (
            pa.array([1], pa.timestamp("s", "UTC")),
            pa.array([2], pa.timestamp("us", "UTC")),
            pa.timestamp("us", "UTC"),
        ),
        (
            pa.array([1], pa.timestamp("s", "UTC")),
            pa.array([2], pa.timestamp("s", "Asia/Tokyo")),
            pa.timestamp("s", "UTC"),
        ),
        (pa.array([[None]]), pa.array([["a"], None]), pa.list_(pa.string())),
        (pa.array([{"a": None}]), pa.array([{"a": "x"}]), pa.struct([("a", pa.string())])),
        (pa.array([[1.0]]), pa.array([[2.0]], pa.list_(pa.float64(), 1)), pa.list_(pa.float64())),
        (
            pa.array([[0.5, 1.0]], pa.list_(pa.float16(), 2)),
            pa.array([[0.1]], pa.list_(pa.float64(), 1)),
            pa.list_(pa.float64()),
        ),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_unified_columns_keep_every_value(
    one: pa.Array, other: pa.Array, kind: pa.DataType
) -> None:
    assert unified(one, other) == (kind, one.to_pylist() + other.to_pylist())
    assert unified(other, one)[1] == other.to_pylist() + one.to_pylist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array(["1"])),
        (pa.array([b"a"]), pa.array(["a"])),
        (pa.array([True]), pa.array([1])),
        (pa.array([1], pa.int8()), pa.array([2**63], pa.uint64())),
        (pa.array([1], pa.timestamp("s", "UTC")), pa.array([1], pa.timestamp("s"))),
        (pa.array([1.5]), pa.array([Decimal("1.5")])),
        (pa.array([["a"]]), pa.array([[1]])),
        (pa.array([["a"]]), pa.array(["a"])),
    ],
    ids=lambda value: str(value.type),
)
def test_columns_that_cannot_be_unified_are_refused_by_name_type_and_place(
    one: pa.Array, other: pa.Array
) -> None:
    with pytest.raises(ManifestError) as caught:
        unified(one, other)
    assert str(caught.value) == (
        f"manifest b: its column 'x' is {other.type}, and {one.type} in a; "
        "write it as one type in all tables"
    )


def test_a_value_that_would_change_is_refused() -> None:
    with pytest.raises(
        ManifestError, match=r"^a: column 'x' is int64 and cannot be read as double"
    ):
        unified(pa.array([2**53 + 1]), pa.array([0.5]))
    far = pa.array([10**11], pa.timestamp("s"))
    with pytest.raises(ManifestError, match=r"column 'x' is timestamp\[s\] and cannot be read as"):
        unified(far, pa.array([1], pa.timestamp("ns")))


def test_the_place_of_a_type_is_that_of_the_file_which_has_it() -> None:
    schemas = [("a", pa.schema([("x", pa.null())])), ("b", pa.schema([("x", pa.string())])),
               ("c", pa.schema([("x", pa.int64())]))]  # fmt: skip
    with pytest.raises(ManifestError, match=r"^run c: its column 'x' is int64, and string in b;"):
        unify_schemas(schemas, "run")


def test_the_order_is_that_of_the_first_and_nullable_is_kept() -> None:
    first = pa.schema([pa.field("x", pa.int8(), nullable=False), ("y", pa.string())])
    other = pa.schema([("y", pa.string()), pa.field("x", pa.int8(), nullable=False)])
    assert unify_schemas([("a", first), ("b", other)], "manifest").equals(first)
    schema = unify_schemas([("a", first), ("b", other.set(1, pa.field("x", pa.int8())))], "m")
    assert schema.field("x").nullable


def test_an_absent_column_is_null_only_where_columns_are_optional() -> None:
    one, other = pa.table({"x": [1], "y": ["a"]}), pa.table({"y": ["b"], "z": [2.5]})
    schemas = [("a", one.schema), ("b", other.schema)]
    with pytest.raises(ManifestError, match=r"its columns \(y, z\) differ from \(x, y\) in a"):
        unify_schemas(schemas, "manifest")
    schema = unify_schemas(schemas, "run", optional=True)
    both = pa.concat_tables(conform_table(each, schema, "") for each in (one, other))
    assert both.to_pylist() == [{"x": 1, "y": "a", "z": None}, {"x": None, "y": "b", "z": 2.5}]


def test_dictionaries_have_the_values_of_any_number_of_files() -> None:
    def shard(number: int) -> pa.Table:
        codes, names = pa.array(range(100), pa.int8()), [f"{number}-{i}" for i in range(100)]
        return pa.table({"x": pa.DictionaryArray.from_arrays(codes, pa.array(names))})

    schema = widen_types(shard(0).schema)
    assert schema.field("x").type == TEXT32
    whole = pa.concat_tables(conform_table(shard(n), schema, "") for n in range(5)).combine_chunks()
    assert whole["x"].to_pylist() == [f"{n}-{i}" for n in range(5) for i in range(100)]


def test_a_schema_without_dictionaries_is_not_changed() -> None:
    schema = pa.schema(
        [
            ("a", pa.list_(pa.field("element", pa.string(), nullable=False))),
            ("b", pa.map_(pa.string(), pa.int8())),
            pa.field("c", pa.string(), metadata={"PARQUET:field_id": "3"}),
        ]
    )
    assert widen_types(schema).equals(schema, check_metadata=True)


def test_views_become_plain_types(tmp_path: Path) -> None:
    strings = pa.array(["a.jpg", "b.jpg", None], pa.string_view())
    table = pa.table(
        {
            "path": strings,
            "tags": pa.array([["x"], None, []], pa.list_(pa.string_view())),
            "note": pa.array([{"by": "me"}] * 3, pa.struct([("by", pa.string_view())])),
            "mark": pa.array([b"1", None, b"3"], pa.binary_view()),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    plain = [
        pa.string(), pa.list_(pa.string()), pa.struct([("by", pa.string())]), pa.binary(),
    ]  # fmt: skip
    assert [field.type for field in manifest.schema] == plain
    (batch,) = manifest.batches()
    assert batch.schema.equals(manifest.schema)
    assert batch.take(pa.array([2, 0])).to_pylist() == [table.to_pylist()[at] for at in (2, 0)]
