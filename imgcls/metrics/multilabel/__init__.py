"""Metrics of multi-label classification: any number of classes may apply to a row."""

from imgcls.metrics.multilabel.columns import (
    ListMatrix,
    MultiLabelRows,
    encode_label_lists,
    read_multilabel_rows,
)
from imgcls.metrics.multilabel.cooccurrence import CooccurrenceCounts
from imgcls.metrics.multilabel.counts import MultiLabelCounts
from imgcls.metrics.multilabel.metrics import compute_multilabel_metrics
from imgcls.metrics.multilabel.ranking import RankingCounts
from imgcls.metrics.multilabel.registry import MULTILABEL_METRICS
from imgcls.metrics.multilabel.tables import (
    build_calibration_table,
    build_cooccurrence_table,
    build_multilabel_per_class,
    build_pr_curves,
)

__all__ = [
    "MULTILABEL_METRICS",
    "CooccurrenceCounts",
    "ListMatrix",
    "MultiLabelCounts",
    "MultiLabelRows",
    "RankingCounts",
    "build_calibration_table",
    "build_cooccurrence_table",
    "build_multilabel_per_class",
    "build_pr_curves",
    "compute_multilabel_metrics",
    "encode_label_lists",
    "read_multilabel_rows",
]
