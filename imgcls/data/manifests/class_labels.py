"""Integer labels with their class names in the metadata of Hugging Face `datasets`.

A column of its type ClassLabel becomes text: the names. -1 is an unlabeled row. A label column of
lists of it becomes lists of names; other columns of lists stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifests.label_columns import is_list
from imgcls.errors import ManifestError

_LIST_TYPES = ("Sequence", "List", "LargeList")
_METADATA_KEY = b"huggingface"


def find_class_names(schema: pa.Schema, list_labels: Sequence[str] = ()) -> dict[str, list[str]]:
    """The class names of each integer column that has some in the metadata of a schema.

    list_labels: columns that may have lists of labels
    """
    try:
        info = json.loads((schema.metadata or {})[_METADATA_KEY])
        features = info["info"]["features"].items()
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    found = {}
    for name, feature in features:
        at = schema.get_field_index(name)
        names = _find_names(feature)
        if names is None or at < 0:
            continue
        kind = schema.field(at).type
        if is_list(kind) and name in list_labels:
            kind = kind.value_type
        if pa.types.is_integer(kind):
            found[name] = [str(each) for each in names]
    return found


def _find_names(feature: Any) -> list[Any] | None:
    """The class names of a feature ClassLabel, or of a list of it; None for any other feature."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    elif isinstance(feature, dict) and feature.get("_type") in _LIST_TYPES:
        feature = feature.get("feature")
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return names if isinstance(names, list) else None


def convert_label_types(schema: pa.Schema, list_labels: Sequence[str] = ()) -> pa.Schema:
    """The schema with text, or lists of text, for each column that has class names."""
    for name in find_class_names(schema, list_labels):
        at = schema.get_field_index(name)
        kind = pa.list_(pa.string()) if is_list(schema.field(at).type) else pa.string()
        schema = schema.set(at, pa.field(name, kind))
    return schema


def convert_class_labels(
    batch: pa.RecordBatch, schema: pa.Schema, place: str, list_labels: Sequence[str] = ()
) -> pa.RecordBatch:
    """A batch with the class names of each column that has some in the metadata of a schema.

    Raises ManifestError for a number that is neither -1 nor that of a class.
    """
    for name, classes in find_class_names(schema, list_labels).items():
        at = batch.schema.get_field_index(name)
        if at < 0:
            continue
        column = batch.column(at)
        values = column.flatten() if is_list(column.type) else column
        names = _convert_codes(values.cast(pa.int64()), classes, f"{place}: column {name!r}")
        if is_list(column.type):
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            # codes of -1 alone, like a single -1: the row is not labeled
            is_name = names.is_valid().to_numpy(zero_copy_only=False)
            known = np.concatenate([[0], np.cumsum(is_name)])
            is_unlabeled = (lengths > 0) & (known[offsets[1:]] == known[offsets[:-1]])
            mask = pc.or_(column.is_null(), pa.array(is_unlabeled))
            names = pa.ListArray.from_arrays(pa.array(offsets), names, mask=mask)
        batch = batch.set_column(at, pa.field(name, names.type), names)
    return batch


def _convert_codes(codes: pa.Array, classes: list[str], place: str) -> pa.Array:
    is_unknown = pc.or_(pc.less(codes, -1), pc.greater_equal(codes, len(classes)))
    if pc.any(is_unknown).as_py():
        code = codes.filter(is_unknown)[0].as_py()
        raise ManifestError(
            f"{place} contains {code}, and its metadata has the names of {len(classes)} classes; "
            "correct the label, or the metadata (huggingface)"
        )
    known = pc.if_else(pc.less(codes, 0), None, codes)
    return pa.array(classes, pa.string()).take(known)
