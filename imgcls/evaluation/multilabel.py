"""Compute the evaluation of a multilabel run: metrics, tables, and the cells to show.

A cell is one class of one row. Its mistakes are false positives (predicted without the label) and
false negatives (the label, not predicted).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from imgcls.errors import RequestError
from imgcls.evaluation.aggregate import aggregate_run
from imgcls.evaluation.class_samples import list_frequent_classes
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.embedding_map import compute_map
from imgcls.evaluation.label_list_join import resolve_label_lists
from imgcls.evaluation.multilabel_aggregate import (
    MultiLabelAggregate,
    MultiLabelSettings,
    count_kept_cells,
)
from imgcls.evaluation.multilabel_cells import (
    MAX_ISSUES,
    CellReader,
    Cells,
    rank_issues,
    select_mistakes,
)
from imgcls.evaluation.result import RunEvaluation, build_slice_row, build_slice_table
from imgcls.formatting import format_count
from imgcls.metrics.multilabel import (
    CooccurrenceCounts,
    MultiLabelCounts,
    RankingCounts,
    build_calibration_table,
    build_cooccurrence_table,
    build_multilabel_per_class,
    build_pr_curves,
    compute_multilabel_metrics,
)
from imgcls.metrics.multilabel.cooccurrence import MAX_COOCCURRENCE_CLASSES
from imgcls.metrics.tables import Metric
from imgcls.runs.committed import CommittedRun

_QUALITY = "f1_micro"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MultiLabelEvaluation(RunEvaluation):
    """Result of `imgcls.evaluate`: metrics and tables of a run with any number of labels per image.

    In a notebook it shows the headline numbers, the classes and the precision-recall curves.

    Attributes
    ----------
    run : CommittedRun
        The evaluated run.
    config : EvaluationOptions
        Options of the evaluation.
    aggregate : MultiLabelAggregate
        Counts from which everything is computed.
    has_labels : bool
        Whether a label of a row is known.
    metrics : list of Metric
        All metrics, in the order of `summary.parquet`.
    omitted : list of str
        Notes on metrics that could not be computed, and how to get them.
    per_class, pr_curves, cooccurrence, calibration, slices : pyarrow.Table
        As in `metrics/per_class.parquet` and so on.
    mistakes : pyarrow.Table
        For the classes with the most mistakes, the false positives with the highest score and the
        false negatives with the lowest score.
    label_issues : pyarrow.Table
        Cells whose label the model contradicts, the worst first, and `issue_rows`: the first of
        them with the columns of `mistakes`.
    strangest : pyarrow.Table
        Rows with the highest out-of-distribution score.
    samples : pyarrow.Table
        Rows of the most frequent predicted classes, drawn at random; none of a labeled run.
    embedding_map : EmbeddingMap or None
        Sample of the embeddings; None for a run without any.
    storage : StorageConfig
        Storage settings that the evaluation was made with; images are read with them.
    """

    aggregate: MultiLabelAggregate
    pr_curves: pa.Table
    cooccurrence: pa.Table
    calibration: pa.Table
    issue_rows: pa.Table
    samples: pa.Table

    @property
    def counts(self) -> MultiLabelCounts:
        """Counts of the rows of the run."""
        return self.aggregate.counts

    def build_tables(self) -> dict[str, pa.Table]:
        """The tables of `metrics/`, by file name without its extension."""
        names = ("per_class", "pr_curves", "cooccurrence", "calibration", "slices", "label_issues")
        return {name: getattr(self, name) for name in names}

    def compute_count_metrics(self) -> list[Metric]:
        """The metrics that need no scores, which prediction logs too."""
        return compute_multilabel_metrics(self.counts, resamples=0)

    def render(self, *, in_notebook: bool) -> str:
        """Render the report, or its short form for a notebook."""
        from imgcls.evaluation.multilabel_report import (
            render_multilabel_notebook,
            render_multilabel_run,
        )

        return render_multilabel_notebook(self) if in_notebook else render_multilabel_run(self)


def compute_multilabel(
    run: CommittedRun, config: EvaluationOptions, *, need_labels: bool
) -> MultiLabelEvaluation:
    """Evaluate a committed run of a multilabel bundle; see `compute.compute_evaluation`."""
    labels, joined = resolve_label_lists(run, config.labels, config.on, required=need_labels)
    run.check_slices(config.slice_by)
    settings = MultiLabelSettings(
        classes=run.classes,
        labels=labels,
        slice_by=tuple(config.slice_by),
        scores=run.has_scores and labels is not None,
        ood=run.has_ood,
        gallery=config.gallery,
        cells=count_kept_cells(run.classes, MAX_ISSUES, config.num_mistakes),
    )
    found = aggregate_run(run, settings, joined)
    counts, ranking = found.counts, found.ranking
    if need_labels and not counts.labeled:
        raise RequestError(
            f"{run.url}: none of its {counts.ok:,} predictions has a label; "
            + ("join labels with" if config.labels is None else "check the labels of")
            + " --labels TABLE"
        )
    issues = rank_issues(found)
    reader = CellReader(run, None if labels is None else labels.columns, joined)
    samples = found.samples.select(list_frequent_classes(counts.predicted_counts))
    mistakes, issue_rows, strangest, sampled = reader.read(
        [
            select_mistakes(found, config.gallery, config.explain),
            issues.take(slice(0, config.gallery)),
            Cells.from_rows(found.strangest),
            Cells.from_samples(samples),
        ],
        config.slice_by,
    )
    return MultiLabelEvaluation(
        run=run,
        config=config,
        aggregate=found,
        has_labels=counts.labeled > 0,
        metrics=compute_multilabel_metrics(counts, ranking=ranking),
        omitted=list(_explain_omissions(run, found)),
        per_class=build_multilabel_per_class(counts, ranking),
        pr_curves=build_pr_curves(ranking or RankingCounts.empty(run.classes)),
        cooccurrence=build_cooccurrence_table(found.pairs or CooccurrenceCounts.empty(run.classes)),
        calibration=build_calibration_table(ranking or RankingCounts.empty(run.classes)),
        slices=_build_slices(found, config.small_slice),
        mistakes=mistakes,
        issue_rows=issue_rows,
        strangest=strangest.drop_columns(["label", "given", "score"]),
        samples=sampled.append_column("sampled_class", sampled["label"]).drop_columns(
            ["label", "given", "score"]
        ),
        label_issues=reader.read_issues(issues, ranking),
        embedding_map=compute_map(run, None, None),
    )


def _explain_omissions(run: CommittedRun, found: MultiLabelAggregate) -> Iterator[str]:
    if not found.counts.labeled:
        yield (
            "All metrics that need labels: the run has no labels. Join some with "
            "`imgcls evaluate --predictions RUN --labels TABLE --output FOLDER`."
        )
    if found.counts.unknown_label:
        yield (
            f"{format_count(found.counts.unknown_label, 'row')} with a label that is no class of "
            "the model, for which this label is ignored. If labels are separated by a character, "
            "name it with --manifest.label-delimiter, or --labels.label-delimiter."
        )
    if found.counts.labeled and not run.has_scores:
        yield (
            "mAP, AUROC, calibration, the images with mistakes and possible label errors need the "
            "scores of all classes in one order, which this history does not have: its bundles had "
            "different classes, or an earlier version compacted it. Compact it again, or evaluate "
            "one of its runs."
        )
    elif found.pairs is not None and not found.pairs.together.size:
        yield f"Co-occurrence is counted for at most {MAX_COOCCURRENCE_CLASSES:,} classes."


def _build_slices(found: MultiLabelAggregate, small: int) -> pa.Table:
    """Metrics of each slice, as `build_slice_table` returns them."""
    rows = [
        build_slice_row(
            column,
            value,
            compute_multilabel_metrics(counts, resamples=0),
            small=(counts.labeled if found.counts.labeled else counts.ok) < small,
            with_interval=_QUALITY,
        )
        for column, slices in found.slices.items()
        for value, counts in slices.items()
    ]
    # the report shows these, also where no slice has them
    shown = ("rows", "f1_macro", "subset_accuracy", "labels_per_row", "predicted_labels_per_row")
    ends = (f"{_QUALITY}_lower", f"{_QUALITY}_upper")
    for row in rows:
        for name in (*shown, _QUALITY, *ends, "error_rate"):
            row.setdefault(name, None)
    return build_slice_table(rows, _QUALITY)
