"""The label of an image from the annotations of one or several people, and their agreement.

Of each annotator the last decision counts. An image that was skipped has no decision.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imgcls.curation.config import ConflictPolicy
from imgcls.data.annotations.annotation import Annotation
from imgcls.metrics.agreement import cohens_kappa, krippendorffs_alpha

LabelNames = frozenset[str]
"""The labels of an image: one name, or any number of them."""

MAX_LABEL_SETS = 20_000
"""Different sets of labels up to which alpha is computed, in time that grows with their square."""


@dataclass(frozen=True)
class LabelDecision:
    """The label of an image by its annotations.

    votes:   the last annotation of each annotator, without skipped ones
    names:   the label; None where the annotators disagree and the policy decides nothing
    is_conflict: whether the annotators disagree
    """

    votes: tuple[Annotation, ...]
    names: LabelNames | None
    is_conflict: bool

    @property
    def voters(self) -> list[Annotation]:
        """The annotations that agree with the label; a majority by class may agree with none."""
        return [each for each in self.votes if get_names(each) == self.names]


def get_names(annotation: Annotation) -> LabelNames | None:
    """The labels of an annotation; None if the image was skipped."""
    return None if annotation.labels is None else frozenset(annotation.labels)


def decide(
    annotations: Iterable[Annotation], policy: ConflictPolicy, *, several: bool
) -> LabelDecision | None:
    """The label of an image by its annotations; None without one.

    several: an image may have any number of labels; the majority is that of each class
    """
    votes = tuple(each for each in _take_last(annotations) if each.labels is not None)
    kinds = {get_names(each) for each in votes}
    if not votes:
        return None
    if len(kinds) == 1:
        return LabelDecision(votes, kinds.pop(), is_conflict=False)
    names = None
    if policy == "majority":
        names = _find_majority(votes, several=several)
    elif policy == "newest":
        names = _find_newest(votes)
    return LabelDecision(votes, names, is_conflict=True)


def _take_last(annotations: Iterable[Annotation]) -> list[Annotation]:
    """The last annotation of each annotator; all different ones where names or times are missing.

    Equal annotations without a name may be one person's, and count once.
    """
    groups: dict[str, list[Annotation]] = {}
    kept: list[Annotation] = []
    for each in annotations:
        if each.annotator is None:
            if each not in kept:
                kept.append(each)
        else:
            groups.setdefault(each.annotator, []).append(each)
    for group in groups.values():
        unique = {get_names(each): each for each in _find_last(group) or reversed(group)}
        kept += unique.values()
    return kept


def _find_last(annotations: Sequence[Annotation]) -> list[Annotation]:
    """All annotations with the last time; none if one of them has no time."""
    if any(each.labeled_at is None for each in annotations):
        return []
    last = find_last_time(annotations)
    return [each for each in annotations if each.labeled_at == last]


def _find_majority(votes: Sequence[Annotation], *, several: bool) -> LabelNames | None:
    """The label of more than half of the votes; None without one.

    With several labels per image it has each class of more than half of the votes. It has no class
    only if more than half of the votes have none.
    """
    half = len(votes) / 2
    if not several:
        counts = Counter(get_names(each) for each in votes)
        names, count = counts.most_common(1)[0]
        return names if count > half else None
    classes = Counter(name for each in votes for name in get_names(each) or ())
    if half in classes.values():
        return None
    names = frozenset(name for name, count in classes.items() if count > half)
    is_empty = sum(not each.labels for each in votes) > half
    return names if names or is_empty else None


def _find_newest(votes: Sequence[Annotation]) -> LabelNames | None:
    """The label of the last vote; None where times are missing or equal."""
    last = {get_names(each) for each in _find_last(votes)}
    return last.pop() if len(last) == 1 else None


def find_last_time(annotations: Iterable[Annotation]) -> datetime.datetime | None:
    """The last time of annotations; None if none has one."""
    times = [each.labeled_at for each in annotations if each.labeled_at is not None]
    return max(times, default=None)


@dataclass(frozen=True)
class Agreement:
    """Agreement of the annotators of images that several of them labeled.

    images:     number of these images
    annotators: number of people who labeled them
    agreed:     images about which all agree
    alpha:      Krippendorff's alpha; of several labels per image with the Jaccard distance, and
                None for more than 20,000 different sets of labels
    kappa:      Cohen's kappa of two annotators of one label per image; else None
    label_sets: number of different labels, or sets of labels
    """

    images: int
    annotators: int
    agreed: int
    alpha: float | None
    kappa: float | None
    label_sets: int


def measure_agreement(decisions: Mapping[str, LabelDecision], *, several: bool) -> Agreement | None:
    """The agreement of named annotators; None if no image was labeled by two of them."""
    shared = []
    for decision in decisions.values():
        votes = {each.annotator: each for each in decision.votes if each.annotator is not None}
        if len(votes) > 1:
            shared.append(votes)
    if not shared:
        return None
    kinds: dict[LabelNames, int] = {}
    units, values = [], []
    for unit, votes in enumerate(shared):
        for each in votes.values():
            names = get_names(each) or frozenset()
            units.append(unit)
            values.append(kinds.setdefault(names, len(kinds)))
    people = {name for votes in shared for name in votes if name is not None}
    agreed = sum(len({get_names(each) for each in votes.values()}) == 1 for votes in shared)
    alpha = None
    if not several:
        alpha = krippendorffs_alpha(np.array(units), np.array(values))
    elif len(kinds) <= MAX_LABEL_SETS:
        distances = _JaccardDistances(list(kinds))
        alpha = krippendorffs_alpha(np.array(units), np.array(values), distances.compute_row)
    kappa = None
    if len(people) == 2 and not several:
        first, second = sorted(people)
        codes = np.array(
            [[kinds[get_names(votes[name]) or frozenset()] for name in (first, second)]
             for votes in shared]
        )  # fmt: skip
        rows = [np.bincount(codes[:, each], minlength=len(kinds)) for each in (0, 1)]
        kappa = cohens_kappa(rows[0], rows[1], float(agreed))
    return Agreement(len(shared), len(people), agreed, alpha, kappa, len(kinds))


class _JaccardDistances:
    """Jaccard distances of sets: 1 - |A and B| / |A or B|; 0 between empty ones."""

    def __init__(self, kinds: Sequence[LabelNames]) -> None:
        self._kinds = kinds
        self._sizes = np.array([len(names) for names in kinds])
        members: dict[str, list[int]] = {}
        for place, names in enumerate(kinds):
            for name in names:
                members.setdefault(name, []).append(place)
        self._members = {name: np.array(places) for name, places in members.items()}

    def compute_row(self, place: int) -> npt.NDArray[np.float64]:
        """(V,) distances of one set from each of them."""
        common = np.zeros(len(self._kinds))
        for name in self._kinds[place]:
            common[self._members[name]] += 1
        union = self._sizes[place] + self._sizes - common
        return np.where(union > 0, 1 - common / np.maximum(union, 1), 0.0)
