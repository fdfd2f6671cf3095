"""One version of a lakehouse table, as the source of a manifest."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_PINNED = re.compile(r"(.+)@(\d+)", re.DOTALL)


@dataclass(frozen=True)
class TableVersion:
    """A version of a table.

    name:     the table with its version, which reads the same rows again: "delta:/lake/photos@12"
    folder:   the folder of the table, where relative paths start
    version:  version or snapshot
    table_id: UUID of the table; one that is created again under the same name has another
    """

    name: str
    folder: str
    version: str
    table_id: str

    @property
    def fingerprint(self) -> str:
        """A hash of the table and its version, which stands for the rows."""
        text = f"{self.table_id}@{self.version}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_version(name: str) -> tuple[str, int | None]:
    """Split `NAME@12` into the name and the version; None for a name without a version."""
    match = _PINNED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)
