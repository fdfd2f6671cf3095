"""What a record stores about an output that it names by its path, and what is there now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgcls.data.storage import filesystem
from imgcls.evaluation.overview.entry import RunEntry
from imgcls.evaluation.overview.records import get_section, get_text
from imgcls.models.bundle import is_registry_uri

BY_PATH = "by path, not verified"
_SHOWN = 12


@dataclass(frozen=True)
class ExpectedRun:
    """A run as a record knows it; None where it does not.

    bundle_sha256, fingerprint: of its bundle and its manifest
    run_id, committed:          of its commit
    """

    bundle_sha256: str | None = None
    fingerprint: str | None = None
    run_id: str | None = None
    committed: str | None = None

    @classmethod
    def from_record(cls, record: Any) -> ExpectedRun:
        """Of the keys bundle_sha256, manifest_fingerprint, run_id and committed."""
        names = ("bundle_sha256", "manifest_fingerprint", "run_id", "committed")
        return cls(*(get_text(record, name) for name in names))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known, so that no output can be verified."""
        return self == ExpectedRun()

    def describe_differences(self, entry: RunEntry) -> str:
        """How the run that is there now differs; empty if it does not."""
        committed = entry.date if entry.state == "committed" else None
        pairs = (
            ("bundle", self.bundle_sha256, entry.bundle_sha256),
            ("manifest", self.fingerprint, entry.fingerprint),
            ("run", self.run_id, get_text(entry.record, "plan", "run_id")),
            ("committed", self.committed, committed),
        )
        return ", ".join(
            f"{name} {_shorten(name, now)} instead of {_shorten(name, then)}"
            for name, then, now in pairs
            if then is not None and then != now
        )


def is_relative(url: str) -> bool:
    """Whether a path depends on the working directory of the command that stored it."""
    if is_registry_uri(url) or not filesystem.is_local(url):
        return False
    return not os.path.isabs(filesystem.local_path(url))


def describe_path_link(url: str) -> str:
    """The mark of an output that was found by its path alone."""
    where = f"; a relative path, read in {os.getcwd()}" if is_relative(url) else ""
    return BY_PATH + where


def find_embedded_run(made: Mapping[str, Any]) -> ExpectedRun:
    """The run whose embeddings a head was fitted to, by the provenance of its bundle."""
    return ExpectedRun.from_record(get_section(made, "run", "data", "data.embeddings"))


def _shorten(name: str, text: str | None) -> str:
    if text is None:
        return "none"
    return text if name == "committed" else text[:_SHOWN]
