"""Judge a committed run: count once, derive every number, write tables, `summary.json`, report.

Never runs a model. What a column is missing for is left out and said, with what would supply it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import PositiveInt

from imgcls.config import Names
from imgcls.data import filesystem
from imgcls.errors import RequestError
from imgcls.evaluation import row_lookup as kept_rows
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate
from imgcls.evaluation.count import aggregate_run
from imgcls.evaluation.label_join import (
    JoinedLabels,
    LabelJoinConfig,
    resolve_labels,
    select_run_columns,
)
from imgcls.metrics import tables
from imgcls.metrics.discrimination import (
    MAX_BRIER,
    ScoreCounts,
    brier_score,
    compute_discrimination,
)
from imgcls.metrics.discrimination import build_discrimination_table as discrimination_table
from imgcls.metrics.intervals import (
    Z_95,
    auroc_limits,
    bootstrap_intervals,
    mover_interval,
    nonnegative_mean_interval,
    union_interval,
    wilson_interval,
    wilson_limits,
)
from imgcls.metrics.selective import RIGHT, WRONG, area_under_risk_coverage, build_coverage_curve
from imgcls.metrics.tables import Metric
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run


class EvaluationOptions(LabelJoinConfig):
    """What to judge predictions by, and what to show of them."""

    slice_by: Names = []
    """Manifest columns: every metric for each of their values, e.g. camera,site."""
    small_slice: PositiveInt = 30
    """Slices with fewer labelled rows are marked as small."""
    gallery: PositiveInt = 24
    """Images of each kind in the report."""
    thumbnails: bool = True
    """Show the images in the report, which reads them."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A run and all that is known of it.

    labelled:  whether there are labels to judge by
    metrics:   the numbers of `summary`, in order
    left_out:  sentences on numbers that are not there, and how to get them
    mistakes, uncertain, issues: rows as `rows.fetch` and `rows.label_issues` give them
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
    label_issues: pa.Table

    def get_metric(self, name: str) -> Metric | None:
        """The metric of that name, if it is known."""
        return next((metric for metric in self.metrics if metric.name == name), None)


def compute_evaluation(url: str, config: EvaluationOptions, *, need_labels: bool) -> Evaluation:
    """Everything that follows from a committed run.

    need_labels: refuse a run without labels
    Raises RequestError when the run, a column or the labels are not usable.
    """
    run = open_run(url)
    label_column, late = resolve_labels(run, config.labels, config.on, required=need_labels)
    run.check_slices(select_run_columns(config.slice_by, joined=late is not None))
    wanted = AggregateSpec(
        classes=run.classes,
        label_column=label_column,
        slice_by=tuple(config.slice_by),
        scores=run.has_scores and label_column is not None,
        gallery=config.gallery,
    )
    tally = aggregate_run(run, wanted, late)
    labelled = tally.counts.labeled > 0
    if need_labels and not labelled:
        raise RequestError(
            f"{run.url}: none of its {tally.counts.ok:,} predictions has a label that is a class "
            f"of the model ({tally.counts.unlabeled:,} have none, {tally.counts.unknown_label:,} "
            "another); join labels with --labels TABLE"
        )
    kept = [tally.mistakes, tally.uncertain, tally.issues]
    mistakes, uncertain, issues = kept_rows.lookup_rows(run, kept, label_column, late)
    return Evaluation(
        run=run,
        config=config,
        aggregate=tally,
        has_labels=labelled,
        metrics=[
            *tables.compute_metrics(tally.counts, top_k=run.top_k),
            *_compute_score_metrics(tally),
        ],
        omitted=list(_explain_omissions(run, tally, late)),
        per_class=_build_per_class(tally),
        coverage_curve=build_coverage_curve(tally.selective),
        slices=_build_slices(tally, run.top_k, config.small_slice),
        mistakes=mistakes,
        uncertain=uncertain,
        label_issues=kept_rows.rank_label_issues(tally, issues),
    )


def write_evaluation(evaluation: Evaluation, output: str) -> None:
    """Write `metrics/*.parquet` and `summary.json` into a folder."""
    counts = evaluation.aggregate.counts
    made = {
        "summary": tables.build_summary_table(evaluation.metrics),
        "per_class": evaluation.per_class,
        "confusion": tables.build_confusion(counts),
        "calibration": tables.build_calibration(counts),
        "coverage": evaluation.coverage_curve,
        "slices": evaluation.slices,
        "label_issues": evaluation.label_issues,
    }
    layout.write_tables(filesystem.join(output, layout.METRICS_FOLDER), made)
    body = build_summary_json(evaluation)
    filesystem.write(
        filesystem.join(output, "summary.json"), (json.dumps(body, indent=2) + "\n").encode()
    )


def build_summary_json(evaluation: Evaluation) -> dict[str, Any]:
    """The headline numbers for programs: each with its value and, where known, its interval."""
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


def _compute_score_metrics(tally: RunAggregate) -> Iterator[Metric]:
    cells = tally.selective.counts.sum(1)
    found = _compute_aurc(cells)
    drawn = bootstrap_intervals([cells], _compute_aurc)
    for name, area in found.items():
        interval = union_interval(drawn.get(name), _compute_aurc_limits(cells), low=0.0, high=1.0)
        yield Metric(name, area, "mean error over all coverages", interval)
    counts = tally.scores
    if counts is None or not counts.rows:
        return
    score = brier_score(counts)
    if score is not None:
        low, high = nonnegative_mean_interval(
            counts.brier_sum, counts.brier_square_sum, counts.rows, MAX_BRIER
        )
        interval = (low, min(high, MAX_BRIER))
        yield Metric("brier_score", score, "mean squared distance from the truth", interval)
    ranks = compute_discrimination(counts)
    if not np.isfinite(ranks.auroc).any():
        return
    known = np.isfinite(ranks.auroc)
    positives, negatives = counts.positive.sum(1)[known], counts.negative.sum(1)[known]
    ranked = ranks.average_precision[known]
    spreads = _bootstrap_ranking_spreads(counts, known)
    for name, values, bounds, ends in (
        (
            "auroc_macro",
            ranks.auroc[known],
            ranks.auroc_bound[known],
            auroc_limits(ranks.auroc[known], positives, negatives),
        ),
        # the limits of a share of the positives: Boyd, Eng, Page, "Area under the Precision-Recall
        # Curve: Point Estimates and Confidence Intervals", ECML 2013, with Wilson's interval
        (
            "average_precision_macro",
            ranked,
            ranks.average_precision_bound[known],
            wilson_limits(ranked * positives, positives),
        ),
    ):
        value, bound = float(values.mean()), float(bounds.mean())
        what = "mean over classes, each against the rest"
        told = f"; bins can move it by {bound:.1e}" if bound else ""
        edge = mover_interval(
            value, (values - ends[0]) / len(values), (ends[1] - values) / len(values)
        )
        spread = spreads[name]
        interval = union_interval((value - spread, value + spread), edge, low=0.0, high=1.0)
        yield Metric(name, value, what + told, interval)


def _compute_aurc(cells: Any) -> dict[str, float]:
    area = area_under_risk_coverage(cells)
    return {} if area is None else {"area_under_risk_coverage": area}


def _compute_aurc_limits(cells: Any) -> tuple[float, float]:
    """The area with as many wrong rows as the Wilson limits of the error rate have, spread as seen.

    More of them are taken from the right rows of every confidence alike.
    """
    right, wrong = cells[RIGHT].astype(float), cells[WRONG].astype(float)
    rows, errors = right.sum() + wrong.sum(), wrong.sum()
    least, most = wilson_interval(errors, int(rows))
    fewer = wrong * (least * rows / errors) if errors else wrong
    more = wrong + right * ((most * rows - errors) / right.sum()) if right.sum() else wrong
    ends = [_compute_aurc(np.stack([right + wrong - each, each])) for each in (fewer, more)]
    low, high = (end["area_under_risk_coverage"] for end in ends)
    return low, high


def _bootstrap_ranking_spreads(
    counts: ScoreCounts, known: NDArray[np.bool_], resamples: int = 50
) -> dict[str, float]:
    """Half the width of the 95 % intervals of the two macro means over the `known` (C,) classes.

    A row is one of its own class and one of the others for every other class. So rows are drawn
    anew twice: as those of the class, which differ from class to class, so that the variances of
    the classes add up; and as the others, which are nearly the same rows for all classes, so that
    their standard deviations add up. The two are taken as dependent, too.
    """
    rng = np.random.default_rng(0)
    names = {"auroc_macro": "auroc", "average_precision_macro": "average_precision"}
    drawn: dict[tuple[str, bool], list[Any]] = {}
    for _ in range(resamples):
        for own in (True, False):
            cells = rng.poisson(counts.positive if own else counts.negative)
            pair = (cells, counts.negative) if own else (counts.positive, cells)
            found = compute_discrimination(
                ScoreCounts(counts.classes, *pair, counts.rows, 0.0, 0.0)
            )
            for name, field in names.items():
                drawn.setdefault((name, own), []).append(getattr(found, field)[known])
    spreads = {}
    for name in names:
        # a class that was not drawn has no value
        of_own, of_others = (np.nanvar(drawn[name, own], axis=0) for own in (True, False))
        spreads[name] = Z_95 * float(
            np.sqrt(of_own.sum()) / known.sum() + np.sqrt(of_others).mean()
        )
    return spreads


def _explain_omissions(
    run: CommittedRun, tally: RunAggregate, late: JoinedLabels | None
) -> Iterator[str]:
    if not tally.counts.labeled:
        yield (
            "Accuracy and all that judges by labels: there are none. Join some with "
            "`imgcls evaluate --predictions RUN --labels TABLE`."
        )
        return
    if not run.has_scores:
        what = "AUROC, average precision and the Brier score"
        if late is not None:
            what += ", log loss and likely label errors"
        yield f"{what} need every class's score: label with `imgcls predict --scores`."
    if not tally.spec.slice_by:
        yield "Slices: name manifest columns with `--slice-by camera,site`."


def _build_per_class(tally: RunAggregate) -> pa.Table:
    """The classes, with 95 % Wilson intervals and, where scores are known, how well they rank."""
    table = tables.build_per_class(tally.counts)
    support, predicted, hits = tables.count_labels(tally.counts)
    for rate, judged in (("precision", predicted), ("recall", support)):
        ends = [
            wilson_interval(hit, int(rows)) if rows > 0 else (None, None)
            for hit, rows in zip(hits, judged, strict=True)
        ]
        for side, values in (("lower", [e[0] for e in ends]), ("upper", [e[1] for e in ends])):
            table = table.append_column(f"{rate}_{side}", pa.array(values, pa.float64()))
    if tally.scores is not None and tally.scores.rows:
        ranked = discrimination_table(tally.scores)
        for name in ranked.schema.names[1:]:
            table = table.append_column(name, ranked[name])
    return table


def _build_slices(tally: RunAggregate, top_k: int, small: int) -> pa.Table:
    """A row per slice and a column per metric, the worst first, small ones behind.

    slice_by, value (string), small (bool), then as in `summary`, with the ends of accuracy's
    interval; null where a slice does not have it.
    """
    rows: list[dict[str, Any]] = []
    for column, found in tally.slices.items():
        for value, counts in found.items():
            known = {m.name: m for m in tables.compute_metrics(counts, top_k=top_k, resamples=0)}
            row: dict[str, Any] = {"slice_by": column, "value": value}
            row["small"] = counts.labeled < small if tally.counts.labeled else counts.ok < small
            row |= {name: float(metric.value) for name, metric in known.items()}
            if "accuracy" in known:
                row["accuracy_lower"], row["accuracy_upper"] = known["accuracy"].interval or (0, 1)
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    if not rows:
        return pa.table({n: pa.array([], pa.string()) for n in ("slice_by", "value")})
    badness = "accuracy" if "accuracy" in names else "mean_confidence"
    rows.sort(key=lambda r: (r["small"], r.get(badness, 2.0), r["slice_by"], r["value"]))
    return pa.table({name: [row.get(name) for row in rows] for name in names})
