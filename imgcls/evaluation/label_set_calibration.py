"""Choose the conformal label sets of a bundle, on labeled held-out rows (split conformal)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgcls import log
from imgcls.errors import RequestError
from imgcls.evaluation.config import CalibrateConfig
from imgcls.formatting import format_count, format_list
from imgcls.metrics.columns import Ints
from imgcls.models.label_sets import (
    ALWAYS_INCLUDED,
    LabelSets,
    choose_set_threshold,
    compute_nonconformity,
    find_label_sets,
)
from imgcls.models.single_label import SINGLE_LABEL

_MAX_LISTED = 10
_MAX_ROUNDED = 0.999
"""Maximum threshold from scores in float16, whose sums are coarse near 1."""


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Labeled rows with their scores, which are computed in blocks.

    log_scores: (N, C) float32
    label:      (N,) int64 class indices
    scale, bias: of the log scores, as in `calibrate`
    """

    log_scores: NDArray[np.float32]
    label: Ints
    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None

    def iter_blocks(self) -> Iterator[tuple[NDArray[np.float32], Ints]]:
        """Scores and labels, in blocks of rows."""
        scaled = SINGLE_LABEL.iter_scaled_scores(self.log_scores, self.scale, self.bias)
        for part, scores in scaled:
            yield scores, self.label[part]

    def split(self) -> tuple[ScaledRows, ScaledRows]:
        """Two halves: the even and the odd rows."""
        first, second = (
            ScaledRows(self.log_scores[half::2], self.label[half::2], self.scale, self.bias)
            for half in (0, 1)
        )
        return first, second


class SetQuality(NamedTuple):
    """How label sets fit labeled rows: shares of them, and the mean number of labels."""

    coverage: float
    mean_size: float
    single: float


def choose_label_sets(
    config: CalibrateConfig, rows: ScaledRows, *, is_rounded: bool = False
) -> LabelSets:
    """The label sets with the coverage that `config` asks for.

    is_rounded: whether the scores were stored as float16
    Raises RequestError for too few rows, or a threshold that float16 does not resolve.
    """
    assert config.coverage is not None
    parts = [compute_nonconformity(*block, config.rank_penalty) for block in rows.iter_blocks()]
    values = np.concatenate(parts)
    groups = (
        [values[rows.label == code] for code in range(rows.log_scores.shape[1])]
        if config.coverage_per_class
        else [values]
    )
    found = [choose_set_threshold(group, config.coverage) for group in groups]
    lacking = sum(threshold is None for threshold in found)
    if 2 * lacking > len(found):
        needed = math.ceil(round(config.coverage / (1 - config.coverage), 9))
        raise RequestError(
            f"coverage {config.coverage:g}: needs {needed:,} labeled rows"
            f"{_describe_lack(groups, lacking, config)}. Hold out more images, or lower it"
        )
    if is_rounded and any(value is not None and value > _MAX_ROUNDED for value in found):
        raise RequestError(
            "coverage: the scores of the run are in float16, too coarse for these label sets; "
            "predict the held-out images with --scores-type float32"
        )
    return LabelSets(
        coverage=config.coverage,
        thresholds=[ALWAYS_INCLUDED if value is None else value for value in found],
        rank_penalty=config.rank_penalty,
    )


def _describe_lack(groups: list[NDArray[np.float32]], lacking: int, config: CalibrateConfig) -> str:
    if config.coverage_per_class:
        return f" of each class; {lacking:,} of {len(groups):,} classes have fewer"
    return f", found {len(groups[0]):,}"


def evaluate_label_sets(sets: LabelSets, rows: ScaledRows) -> SetQuality:
    """Coverage and size of the label sets of labeled rows."""
    covered = size = single = 0
    for scores, label in rows.iter_blocks():
        order, is_included = find_label_sets(scores, sets)
        sizes = is_included.sum(1)
        covered += int(is_included[order == label[:, None]].sum())
        size += int(sizes.sum())
        single += int((sizes == 1).sum())
    count = len(rows.label)
    return SetQuality(covered / count, size / count, single / count)


def cross_evaluate(config: CalibrateConfig, rows: ScaledRows) -> SetQuality | None:
    """Quality of the sets, each half with thresholds of the other half; None for too few rows."""
    halves = rows.split()
    try:
        found = [
            evaluate_label_sets(choose_label_sets(config, fitted), rest)
            for fitted, rest in (halves, halves[::-1])
        ]
    except RequestError:
        return None
    weights = [len(half.label) for half in halves[::-1]]
    return SetQuality(*np.average(np.array(found), axis=0, weights=weights).tolist())


def log_label_sets(sets: LabelSets, quality: SetQuality | None, classes: tuple[str, ...]) -> None:
    """Show the quality of the sets, and the classes that are in every one."""
    text = f"label sets {sets.coverage:.2%} coverage"
    if quality is not None:
        text += (
            f": {quality.coverage:.2%} covered, {quality.mean_size:.2f} labels on average, "
            f"{quality.single:.2%} with one label (two-fold cross-fitting)"
        )
    log.show(text)
    always = [
        name
        for name, threshold in zip(classes, sets.thresholds, strict=False)
        if threshold >= ALWAYS_INCLUDED
    ]
    if always:
        log.emit(
            "note",
            f"{format_count(len(always), 'class', 'classes')} with too few held-out rows: in every "
            f"label set ({format_list(always, _MAX_LISTED)}). Hold out more images of them",
        )
