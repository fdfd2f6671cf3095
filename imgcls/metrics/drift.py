"""Drift of a run from a reference run: class shares, confidence histograms and embeddings.

Needs no labels, so it is the first sign of changed input.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.counts import PredictionCounts
from imgcls.metrics.multilabel.counts import MultiLabelCounts

Vectors = NDArray[np.float32]
_PRIOR = 0.5
"""Rows added to each cell, so that an empty cell gives a finite index (Jeffreys prior)."""

_DRIFT_SCHEMA = pa.schema(
    [
        ("of", pa.string()),
        ("psi", pa.float64()),
        ("jensen_shannon", pa.float64()),
        ("rows", pa.int64()),
        ("reference_rows", pa.int64()),
    ]
)


def population_stability_index(counts: Ints, reference: Ints) -> float:
    """Population stability index (PSI): the sum of (p - q) log(p / q) over cells, in nats.

    Parameters
    ----------
    counts, reference : ndarray of int64, shape (K,)
        Rows per cell; half a row is added to each.

    Returns
    -------
    float
        0 for equal shares; values above 0.25 are commonly called a shift.

    Notes
    -----
    Siddiqi, "Credit Risk Scorecards", Wiley 2006: a symmetric Kullback-Leibler divergence.

    Examples
    --------
    >>> population_stability_index(np.array([50, 50]), np.array([50, 50]))
    0.0
    >>> round(population_stability_index(np.array([80, 20]), np.array([50, 50])), 3)
    0.406
    """
    p, q = _smooth_shares(counts), _smooth_shares(reference)
    return float(((p - q) * np.log(p / q)).sum())


def jensen_shannon_divergence(counts: Ints, reference: Ints) -> float:
    """Jensen-Shannon divergence of the shares, in bits.

    Parameters
    ----------
    counts, reference : ndarray of int64, shape (K,)
        Rows per cell.

    Returns
    -------
    float
        From 0 (equal shares) to 1 (no cell in common).

    Notes
    -----
    Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 1991.

    Examples
    --------
    >>> jensen_shannon_divergence(np.array([1, 0]), np.array([0, 1]))
    1.0
    """
    p, q = (each / max(1, each.sum()) for each in (counts, reference))
    middle = (p + q) / 2
    return float((_kl_divergence(p, middle) + _kl_divergence(q, middle)) / 2)


def maximum_mean_discrepancy(
    embeddings: Vectors, reference: Vectors, *, permutations: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy (MMD) of two samples of embeddings, and its p-value.

    Parameters
    ----------
    embeddings, reference : ndarray of float32, shape (N, E) and (M, E)
        Samples, at least two rows each; both are held in memory with (N + M)^2 numbers.
    permutations : int, default 500
        Permutations of the rows between the samples, for the p-value.
    seed : int, default 0
        Seed of the permutations.

    Returns
    -------
    tuple of float
        The unbiased estimate, which is about 0 (also below) for samples of one distribution, and
        the share of permutations with at least this value, from 1 / (permutations + 1) to 1.

    Notes
    -----
    Gaussian kernel with the median distance as bandwidth. Gretton et al., "A kernel two-sample
    test", JMLR 13 (2012).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> first, second, far = (rng.normal(size=(200, 4)).astype(np.float32) for _ in range(3))
    >>> maximum_mean_discrepancy(first, second)[1] > 0.05
    True
    >>> maximum_mean_discrepancy(first, far + 1)[1] < 0.01
    True
    """
    count, every = len(embeddings), np.concatenate([embeddings, reference]).astype(np.float64)
    squares = (every**2).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * every @ every.T, 0)
    upper = distance[np.triu_indices(len(every), 1)]
    kernel = np.exp(-distance / (np.median(upper) or 1.0))
    np.fill_diagonal(kernel, 0)
    rng, sums = np.random.default_rng(seed), kernel.sum()
    member = np.zeros((permutations + 1, len(every)))
    member[0, :count] = 1
    for row in member[1:]:
        row[rng.permutation(len(every))[:count]] = 1
    product = member @ kernel
    within = (product * member).sum(1)
    across = product.sum(1) - within
    rest = len(every) - count
    values = (
        within / (count * (count - 1))
        + (sums - within - 2 * across) / (rest * (rest - 1))
        - 2 * across / (count * rest)
    )
    # equal sums may differ in their last bits
    as_far = values[1:] >= values[0] - 1e-12
    return float(values[0]), float((1 + as_far.sum()) / (permutations + 1))


def compute_drift(
    counts: PredictionCounts | MultiLabelCounts, reference: PredictionCounts | MultiLabelCounts
) -> pa.Table:
    """Drift of predicted classes and of confidences (by bin) from a reference.

    Parameters
    ----------
    counts, reference : PredictionCounts or MultiLabelCounts
        Counts of both runs, of one task. Classes are matched by name; a class that only one model
        has counts as empty in the other.

    Returns
    -------
    pyarrow.Table
        Rows `predicted_label` and `confidence` with columns of (string), psi, jensen_shannon
        (float64), rows, reference_rows (int64). For multilabel one row `predicted_labels`, of the
        occurrences of each label and the number of rows. No rows if a run has no prediction.

    Examples
    --------
    >>> empty = PredictionCounts.empty(["cat", "dog"])
    >>> compute_drift(empty, empty).num_rows
    0
    """
    names = sorted({*counts.classes, *reference.classes})
    classes = (_align_by_name(counts, names), _align_by_name(reference, names))
    if isinstance(counts, PredictionCounts) and isinstance(reference, PredictionCounts):
        confidences = (counts.bin_counts.sum(0), reference.bin_counts.sum(0))
        pairs = {"predicted_label": classes, "confidence": confidences}
    else:
        cells = zip(classes, (counts.ok, reference.ok), strict=True)
        current, earlier = (np.append(labels, ok) for labels, ok in cells)
        pairs = {"predicted_labels": (current, earlier)}
    rows = [
        {
            "of": what,
            "psi": population_stability_index(current, earlier),
            "jensen_shannon": jensen_shannon_divergence(current, earlier),
            "rows": counts.ok,
            "reference_rows": reference.ok,
        }
        for what, (current, earlier) in pairs.items()
        if current.sum() and earlier.sum()
    ]
    return pa.Table.from_pylist(rows, schema=_DRIFT_SCHEMA)


def _smooth_shares(counts: Ints) -> Floats:
    shares: Floats = (counts + _PRIOR) / (counts + _PRIOR).sum()
    return shares


def _kl_divergence(p: Floats, q: Floats) -> float:
    """Kullback-Leibler divergence of p from q, in bits."""
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


def _align_by_name(counts: PredictionCounts | MultiLabelCounts, names: list[str]) -> Ints:
    """(len(names),) predictions of each class; 0 for a class that the model does not have."""
    known = dict(zip(counts.classes, counts.predicted_counts.tolist(), strict=True))
    return np.array([known.get(name, 0) for name in names], np.int64)
