"""All metrics of a multi-label run, in the order of the registry."""

from __future__ import annotations

from imgcls.metrics.multilabel.counts import MultiLabelCounts
from imgcls.metrics.multilabel.ranking import RankingCounts
from imgcls.metrics.multilabel.registry import MULTILABEL_METRICS, MultiLabelStatistics
from imgcls.metrics.registry import STATUS_PREFIX
from imgcls.metrics.tables import Metric


def compute_multilabel_metrics(
    counts: MultiLabelCounts, *, ranking: RankingCounts | None = None, resamples: int = 50
) -> list[Metric]:
    """Compute every metric of the registry that the counts define.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run. A metric without any row is left out: an unlabeled run has no F1.
    ranking : RankingCounts, optional
        Adds mean_average_precision, AUROC, ranking metrics, losses and calibration.
    resamples : int, default 50
        Bootstrap resamples; 0 leaves out the intervals of mean_average_precision and auroc_macro.

    Returns
    -------
    list of Metric
        In the order of the registry, as `tables.build_summary_table` takes them. Intervals are
        95% ones for rows drawn at random: cells of a row are not taken for independent.

    Raises
    ------
    ValueError
        If the classes of `ranking` are others than those of `counts`.

    Examples
    --------
    >>> [metric.name for metric in compute_multilabel_metrics(MultiLabelCounts.empty(["cat"]))]
    ['rows', 'ok', 'labelled']
    """
    if ranking is not None and ranking.classes != counts.classes:
        raise ValueError("counts and ranking have different classes; count both with one bundle")
    statistics = MultiLabelStatistics(counts, ranking, resamples)
    found = []
    for spec in MULTILABEL_METRICS:
        estimate = spec.estimate(statistics)
        if estimate is not None:
            description = spec.description + estimate.note
            found.append(Metric(spec.name, estimate.value, description, estimate.interval))
        if spec.name == "ok":
            found += [
                Metric(STATUS_PREFIX + name, rows, f"rows with status {name}")
                for name, rows in sorted(counts.status.items())
                if name != "ok"
            ]
    return found
