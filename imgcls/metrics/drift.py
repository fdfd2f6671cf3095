"""How far a run's predictions have moved from those of a reference run: shares and confidence.

Speaks of predictions alone, so it needs no labels: the first sign that what comes in has changed.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.counts import PredictionCounts

_PRIOR = 0.5
"""Rows added to each cell, so that one that is empty on one side stays finite (Jeffreys)."""


def population_stability_index(counts: Ints, reference: Ints) -> float:
    """Sum of (p - q) log(p / q) over cells, in nats; 0 for equal shares, above 0.25 called a shift.

    counts, reference: (K,) rows per cell; half a row is added to each
    Source: Siddiqi, "Credit Risk Scorecards", Wiley 2006: the symmetric Kullback-Leibler one.
    """
    p, q = _smooth_shares(counts), _smooth_shares(reference)
    return float(((p - q) * np.log(p / q)).sum())


def jensen_shannon_divergence(counts: Ints, reference: Ints) -> float:
    """Jensen-Shannon divergence of the shares in bits, from 0 (equal) to 1 (nothing in common).

    counts, reference: (K,) rows per cell
    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 1991.
    """
    p, q = (each / max(1, each.sum()) for each in (counts, reference))
    middle = (p + q) / 2
    return float((_kl_divergence(p, middle) + _kl_divergence(q, middle)) / 2)


def compute_drift(counts: PredictionCounts, reference: PredictionCounts) -> pa.Table:
    """What has moved: predicted classes, and confidences by bin.

    Classes are matched by name; one that only the other model knows counts as empty. Without a
    prediction on either side there is nothing to compare, and no row.
    Returns of (string), psi, jensen_shannon (float64), rows, reference_rows (int64).
    """
    names = sorted({*counts.classes, *reference.classes})
    pairs = {
        "predicted_label": (_align_by_name(counts, names), _align_by_name(reference, names)),
        "confidence": (counts.bin_counts.sum(0), reference.bin_counts.sum(0)),
    }
    rows = [
        {
            "of": what,
            "psi": population_stability_index(now, then),
            "jensen_shannon": jensen_shannon_divergence(now, then),
            "rows": int(now.sum()),
            "reference_rows": int(then.sum()),
        }
        for what, (now, then) in pairs.items()
        if now.sum() and then.sum()
    ]
    return pa.Table.from_pylist(rows, schema=_DRIFT_SCHEMA)


def _smooth_shares(counts: Ints) -> Floats:
    shares: Floats = (counts + _PRIOR) / (counts + _PRIOR).sum()
    return shares


def _kl_divergence(p: Floats, q: Floats) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


def _align_by_name(counts: PredictionCounts, names: list[str]) -> Ints:
    known = dict(zip(counts.classes, counts.predicted_counts.tolist(), strict=True))
    return np.array([known.get(name, 0) for name in names], np.int64)


_DRIFT_SCHEMA = pa.schema(
    [
        ("of", pa.string()),
        ("psi", pa.float64()),
        ("jensen_shannon", pa.float64()),
        ("rows", pa.int64()),
        ("reference_rows", pa.int64()),
    ]
)
