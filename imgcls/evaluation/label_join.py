"""Labels that came after the predictions: a table joined to them by a key, such as the path.

Holds the labels, hashed, and streams the predictions past them. A key that stands twice on either
side is refused, since no one can say which label is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from imgcls.config import Section
from imgcls.data.manifest import ManifestConfig, normalize_labels, open_manifest
from imgcls.errors import ManifestError, RequestError
from imgcls.metrics.columns import compute_label_scores, encode_classes, take_scores
from imgcls.runs.committed import CommittedRun, is_scalar_type
from imgcls.runs.schema import OK

JOINED_COLUMN = "label"
"""The column that judged tables carry the joined label in."""


class LabelTableConfig(Section):
    """A CSV or Parquet table of labels that came later."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """The table: a file, a folder or a glob."""
    column: str = "label"
    """Its column of class names."""
    delimiter: str | None = None
    """CSV delimiter; found in the header line when not given."""
    encoding: str = "utf-8"
    """CSV text encoding."""
    escape: str | None = None
    """CSV escape character before a quote inside a quoted value, such as \\ for files of Spark."""


class LabelJoinConfig(Section):
    """Which labels a run is judged by."""

    labels: LabelTableConfig | None = None
    """Labels that came later; the run's own label column when not given."""
    on: str | None = None
    """The column that joins predictions and labels; the path column when not given."""

    @model_validator(mode="after")
    def _check_join(self) -> Self:
        if self.on is not None and self.labels is None:
            raise ValueError("on: joins --labels, which was not given")
        return self


def select_run_columns(names: Sequence[str], *, joined: bool) -> list[str]:
    """The columns of `names` that a run itself has: not the label, where it is joined."""
    return [name for name in names if not joined or name != JOINED_COLUMN]


def resolve_labels(
    run: CommittedRun, labels: LabelTableConfig | None, on: str | None, *, required: bool
) -> tuple[str | None, JoinedLabels | None]:
    """The column of labels to judge a run by, and the later labels that supply it, if any.

    Raises RequestError when the labels are not usable, or there are none and some are required.
    """
    if labels is not None:
        return JOINED_COLUMN, JoinedLabels(labels, run, on or run.path_column)
    if required and run.label_column is None:
        raise RequestError(
            f"{run.url}: has no labels to judge by; join some with --labels TABLE, or see "
            "`imgcls report` for what can be said without"
        )
    return run.label_column, None


class JoinedLabels:
    """Labels by key, and how many rows found theirs."""

    def __init__(self, config: LabelTableConfig, run: CommittedRun, on: str) -> None:
        """Read the labels. Raises RequestError when the table or a key is not usable."""
        self.source = f"labels {config.path}"
        self.key_column = on
        run.check_key(on)
        self.classes = run.classes
        self.required_columns = [on, "topk_labels", *(["scores"] if run.has_scores else [])]
        batches = _read_labels(config, on, is_path=on == run.path_column)
        if not batches:
            raise RequestError(f"{self.source}: has no row")
        table = pa.Table.from_batches(batches)
        self.keys = normalize_join_keys(table[on])
        labels = normalize_labels(table[config.column]).cast(pa.string())
        self.labels = labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels
        self._order, self._hashes = _sort_by_hash(self.keys)
        self._check_unique()
        self.is_matched = np.zeros(len(self.keys), bool)

    def join(self, table: pa.Table) -> pa.Table:
        """The table with the joined labels; their scores where every class's score was written.

        A rank below the top k is given as k + 1, which is all that a top-k accuracy asks.
        Raises RequestError when two rows of the predictions have one key.
        """
        found = self._find_keys(normalize_join_keys(table[self.key_column]))
        hit = found >= 0
        taken = found[hit]
        if self.is_matched[taken].any() or len(np.unique(taken)) < len(taken):
            repeated = taken[self.is_matched[taken]]
            if not len(repeated):
                values, times = np.unique(taken, return_counts=True)
                repeated = values[times > 1]
            key = self.keys[int(repeated[0])].as_py()
            raise RequestError(
                f"{self.source}: {self.key_column} {key!r} stands in several rows of the "
                "predictions; join "
                "on a column that tells them apart"
            )
        self.is_matched[taken] = True
        return self._attach_labels(table, found)

    def rejoin(self, table: pa.Table) -> pa.Table:
        """As `judge`, of rows that were judged before."""
        return self._attach_labels(
            table, self._find_keys(normalize_join_keys(table[self.key_column]))
        )

    def _attach_labels(self, table: pa.Table, found: np.ndarray) -> pa.Table:
        hit = found >= 0
        label = self.labels.take(pa.array(found, mask=~hit))
        score, rank = self._compute_scores_and_ranks(table, label)
        for name in (JOINED_COLUMN, "label_score", "label_rank"):
            if name in table.schema.names:
                table = table.drop_columns([name])
        return (
            table.append_column(JOINED_COLUMN, label)
            .append_column("label_score", score)
            .append_column("label_rank", rank)
        )

    def finish(self) -> None:
        """Raise RequestError when no row found a label; say how many labels were not used."""
        used = int(self.is_matched.sum())
        if used == 0:
            raise RequestError(
                f"{self.source}: no {self.key_column} of the predictions is among its "
                f"{len(self.keys):,} "
                f"(such as {self.keys[0].as_py()!r}); check that both write it the same way"
            )
        if used < len(self.keys):
            print(f"note: {len(self.keys) - used:,} of {len(self.keys):,} labels match no row")

    def _find_keys(self, keys: pa.Array) -> np.ndarray:
        """(N,) places in `self.keys`, -1 where there is none."""
        hashes = _hash_keys(keys)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found = np.where(self._hashes[place] == hashes, self._order[place], -1)
        # equal hashes are not yet equal keys
        same = pc.fill_null(pc.equal(keys, self.keys.take(pa.array(np.maximum(found, 0)))), False)
        return np.where(same.to_numpy(zero_copy_only=False), found, -1)

    def _compute_scores_and_ranks(
        self, table: pa.Table, label: pa.Array
    ) -> tuple[pa.Array, pa.Array]:
        """(N,) label_score and label_rank, null without a prediction or a label that is a class."""
        code = encode_classes(pa.chunked_array([label]), self.classes)
        judged = (code >= 0) & pc.equal(table["status"].cast(pa.string()), OK).to_numpy()
        score, rank = np.zeros(len(code), np.float32), np.zeros(len(code), np.int32)
        if "scores" in table.schema.names:
            at = np.flatnonzero(judged)
            score[at], rank[at] = compute_label_scores(take_scores(table["scores"], at), code[at])
            return pa.array(score, mask=~judged), pa.array(rank, mask=~judged)
        names = table["topk_labels"].combine_chunks()
        width = pc.max(pc.list_value_length(names)).as_py() or 0
        parent = pc.list_parent_indices(names).to_numpy()
        listed = pc.utf8_normalize(pc.list_flatten(names), form="NFC")  # as labels are
        same = pc.equal(listed, label.take(pa.array(parent)))
        at = np.flatnonzero(pc.fill_null(same, False).to_numpy(zero_copy_only=False))
        rank[:] = width + 1
        rank[parent[at]] = at - np.searchsorted(parent, parent[at]) + 1
        return pa.nulls(len(code), pa.float32()), pa.array(rank, mask=~judged)

    def _check_unique(self) -> None:
        if self.keys.null_count:
            raise RequestError(
                f"{self.source}: {self.key_column} is null in {self.keys.null_count:,} rows"
            )
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(twice):
            key = self.keys[int(self._order[twice[0]])].as_py()
            raise RequestError(
                f"{self.source}: {self.key_column} {key!r} stands there twice; give one label "
                "for each"
            )


def _read_labels(config: LabelTableConfig, on: str, *, is_path: bool) -> list[pa.RecordBatch]:
    """The keys and labels of a table; raises ManifestError with the options of --labels."""
    table = ManifestConfig(
        path=config.path,
        path_column=on,
        label_column=config.column,
        delimiter=config.delimiter,
        encoding=config.encoding,
        escape=config.escape,
    )
    try:
        manifest = open_manifest(table, any_key=not is_path)
        kind = manifest.schema.field(on).type
        if not is_scalar_type(kind):
            raise RequestError(
                f"labels {config.path}: column {on!r} is {kind}, which cannot be joined by"
            )
        return [batch.select([on, config.column]) for batch in manifest.batches()]
    except ManifestError as error:
        text = str(error).replace("--manifest.path-column", "--on")
        text = text.replace("--manifest.label-column", "--labels.column")
        raise ManifestError(text.replace("--manifest.", "--labels.")) from error


def normalize_join_keys(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column to join by as large strings: equal values of any two types have equal text.

    Whole floats and decimals are written as integers, dates as midnight, times in microseconds.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        array = array.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = [
            None if v is None or v != v else int(v) if v % 1 == 0 else v for v in array.to_pylist()
        ]
        return pa.array([None if v is None else str(v) for v in values], pa.large_string())
    return array.cast(pa.large_string())


def _sort_by_hash(keys: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    hashes = _hash_keys(keys)
    order = np.argsort(hashes, kind="stable")
    return order, hashes[order]


def _hash_keys(keys: pa.Array) -> np.ndarray:
    from pandas.util import hash_array

    return np.asarray(hash_array(keys.to_numpy(zero_copy_only=False), categorize=False))
