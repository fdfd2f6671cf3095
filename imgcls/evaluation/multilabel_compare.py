"""Compare two multilabel runs over the same images: metrics, classes, slices and differing rows.

Only classes of both models are compared, and rows with predictions of both and a known label. The
intervals are paired: both runs have the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls import log
from imgcls.data.manifests.label_columns import POSITIVE, UNKNOWN, build_name_lists
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.errors import OK, RequestError
from imgcls.evaluation.aggregate import MAX_SLICES
from imgcls.evaluation.comparison_parts import (
    DifferingRows,
    log_cut_rows,
    log_worst_groups,
    name_right,
    write_comparison,
)
from imgcls.evaluation.config import CompareConfig
from imgcls.evaluation.label_join import NO_VALUE
from imgcls.evaluation.label_list_join import require_label_lists
from imgcls.evaluation.row_pairs import check_not_worse, check_pairing, iter_row_pairs
from imgcls.metrics.agreement import PairedComparison, mcnemar_test
from imgcls.metrics.columns import Bools, Ints, take_scores
from imgcls.metrics.multilabel import encode_label_lists
from imgcls.metrics.multilabel.paired import (
    Difference,
    PairedMetrics,
    RunCells,
    compare_multilabel_cells,
)
from imgcls.runs.committed import CommittedRun

Targets = NDArray[np.int8]

MAX_CELLS = 100_000_000
"""Maximum number of cells in memory; of larger runs the metrics of every n-th row are compared."""
_COLUMNS_B = ["row", "predicted_labels", "scores", "status"]
_NAMES = {
    "mean_average_precision": "mean average precision",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "subset_accuracy": "all labels correct",
}
_DIFFERENCE_FIELDS = [pa.field(name, pa.float64()) for name in ("difference", "lower", "upper")]
_CLASS_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("rows", pa.int64()),
        ("support", pa.int64()),
        ("average_precision_a", pa.float64()),
        ("average_precision_b", pa.float64()),
        *_DIFFERENCE_FIELDS,
        *((f"f1_{name}", pa.float64()) for name in ("a", "b", "difference", "lower", "upper")),
    ]
)
_SLICE_SCHEMA = pa.schema(
    [
        ("slice_by", pa.string()),
        ("value", pa.string()),
        ("rows", pa.int64()),
        ("mean_average_precision_a", pa.float64()),
        ("mean_average_precision_b", pa.float64()),
        *_DIFFERENCE_FIELDS,
        *((f"f1_micro_{run}", pa.float64()) for run in "ab"),
        *((f"subset_accuracy_{run}", pa.float64()) for run in "ab"),
    ]
)
_DIFFERING_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("predicted_a", pa.list_(pa.string())),
        ("predicted_b", pa.list_(pa.string())),
        ("wrong_a", pa.int64()),
        ("wrong_b", pa.int64()),
        ("right", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class MultiLabelComparison:
    """Comparison of two multilabel runs, A and B.

    Attributes
    ----------
    rows : int
        Compared rows.
    metrics : dict of str to Difference
        mean_average_precision, f1_micro, f1_macro and subset_accuracy (the share of completely
        labeled rows with all labels correct), if they are defined.
    paired : PairedComparison or None
        McNemar's test of the rows with all labels correct; None without a completely labeled row.
    per_class : pyarrow.Table
        Columns label, rows, support, average_precision_a, average_precision_b, difference, lower,
        upper, and f1_a, f1_b, f1_difference, f1_lower, f1_upper.
    slices : pyarrow.Table
        Columns slice_by, value, rows, mean_average_precision_a, mean_average_precision_b,
        difference, lower, upper, f1_micro_a, f1_micro_b, subset_accuracy_a, subset_accuracy_b.
    differing : pyarrow.Table
        Rows with different predicted labels, at most a million; those that only one run predicts
        correctly come first. wrong_a and wrong_b are numbers of wrong labels.
    num_differing : int
        Number of all rows with different predicted labels.
    unknown_label : int
        Compared rows with a label that is not a class of both models.
    """

    rows: int
    metrics: dict[str, Difference]
    paired: PairedComparison | None
    per_class: pa.Table
    slices: pa.Table
    differing: pa.Table
    num_differing: int
    unknown_label: int


def compare_multilabel(
    a: CommittedRun, b: CommittedRun, config: CompareConfig
) -> MultiLabelComparison:
    """Compare two multilabel runs and log the result.

    Raises RequestError if they cannot be compared, TooManyErrors if the mean average precision of
    run_b is lower than `fail_if_worse` allows.
    """
    a.check_slices(config.slice_by)
    check_pairing(a, b, config.on)
    collector = _PairCollector(a, b, config)
    for left, right in iter_row_pairs(a, b, collector.columns, _COLUMNS_B, config.on):
        collector.add(left, right)
    comparison = collector.finish()
    _log_comparison(a, b, comparison)
    if config.output is not None:
        write_comparison(config.output, a, b, comparison, _summarize(comparison))
    precision = comparison.metrics.get("mean_average_precision")
    if precision is None and config.fail_if_worse is not None:
        raise RequestError(
            f"fail_if_worse: {a.url} has no class with known labels of both kinds; add labels"
        )
    if precision is not None:
        check_not_worse(a, b, precision.difference, config.fail_if_worse)
    return comparison


@dataclass(frozen=True, eq=False)
class _Cells:
    """Labels of rows, and the predictions of both runs for them."""

    targets: Targets
    a: RunCells
    b: RunCells

    def select(self, rows: Bools) -> _Cells:
        a, b = (RunCells(run.scores[rows], run.predicted[rows]) for run in (self.a, self.b))
        return _Cells(self.targets[rows], a, b)

    @classmethod
    def concat(cls, parts: Sequence[_Cells]) -> _Cells:
        a, b = (
            RunCells(
                np.concatenate([run.scores for run in runs]),
                np.concatenate([run.predicted for run in runs]),
            )
            for runs in ([part.a for part in parts], [part.b for part in parts])
        )
        return cls(np.concatenate([part.targets for part in parts]), a, b)

    def compare(self) -> PairedMetrics:
        return compare_multilabel_cells(self.targets, self.a, self.b)

    def test_exact(self) -> tuple[int, PairedComparison | None]:
        """Completely labeled rows with all labels of A correct, and McNemar's test."""
        complete = (self.targets != UNKNOWN).all(1)
        rows = int(complete.sum())
        if not rows:
            return 0, None
        is_right = [
            ((run.predicted == (self.targets == POSITIVE)).all(1) & complete)
            for run in (self.a, self.b)
        ]
        only_a, only_b = (int((mine & ~other).sum()) for mine, other in (is_right, is_right[::-1]))
        return int(is_right[0].sum()), mcnemar_test(rows, only_a, only_b)


class _PairCollector:
    """Collects the cells of paired rows, and the rows with different predictions."""

    def __init__(self, a: CommittedRun, b: CommittedRun, config: CompareConfig) -> None:
        self.a = a
        names = [normalize_labels(pa.array(run.classes)).to_pylist() for run in (a, b)]
        self.classes = tuple(name for name in names[0] if name in set(names[1]))
        if not self.classes:
            raise RequestError(f"{a.url} and {b.url} have no class in common")
        for run in (a, b):
            if not run.has_scores:
                raise RequestError(run.describe_missing_scores("the comparison"))
        self.labels, self.joined = require_label_lists(a, config.labels, config.on)
        self.slice_by = list(config.slice_by)
        self.places = [[own.index(name) for name in self.classes] for own in names]
        self.every = max(1, -(-min(a.rows, b.rows) * len(self.classes) // MAX_CELLS))
        self.cells: list[_Cells] = []
        self.slice_values: list[pa.Table] = []
        self.differing = DifferingRows(_DIFFERING_SCHEMA)
        self.rows = self.unknown_label = 0

    @property
    def columns(self) -> list[str]:
        """Columns to read of run a."""
        shown = [*_COLUMNS_B, self.a.path_column, *self.labels.names]
        if self.joined is not None:
            shown += self.joined.required_columns
        return list(dict.fromkeys([*shown, *self.slice_by]))

    def add(self, left: pa.Table, right: pa.Table) -> None:
        """Add rows of both runs, of the same images in the same order."""
        if self.joined is not None:
            left = self.joined.join(left)
        every = self.labels.encode(left, self.a.classes)
        labels = every.targets[:, self.places[0]]
        others = np.delete(every.targets, self.places[0], axis=1)
        is_unknown = every.has_unknown_name | (others == POSITIVE).any(1)
        ok = np.ones(left.num_rows, bool)
        for side in (left, right):
            ok &= pc.equal(side["status"].cast(pa.string()), OK).to_numpy()
        at = np.flatnonzero(ok & (labels != UNKNOWN).any(1))
        self.unknown_label += int(is_unknown[at].sum())
        predicted = [
            encode_label_lists(side["predicted_labels"].take(at), self.classes).present
            for side in (left, right)
        ]
        targets = labels[at]
        self._add_differing(left, at, targets, predicted)
        kept = np.flatnonzero((self.rows + np.arange(len(at))) % self.every == 0)
        self.rows += len(at)
        runs = []
        for side, place, called in zip((left, right), self.places, predicted, strict=True):
            scores = take_scores(side["scores"], at[kept])[:, place].astype(np.float16)
            runs.append(RunCells(scores, called[kept]))
        self.cells.append(_Cells(targets[kept], *runs))
        values = {name: normalize_labels(left[name].take(at[kept])) for name in self.slice_by}
        self.slice_values.append(pa.table(values))

    def _add_differing(
        self, left: pa.Table, at: Ints, targets: Targets, predicted: list[Bools]
    ) -> None:
        differ = self.differing.keep(np.flatnonzero((predicted[0] != predicted[1]).any(1)))
        if not len(differ):
            return
        own = targets[differ]
        called = [each[differ] for each in predicted]
        wrong = [((each != (own == POSITIVE)) & (own != UNKNOWN)).sum(1) for each in called]
        lists = [build_name_lists(each.astype(np.int8), self.classes) for each in called]
        self.differing.add(
            [
                left["row"].take(at[differ]),
                left[self.a.path_column].cast(pa.string()).take(at[differ]),
                build_name_lists(own, self.classes),
                *lists,
                *(pa.array(each, pa.int64()) for each in wrong),
                name_right(wrong[0] == 0, wrong[1] == 0),
            ]
        )

    def finish(self) -> MultiLabelComparison:
        if self.joined is not None:
            self.joined.finish()
        if not self.rows:
            raise RequestError(
                f"{self.a.url}: no row has predictions of both runs and a known label of a class "
                "of both models; check the labels"
            )
        cells = _Cells.concat(self.cells)
        found = cells.compare()
        exact_a, paired = cells.test_exact()
        metrics = {
            name: value
            for name in ("mean_average_precision", "f1_micro", "f1_macro")
            if (value := getattr(found, name)) is not None
        }
        if paired is not None:
            share = exact_a / paired.rows
            metrics["subset_accuracy"] = Difference(
                share, share + paired.difference, paired.difference, paired.lower, paired.upper
            )
        if self.every > 1:
            log.emit(
                "note",
                f"the metrics are those of one row in {self.every}; the others exceed the memory",
            )
        return MultiLabelComparison(
            self.rows,
            metrics,
            paired,
            self._build_classes(cells, found),
            self._build_slices(cells),
            self.differing.sort(),
            self.differing.count,
            self.unknown_label,
        )

    def _build_classes(self, cells: _Cells, found: PairedMetrics) -> pa.Table:
        known, positive = cells.targets != UNKNOWN, cells.targets == POSITIVE
        rows = [
            {
                "label": name,
                "rows": int(known[:, c].sum()),
                "support": int(positive[:, c].sum()),
                **_name_difference(found.average_precision[c], "average_precision_", ""),
                **_name_difference(found.f1[c], "f1_", "f1_"),
            }
            for c, name in enumerate(self.classes)
        ]
        return _sort_by_difference(rows, _CLASS_SCHEMA)

    def _build_slices(self, cells: _Cells) -> pa.Table:
        rows = []
        values = pa.concat_tables(self.slice_values)
        for column in self.slice_by:
            coded = pc.fill_null(values[column].combine_chunks(), NO_VALUE).dictionary_encode()
            indices = coded.indices.to_numpy()
            if len(coded.dictionary) > MAX_SLICES:
                raise RequestError(
                    f"slice_by: column {column!r} has more than {MAX_SLICES:,} values; slices are "
                    "for groups such as camera or site, pass a column with fewer"
                )
            for place, value in enumerate(coded.dictionary.to_pylist()):
                part = cells.select(indices == place)
                found = part.compare()
                exact_a, paired = part.test_exact()
                row: dict[str, Any] = {"slice_by": column, "value": value}
                row["rows"] = len(part.targets)
                row |= _name_difference(found.mean_average_precision, "mean_average_precision_", "")
                if found.f1_micro is not None:
                    row |= {"f1_micro_a": found.f1_micro.a, "f1_micro_b": found.f1_micro.b}
                if paired is not None:
                    share = exact_a / paired.rows
                    row["subset_accuracy_a"] = share
                    row["subset_accuracy_b"] = share + paired.difference
                rows.append(row)
        return _sort_by_difference(rows, _SLICE_SCHEMA)


_MIN_SHOWN = 0.0005
"""A smaller difference is shown as 0.0 points."""


def _name_difference(found: Difference | None, run: str, other: str) -> dict[str, float]:
    """Columns of a difference.

    run, other: prefixes of the columns of the runs, and of the others
    """
    if found is None:
        return {}
    named = {f"{run}a": found.a, f"{run}b": found.b}
    others = ("difference", "lower", "upper")
    return named | {f"{other}{name}": getattr(found, name) for name in others}


def _sort_by_difference(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The worst first; rows without a difference last."""
    rows.sort(key=lambda row: (row.get("difference", np.inf), -row["rows"]))
    return pa.Table.from_pylist(rows, schema=schema)


def _log_comparison(a: CommittedRun, b: CommittedRun, comparison: MultiLabelComparison) -> None:
    for name, run in (("a", a), ("b", b)):
        shown = ", ".join(
            f"{_NAMES[metric]} {getattr(value, name):.2%}"
            for metric, value in comparison.metrics.items()
        )
        log.show(f"{name.upper()}  {run.url}: {shown}")
    for metric, value in comparison.metrics.items():
        test = ""
        if metric == "subset_accuracy" and comparison.paired is not None:
            test = f", p = {comparison.paired.p_value:.3g} by McNemar's test"
        log.show(
            f"B - A  {_NAMES[metric]} {100 * value.difference:+.2f} points (95%: "
            f"{100 * value.lower:+.2f} to {100 * value.upper:+.2f}){test}"
        )
    log.show(
        f"{comparison.rows:,} rows compared; predicted labels differ on "
        f"{comparison.num_differing:,}"
    )
    if comparison.unknown_label:
        log.emit(
            "note",
            f"{comparison.unknown_label:,} of them have a label that is not a class of both "
            "models, which is ignored",
        )
    log_cut_rows(comparison)
    log_worst_groups(
        comparison,
        _MIN_SHOWN,
        lambda row: (
            f" of average precision (95%: {100 * row['lower']:+.1f} to {100 * row['upper']:+.1f}) "
            f"over {row['rows']:,} rows"
        ),
    )
    precision = comparison.metrics.get("mean_average_precision")
    if precision is None or precision.lower <= 0 <= precision.upper:
        log.show("result: no significant difference of the mean average precision")
    else:
        log.show(f"result: {'B' if precision.difference > 0 else 'A'} is better")


def _summarize(comparison: MultiLabelComparison) -> dict[str, Any]:
    paired = comparison.paired
    return {
        "task": "multilabel",
        "rows": comparison.rows,
        "unknown_label": comparison.unknown_label,
        "metrics": {name: value._asdict() for name, value in comparison.metrics.items()},
        "only_a": None if paired is None else paired.only_a,
        "only_b": None if paired is None else paired.only_b,
        "mcnemar_p_value": None if paired is None else paired.p_value,
        "predictions_differ": comparison.num_differing,
    }
