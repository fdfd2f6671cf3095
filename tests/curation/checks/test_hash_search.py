"""Close hashes among many."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.curation.checks.hash_search import DisjointSets, find_near_pairs


def random_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 2**64, (count, 4), dtype=np.uint64)


def flipped(rng: np.random.Generator, hashes: np.ndarray, share: float) -> np.ndarray:
    """Each bit changed with a probability."""
    noise = rng.random((len(hashes), 256)) < share
    return hashes ^ np.packbits(noise, axis=1).view(np.uint64)


def groups_of(count: int, first: np.ndarray, second: np.ndarray) -> set[frozenset[int]]:
    groups = DisjointSets(count)
    groups.union(first, second)
    found: dict[int, set[int]] = {}
    for row, root in enumerate(groups.root.tolist()):
        found.setdefault(root, set()).add(row)
    return {frozenset(rows) for rows in found.values()}


def test_the_groups_are_those_of_comparing_every_pair() -> None:
    rng = np.random.default_rng(0)
    originals = random_hashes(rng, 400)
    copies = [flipped(rng, originals[:150], 0.015) for _ in range(3)]
    hashes = np.concatenate([originals, *copies])
    mirror = random_hashes(rng, 1)[0]
    hashes[450:500] ^= mirror
    pairs = find_near_pairs(hashes, mirror, max_distance=24)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    mirrored = np.bitwise_count(hashes[:, None] ^ hashes[None] ^ mirror).sum(axis=2)
    one, other = np.nonzero(np.triu(np.minimum(distance, mirrored) <= 24, 1))
    expected = groups_of(len(hashes), one, other)
    found = groups_of(len(hashes), pairs.first, pairs.second)
    assert len(expected ^ found) <= 0.01 * len(expected)
    for i, j, bits, turned in zip(
        pairs.first, pairs.second, pairs.distance, pairs.mirrored, strict=True
    ):
        assert bits == (mirrored if turned else distance)[i, j]
        assert i < j


def test_no_pair_of_few_bits_in_the_first_word_is_missed() -> None:
    rng = np.random.default_rng(1)
    hashes = random_hashes(rng, 200)
    near = hashes.copy()
    for row in range(200):
        for bit in rng.choice(64, 5, replace=False):
            near[row, 0] ^= np.uint64(1) << np.uint64(bit)
    pairs = find_near_pairs(np.concatenate([hashes, near]), None, max_distance=10)
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == {
        (row, row + 200) for row in range(200)
    }


def test_many_copies_of_one_image_are_one_group_at_little_cost() -> None:
    rng = np.random.default_rng(2)
    one = random_hashes(rng, 1)
    hashes = flipped(rng, np.repeat(one, 20_000, axis=0), 0.01)
    pairs = find_near_pairs(hashes, None, max_distance=30)
    assert len(groups_of(len(hashes), pairs.first, pairs.second)) == 1
    assert len(pairs) < 4 * len(hashes)


def test_no_hashes_have_no_pairs() -> None:
    for count in (0, 1):
        assert (
            len(
                find_near_pairs(
                    random_hashes(np.random.default_rng(0), count), None, max_distance=60
                )
            )
            == 0
        )


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 3))
def test_joined_rows_are_together_whatever_the_order(
    pairs: list[tuple[int, int]], pieces: int
) -> None:
    groups = DisjointSets(31)
    for piece in range(pieces):
        part = np.array(pairs[piece::pieces], np.int64).reshape(-1, 2)
        groups.union(part[:, 0], part[:, 1])
    sets = [{row} for row in range(31)]
    for one, other in pairs:
        joined = sets[one] | sets[other]
        for row in joined:
            sets[row] = joined
    assert groups.root.tolist() == [min(rows) for rows in sets]


@pytest.mark.parametrize("max_distance", [0, 20])
def test_every_pair_is_returned_once(max_distance: int) -> None:
    rng = np.random.default_rng(3)
    hashes = np.repeat(random_hashes(rng, 50), 2, axis=0)
    pairs = find_near_pairs(hashes, random_hashes(rng, 1)[0], max_distance=max_distance)
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert found == [(i, i + 1) for i in range(0, 100, 2)]
    assert not list(itertools.compress(found, pairs.mirrored))
