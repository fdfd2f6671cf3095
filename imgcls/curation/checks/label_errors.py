"""Labels that look mistaken and images that look out of place, by the embeddings of a model.

The model need not know the classes: a linear probe on its embeddings learns them from the labels
that are there, and judges each label by a probe that has not seen it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from imgcls.config import Section, UnitFloat
from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import FloatArray, ImageTable, IntArray
from imgcls.curation.checks.similarity import normalize_embeddings

OUTLIER_BLOCK = 4096
PROBE_WEIGHT_DECAYS = (0.003, 0.03, 0.3)
"""Weight decays of the probe, of which the one that fits unseen labels best is taken."""


class LabelErrorsConfig(Section):
    """How labels and outliers are judged, with a model."""

    folds: int = Field(default=5, ge=2, le=20)
    """Parts of the data, each judged by a probe of the others."""
    max_probe_images: PositiveInt = 50_000
    """A probe learns from about so many at most; of a class with few images, from all of them."""
    min_margin: UnitFloat = 0.0
    """Label errors: the likeliest class must be likelier than the label by more than this."""
    neighbors: PositiveInt = 10
    """Outliers: how far an image is from so many of its nearest."""
    max_reference_images: PositiveInt = 10_000
    """They are looked for among so many."""
    outlier_deviations: PositiveFloat = 5.0
    """So many robust standard deviations above the median make an outlier."""
    seed: int = 1


def find_label_issues(images: ImageTable, config: LabelErrorsConfig) -> Iterator[Finding]:
    """Label errors, the likeliest first, and outliers; nothing without a model."""
    if images.embedding is None:
        return
    unit = normalize_embeddings(np.nan_to_num(images.embedding))
    labelled = images.is_ok & (images.label >= 0)
    # of the only image of a class no probe of the others can know
    alone = np.bincount(images.label[labelled], minlength=len(images.classes)) < 2
    labelled[labelled] = ~alone[images.label[labelled]]
    if len(np.unique(images.label[labelled])) > 1:
        yield _find_label_errors(images, unit, np.flatnonzero(labelled), config)
    yield _find_outliers(unit, np.flatnonzero(images.is_ok), config)


def _find_label_errors(
    images: ImageTable, unit: FloatArray, at: IntArray, config: LabelErrorsConfig
) -> Finding:
    """Labels whose class a probe that has not seen them holds to be less likely than another.

    The score is (1 + p(likeliest other class) - p(label)) / 2.
    Source: normalised margin, Northcutt, Jiang and Chuang, "Confident Learning", JAIR 2021.
    """
    scores = predict_out_of_fold(unit[at], images.label[at], len(images.classes), config)
    rows = np.arange(len(at))
    own = scores[rows, images.label[at]].copy()
    scores[rows, images.label[at]] = -1
    other = scores.argmax(axis=1)
    margin = scores[rows, other] - own
    wrong = margin > config.min_margin
    detail = [
        f"labelled {images.classes[label]!r} ({p:.0%}), looks like {images.classes[o]!r} ({q:.0%})"
        for label, p, o, q in zip(
            images.label[at][wrong],
            own[wrong],
            other[wrong],
            scores[rows, other][wrong],
            strict=True,
        )
    ]
    return Finding("label-error", at[wrong], ((1 + margin) / 2)[wrong].astype(np.float32), detail)


def predict_out_of_fold(
    unit: FloatArray, label: IntArray, classes: int, config: LabelErrorsConfig
) -> npt.NDArray[np.float32]:
    """(N, C) float32: what a linear probe of the other folds says of each image.

    unit:  (N, E) float32, embeddings of length 1
    label: (N,) int64
    Folds are drawn with the seed; each holds its share of every class. Of `DECAYS` the one with the
    lowest log loss over all folds is taken.
    """
    mean, spread = unit.mean(axis=0), unit.std() or 1.0
    inputs = torch.from_numpy((unit - mean) / spread)
    rows = np.arange(len(label))
    best, least = np.empty((0, classes), np.float32), np.inf
    for decay in PROBE_WEIGHT_DECAYS:
        scores = _predict_folds(inputs, label, classes, decay, config)
        loss = -np.log(np.maximum(scores[rows, label], 1e-12)).mean()
        if loss < least:
            best, least = scores, loss
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
        learn = np.flatnonzero(fold != number)
        if len(learn) > config.max_probe_images:
            learn = _sample_per_class(learn, label, config.max_probe_images, rng)
        weight, bias = _fit_probe(inputs[learn], torch.from_numpy(label[learn]), classes, decay)
        held = np.flatnonzero(fold == number)
        scores[held] = torch.softmax(inputs[held] @ weight + bias, dim=1).numpy()
    return scores


def _sample_per_class(
    at: IntArray, label: IntArray, count: int, rng: np.random.Generator, least: int = 20
) -> IntArray:
    """So many of the places: as many of each class as its share, but `least` where it has them."""
    order = rng.permutation(at)
    order = order[np.argsort(label[order], kind="stable")]
    sizes = np.bincount(label[order])
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    wanted = np.minimum(sizes, np.maximum(least, sizes * count // len(order)))
    return order[place < np.repeat(wanted, sizes)]


def _fit_probe(
    inputs: torch.Tensor, label: torch.Tensor, classes: int, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (E, C) and bias (C,) of a multinomial logistic regression."""
    weight = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight + bias, label)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight.detach(), bias.detach()


def _find_outliers(unit: FloatArray, at: IntArray, config: LabelErrorsConfig) -> Finding:
    """Images far from their nearest neighbours, among a sample of all.

    The score is the mean cosine distance to them over 2.
    """
    rng = np.random.default_rng(config.seed)
    sample = at
    if len(at) > config.max_reference_images:
        sample = rng.choice(at, config.max_reference_images, replace=False)
    count = min(config.neighbors, len(sample) - 1)
    if count < 1:
        return Finding("outlier", at[:0], np.empty(0, np.float32), [])
    reference = torch.from_numpy(unit[sample])
    far = np.empty(len(at), np.float32)
    for start in range(0, len(at), OUTLIER_BLOCK):
        block = at[start : start + OUTLIER_BLOCK]
        near = (torch.from_numpy(unit[block]) @ reference.T).topk(count + 1, dim=1).values
        # an image of the sample finds itself first
        itself = np.isin(block, sample)
        nearest = torch.where(torch.from_numpy(itself)[:, None], near[:, 1:], near[:, :-1])
        far[start : start + OUTLIER_BLOCK] = 1 - nearest.mean(dim=1).numpy()
    median = np.median(far)
    deviation = 1.4826 * np.median(np.abs(far - median))
    out = far > median + config.outlier_deviations * deviation
    detail = [f"{value:.2f} from its nearest; half are within {median:.2f}" for value in far[out]]
    return Finding("outlier", at[out], far[out] / 2, detail)
