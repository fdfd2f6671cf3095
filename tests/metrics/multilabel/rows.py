"""Random multi-label rows, and adversarial ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Multi-label rows: (N, C) int8 targets, bool predictions and float16 scores."""

    targets: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray

    @property
    def classes(self) -> list[str]:
        return [f"class {i}" for i in range(self.targets.shape[1])]


def make_rows(
    rows: int,
    classes: int,
    *,
    seed: int = 0,
    density: float = 0.2,
    skill: float = 2.0,
    ties: int = 0,
    unknown: float = 0.0,
    dependence: float = 0.0,
) -> Rows:
    """Rows with labels at random, and scores of a model.

    density: share of the cells with a label
    skill: by how much a label raises the logit
    ties: number of different scores; 0 for no limit
    unknown: share of unknown cells
    dependence: spread of a value that all logits of a row share
    """
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, classes)) < density).astype(np.int8)
    logits = rng.normal(size=(rows, classes)) - 1 + skill * targets
    # a difficult row has low scores of its labels, and high ones of other classes
    logits += dependence * rng.normal(size=(rows, 1)) * (2 * targets - 1)
    scores = 1 / (1 + np.exp(-logits))
    if ties:
        scores = np.round(scores * ties) / ties
    scores = scores.astype(np.float16)
    targets[rng.random((rows, classes)) < unknown] = -1
    return Rows(targets, scores >= 0.5, scores)


def _adversarial() -> dict[str, Rows]:
    ones, zeros = np.ones((6, 4), np.float16), np.zeros((6, 4), np.float16)
    mixed = make_rows(40, 5, seed=9, ties=2)
    denormal = np.random.default_rng(1).integers(0, 4, (30, 4)).astype(np.uint16).view(np.float16)
    labels = (np.random.default_rng(2).random((30, 4)) < 0.4).astype(np.int8)
    full, none = np.ones((6, 4), np.int8), np.zeros((6, 4), np.int8)
    half = np.tile(np.array([[1, 0, 1, 0], [0, 1, 0, 0]], np.int8), (3, 1))
    absent = mixed.targets.copy()
    absent[:, 2], absent[:, 3] = 0, 1  # a class without positives, one without negatives
    extreme = (np.random.default_rng(3).random((40, 5)) < 0.5).astype(np.float16)
    return {
        "all ties": Rows(half, ones > 0, ones),
        "all scores zero": Rows(half, zeros > 0, zeros),
        "all labels": Rows(full, half > 0, half.astype(np.float16)),
        "no labels": Rows(none, half > 0, half.astype(np.float16)),
        "no labels, no predictions": Rows(none, zeros > 0, zeros),
        "absent classes": mixed._replace(targets=absent),
        "few scores": mixed,
        "scores at 0 and 1": Rows(mixed.targets, extreme > 0, extreme),
        "denormals": Rows(labels, denormal > 0, denormal),
        "one row": make_rows(1, 5, seed=4, density=0.5),
        "one class": make_rows(50, 1, seed=5, density=0.5),
        "no label in a row": make_rows(60, 4, seed=6, density=0.1),
        "many labels": make_rows(60, 70, seed=7, density=0.9),
        "few labels of many": make_rows(300, 130, seed=8, density=0.02),
    }


ADVERSARIAL = _adversarial()
