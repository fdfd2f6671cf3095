"""Integer labels with their class names in the metadata of Hugging Face `datasets`.

A column of its type ClassLabel becomes text: the names. -1 is an unlabeled row.
"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc

from imgcls.errors import ManifestError

_METADATA_KEY = b"huggingface"


def find_class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The class names of each integer column that has some in the metadata of a schema."""
    try:
        info = json.loads((schema.metadata or {})[_METADATA_KEY])
        features = info["info"]["features"].items()
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    found = {}
    for name, feature in features:
        at = schema.get_field_index(name)
        names = feature.get("names") if isinstance(feature, dict) else None
        if names is None or feature.get("_type") != "ClassLabel" or at < 0:
            continue
        if pa.types.is_integer(schema.field(at).type):
            found[name] = [str(each) for each in names]
    return found


def convert_label_types(schema: pa.Schema) -> pa.Schema:
    """The schema with text for each column that has class names."""
    for name in find_class_names(schema):
        at = schema.get_field_index(name)
        schema = schema.set(at, pa.field(name, pa.string()))
    return schema


def convert_class_labels(batch: pa.RecordBatch, schema: pa.Schema, place: str) -> pa.RecordBatch:
    """A batch with the class names of each column that has some in the metadata of a schema.

    Raises ManifestError for a number that is neither -1 nor that of a class.
    """
    for name, classes in find_class_names(schema).items():
        at = batch.schema.get_field_index(name)
        if at < 0:
            continue
        codes = batch.column(at).cast(pa.int64())
        is_unknown = pc.or_(pc.less(codes, -1), pc.greater_equal(codes, len(classes)))
        if pc.any(is_unknown).as_py():
            code = codes.filter(is_unknown)[0].as_py()
            raise ManifestError(
                f"{place}: column {name!r} contains {code}, and its metadata has the names of "
                f"{len(classes)} classes; correct the label, or the metadata (huggingface)"
            )
        known = pc.if_else(pc.less(codes, 0), None, codes)
        text = pa.array(classes, pa.string()).take(known)
        batch = batch.set_column(at, pa.field(name, pa.string()), text)
    return batch
