"""Base class of the targets of `imgcls publish`, and how two publishers at once are handled.

A run is known to a target by its run id and the number of its commit. Each target records both in
the transaction that adds the rows, so a run is added once, however often and from wherever it is
published. A transaction that another writer preceded is tried again from the start, with the check.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from imgcls.errors import StorageUnavailable
from imgcls.publishing.rows import RunRows

MAX_ATTEMPTS = 20
"""Transactions that one publisher tries while other writers precede it."""
_MAX_PAUSE_S = 2.0


@dataclass(frozen=True)
class Publication:
    """What publishing a run did.

    action:  "published", "replaced" for rows of an earlier commit of the run, or "unchanged"
    version: version, snapshot or commit of the target with the rows; None if it has no number
    """

    action: Literal["published", "replaced", "unchanged"]
    version: str | None


class TransactionConflict(Exception):
    """Another writer has changed the target since it was read; nothing was written to it."""


class Sink(ABC):
    """A target, such as a table.

    prefix: of its name on the command line
    syntax: of its name, in messages
    """

    prefix: ClassVar[str]
    syntax: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def target(self) -> str:
        """The target as it is written on the command line."""
        return f"{self.prefix}:{self.name}"

    @abstractmethod
    def check(self, schema: pa.Schema, place: str) -> None:
        """Raise RequestError where rows with these columns cannot be published.

        schema: of `add_published_columns`
        place:  where the columns come from, with which errors begin
        """

    @abstractmethod
    def find(self, rows: RunRows) -> Publication | None:
        """The publication of a run as it is committed now; None where it is not in the target."""

    @abstractmethod
    def publish(self, rows: RunRows) -> Publication:
        """Publish a run in one transaction, unless it is published already."""


def retry_conflicts(target: str, attempt: Callable[[], Publication]) -> Publication:
    """Repeat a transaction while other writers precede it; raises StorageUnavailable in the end."""
    for number in range(MAX_ATTEMPTS):
        try:
            return attempt()
        except TransactionConflict:
            time.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.05 * 2**number)))
    raise StorageUnavailable(
        f"{target}: other writers changed it during {MAX_ATTEMPTS} attempts; rerun the command"
    )
