"""Compare two runs over the same images: which model is better, and on which classes and slices.

Rows are paired in row order, or joined by a column. As in `evaluate`, only rows with predictions of
both runs and a label that is a class of both models are compared; the others are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import OK, RequestError
from imgcls.evaluation.comparison_parts import (
    DifferingRows,
    log_cut_rows,
    log_worst_groups,
    name_right,
    write_comparison,
)
from imgcls.evaluation.config import CompareConfig
from imgcls.evaluation.label_join import NO_VALUE, resolve_labels, select_run_columns
from imgcls.evaluation.multilabel_compare import MultiLabelComparison, compare_multilabel
from imgcls.evaluation.row_pairs import check_not_worse, check_pairing, iter_row_pairs
from imgcls.metrics.agreement import PairedComparison, mcnemar_test
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run

_GROUP_FIELDS = [
    pa.field("rows", pa.int64()),
    *(pa.field(n, pa.float64()) for n in ("accuracy_a", "accuracy_b", "difference")),
    *(pa.field(n, pa.float64()) for n in ("lower", "upper")),
    *(pa.field(n, pa.int64()) for n in ("only_a", "only_b")),
    pa.field("p_value", pa.float64()),
]
_COLUMNS_B = ["row", "predicted_label", "confidence", "status"]
_DIFFERING_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("predicted_a", pa.string()),
        ("confidence_a", pa.float32()),
        ("predicted_b", pa.string()),
        ("confidence_b", pa.float32()),
        ("right", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Comparison of two runs, A and B.

    Attributes
    ----------
    paired : PairedComparison
        Difference of the accuracies on the compared rows, with McNemar's test.
    correct_a, correct_b : int
        Correct predictions among the compared rows.
    per_class : pyarrow.Table
        Columns label, rows, accuracy_a, accuracy_b, difference, lower, upper, only_a, only_b,
        p_value.
    slices : pyarrow.Table
        Columns slice_by, value, then as in `per_class`.
    differing : pyarrow.Table
        Rows with different predictions, at most a million; those that only one run predicts
        correctly come first.
    num_differing : int
        Number of all rows with different predictions.
    unknown_label : int
        Rows with predictions of both whose label is not a class of both models.
    """

    paired: PairedComparison
    correct_a: int
    correct_b: int
    per_class: pa.Table
    slices: pa.Table
    differing: pa.Table
    num_differing: int
    unknown_label: int


@with_config_storage
def compare(config: CompareConfig) -> RunComparison | MultiLabelComparison:
    """Compare two runs and log the result.

    Parameters
    ----------
    config : CompareConfig
        Settings of `imgcls compare`.

    Returns
    -------
    RunComparison or MultiLabelComparison
        The difference of the accuracies, or of the metrics of multilabel, per class and slice, and
        the differing rows.

    Raises
    ------
    RequestError
        If the runs cannot be compared.
    TooManyErrors
        If run_b is worse than `fail_if_worse` allows (exit code 3).
    """
    a, b = open_run(config.run_a), open_run(config.run_b)
    for run in (a, b):
        run.check_predictions()
    if a.task != b.task:
        raise RequestError(
            f"{a.url} was labeled by a {a.task} bundle, {b.url} by a {b.task} one; pass two runs "
            "of one task"
        )
    if config.output is not None:
        layout.check_no_run(config.output)
    if a.task == "multilabel":
        return compare_multilabel(a, b, config)
    comparison = compare_runs(a, b, config)
    _log_comparison(a, b, comparison)
    if config.output is not None:
        write_comparison(config.output, a, b, comparison, _summarize(comparison))
    check_not_worse(a, b, comparison.paired.difference, config.fail_if_worse)
    return comparison


def compare_runs(a: CommittedRun, b: CommittedRun, config: CompareConfig) -> RunComparison:
    """Compare the rows that both runs have. Raises RequestError if there are none."""
    a.check_slices(select_run_columns(config.slice_by, joined=config.labels is not None))
    check_pairing(a, b, config.on)
    counter = _PairCounter(a, b, config)
    for left, right in iter_row_pairs(a, b, counter.columns, _COLUMNS_B, config.on):
        counter.add(left, right)
    return counter.finish()


class _PairCounter:
    """Counts outcomes of paired rows: in total, per class and per slice."""

    def __init__(self, a: CommittedRun, b: CommittedRun, config: CompareConfig) -> None:
        self.a = a
        names_a, names_b = (normalize_labels(pa.array(each.classes)) for each in (a, b))
        self.shared_classes = names_a.filter(pc.is_in(names_a, value_set=names_b))
        self.slice_by = list(config.slice_by)
        column, self.joined_labels = resolve_labels(a, config.labels, config.on, required=True)
        assert column is not None
        self.label_column = column
        self.groups: dict[tuple[str, str], np.ndarray] = {}
        self.total = np.zeros(4, np.int64)
        self.differing = DifferingRows(_DIFFERING_SCHEMA)
        self.unknown_label = 0

    @property
    def columns(self) -> list[str]:
        """Columns to read of run a."""
        mine = (
            self.joined_labels.required_columns
            if self.joined_labels is not None
            else [self.label_column]
        )
        shown = ["row", self.a.path_column, "predicted_label", "confidence", "status"]
        sliced = select_run_columns(self.slice_by, joined=self.joined_labels is not None)
        return list(dict.fromkeys([*shown, *mine, *sliced]))

    def add(self, left: pa.Table, right: pa.Table) -> None:
        """Add rows of both runs, of the same images in the same order."""
        if self.joined_labels is not None:
            left = self.joined_labels.join(left)
        label = normalize_labels(left[self.label_column]).cast(pa.string())
        predicted = [normalize_labels(side["predicted_label"]) for side in (left, right)]
        ok = pc.and_(
            pc.equal(left["status"].cast(pa.string()), OK),
            pc.equal(right["status"].cast(pa.string()), OK),
        )
        labeled = np.asarray(pc.and_(ok.combine_chunks(), pc.is_valid(label)))
        compared = labeled & np.asarray(pc.is_in(label, value_set=self.shared_classes))
        self.unknown_label += int((labeled & ~compared).sum())
        right_a, right_b = (
            np.asarray(pc.fill_null(pc.equal(each, label), False)) & compared for each in predicted
        )
        cell = np.where(right_a, 2, 0) + right_b  # neither, only b, only a, both
        self.total += np.bincount(cell[compared], minlength=4)
        columns = {"": label, **{n: normalize_labels(left[n]) for n in self.slice_by}}
        for column, values in columns.items():
            self._count_groups(column, values, cell, compared)
        differ = compared & np.asarray(pc.fill_null(pc.not_equal(*predicted), False))
        at = self.differing.keep(np.flatnonzero(differ))
        if len(at):
            self.differing.add(
                [
                    left["row"].take(at),
                    left[self.a.path_column].cast(pa.string()).take(at),
                    label.take(at),
                    predicted[0].take(at),
                    left["confidence"].take(at),
                    predicted[1].take(at),
                    right["confidence"].take(at),
                    name_right(right_a[at], right_b[at]),
                ]
            )

    def finish(self) -> RunComparison:
        if self.joined_labels is not None:
            self.joined_labels.finish()
        neither, only_b, only_a, both = (int(n) for n in self.total)
        rows = neither + only_b + only_a + both
        if rows == 0:
            raise RequestError(
                f"{self.a.url}: no row has predictions of both runs and a label that is a class of "
                f"both models ({self.unknown_label:,} rows have another label); check the labels, "
                "or pass --labels TABLE"
            )
        return RunComparison(
            mcnemar_test(rows, only_a, only_b),
            only_a + both,
            only_b + both,
            self._build_table(classes=True),
            self._build_table(classes=False),
            self.differing.sort(),
            self.differing.count,
            self.unknown_label,
        )

    def _count_groups(
        self, column: str, values: pa.Array, cell: np.ndarray, compared: np.ndarray
    ) -> None:
        coded = pc.fill_null(values, NO_VALUE).dictionary_encode()
        key = coded.indices.to_numpy().astype(np.int64) * 4 + cell
        counts = np.bincount(key[compared], minlength=4 * len(coded.dictionary)).reshape(-1, 4)
        for name, row in zip(coded.dictionary.to_pylist(), counts, strict=True):
            if row.any():
                self.groups[column, name] = self.groups.get((column, name), 0) + row

    def _build_table(self, *, classes: bool) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for (column, value), counts in self.groups.items():
            if (column == "") != classes:
                continue
            neither, only_b, only_a, both = (int(n) for n in counts)
            paired = mcnemar_test(neither + only_b + only_a + both, only_a, only_b)
            name = {"label": value} if classes else {"slice_by": column, "value": value}
            rows.append(
                {
                    **name,
                    "rows": paired.rows,
                    "accuracy_a": (only_a + both) / paired.rows,
                    "accuracy_b": (only_b + both) / paired.rows,
                    "difference": paired.difference,
                    "lower": paired.lower,
                    "upper": paired.upper,
                    "only_a": only_a,
                    "only_b": only_b,
                    "p_value": paired.p_value,
                }
            )
        rows.sort(key=lambda row: (row["difference"], -row["rows"]))
        first = ["label"] if classes else ["slice_by", "value"]
        schema = pa.schema([*((name, pa.string()) for name in first), *_GROUP_FIELDS])
        return pa.Table.from_pylist(rows, schema=schema)


def _log_comparison(a: CommittedRun, b: CommittedRun, comparison: RunComparison) -> None:
    both = comparison.paired
    log.show(f"A  {comparison.correct_a / both.rows:.2%}  {a.url}")
    log.show(f"B  {comparison.correct_b / both.rows:.2%}  {b.url}")
    log.show(
        f"B - A  {100 * both.difference:+.2f} points (95%: {100 * both.lower:+.2f} to "
        f"{100 * both.upper:+.2f}), p = {both.p_value:.3g} by McNemar's test"
    )
    log.show(
        f"{both.rows:,} rows compared; predictions differ on {comparison.num_differing:,}: "
        f"{both.only_a:,} correct only in A, {both.only_b:,} only in B"
    )
    if comparison.unknown_label:
        log.emit(
            "note",
            f"{comparison.unknown_label:,} more rows have a label that is not a class of "
            "both models; they are not compared",
        )
    log_cut_rows(comparison)
    log_worst_groups(
        comparison, 0, lambda row: f" over {row['rows']:,} rows, p = {row['p_value']:.2g}"
    )
    if both.p_value >= 0.05:
        log.show("result: no significant difference (p >= 0.05)")
    else:
        log.show(f"result: {'B' if both.difference > 0 else 'A'} is better")


def _summarize(comparison: RunComparison) -> dict[str, Any]:
    both = comparison.paired
    return {
        "rows": both.rows,
        "unknown_label": comparison.unknown_label,
        "accuracy_a": comparison.correct_a / both.rows,
        "accuracy_b": comparison.correct_b / both.rows,
        "difference": {"value": both.difference, "lower": both.lower, "upper": both.upper},
        "only_a": both.only_a,
        "only_b": both.only_b,
        "mcnemar_p_value": both.p_value,
        "predictions_differ": comparison.num_differing,
    }
