"""Compute the evaluation of a committed run: metrics, tables, and the rows to show.

Never runs a model. Metrics whose columns are missing are left out, with a note on how to get them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.errors import RequestError
from imgcls.evaluation import row_lookup
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate, aggregate_run
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.embedding_map import EmbeddingMap, compute_map
from imgcls.evaluation.label_join import JoinedLabels, resolve_labels, select_run_columns
from imgcls.metrics import tables
from imgcls.metrics.confusion import ClassCounts
from imgcls.metrics.discrimination import build_discrimination_table
from imgcls.metrics.formatting import list_headlines
from imgcls.metrics.intervals import wilson_interval
from imgcls.metrics.label_sets import build_set_columns
from imgcls.metrics.selective import build_coverage_curve
from imgcls.metrics.tables import Metric
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of `imgcls.evaluate`: metrics and tables of a run.

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
    storage : StorageConfig
        Storage settings that the evaluation was made with; images are read with them.
    """

    run: CommittedRun
    config: EvaluationOptions
    aggregate: RunAggregate
    has_labels: bool
    metrics: list[Metric]
    omitted: list[str]
    per_class: pa.Table
    coverage_curve: pa.Table
    slices: pa.Table
    mistakes: pa.Table
    uncertain: pa.Table
    strangest: pa.Table
    label_issues: pa.Table
    embedding_map: EmbeddingMap | None
    storage: StorageConfig = field(default_factory=current_settings, repr=False)

    def get_metric(self, name: str) -> Metric | None:
        """Find a metric by name.

        Parameters
        ----------
        name : str
            Name as in `summary.json`, such as "accuracy".

        Returns
        -------
        Metric or None
            None if the run does not define it.
        """
        return next((metric for metric in self.metrics if metric.name == name), None)

    def __repr__(self) -> str:
        counts = self.aggregate.counts
        found = [self.get_metric(n) for n in list_headlines([m.name for m in self.metrics])]
        texts = [f"{counts.rows:,} rows", *(str(metric) for metric in found[:3])]
        return f"<Evaluation of {self.run.url}: {', '.join(texts)}>"

    def _repr_html_(self) -> str:
        from imgcls.evaluation import report

        with use_settings(self.storage):
            return report.render_notebook(self)


def compute_evaluation(url: str, config: EvaluationOptions, *, need_labels: bool) -> Evaluation:
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
    Evaluation

    Raises
    ------
    RequestError
        If a column or the labels cannot be used.
    OutputError
        If there is no committed run.
    """
    run = open_run(url)
    run.check_predictions()
    label_column, joined = resolve_labels(run, config.labels, config.on, required=need_labels)
    run.check_slices(select_run_columns(config.slice_by, joined=joined is not None))
    spec = AggregateSpec(
        classes=run.classes,
        label_column=label_column,
        slice_by=tuple(config.slice_by),
        scores=run.has_scores and label_column is not None,
        sets=run.has_label_sets,
        ood=run.has_ood,
        gallery=config.gallery,
    )
    found = aggregate_run(run, spec, joined)
    counts = found.counts
    if need_labels and not counts.labeled:
        raise RequestError(
            f"{run.url}: none of its {counts.ok:,} predictions has a label that is a class of the "
            f"model ({counts.unlabeled:,} have none, {counts.unknown_label:,} another); join "
            "labels with --labels TABLE"
        )
    lists = [found.mistakes, found.uncertain, found.issues, found.strangest]
    mistakes, uncertain, issues, strangest = row_lookup.lookup_rows(
        run, lists, label_column, joined
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
        uncertain=uncertain,
        strangest=strangest,
        label_issues=row_lookup.rank_label_issues(found, issues),
        embedding_map=compute_map(run, label_column, joined),
    )


def write_evaluation(evaluation: Evaluation, output: str) -> None:
    """Write `metrics/*.parquet` and `summary.json` into a folder."""
    counts = evaluation.aggregate.counts
    layout.write_tables(
        filesystem.join(output, layout.METRICS_FOLDER),
        {
            "summary": tables.build_summary_table(evaluation.metrics),
            "per_class": evaluation.per_class,
            "confusion": tables.build_confusion(counts),
            "calibration": tables.build_calibration(counts),
            "coverage": evaluation.coverage_curve,
            "slices": evaluation.slices,
            "label_issues": evaluation.label_issues,
        },
    )
    body = json.dumps(build_summary_json(evaluation), indent=2) + "\n"
    filesystem.write(filesystem.join(output, SUMMARY_FILE), body.encode())


def build_summary_json(evaluation: Evaluation) -> dict[str, Any]:
    """Contents of `summary.json`: the value of each metric and its interval, if it has one."""
    run = evaluation.run
    return {
        "run": run.url,
        "rows": evaluation.aggregate.counts.rows,
        "bundle_sha256": run.bundle_sha256,
        "manifest_fingerprint": run.manifest_fingerprint,
        "labels": evaluation.config.labels and evaluation.config.labels.path,
        "metrics": {
            metric.name: {
                "value": metric.value,
                "lower": metric.interval and metric.interval[0],
                "upper": metric.interval and metric.interval[1],
            }
            for metric in evaluation.metrics
        },
        "label_issues": evaluation.label_issues.num_rows,
        "left_out": evaluation.omitted,
    }


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
        yield f"{what} need the scores of all classes: run `imgcls predict --scores`."


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
    """A row per slice and a column per metric, the worst first, small slices last.

    slice_by, value (string), small (bool), then the metrics of `summary` and the ends of the
    interval of accuracy; null where a slice does not have a metric.
    """
    rows: list[dict[str, Any]] = []
    for column, slices in found.slices.items():
        for value, counts in slices.items():
            known = {m.name: m for m in tables.compute_metrics(counts, top_k=top_k, resamples=0)}
            row: dict[str, Any] = {"slice_by": column, "value": value}
            row["small"] = (counts.labeled if found.counts.labeled else counts.ok) < small
            row |= {name: float(metric.value) for name, metric in known.items()}
            if "accuracy" in known:
                row["accuracy_lower"], row["accuracy_upper"] = known["accuracy"].interval or (0, 1)
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    if not rows:
        return pa.table({n: pa.array([], pa.string()) for n in ("slice_by", "value")})
    quality = "accuracy" if "accuracy" in names else "mean_confidence"
    rows.sort(key=lambda r: (r["small"], r.get(quality, 2.0), r["slice_by"], r["value"]))
    return pa.table({name: [row.get(name) for row in rows] for name in names})
