"""Iterative stratification: parts in which each class has its share, for any number of labels.

The rarest class is divided first, since its images decide most. Deterministic: units with equal
claims are taken in the order that the caller passes.
Source: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML 2011.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Rows that stay together, such as those of one image or one patient.

    rows:   their number
    labels: rows of each class, by its name
    """

    rows: int
    labels: Mapping[str, int]


def stratify(units: Sequence[Unit], shares: Sequence[float]) -> list[int]:
    """Assign each unit to one of P parts, so that each class is divided by the shares.

    units:  in the order in which units with equal claims are taken
    shares: (P,) fractions of the rows; their sum is 1
    Returns the part of each unit.
    """
    return _Stratification(units, shares).run()


class _Stratification:
    """State of one stratification: the rows that each part still needs, of each class and of all.

    waiting: units of each class that have no part yet
    """

    def __init__(self, units: Sequence[Unit], shares: Sequence[float]) -> None:
        self._units = units
        self._parts = [-1] * len(units)
        self._by_label: dict[str, list[int]] = {}
        totals: dict[str, int] = {}
        for number, unit in enumerate(units):
            for label, rows in unit.labels.items():
                self._by_label.setdefault(label, []).append(number)
                totals[label] = totals.get(label, 0) + rows
        self._waiting = {label: len(numbers) for label, numbers in self._by_label.items()}
        self._needed = {
            label: [share * total for share in shares] for label, total in totals.items()
        }
        self._needed_rows = [share * sum(unit.rows for unit in units) for share in shares]
        self._min_needed = [-0.1 * rows for rows in self._needed_rows]

    def run(self) -> list[int]:
        rarest = [(count, label) for label, count in self._waiting.items()]
        heapq.heapify(rarest)
        while rarest:
            count, label = heapq.heappop(rarest)
            if count != self._waiting[label]:  # units of it were assigned for another class
                if self._waiting[label]:
                    heapq.heappush(rarest, (self._waiting[label], label))
                continue
            self._divide(label)
        # large units first: small ones fill the gaps that these leave
        left = [number for number, part in enumerate(self._parts) if part < 0]
        for number in sorted(left, key=lambda number: -self._units[number].rows):
            self._assign(number, self._needed_rows)
        return self._parts

    def _divide(self, label: str) -> None:
        """Assign all waiting units of a class."""
        waiting = [number for number in self._by_label[label] if self._parts[number] < 0]
        for number in sorted(waiting, key=lambda number: -self._units[number].labels[label]):
            self._assign(number, self._needed[label])

    def _assign(self, number: int, needed: Sequence[float]) -> None:
        """Assign a unit to the part that needs most; the rows that are needed break ties.

        A part that has a tenth more rows than its share takes no more: with many rare classes,
        each of which needs its units most in the largest part, the others would stay empty.
        """
        parts = range(len(needed))
        open_parts = [part for part in parts if self._needed_rows[part] > self._min_needed[part]]
        part = max(open_parts or parts, key=lambda part: (needed[part], self._needed_rows[part]))
        self._parts[number] = part
        self._needed_rows[part] -= self._units[number].rows
        for label, rows in self._units[number].labels.items():
            self._needed[label][part] -= rows
            self._waiting[label] -= 1
