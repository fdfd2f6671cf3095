"""Stratification of rows with any number of classes."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from imgcls.curation.stratification import Unit, stratify

SHARES = [0.8, 0.1, 0.1]
units_of = st.lists(
    st.builds(
        lambda labels, extra: Unit(max(labels.values(), default=0) + extra, labels),
        st.dictionaries(st.sampled_from("abcde"), st.integers(1, 3), max_size=4),
        st.integers(1, 2),
    ),
    max_size=60,
)


@given(units_of)
def test_every_unit_is_in_one_part_and_repeatably(units: list[Unit]) -> None:
    parts = stratify(units, SHARES)
    assert len(parts) == len(units)
    assert set(parts) <= {0, 1, 2}
    assert parts == stratify(units, SHARES)


def test_each_class_has_its_share_in_each_part() -> None:
    rng = np.random.default_rng(0)
    rates = {"common": 0.5, "usual": 0.2, "rare": 0.02}
    units = [
        Unit(1, {name: 1 for name, rate in rates.items() if rng.random() < rate})
        for _ in range(2000)
    ]
    parts = stratify(units, SHARES)
    total = Counter(name for unit in units for name in unit.labels)
    for part, share in enumerate(SHARES):
        own = [unit for unit, each in zip(units, parts, strict=True) if each == part]
        assert abs(len(own) - share * 2000) < 20
        counts = Counter(name for unit in own for name in unit.labels)
        for name in rates:
            assert abs(counts[name] - share * total[name]) <= 2


def test_folds_get_the_images_of_a_rare_class_one_each() -> None:
    units = [Unit(1, {"rare": 1, "common": 1})] * 5 + [Unit(1, {"common": 1})] * 45
    parts = stratify(units, [0.2] * 5)
    assert sorted(parts[:5]) == [0, 1, 2, 3, 4]
    assert set(Counter(parts).values()) == {10}


def test_large_groups_are_placed_first() -> None:
    units = [Unit(1, {})] * 10 + [Unit(10, {})]
    assert sum(unit.rows for unit, part in zip(units, stratify(units, [0.5, 0.5]), strict=True)
               if part == 0) == 10  # fmt: skip


def test_many_rare_classes_leave_no_part_empty() -> None:
    units = [Unit(1, Counter({f"common {n % 5}": 1, f"rare {n % 400}": 1})) for n in range(1000)]
    parts = stratify(units, [0.8, 0.1, 0.1])
    assert all(parts.count(part) > 50 for part in (1, 2))
