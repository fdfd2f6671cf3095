"""Base of the results of an evaluation, and the files that they are written to."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.embedding_map import EmbeddingMap
from imgcls.evaluation.explained import Overlays
from imgcls.metrics import tables
from imgcls.metrics.formatting import list_headlines
from imgcls.metrics.tables import Metric
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun
from imgcls.runs.table_counts import RunCounts


@dataclass(frozen=True, eq=False, kw_only=True)
class RunEvaluation(ABC):
    """Metrics and tables of a run, of any task.

    Attributes
    ----------
    run : CommittedRun
        The evaluated run.
    config : EvaluationOptions
        Options of the evaluation.
    has_labels : bool
        Whether a row has a label that is a class of the model.
    metrics : list of Metric
        All metrics, in the order of `summary.parquet`.
    omitted : list of str
        Notes on metrics that could not be computed, and how to get them.
    per_class, slices : pyarrow.Table
        As in `metrics/per_class.parquet` and `slices.parquet`.
    mistakes, strangest, label_issues : pyarrow.Table
        Wrong predictions, rows with the highest out-of-distribution score, and labels that the
        model contradicts.
    embedding_map : EmbeddingMap or None
        Sample of the embeddings; None for a run without any.
    storage : StorageConfig
        Storage settings that the evaluation was made with; images are read with them.
    overlays : mapping
        Class activation maps over mistakes, by row and class; empty unless requested.
    """

    run: CommittedRun
    config: EvaluationOptions
    has_labels: bool
    metrics: list[Metric]
    omitted: list[str]
    per_class: pa.Table
    slices: pa.Table
    mistakes: pa.Table
    strangest: pa.Table
    label_issues: pa.Table
    embedding_map: EmbeddingMap | None
    storage: StorageConfig = field(default_factory=current_settings, repr=False)
    overlays: Overlays = field(default_factory=dict, repr=False)

    @property
    @abstractmethod
    def counts(self) -> RunCounts:
        """Counts of the rows of the run."""

    @abstractmethod
    def build_tables(self) -> dict[str, pa.Table]:
        """The tables of `metrics/`, by file name without its extension."""

    @abstractmethod
    def compute_count_metrics(self) -> list[Metric]:
        """The metrics that need no scores, which prediction logs too."""

    @abstractmethod
    def render(self, *, in_notebook: bool) -> str:
        """Render the report, or its short form for a notebook."""

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
        found = [self.get_metric(n) for n in list_headlines([m.name for m in self.metrics])]
        texts = [f"{self.counts.rows:,} rows", *(str(metric) for metric in found[:3])]
        return f"<{type(self).__name__} of {self.run.url}: {', '.join(texts)}>"

    def _repr_html_(self) -> str:
        with use_settings(self.storage):
            return self.render(in_notebook=True)


def write_evaluation(evaluation: RunEvaluation, output: str) -> None:
    """Write `metrics/*.parquet` and `summary.json` into a folder."""
    layout.write_tables(
        filesystem.join(output, layout.METRICS_FOLDER),
        {"summary": tables.build_summary_table(evaluation.metrics), **evaluation.build_tables()},
    )
    body = json.dumps(build_summary_json(evaluation), indent=2) + "\n"
    filesystem.write(filesystem.join(output, layout.SUMMARY_FILE), body.encode())


def build_summary_json(evaluation: RunEvaluation) -> dict[str, Any]:
    """Contents of `summary.json`: the value of each metric and its interval, if it has one."""
    run = evaluation.run
    return {
        "run": run.url,
        "rows": evaluation.counts.rows,
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


def build_slice_table(rows: list[dict[str, Any]], quality: str) -> pa.Table:
    """A row per slice and a column per metric, the worst first, small slices last.

    rows: slice_by, value (string), small (bool), then metrics; null where a slice does not have one
    quality: metric that is lowest for the worst slice
    """
    if not rows:
        return pa.table({n: pa.array([], pa.string()) for n in ("slice_by", "value")})
    names = dict.fromkeys(name for row in rows for name in row)
    rows = sorted(rows, key=lambda r: (r["small"], r.get(quality, 2.0), r["slice_by"], r["value"]))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def build_slice_row(
    column: str, value: str, metrics: list[Metric], *, small: bool, with_interval: str
) -> dict[str, Any]:
    """A row of `build_slice_table`; with_interval: metric whose interval is included."""
    known: Mapping[str, Metric] = {metric.name: metric for metric in metrics}
    row: dict[str, Any] = {"slice_by": column, "value": value, "small": small}
    row |= {name: float(metric.value) for name, metric in known.items()}
    if with_interval in known:
        ends = known[with_interval].interval or (0, 1)
        row |= dict(zip((f"{with_interval}_lower", f"{with_interval}_upper"), ends, strict=True))
    return row
