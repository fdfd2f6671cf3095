"""Join a table of labels to predictions by a key, such as the path.

The labels are held in memory, hashed, and the predictions are streamed. A key that occurs twice on
either side is rejected, because its label would be ambiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.data.manifests.image_urls import normalize_urls
from imgcls.data.manifests.manifest import Manifest, ManifestConfig, normalize_labels, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import OK, RequestError
from imgcls.evaluation.config import LabelTableConfig
from imgcls.metrics.columns import encode_classes, take_scores
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.runs.committed import CommittedRun, is_scalar_type

JOINED_COLUMN = "label"
"""Column of the joined label."""
NO_VALUE = "(none)"
"""Name of the slice of rows without a value."""
KEYS = KeyNames("labels", {"path_column": "on", "label_column": "labels.column"})


def select_run_columns(names: Sequence[str], *, joined: bool) -> list[str]:
    """The columns of `names` that the run itself has: without the label if it is joined."""
    return [name for name in names if not joined or name != JOINED_COLUMN]


def resolve_labels(
    run: CommittedRun, labels: LabelTableConfig | None, on: str | None, *, required: bool
) -> tuple[str | None, JoinedLabels | None]:
    """Label column to evaluate against, and the joined labels that supply it, if any.

    Raises RequestError if the labels cannot be used, or are required and missing.
    """
    if labels is not None:
        for name in ("label_delimiter", "label_columns"):
            if getattr(labels, name):
                raise RequestError(
                    f"{KEYS.key(name)}: is for several labels per image, and {run.url} has one "
                    "per image; remove it"
                )
        return JOINED_COLUMN, JoinedLabels(labels, run, on or run.path_column)
    if required and run.label_column is None:
        raise RequestError(
            f"{run.url}: has no labels; join some with --labels TABLE, or run `imgcls report`, "
            "which needs no labels"
        )
    return run.label_column, None


class KeyedLabels(ABC):
    """Rows of a table of labels by key, and which of them were matched.

    required_columns: columns of the run that a join needs
    """

    def __init__(self, source: str, run: CommittedRun, on: str, keys: pa.ChunkedArray) -> None:
        """Sort the keys. Raises RequestError if one is null or occurs twice."""
        self.source = source
        self.key_column = on
        self.required_columns = [on]
        self._are_paths = on == run.path_column
        self.keys = normalize_join_keys(keys, are_paths=self._are_paths)
        self._order, self._hashes = _sort_by_hash(self.keys)
        self._check_unique()
        self.is_matched = np.zeros(len(self.keys), bool)

    @abstractmethod
    def attach_labels(self, table: pa.Table, found: np.ndarray) -> pa.Table:
        """Add label columns; found: (N,) row of the labels for each row, -1 without one."""

    def join(self, table: pa.Table) -> pa.Table:
        """Add the joined labels.

        Raises RequestError if two rows of the predictions have the same key.
        """
        found = self.find(table)
        hit = found >= 0
        taken = found[hit]
        if self.is_matched[taken].any() or len(np.unique(taken)) < len(taken):
            repeated = taken[self.is_matched[taken]]
            if not len(repeated):
                values, times = np.unique(taken, return_counts=True)
                repeated = values[times > 1]
            key = self.keys[int(repeated[0])].as_py()
            raise RequestError(
                f"{self.source}: {self.key_column} {key!r} occurs in several rows of the "
                "predictions; join on a column with unique values"
            )
        self.is_matched[taken] = True
        return self.attach_labels(table, found)

    def rejoin(self, table: pa.Table) -> pa.Table:
        """As `join`, for rows that were joined before."""
        return self.attach_labels(table, self.find(table))

    def find(self, table: pa.Table) -> np.ndarray:
        """(N,) row of the labels of each row of the predictions, -1 without one."""
        return self._find_keys(
            normalize_join_keys(table[self.key_column], are_paths=self._are_paths)
        )

    def finish(self) -> None:
        """Raise RequestError if no label was matched; log how many were not."""
        used = int(self.is_matched.sum())
        if used == 0:
            raise RequestError(
                f"{self.source}: no {self.key_column} of the predictions is among its "
                f"{len(self.keys):,} "
                f"(such as {self.keys[0].as_py()!r}); check that both use the same form"
            )
        if used < len(self.keys):
            log.emit("note", f"{len(self.keys) - used:,} of {len(self.keys):,} labels match no row")

    def _find_keys(self, keys: pa.Array) -> np.ndarray:
        """(N,) indices into `self.keys`, -1 without a match."""
        hashes = _hash_keys(keys)
        index = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found = np.where(self._hashes[index] == hashes, self._order[index], -1)
        # equal hashes are not yet equal keys
        same = pc.fill_null(pc.equal(keys, self.keys.take(pa.array(np.maximum(found, 0)))), False)
        return np.where(same.to_numpy(zero_copy_only=False), found, -1)

    def _check_unique(self) -> None:
        if self.keys.null_count:
            raise RequestError(
                f"{self.source}: {self.key_column} is null in {self.keys.null_count:,} rows"
            )
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(twice):
            key = self.keys[int(self._order[twice[0]])].as_py()
            raise RequestError(
                f"{self.source}: {self.key_column} {key!r} occurs twice; keep one label per key"
            )


class JoinedLabels(KeyedLabels):
    """One label per key."""

    def __init__(self, config: LabelTableConfig, run: CommittedRun, on: str) -> None:
        """Read the labels. Raises RequestError if the table or a key cannot be used."""
        column = config.column or JOINED_COLUMN
        source = describe_label_table(config)
        manifest = open_label_table(config, run, on, label_column=column)
        table = read_label_rows(manifest, [on, column], source)
        super().__init__(source, run, on, table[on])
        self.classes = run.classes
        self.required_columns += ["topk_labels", *(["scores"] if run.has_scores else [])]
        labels = normalize_labels(table[column], KEYS).cast(pa.string())
        self.labels = labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels

    def attach_labels(self, table: pa.Table, found: np.ndarray) -> pa.Table:
        """Add the joined labels, and their scores and ranks if the scores of all classes exist.

        Without scores, a rank below the top k is k + 1, which is enough for top-k accuracy.
        """
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

    def _compute_scores_and_ranks(
        self, table: pa.Table, label: pa.Array
    ) -> tuple[pa.Array, pa.Array]:
        """(N,) label_score and label_rank; null without a prediction or a label that is a class."""
        code = encode_classes(pa.chunked_array([label]), self.classes)
        labeled = (code >= 0) & pc.equal(table["status"].cast(pa.string()), OK).to_numpy()
        names = table["topk_labels"].combine_chunks()
        width = pc.max(pc.list_value_length(names)).as_py() or 0
        parent = pc.list_parent_indices(names).to_numpy()
        listed = pc.utf8_normalize(pc.list_flatten(names), form="NFC")  # as labels are
        same = pc.equal(listed, label.take(pa.array(parent)))
        at = np.flatnonzero(pc.fill_null(same, False).to_numpy(zero_copy_only=False))
        score, rank = np.zeros(len(code), np.float32), np.full(len(code), width + 1, np.int32)
        has_scores = "scores" in table.schema.names
        if has_scores:
            rows = np.flatnonzero(labeled)
            scores = take_scores(table["scores"], rows)
            score[rows], below = SINGLE_LABEL.rank_labels(scores, code[rows])
            lengths = pc.fill_null(pc.list_value_length(names), 0).to_numpy()
            rank[rows] = np.maximum(below, lengths[rows] + 1)
        # scores written as float16 have ties that those of the network had not
        rank[parent[at]] = at - np.searchsorted(parent, parent[at]) + 1
        mask = ~labeled if has_scores else np.ones(len(code), bool)
        return pa.array(score, mask=mask), pa.array(rank, mask=~labeled)


def describe_label_table(config: LabelTableConfig) -> str:
    """The table of labels, for messages."""
    return f"labels {config.path}"


def open_label_table(
    config: LabelTableConfig, run: CommittedRun, on: str, **label_options: Any
) -> Manifest:
    """Open a table of labels; errors name the options of --labels.

    label_options: fields of `ManifestConfig` that describe the labels
    Raises RequestError if the key of the run or of the table cannot be used.
    """
    run.check_key(on)
    table = ManifestConfig(
        path=config.path,
        path_column=on,
        delimiter=config.delimiter,
        encoding=config.encoding,
        escape=config.escape,
        **label_options,
    )
    manifest = open_manifest(table, any_key=on != run.path_column, keys=KEYS)
    kind = manifest.schema.field(on).type
    if not is_scalar_type(kind):
        raise RequestError(
            f"labels {config.path}: column {on!r} is {kind}, which cannot be a join key"
        )
    return manifest


def read_label_rows(manifest: Manifest, names: Sequence[str], source: str) -> pa.Table:
    """Some columns of a table of labels. Raises RequestError if it has no rows."""
    batches = [batch.select(list(dict.fromkeys(names))) for batch in manifest.batches()]
    if not batches:
        raise RequestError(f"{source}: has no rows")
    return pa.Table.from_batches(batches)


def normalize_join_keys(column: pa.Array | pa.ChunkedArray, *, are_paths: bool = False) -> pa.Array:
    """Join keys as large strings: equal values of any two types have equal text.

    Whole floats and decimals become integers, dates midnight, times microseconds.
    are_paths: the keys are paths of images, of which absolute ones of one file have equal text
    """
    if are_paths:
        column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
        return normalize_urls(column).combine_chunks()
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
