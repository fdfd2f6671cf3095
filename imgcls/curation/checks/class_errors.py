"""Label errors of a multi-label data set, found by the embeddings of a model, class by class.

A linear probe per class is fitted on the embeddings, and each label is compared with the
probability of a probe that was fitted without it (cross-validation).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable, IntArray
from imgcls.curation.config import LabelErrorsConfig
from imgcls.curation.stratification import Unit, stratify
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE, UNKNOWN

WEIGHT_DECAYS = (0.003, 0.03, 0.3)
"""Candidate weight decays of the probes; of each class, the best in cross-validation is used."""
_MIN_PER_CLASS = 20
_MIN_KNOWN = 2

Targets = npt.NDArray[np.int8]


def find_class_errors(images: ImageTable, unit: FloatArray, config: LabelErrorsConfig) -> Finding:
    """Find classes that an image probably lacks, or has without being labeled.

    A negative is reported if its probability is at least the mean of the positives' of the class,
    a positive if it is at most the mean of the negatives'. An unknown class is not reported. The
    score of an image is the probability that its worst label is wrong.
    Source: Northcutt, Jiang and Chuang, "Confident Learning", JAIR 2021, for each class.

    unit: (N, E) float32, embeddings of length 1
    """
    assert images.targets is not None
    indices = np.flatnonzero(images.is_ok & images.is_labeled)
    targets = images.targets[indices]
    # the only positive or negative is left out: a probe fitted without it knows one side only
    counts = np.minimum((targets == POSITIVE).sum(axis=0), (targets == NEGATIVE).sum(axis=0))
    usable = np.flatnonzero(counts >= _MIN_KNOWN)
    if not len(usable):
        return Finding("label-error", indices[:0], np.empty(0, np.float32), [])
    targets = targets[:, usable]
    scores = predict_classes_out_of_fold(unit[indices], targets, config)
    wrong = _find_wrong(targets, scores, config.min_margin)
    doubt = np.where(wrong, np.where(targets == POSITIVE, 1 - scores, scores), 0)
    rows = np.flatnonzero(wrong.any(axis=1))
    names = [images.classes[code] for code in usable.tolist()]
    details = [_describe(names, targets[row], scores[row], doubt[row]) for row in rows.tolist()]
    return Finding("label-error", indices[rows], doubt[rows].max(axis=1), details)


def _find_wrong(targets: Targets, scores: FloatArray, min_margin: float) -> BoolArray:
    """(N, C) bool: labels whose probability is that of the other side."""
    of_positives = _compute_means(scores, targets == POSITIVE)
    of_negatives = _compute_means(scores, targets == NEGATIVE)
    beyond = np.where(targets == POSITIVE, of_negatives - scores, scores - of_positives)
    # a probe that does not separate a class shows nothing about it
    is_separated = of_positives > of_negatives
    return np.asarray((targets != UNKNOWN) & (beyond >= min_margin) & is_separated)


def _compute_means(scores: FloatArray, mask: BoolArray) -> FloatArray:
    return np.asarray(np.where(mask, scores, 0).sum(axis=0) / mask.sum(axis=0))


def _describe(names: list[str], targets: Targets, scores: FloatArray, doubt: FloatArray) -> str:
    """The wrong labels of an image, the worst first."""
    order = np.argsort(-doubt, kind="stable")
    texts = []
    for code in order[doubt[order] > 0].tolist():
        label = "labeled" if targets[code] == POSITIVE else "not labeled"
        verb = "does not look like it" if targets[code] == POSITIVE else "looks like it"
        texts.append(f"{label} {names[code]!r}, {verb} ({scores[code]:.0%})")
    return "; ".join(texts)


def predict_classes_out_of_fold(
    unit: FloatArray, targets: Targets, config: LabelErrorsConfig
) -> npt.NDArray[np.float32]:
    """Probabilities of linear probes that were fitted on the other folds, (N, C) float32.

    unit:    (N, E) float32, embeddings of length 1
    targets: (N, C), each class with a positive and a negative at least
    The folds are stratified by class and drawn with the seed. Of each class, the weight decay of
    WEIGHT_DECAYS with the lowest log loss over all folds is used.
    """
    mean, spread = unit.mean(axis=0), unit.std() or 1.0
    inputs = torch.from_numpy((unit - mean) / spread)
    best = np.zeros(targets.shape, np.float32)
    lowest = np.full(targets.shape[1], np.inf)
    for decay in WEIGHT_DECAYS:
        rng = np.random.default_rng(config.seed)
        folds = _draw_folds(targets, config.folds, rng)
        scores = _predict_folds(inputs, targets, folds, decay, config.max_probe_images, rng)
        right = np.where(targets == POSITIVE, scores, 1 - scores)
        loss = np.where(targets == UNKNOWN, 0, -np.log(np.maximum(right, 1e-12))).sum(axis=0)
        is_better = loss < lowest
        best[:, is_better], lowest[is_better] = scores[:, is_better], loss[is_better]
    return best


def _draw_folds(targets: Targets, folds: int, rng: np.random.Generator) -> IntArray:
    """(N,) int64: the fold of each image, with about the same share of each class."""
    order = rng.permutation(len(targets))
    units = [
        Unit(1, {str(code): 1 for code in np.flatnonzero(row == POSITIVE).tolist()})
        for row in targets[order]
    ]
    fold = np.empty(len(targets), np.int64)
    fold[order] = stratify(units, [1 / folds] * folds)
    return fold


def _predict_folds(
    inputs: torch.Tensor,
    targets: Targets,
    folds: IntArray,
    decay: float,
    max_images: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32]:
    scores = np.empty(targets.shape, np.float32)
    for number in np.unique(folds).tolist():
        fit = np.flatnonzero(folds != number)
        if len(fit) > max_images:
            fit = _sample(fit, targets, max_images, rng)
        weight, bias = _fit_probes(inputs[fit], torch.from_numpy(targets[fit]), decay)
        held_out = np.flatnonzero(folds == number)
        scores[held_out] = torch.sigmoid(inputs[held_out] @ weight + bias).numpy()
    return scores


def _sample(indices: IntArray, targets: Targets, count: int, rng: np.random.Generator) -> IntArray:
    """Draw `count` images, and all images of classes that have few."""
    is_positive = targets[indices] == POSITIVE
    is_rare = is_positive[:, is_positive.sum(axis=0) <= _MIN_PER_CLASS].any(axis=1)
    drawn = rng.choice(indices, count, replace=False)
    return np.union1d(drawn, indices[is_rare])


def _fit_probes(
    inputs: torch.Tensor, targets: torch.Tensor, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (E, C) and bias (C,) of a logistic regression per class, without unknown labels."""
    weight = torch.zeros(inputs.shape[1], targets.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    known = (targets != UNKNOWN).float()
    share = known / known.sum(dim=0).clamp(min=1)
    positive = (targets == POSITIVE).float()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, positive, share, reduction="sum"
        )
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
