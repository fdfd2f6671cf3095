"""Select the cells of a multilabel run to show: mistakes and possible label errors.

An aggregate keeps cells without columns; those of their rows are read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from imgcls.data.manifests.label_columns import UNKNOWN, LabelColumns
from imgcls.evaluation.aggregate import TopRows
from imgcls.evaluation.class_samples import ClassSamples
from imgcls.evaluation.label_list_join import JoinedLabelLists
from imgcls.evaluation.multilabel_aggregate import MultiLabelAggregate
from imgcls.evaluation.row_lookup import read_rows, read_slices
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.multilabel import RankingCounts
from imgcls.metrics.score_bins import ONE, bin_values
from imgcls.runs.committed import CommittedRun

MAX_CLASSES_WITH_MISTAKES = 50
MAX_ISSUES = 100_000
_SHOWN_COLUMNS = ("predicted_labels", "topk_labels", "topk_scores", "width", "height")


@dataclass(frozen=True, eq=False)
class Cells:
    """N cells.

    label:     (N,) class
    given:     (N,) whether the row has the label
    predicted: (N,) whether the class is predicted
    score:     (N,) of the class
    file, position: (N,) the row
    """

    label: Ints
    given: Bools
    predicted: Bools
    score: Floats
    file: Ints
    position: Ints

    @classmethod
    def from_aggregate(cls, found: MultiLabelAggregate) -> Cells:
        """The kept cells: those without the label, then those with it, by class, worst first."""
        kept = (found.negatives, found.positives)
        bits = np.concatenate([found.negatives.value, ONE - found.positives.value])
        return cls(
            label=np.concatenate([top.label for top in kept]),
            given=np.repeat([False, True], [len(top.label) for top in kept]),
            predicted=np.concatenate([top.is_predicted for top in kept]),
            score=bits.astype(np.uint16).view(np.float16).astype(np.float64),
            file=np.concatenate([top.file for top in kept]),
            position=np.concatenate([top.position for top in kept]),
        )

    @classmethod
    def from_rows(cls, top: TopRows) -> Cells:
        """Rows without a class in question."""
        label, unknown = np.zeros(len(top.file), np.int64), np.zeros(len(top.file), bool)
        return cls(label, unknown, unknown, top.value, top.file, top.position)

    @classmethod
    def from_samples(cls, samples: ClassSamples) -> Cells:
        """Sampled rows of predicted classes, without their scores."""
        unknown, score = np.zeros(len(samples.label), bool), np.zeros(len(samples.label))
        return cls(samples.label, unknown, ~unknown, score, samples.file, samples.position)

    def take(self, chosen: Ints | Bools | slice) -> Cells:
        """Some of the cells."""
        return Cells(*(getattr(self, field.name)[chosen] for field in fields(self)))


def select_mistakes(found: MultiLabelAggregate, gallery: int, confident: int = 0) -> Cells:
    """The worst mistakes of the classes with the most, false positives of a class first.

    Per class, at most a quarter of `gallery` false positives and as many false negatives; in
    addition, the `confident` most confident mistakes of these classes.
    """
    counts, cells = found.counts, Cells.from_aggregate(found)
    wrong = cells.take(cells.given != cells.predicted)
    number = counts.false_positives + counts.false_negatives
    order = np.argsort(-number, kind="stable")[:MAX_CLASSES_WITH_MISTAKES]
    labels = order[number[order] > 0]
    wrong = wrong.take(np.isin(wrong.label, labels))
    rank = np.argsort(np.argsort(-compute_margins(wrong), kind="stable"))
    size = max(1, gallery // 4)
    chosen = [np.zeros(0, np.int64)]
    for label in labels:
        for given in (False, True):
            cells_of_class = np.flatnonzero((wrong.label == label) & (wrong.given == given))
            is_chosen = rank[cells_of_class] < confident
            is_chosen[:size] = True
            chosen.append(cells_of_class[is_chosen])
    return wrong.take(np.concatenate(chosen))


def rank_issues(found: MultiLabelAggregate) -> Cells:
    """Cells whose label the model contradicts with confidence, worst first, at most `MAX_ISSUES`.

    A cell without the label is included if its score is at least the mean score of the class on
    rows with the label; a cell with it, if the score is at most the mean on rows without it. Cells
    are ranked by their margin. Source: Northcutt, Jiang, Chuang, "Confident Learning", JAIR 70
    (2021): the off-diagonal of the confident joint of each class and its complement, ranked by
    normalized margin.
    """
    cells = Cells.from_aggregate(found)
    if found.ranking is None:
        return cells
    threshold = compute_thresholds(found.ranking, cells)
    # never for a class without such rows, whose mean is NaN
    contradicted = np.where(cells.given, cells.score <= threshold, cells.score >= threshold)
    cells = cells.take(contradicted)
    margin = compute_margins(cells)
    order = np.lexsort((cells.label, cells.position, cells.file, -margin))
    return cells.take(order[:MAX_ISSUES])


def compute_thresholds(ranking: RankingCounts, cells: Cells) -> Floats:
    """(N,) mean score of the class on the rows that have the other value of the label."""
    scores = bin_values(ranking.positive.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        with_label, without = (
            bins @ scores / bins.sum(axis=1) for bins in (ranking.positive, ranking.negative)
        )
    mean: Floats = np.where(cells.given, without[cells.label], with_label[cells.label])
    return mean


def compute_margins(cells: Cells) -> Floats:
    """(N,) score of the other value of the label minus that of the given one."""
    margin: Floats = np.where(cells.given, 1 - 2 * cells.score, 2 * cells.score - 1)
    return margin


class CellReader:
    """Reads the rows of cells from a run."""

    def __init__(
        self, run: CommittedRun, columns: LabelColumns | None, joined: JoinedLabelLists | None
    ) -> None:
        """columns: of the labels in the run; None if they are joined or there are none."""
        self._run, self._columns, self._joined = run, columns, joined

    def read(self, lists: Sequence[Cells], slice_by: Sequence[str] = ()) -> list[pa.Table]:
        """Cells with the columns of their rows, each list in its order.

        Columns: row, path, label (the class), given, score, predicted_labels, topk_labels,
        topk_scores, width, height, labels (null for an unlabeled row), unknown_labels, the
        predicted labels of which it is unknown whether they are correct, and `slices`, the values
        in `slice_by`.
        """
        run, columns, joined = self._run, self._columns, self._joined
        names = ["row", run.path_column, *_SHOWN_COLUMNS, *slice_by]
        names += [] if columns is None else columns.names
        names += [] if joined is None else joined.required_columns
        files, positions = (
            np.concatenate([getattr(cells, name) for cells in lists])
            for name in ("file", "position")
        )
        table = read_rows(run, files, positions, names)
        shown = {name: table[name] for name in _SHOWN_COLUMNS} | self._read_labels(table)
        shown["slices"] = read_slices(table, slice_by)
        found, start = [], 0
        for cells in lists:
            part = slice(start, start + len(cells.file))
            rows = {name: column[part] for name, column in shown.items()}
            found.append(pa.table(self._name_cells(cells, table[part]) | rows))
            start = part.stop
        return found

    def _read_labels(self, table: pa.Table) -> dict[str, pa.Array]:
        """`labels` and `unknown_labels` of rows of the run."""
        columns, place = self._columns, self._run.url
        predicted = table["predicted_labels"].to_pylist()
        if self._joined is not None:
            columns, place = self._joined.columns, self._joined.source
            table = self._joined.take(table)
        if columns is None:
            nothing = pa.nulls(table.num_rows, pa.list_(pa.string()))
            return {"labels": nothing, "unknown_labels": nothing}
        targets = columns.encode(table, self._run.classes, place).targets
        code = {name: number for number, name in enumerate(self._run.classes)}
        unknown = [
            [name for name in names if row[code[name]] == UNKNOWN]
            for names, row in zip(predicted, targets, strict=True)
        ]
        return {
            "labels": columns.read_names(table, place),
            "unknown_labels": pa.array(unknown, pa.list_(pa.string())),
        }

    def read_issues(self, cells: Cells, ranking: RankingCounts | None) -> pa.Table:
        """Table of `rank_issues`: row, path, label, given, score, threshold, margin."""
        table = read_rows(self._run, cells.file, cells.position, ["row", self._run.path_column])
        threshold = np.zeros(0) if ranking is None else compute_thresholds(ranking, cells)
        return pa.table(
            self._name_cells(cells, table)
            | {
                "threshold": pa.array(threshold, pa.float64()),
                "margin": pa.array(compute_margins(cells), pa.float64()),
            }
        )

    def _name_cells(self, cells: Cells, rows: pa.Table) -> dict[str, pa.Array]:
        names = pa.array(self._run.classes, pa.string())
        return {
            "row": rows["row"],
            "path": rows[self._run.path_column].cast(pa.string()),
            "label": names.take(pa.array(cells.label)),
            "given": pa.array(cells.given),
            "score": pa.array(cells.score, pa.float32()),
        }
