"""The majority of annotators is one of people, and its agreement needs little memory."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from imgcls.curation import label_consensus
from imgcls.curation.label_consensus import LabelDecision, decide, measure_agreement
from imgcls.data.annotations.annotation import Annotation


def vote(*votes: tuple[str, ...], annotators: str = "abcdefg") -> list[Annotation]:
    return [
        Annotation("/a.jpg", labels, person, None, "imgcls")
        for labels, person in zip(votes, annotators, strict=False)
    ]


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([("cat",), ("dog",), ("eel",)], None),
        ([("cat",), (), ()], frozenset()),
        ([("cat",), ("cat", "dog"), ("eel",)], frozenset({"cat"})),
    ],
)
def test_an_image_has_no_class_only_if_a_majority_found_none(
    votes: list[tuple[str, ...]], expected: frozenset[str] | None
) -> None:
    decision = decide(vote(*votes), "majority", several=True)
    assert decision is not None
    assert decision.names == expected


def test_a_majority_by_class_is_the_label_of_no_dissenter() -> None:
    votes = vote(("cat", "dog"), ("cat", "eel"), ("dog", "eel"))
    decision = decide(votes, "majority", several=True)
    assert decision is not None
    assert (decision.names, decision.voters) == (frozenset({"cat", "dog", "eel"}), [])


def test_an_annotation_without_a_name_that_is_there_twice_votes_once() -> None:
    twice = [Annotation("/a.jpg", ("dog",), None, None, "csv")] * 2
    decision = decide([*twice, *vote(("cat",))], "majority", several=False)
    assert decision is not None
    assert (decision.names, len(decision.votes)) == (None, 2)


def build(sets: list[tuple[str, ...]]) -> dict[str, LabelDecision]:
    found = {}
    for number, pair in enumerate(itertools.pairwise(sets)):
        decision = decide(vote(*pair), "skip", several=True)
        assert decision is not None
        found[f"/{number}.jpg"] = decision
    return found


def test_the_agreement_of_sets_is_that_of_the_definition() -> None:
    sets = [("a", "b"), ("a",), (), ("b", "c"), ("a", "b"), ()]
    found = measure_agreement(build(sets), several=True)

    def differ(one: tuple[str, ...], other: tuple[str, ...]) -> float:
        union = set(one) | set(other)
        return 1 - len(set(one) & set(other)) / len(union) if union else 0.0

    pairs = list(itertools.pairwise(sets))
    every = [each for pair in pairs for each in pair]
    observed = np.mean([differ(*pair) for pair in pairs])
    expected = np.mean([differ(*pair) for pair in itertools.permutations(every, 2)])
    assert found is not None
    assert found.alpha == pytest.approx(1 - observed / expected)


def test_the_agreement_of_many_sets_needs_no_matrix_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"c{number}" for number in range(40)]
    sets = list(itertools.islice(itertools.combinations(names, 3), 1500))
    decisions = build(sets)
    tracemalloc.start()
    measure_agreement(decisions, several=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(sets) ** 2  # bytes; a matrix has 8 per pair
    monkeypatch.setattr(label_consensus, "MAX_LABEL_SETS", 1000)
    found = measure_agreement(decisions, several=True)
    assert found is not None
    assert (found.alpha, found.label_sets) == (None, 1500)
