"""Which of two runs is better, and where: may tonight's model replace yesterday's.

Both runs label the same images; their rows are put side by side in row order, or joined by a
column. Only rows with predictions of both runs and a label that is a class of both models are
judged, as in `evaluate`; the others are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator

from imgcls.config import Names, Section
from imgcls.data import filesystem
from imgcls.data.manifest import normalize_labels
from imgcls.data.storage_settings import StorageConfig, with_config_storage
from imgcls.errors import RequestError, TooManyErrors
from imgcls.evaluation.aggregate import NO_VALUE
from imgcls.evaluation.count import read_piece
from imgcls.evaluation.label_join import (
    LabelTableConfig,
    normalize_join_keys,
    resolve_labels,
    select_run_columns,
)
from imgcls.metrics.agreement import PairedComparison, mcnemar_test
from imgcls.runs.committed import CommittedRun, open_run
from imgcls.runs.layout import write_tables
from imgcls.runs.schema import OK

_MAX_DIFFERING = 1_000_000


def _validate_points(text: str) -> str:
    parse_points(text)
    return text


def parse_points(text: str) -> float:
    """`0.5pt` or `0.5%` as 0.005; a bare number must be a fraction. Raises ValueError."""
    number = text.strip().lower()
    for unit in ("pt", "pp", "%"):
        if number.endswith(unit):
            value = float(number.removesuffix(unit)) / 100
            break
    else:
        value = float(number)
    if not 0 <= value < 1:
        raise ValueError(f"{text!r} is not between 0 and 100 points; write 0.5pt for half a point")
    return value


class CompareConfig(Section):
    """Tell which of two runs over the same images is better, and where."""

    positional: ClassVar[tuple[str, ...]] = ("run_a", "run_b")

    run_a: str
    """The run to compare with, e.g. that of the model in use."""
    run_b: str
    """The run of the model that may replace it."""
    on: str | None = None
    """The column that tells which rows are the same image; not needed for one manifest."""
    labels: LabelTableConfig | None = None
    """Labels that came later; run_a's label column when not given."""
    slice_by: Names = []
    """Columns of run_a: the difference for each of their values."""
    fail_if_worse: Annotated[str, AfterValidator(_validate_points)] | None = None
    """Exit with 3 when run_b's accuracy is lower by more than this, e.g. 0.5pt."""
    output: str | None = None
    """A folder for per_class, slices and differing rows as Parquet, and summary.json."""
    storage: StorageConfig = StorageConfig()


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Two runs side by side.

    both:      on the rows that both have
    per_class: label, rows, accuracy_a, accuracy_b, difference, only_a, only_b, p_value
    slices:    slice_by, value, then as per_class
    differing: rows where the predictions differ, those that one alone gets right first
    unknown_label: rows with predictions of both whose label is not a class of both models
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
def compare(config: CompareConfig) -> RunComparison:
    """Compare two runs, print the verdict, and gate on it.

    Raises RequestError when the runs do not fit, TooManyErrors (exit code 3) when run_b is worse
    than `fail_if_worse` allows.
    """
    a, b = open_run(config.run_a), open_run(config.run_b)
    comparison = compare_runs(a, b, config)
    _print_comparison(a, b, comparison)
    if config.output is not None:
        _write_comparison(config.output, a, b, comparison)
    allowed = parse_points(config.fail_if_worse) if config.fail_if_worse is not None else None
    if allowed is not None and comparison.paired.difference < -allowed - 1e-12:
        raise TooManyErrors(
            f"{b.url}: is {-100 * comparison.paired.difference:.2f} points worse than {a.url}, "
            f"allowed {100 * allowed:g}; keep the model in use, or raise --fail-if-worse"
        )
    return comparison


def compare_runs(a: CommittedRun, b: CommittedRun, config: CompareConfig) -> RunComparison:
    """Judge both runs on the rows that both have. Raises RequestError when there are none."""
    a.check_slices(select_run_columns(config.slice_by, joined=config.labels is not None))
    # the rows of a history are those of many manifests; its fingerprint is the newest run's
    other_rows = a.merged_runs or b.merged_runs or a.manifest_fingerprint != b.manifest_fingerprint
    if config.on is None and other_rows:
        raise RequestError(
            f"{a.url} and {b.url} label different manifests; name the column that tells which rows "
            f"are the same image, e.g. --on {a.path_column}"
        )
    if config.on is not None:
        for run in (a, b):
            run.check_key(config.on)
    judge = _PairCounter(a, b, config)
    pairs = (
        _join_rows(a, b, judge, config.on) if config.on is not None else _align_rows(a, b, judge)
    )
    for left, right in pairs:
        judge.add(left, right)
    return judge.finish()


class _PairCounter:
    """Counts what the pairs of rows come to."""

    def __init__(self, a: CommittedRun, b: CommittedRun, config: CompareConfig) -> None:
        self.a = a
        self.shared_classes = pa.array(sorted(set(a.classes) & set(b.classes)), pa.string())
        self.slice_by = list(config.slice_by)
        column, self.joined_labels = resolve_labels(a, config.labels, config.on, required=True)
        assert column is not None
        self.label_column = column
        self.groups: dict[tuple[str, str], np.ndarray] = {}
        self.total = np.zeros(4, np.int64)
        self.differing: list[pa.Table] = []
        self.num_differing = self.unknown_label = 0

    @property
    def columns(self) -> list[str]:
        """Of run a."""
        mine = (
            self.joined_labels.required_columns
            if self.joined_labels is not None
            else [self.label_column]
        )
        shown = ["row", self.a.path_column, "predicted_label", "confidence", "status"]
        sliced = select_run_columns(self.slice_by, joined=self.joined_labels is not None)
        return list(dict.fromkeys([*shown, *mine, *sliced]))

    def add(self, left: pa.Table, right: pa.Table) -> None:
        """Rows of both runs, of the same images in the same order."""
        if self.joined_labels is not None:
            left = self.joined_labels.join(left)
        label = normalize_labels(left[self.label_column]).cast(pa.string())
        said = [normalize_labels(side["predicted_label"]) for side in (left, right)]
        ok = pc.and_(
            pc.equal(left["status"].cast(pa.string()), OK),
            pc.equal(right["status"].cast(pa.string()), OK),
        )
        labelled = np.asarray(pc.and_(ok.combine_chunks(), pc.is_valid(label)))
        judged = labelled & np.asarray(pc.is_in(label, value_set=self.shared_classes))
        self.unknown_label += int((labelled & ~judged).sum())
        right_a, right_b = (
            np.asarray(pc.fill_null(pc.equal(each, label), False)) & judged for each in said
        )
        cell = np.where(right_a, 2, 0) + right_b  # neither, b alone, a alone, both
        self.total += np.bincount(cell[judged], minlength=4)
        columns = {"": label, **{n: normalize_labels(left[n]) for n in self.slice_by}}
        for column, values in columns.items():
            self._count_groups(column, values, cell, judged)
        differ = judged & np.asarray(pc.fill_null(pc.not_equal(*said), False))
        self.num_differing += int(differ.sum())
        kept = sum(table.num_rows for table in self.differing)
        if differ.any() and kept < _MAX_DIFFERING:
            at = np.flatnonzero(differ)
            self.differing.append(
                pa.table(
                    {
                        "row": left["row"].take(at),
                        "path": left[self.a.path_column].cast(pa.string()).take(at),
                        "label": label.take(at),
                        "predicted_a": said[0].take(at),
                        "confidence_a": left["confidence"].take(at),
                        "predicted_b": said[1].take(at),
                        "confidence_b": right["confidence"].take(at),
                        "right": pa.array(
                            np.array(["neither", "b", "a", "both"])[cell[at]].tolist(), pa.string()
                        ),
                    }
                )
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
        differing = pa.concat_tables(self.differing) if self.differing else _NO_DIFFERING
        order = {"a": 0, "b": 1, "both": 2, "neither": 2}
        rank = pa.array([order[name] for name in differing["right"].to_pylist()], pa.int8())
        differing = differing.append_column("rank", rank).sort_by(
            [("rank", "ascending"), ("row", "ascending")]
        )
        return RunComparison(
            mcnemar_test(rows, only_a, only_b),
            only_a + both,
            only_b + both,
            self._build_table(classes=True),
            self._build_table(classes=False),
            differing.drop_columns(["rank"]),
            self.num_differing,
            self.unknown_label,
        )

    def _count_groups(
        self, column: str, values: pa.Array, cell: np.ndarray, judged: np.ndarray
    ) -> None:
        coded = pc.fill_null(values, NO_VALUE).dictionary_encode()
        key = coded.indices.to_numpy().astype(np.int64) * 4 + cell
        counts = np.bincount(key[judged], minlength=4 * len(coded.dictionary)).reshape(-1, 4)
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


def _align_rows(
    a: CommittedRun, b: CommittedRun, judge: _PairCounter
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Rows of one manifest side by side, whatever the files that each run cut them into."""
    rights = _iter_tables(b, ["row", "predicted_label", "confidence", "status"])
    waiting = next(rights, None)
    for left in _iter_tables(a, judge.columns):
        while left.num_rows:
            if waiting is None or waiting.num_rows == 0:
                waiting = next(rights, None)
                if waiting is None:
                    return  # b was limited to fewer rows
                continue
            rows = min(left.num_rows, waiting.num_rows)
            yield left.slice(0, rows), waiting.slice(0, rows)
            left, waiting = left.slice(rows), waiting.slice(rows)


def _join_rows(
    a: CommittedRun, b: CommittedRun, judge: _PairCounter, on: str
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Rows that both have, by a column whose values stand once in each; b is held in memory."""
    import pandas as pd

    columns = list(dict.fromkeys([on, "predicted_label", "confidence", "status"]))
    held = pa.concat_tables(_iter_tables(b, columns)).unify_dictionaries()
    held = held.filter(pc.is_valid(held[on]))  # a row without a key is no row of the other run
    index = pd.Index(normalize_join_keys(held[on]).to_pandas())
    if index.has_duplicates:
        key = index[index.duplicated()][0]
        raise RequestError(f"{b.url}: {on} {key!r} stands there twice; join on another column")
    seen = 0
    used = np.zeros(len(index), bool)
    for left in _iter_tables(a, list(dict.fromkeys([*judge.columns, on]))):
        place = index.get_indexer(normalize_join_keys(left[on]).to_pandas())
        hit = np.flatnonzero(place >= 0)
        taken = place[hit]
        if used[taken].any() or len(np.unique(taken)) < len(taken):
            raise RequestError(f"{a.url}: {on} stands in several rows; join on another column")
        used[taken] = True
        seen += len(hit)
        yield left.take(hit), held.take(taken)
    if seen == 0:
        raise RequestError(
            f"{a.url} and {b.url} share no {on} (such as {index[0]!r}); check that both manifests "
            "write it the same way"
        )
    if seen < max(a.rows, b.rows):
        print(f"note: {seen:,} rows are in both, of {a.rows:,} and {b.rows:,}")


def _iter_tables(run: CommittedRun, names: list[str]) -> Iterator[pa.Table]:
    for piece in run.split_row_groups(10**9):
        yield from read_piece(run, piece, names)


def _print_comparison(a: CommittedRun, b: CommittedRun, comparison: RunComparison) -> None:
    both = comparison.paired
    print(f"A  {comparison.correct_a / both.rows:.2%}  {a.url}")
    print(f"B  {comparison.correct_b / both.rows:.2%}  {b.url}")
    print(
        f"B - A  {100 * both.difference:+.2f} points (95 %: {100 * both.lower:+.2f} to "
        f"{100 * both.upper:+.2f}), p = {both.p_value:.3g} by McNemar's test"
    )
    print(
        f"{both.rows:,} rows judged; predictions differ on {comparison.num_differing:,}: "
        f"{both.only_a:,} only A has right, {both.only_b:,} only B"
    )
    if comparison.unknown_label:
        print(
            f"note: {comparison.unknown_label:,} more rows have a label that is not a class of "
            "both models; they are not counted"
        )
    if comparison.num_differing > comparison.differing.num_rows:
        print(
            f"note: {comparison.differing.num_rows:,} of them are kept, the first by row; those "
            "counted are all"
        )
    for name, table in (("class", comparison.per_class), ("slice", comparison.slices)):
        for row in table.slice(0, 5).to_pylist():
            if row["difference"] < 0:
                what = row.get("label") or f"{row['slice_by']}={row['value']}"
                print(
                    f"  worse {name}: {what}  {100 * row['difference']:+.1f} points over "
                    f"{row['rows']:,} rows, p = {row['p_value']:.2g}"
                )
    if both.p_value >= 0.05:
        print("verdict: no difference that these rows can show")
    else:
        print(f"verdict: {'B' if both.difference > 0 else 'A'} is better", flush=True)


def _write_comparison(
    output: str, a: CommittedRun, b: CommittedRun, comparison: RunComparison
) -> None:
    made = {
        "per_class": comparison.per_class,
        "slices": comparison.slices,
        "differing": comparison.differing,
    }
    write_tables(output, made)
    both = comparison.paired
    body = {
        "run_a": a.url,
        "run_b": b.url,
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
    place = filesystem.join(output, "summary.json")
    filesystem.write(place, (json.dumps(body, indent=2) + "\n").encode())


_GROUP_FIELDS = [
    pa.field("rows", pa.int64()),
    *(pa.field(n, pa.float64()) for n in ("accuracy_a", "accuracy_b", "difference")),
    *(pa.field(n, pa.float64()) for n in ("lower", "upper")),
    *(pa.field(n, pa.int64()) for n in ("only_a", "only_b")),
    pa.field("p_value", pa.float64()),
]
_NO_DIFFERING = pa.schema(
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
).empty_table()
