"""Compute the evaluation of a committed run: metrics, tables, and the rows to show.

Never runs a model. Metrics whose columns are missing are left out, with a note on how to get them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from imgcls.errors import RequestError
from imgcls.evaluation import row_lookup
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate, aggregate_run
from imgcls.evaluation.class_samples import list_frequent_classes
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.embedding_map import compute_map
from imgcls.evaluation.explained import explain_mistakes, open_explainer, select_most_confident
from imgcls.evaluation.label_join import JoinedLabels, resolve_labels, select_run_columns
from imgcls.evaluation.multilabel import MultiLabelEvaluation, compute_multilabel
from imgcls.evaluation.result import RunEvaluation, build_slice_row, build_slice_table
from imgcls.metrics import PredictionCounts, tables
from imgcls.metrics.confusion import ClassCounts
from imgcls.metrics.discrimination import build_discrimination_table
from imgcls.metrics.intervals import wilson_interval
from imgcls.metrics.label_sets import build_set_columns
from imgcls.metrics.selective import build_coverage_curve
from imgcls.metrics.tables import Metric
from imgcls.runs.committed import CommittedRun, open_run


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Evaluation(RunEvaluation):
    """Result of `imgcls.evaluate`: metrics and tables of a run with one label per image.

    In a notebook it shows the headline numbers, the confusion matrix, the curves and the worst
    mistakes.

    Attributes
    ----------
    run : CommittedRun
        The evaluated run.
    config : EvaluationOptions
        Options of the evaluation.
    aggregate : RunAggregate
        Counts from which everything is computed.
    has_labels : bool
        Whether a row has a label that is a class of the model.
    metrics : list of Metric
        All metrics, in the order of `summary.parquet`.
    omitted : list of str
        Notes on metrics that could not be computed, and how to get them.
    per_class, coverage_curve, slices : pyarrow.Table
        As in `metrics/per_class.parquet`, `coverage.parquet` and `slices.parquet`.
    mistakes, uncertain, strangest, label_issues : pyarrow.Table
        Wrong rows with the highest confidence, rows with the lowest confidence, rows with the
        highest out-of-distribution score, and rows whose label the model contradicts.
    embedding_map : EmbeddingMap or None
        Sample of the embeddings; None for a run without any.
    samples : pyarrow.Table
        Rows of the most frequent predicted classes, drawn at random; none of a labeled run.
    storage : StorageConfig
        Storage settings that the evaluation was made with; images are read with them.
    """

    aggregate: RunAggregate
    coverage_curve: pa.Table
    uncertain: pa.Table
    samples: pa.Table

    @property
    def counts(self) -> PredictionCounts:
        """Counts of the rows of the run."""
        return self.aggregate.counts

    def build_tables(self) -> dict[str, pa.Table]:
        """The tables of `metrics/`, by file name without its extension."""
        return {
            "per_class": self.per_class,
            "confusion": tables.build_confusion(self.counts),
            "calibration": tables.build_calibration(self.counts),
            "coverage": self.coverage_curve,
            "slices": self.slices,
            "label_issues": self.label_issues,
        }

    def compute_count_metrics(self) -> list[Metric]:
        """The metrics that need no scores, which prediction logs too."""
        return tables.compute_metrics(self.counts, top_k=self.run.top_k, resamples=0)

    def render(self, *, in_notebook: bool) -> str:
        """Render the report, or its short form for a notebook."""
        from imgcls.evaluation.report import render_notebook, render_run

        return render_notebook(self) if in_notebook else render_run(self)


def compute_evaluation(
    url: str, config: EvaluationOptions, *, need_labels: bool
) -> Evaluation | MultiLabelEvaluation:
    """Evaluate a committed run.

    Parameters
    ----------
    url : str
        Output folder of `imgcls predict`.
    config : EvaluationOptions
        Labels and contents of the report.
    need_labels : bool
        Whether to reject a run without labels.

    Returns
    -------
    Evaluation or MultiLabelEvaluation
        By the task of the bundle that made the run.

    Raises
    ------
    RequestError
        If a column or the labels cannot be used.
    OutputError
        If there is no committed run.
    """
    run = open_run(url)
    run.check_predictions()
    return evaluate_run(run, config, need_labels=need_labels)


def evaluate_run(
    run: CommittedRun, config: EvaluationOptions, *, need_labels: bool
) -> Evaluation | MultiLabelEvaluation:
    """Evaluate a run that is open; see `compute_evaluation`."""
    explainer = open_explainer(run, config)
    compute = compute_multilabel if run.task == "multilabel" else _compute_single_label
    evaluation: Evaluation | MultiLabelEvaluation = compute(run, config, need_labels=need_labels)
    if explainer is None:
        return evaluation
    mistakes = select_most_confident(evaluation.mistakes, config.explain)
    return replace(evaluation, overlays=explain_mistakes(explainer, run, mistakes))


def _compute_single_label(
    run: CommittedRun, config: EvaluationOptions, *, need_labels: bool
) -> Evaluation:
    label_column, joined = resolve_labels(run, config.labels, config.on, required=need_labels)
    run.check_slices(select_run_columns(config.slice_by, joined=joined is not None))
    spec = AggregateSpec(
        classes=run.classes,
        label_column=label_column,
        slice_by=tuple(config.slice_by),
        scores=run.has_scores and label_column is not None,
        sets=run.has_label_sets,
        ood=run.has_ood,
        gallery=config.num_mistakes,
    )
    found = aggregate_run(run, spec, joined)
    counts = found.counts
    if need_labels and not counts.labeled:
        remedy = "join labels with --labels TABLE"
        if config.labels is not None:
            remedy = "check the labels of --labels, whose names are compared with those of classes"
        raise RequestError(
            f"{run.url}: none of its {counts.ok:,} predictions has a label that is a class of the "
            f"model ({counts.unlabeled:,} have none, {counts.unknown_label:,} another); {remedy}"
        )
    samples = found.samples.select(list_frequent_classes(counts.predicted_counts))
    lists: list[row_lookup.RowPlaces] = [found.mistakes, found.uncertain, found.issues]
    lists += [found.strangest, samples]
    mistakes, uncertain, issues, strangest, sampled = row_lookup.lookup_rows(
        run, lists, label_column, joined, config.slice_by
    )
    return Evaluation(
        run=run,
        config=config,
        aggregate=found,
        has_labels=counts.labeled > 0,
        metrics=tables.compute_metrics(
            counts,
            top_k=run.top_k,
            selective=found.selective,
            scores=found.scores,
            sets=found.sets,
        ),
        omitted=list(_explain_omissions(run, found, joined)),
        per_class=_build_per_class(found),
        coverage_curve=build_coverage_curve(found.selective),
        slices=_build_slices(found, run.top_k, config.small_slice),
        mistakes=mistakes,
        uncertain=uncertain.slice(0, config.gallery),
        samples=sampled.append_column("sampled_class", sampled["predicted_label"]),
        strangest=strangest.slice(0, config.gallery),
        label_issues=row_lookup.rank_label_issues(found, issues),
        embedding_map=compute_map(run, label_column, joined),
    )


def _explain_omissions(
    run: CommittedRun, found: RunAggregate, joined: JoinedLabels | None
) -> Iterator[str]:
    if not found.counts.labeled:
        yield (
            "Accuracy and all metrics that need labels: the run has no labels. Join some with "
            "`imgcls evaluate --predictions RUN --labels TABLE --output FOLDER`."
        )
        return
    if not run.has_scores:
        what = "AUROC, average precision and the Brier score"
        if joined is not None:
            what += ", log loss and likely label errors"
        remedy = ": run `imgcls predict --scores`."
        if run.merged_runs:
            remedy = (
                " in one order, which this history does not have: its bundles had different "
                "classes, or an earlier version compacted it. Compact it again, or evaluate one of "
                "its runs."
            )
        yield f"{what} need the scores of all classes{remedy}"


def _build_per_class(found: RunAggregate) -> pa.Table:
    """Classes with 95% Wilson intervals and, if scores are counted, ranking metrics."""
    table = tables.build_per_class(found.counts)
    classes = ClassCounts.from_counts(found.counts)
    for rate, rows in (("precision", classes.predicted), ("recall", classes.support)):
        ends = [
            wilson_interval(correct, int(count)) if count > 0 else (None, None)
            for correct, count in zip(classes.correct, rows, strict=True)
        ]
        for side, values in (("lower", [e[0] for e in ends]), ("upper", [e[1] for e in ends])):
            table = table.append_column(f"{rate}_{side}", pa.array(values, pa.float64()))
    if found.scores is not None and found.scores.rows:
        ranked = build_discrimination_table(found.scores)
        for name in ranked.schema.names[1:]:
            table = table.append_column(name, ranked[name])
    if found.sets is not None and found.sets.labeled.any():
        for name, column in build_set_columns(found.sets).items():
            table = table.append_column(name, column)
    return table


def _build_slices(found: RunAggregate, top_k: int, small: int) -> pa.Table:
    """Metrics of each slice, as `build_slice_table` returns them."""
    rows = [
        build_slice_row(
            column,
            value,
            tables.compute_metrics(counts, top_k=top_k, resamples=0),
            small=(counts.labeled if found.counts.labeled else counts.ok) < small,
            with_interval="accuracy",
        )
        for column, slices in found.slices.items()
        for value, counts in slices.items()
    ]
    has_accuracy = any("accuracy" in row for row in rows)
    return build_slice_table(rows, "accuracy" if has_accuracy else "mean_confidence")
