"""Labels of a multi-label manifest: any number of classes per image.

They are a column of lists, a column of class names separated by a delimiter, or one column per
class with 1, 0 or no value. A class may be unknown for an image: that is no negative.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls.data.manifests.image_columns import is_text
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError
from imgcls.formatting import format_list

if TYPE_CHECKING:
    from imgcls.data.manifests.manifest import ManifestConfig

POSITIVE, NEGATIVE, UNKNOWN = 1, 0, -1
"""Values of `LabelMatrix.targets`."""

LIST_NAMES = ("label", "labels")
"""Columns that may have lists of labels, if no setting names another."""
_TEXT_VALUES = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
"""pandas writes 1.0 to a CSV where other values of the column are missing."""
_WHAT_IS_ALLOWED = "expected 1, 0, or no value where it is unknown; correct it"


@dataclass(frozen=True, eq=False)
class LabelMatrix:
    """Labels of N images for C classes.

    targets:     (N, C) int8: POSITIVE, NEGATIVE or UNKNOWN
    has_unknown_name: (N,) bool, whether a label of the image is none of the classes
    """

    targets: NDArray[np.int8]
    has_unknown_name: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelColumns:
    """Columns of a manifest with any number of labels per image.

    lists:       column of lists of class names, or of names separated by `delimiter`. An empty list
                 has no class; an image without a value is unlabeled.
    delimiter:   separator of the names in a column of text; None for lists
    per_class:   columns of 1, 0 or no value, whose names are those of the classes
    """

    lists: str | None = None
    delimiter: str | None = None
    per_class: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All columns."""
        return self.per_class if self.lists is None else (self.lists,)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of the columns of classes, in Unicode NFC; empty for lists."""
        return tuple(unicodedata.normalize("NFC", name) for name in self.per_class)

    def describe(self) -> str:
        """The columns in words, for messages."""
        if self.lists is not None:
            return f"column {self.lists!r}"
        return f"columns {format_list(map(repr, self.per_class), 3)}"

    def to_json(self) -> dict[str, Any]:
        """The fields for `_run.json`; `from_json` restores them."""
        return {
            "lists": self.lists,
            "delimiter": self.delimiter,
            "per_class": list(self.per_class),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LabelColumns:
        """Restore the columns from `to_json`."""
        return cls(data["lists"], data["delimiter"], tuple(data["per_class"]))

    def count_names(self, rows: pa.Table | pa.RecordBatch, place: str = "") -> Counter[str]:
        """Number of images of each class."""
        if self.lists is not None:
            names = self._read_lists(rows, place).flatten()
            counted = pc.value_counts(names).to_pylist()
            return Counter({each["values"]: each["counts"] for each in counted})
        matrix = self.encode(rows, self.classes, place).targets
        totals = (matrix == POSITIVE).sum(0).tolist()
        return Counter(dict(zip(self.classes, totals, strict=True)))

    def encode(
        self, rows: pa.Table | pa.RecordBatch, classes: Sequence[str], place: str = ""
    ) -> LabelMatrix:
        """Labels of rows as a matrix.

        classes: C class names, compared in Unicode NFC
        place:   the manifest, for messages
        Raises ManifestError for a value that is no label.
        """
        if self.lists is not None:
            return encode_lists(self._read_lists(rows, place), classes)
        targets = np.full((rows.num_rows, len(classes)), UNKNOWN, np.int8)
        indices = {unicodedata.normalize("NFC", name): at for at, name in enumerate(classes)}
        others = np.zeros(rows.num_rows, bool)
        for column, name in zip(self.per_class, self.classes, strict=True):
            values = _read_class_column(rows.column(column), column, place)
            if name in indices:
                targets[:, indices[name]] = values
            else:
                others |= values == POSITIVE
        return LabelMatrix(targets, others)

    def read_names(self, rows: pa.Table | pa.RecordBatch, place: str = "") -> pa.ListArray:
        """Class names of each row, in the order of the manifest; null for an unlabeled row.

        They are in NFC, without spaces around them, each once; blank names are left out.
        """
        if self.lists is not None:
            return self._read_lists(rows, place)
        targets = self.encode(rows, self.classes, place).targets
        return build_name_lists(targets, self.classes)

    def _read_lists(self, rows: pa.Table | pa.RecordBatch, place: str) -> pa.ListArray:
        assert self.lists is not None
        column = rows.column(self.lists)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if self.delimiter is not None:
            column = _split_text(_cast_text(column, self.lists, place), self.delimiter)
        if not is_list(column.type):
            # names without a delimiter: one per image
            text = pc.utf8_trim_whitespace(_cast_text(column, self.lists, place))
            is_blank = pc.fill_null(pc.equal(text, ""), True).to_numpy(zero_copy_only=False)
            return _build_lists(text, np.arange(len(text)), is_blank)
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        return _build_lists(
            _cast_text(column.flatten(), self.lists, place), _find_list_rows(column), is_null
        )


def read_label_columns(identity: Mapping[str, Any]) -> LabelColumns | None:
    """The columns in the identity of a run's manifest; None if it is not multi-label."""
    stored = identity.get("label_columns")
    return None if stored is None else LabelColumns.from_json(stored)


def describe_no_labels(columns: LabelColumns) -> str:
    """How a manifest is read without its labels, for messages."""
    option = "--manifest.label-columns" if columns.lists is None else "--manifest.label-column"
    drop = "" if columns.lists is None else f", and pass --manifest.drop-columns {columns.lists}"
    return f"remove {option} if it is given{drop}"


def is_list(kind: pa.DataType) -> bool:
    """Whether a column has a list in each row."""
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in checks)


def encode_lists(lists: pa.ListArray, classes: Sequence[str]) -> LabelMatrix:
    """Matrix of N lists of class names: a class that is not listed is NEGATIVE.

    A null list is UNKNOWN in all classes.
    """
    targets = np.zeros((len(lists), len(classes)), np.int8)
    if lists.null_count:
        targets[lists.is_null().to_numpy(zero_copy_only=False)] = UNKNOWN
    rows = _find_list_rows(lists)
    names = pc.utf8_normalize(pa.array(classes, pa.string()), form="NFC")
    codes = pc.fill_null(pc.index_in(lists.flatten(), value_set=names), -1).to_numpy()
    is_class = codes >= 0
    targets[rows[is_class], codes[is_class]] = POSITIVE
    others = np.zeros(len(lists), bool)
    others[rows[~is_class]] = True
    return LabelMatrix(targets, others)


def build_name_lists(targets: NDArray[np.int8], classes: Sequence[str]) -> pa.ListArray:
    """Names of the POSITIVE classes of each row; null where all classes are UNKNOWN."""
    rows, codes = np.nonzero(targets == POSITIVE)
    counts = np.bincount(rows, minlength=len(targets))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    is_unlabeled = (targets == UNKNOWN).all(1) if targets.shape[1] else np.ones(len(targets), bool)
    names = pa.array(classes, pa.string()).take(pa.array(codes))
    return pa.ListArray.from_arrays(pa.array(offsets), names, mask=pa.array(is_unlabeled))


def find_label_columns(
    config: ManifestConfig, schema: pa.Schema, keys: KeyNames
) -> LabelColumns | None:
    """The columns of a manifest with any number of labels per image; None for a single label.

    Raises ManifestError for settings that contradict each other or the table.
    """
    place = f"manifest {config.path}"
    if config.label_delimiter is not None and not config.label_delimiter.strip():
        raise ManifestError(
            f"{place}: {keys.option('label_delimiter')} {config.label_delimiter!r} is blank; "
            "separate the labels by another character, such as ;"
        )
    if config.label_columns:
        for option, value in (
            ("label_column", config.label_column),
            ("label_delimiter", config.label_delimiter),
        ):
            if value is not None:
                raise ManifestError(
                    f"{place}: {keys.option('label_columns')} and {keys.option(option)} are both "
                    "given; pass one of them"
                )
        _check_class_columns(config, schema, keys)
        return LabelColumns(per_class=tuple(config.label_columns))
    name = config.label_column or _find_list_column(config, schema)
    if name is None or name not in schema.names:
        if config.label_delimiter is not None:
            raise ManifestError(
                f"{place}: {keys.option('label_delimiter')} {config.label_delimiter!r}: no column "
                f"of labels (found: {', '.join(schema.names)}); name it with "
                f"{keys.option('label_column')}"
            )
        return None
    kind = schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind):
        if config.label_delimiter is not None:
            raise ManifestError(
                f"{place}: column {name!r} has lists, which need no "
                f"{keys.option('label_delimiter')}; remove it"
            )
        return LabelColumns(name)
    if config.label_delimiter is None:
        return None
    if not is_text(kind):
        raise ManifestError(
            f"{place}: column {name!r} is {kind}, not text that "
            f"{keys.option('label_delimiter')} {config.label_delimiter!r} separates"
        )
    return LabelColumns(name, config.label_delimiter)


def _find_list_column(config: ManifestConfig, schema: pa.Schema) -> str | None:
    """The column of several labels that no option names; a column `label` is before `labels`.

    A list of numbers or structs in `labels` is not read: other tasks, such as detection, store
    their annotations so.
    """
    if "label" in schema.names:
        kind = schema.field("label").type
        return "label" if is_list(kind) or config.label_delimiter is not None else None
    if "labels" not in schema.names:
        return None
    kind = schema.field("labels").type
    has_names = is_list(kind) and is_text(kind.value_type)
    return "labels" if has_names or config.label_delimiter is not None else None


def _check_class_columns(config: ManifestConfig, schema: pa.Schema, keys: KeyNames) -> None:
    place, option = f"manifest {config.path}", keys.option("label_columns")
    names = config.label_columns
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise ManifestError(
            f"{place}: no column {missing[0]!r} (found: {', '.join(schema.names)}); correct "
            f"{option}"
        )
    classes = [unicodedata.normalize("NFC", name) for name in names]
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ManifestError(f"{place}: {option} has {twice[0]!r} twice; remove one")
    if config.path_column in names:
        raise ManifestError(
            f"{place}: column {config.path_column!r} is read as that of the paths; remove it from "
            f"{option}"
        )


def _cast_text(values: pa.Array, name: str, place: str) -> pa.Array:
    """Class names as text; whole floats lose their decimal point, as in `normalize_labels`."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        numbers = [None if v is None or v != v else v for v in values.to_pylist()]
        texts = [None if v is None else f"{v:.0f}" if v.is_integer() else str(v) for v in numbers]
        return pa.array(texts, pa.string())
    try:
        return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(
            f"{place or 'manifest'}: column {name!r} has values of the type {values.type}; "
            "expected class names, or lists of class names"
        ) from error


def _split_text(text: pa.Array, delimiter: str) -> pa.ListArray:
    """Lists of the names in each text; null for a null or blank one, empty for delimiters alone."""
    is_blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    return pc.split_pattern(pc.if_else(is_blank, None, text), delimiter)


def _find_list_rows(lists: pa.Array) -> NDArray[np.int64]:
    """The row of each value of `lists.flatten()`.

    Unlike pc.list_parent_indices, it has no values of null lists, as flatten has none.
    """
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return np.repeat(np.arange(len(lists)), lengths)


def _build_lists(
    names: pa.Array, rows: NDArray[np.int64], is_null: NDArray[np.bool_]
) -> pa.ListArray:
    """Lists of names in NFC, each once, without blank names and without spaces around them.

    rows:    (K,) the row of each name, ascending
    is_null: (N,) whether a row has no list
    """
    names = pc.utf8_normalize(pc.utf8_trim_whitespace(names), form="NFC")
    is_name = pc.fill_null(pc.not_equal(names, ""), False).to_numpy(zero_copy_only=False)
    codes = pc.fill_null(names.dictionary_encode().indices.cast(pa.int64()), 0).to_numpy()
    pairs = rows * (len(names) + 1) + codes
    _, first = np.unique(pairs[is_name], return_index=True)
    kept = np.flatnonzero(is_name)[np.sort(first)]
    counts = np.bincount(rows[kept], minlength=len(is_null))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), names.take(pa.array(kept)), mask=pa.array(is_null, pa.bool_())
    )


def _read_class_column(
    column: pa.Array | pa.ChunkedArray, name: str, place: str
) -> NDArray[np.int8]:
    """(N,) POSITIVE, NEGATIVE or UNKNOWN of a column of 1, 0, true, false or no value."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if is_text(array.type):
        return _read_text_values(array, name, place)
    try:
        values = array.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(
            f"{place or 'manifest'}: column {name!r} is {array.type}; {_WHAT_IS_ALLOWED}"
        ) from error
    found = pc.fill_null(values, np.nan).to_numpy()
    is_bad = ~(np.isnan(found) | (found == 0) | (found == 1))
    if is_bad.any():
        row = int(is_bad.argmax())
        raise _build_value_error(place, name, array[row].as_py())
    return np.where(np.isnan(found), UNKNOWN, np.nan_to_num(found)).astype(np.int8)


def _read_text_values(array: pa.Array, name: str, place: str) -> NDArray[np.int8]:
    encoded = array.dictionary_encode()
    values = [UNKNOWN]  # of a null, whose code becomes -1, the last one
    for text in reversed(encoded.dictionary.to_pylist()):
        key = text.strip().lower()
        if key and key not in _TEXT_VALUES:
            raise _build_value_error(place, name, text)
        values.append(_TEXT_VALUES[key] if key else UNKNOWN)
    codes = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    found: NDArray[np.int8] = np.array(values[::-1], np.int8)[codes]
    return found


def _build_value_error(place: str, name: str, value: Any) -> ManifestError:
    return ManifestError(
        f"{place or 'manifest'}: column {name!r} has the value {value!r}; {_WHAT_IS_ALLOWED}"
    )
