"""Base of the counts of a predictions table: rows by status, merging, and conversion to JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class MergeableCounts:
    """Mergeable counts of a table of any task.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    status : dict of str to int
        Rows by status, including "ok".
    """

    classes: tuple[str, ...]
    status: dict[str, int]

    _float_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that are arrays of floats; other arrays are int64."""

    @property
    def rows(self) -> int:
        """All rows, with or without a prediction."""
        return sum(self.status.values())

    @property
    def ok(self) -> int:
        """Rows with a prediction."""
        return self.status.get("ok", 0)

    @property
    def error_rows(self) -> int:
        """Rows without a prediction: any status but ok."""
        return self.rows - self.ok

    def to_dict(self) -> dict[str, Any]:
        """Convert to lists, ints and floats for `json.dumps`; `from_dict` restores it exactly.

        Returns
        -------
        dict
            The attributes by name.

        Examples
        --------
        >>> from imgcls.metrics import PredictionCounts
        >>> counts = PredictionCounts.empty(["cat", "dog"])
        >>> PredictionCounts.from_dict(counts.to_dict()).classes
        ('cat', 'dog')
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {k: v.tolist() for k, v in values.items() if isinstance(v, np.ndarray)}
        return values | lists | {"classes": list(self.classes), "status": dict(self.status)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Restore counts from the result of `to_dict`.

        Parameters
        ----------
        data : mapping
            Result of `to_dict`.

        Returns
        -------
        MergeableCounts
            Of the class that it is called on.

        Raises
        ------
        ValueError
            If keys are missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if difference := expected ^ set(data):
            raise ValueError(f"not the dict of a {cls.__name__}: check {sorted(difference)}")
        arrays = {
            name: np.array(value, dtype=np.float64 if name in cls._float_fields else np.int64)
            for name, value in data.items()
            if isinstance(value, list) and name != "classes"
        }
        plain = {"classes": tuple(data["classes"]), "status": dict(data["status"])}
        return cls(**{**data, **arrays, **plain})

    def _check_same_classes(self, other: MergeableCounts) -> None:
        if self.classes != other.classes:
            raise ValueError(
                f"cannot merge counts over {len(self.classes)} classes with counts over"
                f" {len(other.classes)}: names and order must be the same, from one bundle"
            )

    def _add_fields(self, other: MergeableCounts, skipped: Sequence[str] = ()) -> dict[str, Any]:
        """The fields of the counts of both but the skipped ones; numbers are added up."""
        left_out = {"classes", "status", *skipped}
        names = [field.name for field in fields(self) if field.name not in left_out]
        status = dict(sorted((Counter(self.status) + Counter(other.status)).items()))
        added = {name: getattr(self, name) + getattr(other, name) for name in names}
        return {"classes": self.classes, "status": status, **added}
