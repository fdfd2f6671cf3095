"""Label errors and outliers, found by the embeddings of a model.

The model need not know the classes: a linear probe is fitted on its embeddings, and each label is
compared with the prediction of a probe that was fitted without it (cross-validation).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from imgcls.curation.checks.class_errors import find_class_errors
from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import FloatArray, ImageTable, IntArray
from imgcls.curation.config import LabelErrorsConfig
from imgcls.models.embeddings import normalize_embeddings

OUTLIER_BLOCK = 4096
PROBE_WEIGHT_DECAYS = (0.003, 0.03, 0.3)
"""Candidate weight decays of the probe; the best in cross-validation is used."""


def find_label_issues(images: ImageTable, config: LabelErrorsConfig) -> Iterator[Finding]:
    """Find label errors and outliers; nothing without a model."""
    if images.embedding is None:
        return
    unit = normalize_embeddings(np.nan_to_num(images.embedding))
    if images.targets is not None:
        yield find_class_errors(images, unit, config)
        yield _find_outliers(unit, np.flatnonzero(images.is_ok), config)
        return
    labeled = images.is_ok & (images.label >= 0)
    # the only image of a class is left out: a probe fitted without it does not know the class
    alone = np.bincount(images.label[labeled], minlength=len(images.classes)) < 2
    labeled[labeled] = ~alone[images.label[labeled]]
    if len(np.unique(images.label[labeled])) > 1:
        yield _find_label_errors(images, unit, np.flatnonzero(labeled), config)
    yield _find_outliers(unit, np.flatnonzero(images.is_ok), config)


def _find_label_errors(
    images: ImageTable, unit: FloatArray, indices: IntArray, config: LabelErrorsConfig
) -> Finding:
    """Find labels for which a probe that was fitted without them prefers another class.

    The score is (1 + p(best other class) - p(label)) / 2.
    Source: normalized margin, Northcutt, Jiang and Chuang, "Confident Learning", JAIR 2021.
    """
    label = images.label[indices]
    scores = predict_out_of_fold(unit[indices], label, len(images.classes), config)
    rows = np.arange(len(indices))
    own = scores[rows, label].copy()
    scores[rows, label] = -1
    other = scores.argmax(axis=1)
    margin = scores[rows, other] - own
    wrong = margin > config.min_margin
    details = [
        f"labeled {images.classes[y]!r} ({p:.0%}), looks like {images.classes[o]!r} ({q:.0%})"
        for y, p, o, q in zip(
            label[wrong], own[wrong], other[wrong], scores[rows, other][wrong], strict=True
        )
    ]
    score = ((1 + margin) / 2)[wrong].astype(np.float32)
    return Finding("label-error", indices[wrong], score, details)


def predict_out_of_fold(
    unit: FloatArray, label: IntArray, classes: int, config: LabelErrorsConfig
) -> npt.NDArray[np.float32]:
    """Probabilities of a linear probe that was fitted on the other folds, (N, C) float32.

    unit:  (N, E) float32, embeddings of length 1
    label: (N,) int64
    The folds are stratified by class and drawn with the seed. The weight decay of
    PROBE_WEIGHT_DECAYS with the lowest log loss over all folds is used.
    """
    mean, spread = unit.mean(axis=0), unit.std() or 1.0
    inputs = torch.from_numpy((unit - mean) / spread)
    rows = np.arange(len(label))
    best, lowest = np.empty((0, classes), np.float32), np.inf
    for decay in PROBE_WEIGHT_DECAYS:
        scores = _predict_folds(inputs, label, classes, decay, config)
        loss = -np.log(np.maximum(scores[rows, label], 1e-12)).mean()
        if loss < lowest:
            best, lowest = scores, loss
    return best


def _predict_folds(
    inputs: torch.Tensor, label: IntArray, classes: int, decay: float, config: LabelErrorsConfig
) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    fold = np.empty(len(label), np.int64)
    fold[order] = np.arange(len(label)) % config.folds
    scores = np.empty((len(label), classes), np.float32)
    for number in range(config.folds):
        fit = np.flatnonzero(fold != number)
        if len(fit) > config.max_probe_images:
            fit = _sample_per_class(fit, label, config.max_probe_images, rng)
        weight, bias = _fit_probe(inputs[fit], torch.from_numpy(label[fit]), classes, decay)
        held_out = np.flatnonzero(fold == number)
        scores[held_out] = torch.softmax(inputs[held_out] @ weight + bias, dim=1).numpy()
    return scores


def _sample_per_class(
    indices: IntArray,
    label: IntArray,
    count: int,
    rng: np.random.Generator,
    min_per_class: int = 20,
) -> IntArray:
    """Draw about `count` images in proportion to the classes, at least `min_per_class` of each."""
    order = rng.permutation(indices)
    order = order[np.argsort(label[order], kind="stable")]
    sizes = np.bincount(label[order])
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    quota = np.minimum(sizes, np.maximum(min_per_class, sizes * count // len(order)))
    return order[rank < np.repeat(quota, sizes)]


def _fit_probe(
    inputs: torch.Tensor, label: torch.Tensor, classes: int, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (E, C) and bias (C,) of a multinomial logistic regression."""
    weight = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight + bias, label)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _find_outliers(unit: FloatArray, indices: IntArray, config: LabelErrorsConfig) -> Finding:
    """Find images far from their nearest neighbors in a sample of all images.

    The score is half the mean cosine distance to the neighbors.
    """
    rng = np.random.default_rng(config.seed)
    sample = indices
    if len(indices) > config.max_reference_images:
        sample = rng.choice(indices, config.max_reference_images, replace=False)
    count = min(config.neighbors, len(sample) - 1)
    if count < 1:
        return Finding("outlier", indices[:0], np.empty(0, np.float32), [])
    reference = torch.from_numpy(unit[sample])
    distance = np.empty(len(indices), np.float32)
    for start in range(0, len(indices), OUTLIER_BLOCK):
        block = indices[start : start + OUTLIER_BLOCK]
        near = (torch.from_numpy(unit[block]) @ reference.T).topk(count + 1, dim=1).values
        # an image of the sample is its own nearest neighbor
        in_sample = np.isin(block, sample)
        nearest = torch.where(torch.from_numpy(in_sample)[:, None], near[:, 1:], near[:, :-1])
        distance[start : start + OUTLIER_BLOCK] = 1 - nearest.mean(dim=1).numpy()
    median = np.median(distance)
    deviation = 1.4826 * np.median(np.abs(distance - median))
    far = distance > median + config.outlier_deviations * deviation
    details = [
        f"mean distance {value:.2f} to its nearest neighbors; the median is {median:.2f}"
        for value in distance[far]
    ]
    return Finding("outlier", indices[far], distance[far] / 2, details)
