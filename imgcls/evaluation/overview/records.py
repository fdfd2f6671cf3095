"""Records of outputs as they are stored, and how an unreadable one is explained."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.errors import ImgclsError, OutputError, one_line
from imgcls.evaluation.overview.entry import Kind, RunEntry, State
from imgcls.evaluation.overview.search import FoundFolder
from imgcls.runs import layout

MAX_RECORD_BYTES = 64 << 20
"""Larger records are not read."""
UNREADABLE = (
    ImgclsError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    pa.ArrowException,
)
"""Errors of a file that is no record of imgcls."""


class StoredRecord(BaseModel):
    """What an entry needs of a record; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _ManifestIdentity(StoredRecord):
    fingerprint: str


class _BundleIdentity(StoredRecord):
    sha256: str | None = None


class _Identity(StoredRecord):
    manifest: _ManifestIdentity
    bundle: _BundleIdentity = _BundleIdentity()
    settings: dict[str, Any] = {}
    merged: list[str] = []


class _PlanRecord(StoredRecord):
    rows: int


class ProvenanceRecord(StoredRecord):
    """Settings, versions and commit that made an output."""

    created: str | None = None
    config: dict[str, Any] = {}
    git_commit: str | None = None
    versions: dict[str, str] = {}


class _RegisteredRecord(StoredRecord):
    name: str
    version: str


class RunRecord(StoredRecord):
    """What an entry needs of `_run.json`."""

    identity: _Identity
    plan: _PlanRecord
    provenance: ProvenanceRecord = ProvenanceRecord()
    task: Literal["single_label", "multilabel"] = "single_label"
    began: str | None = None
    refused: str | None = None
    registered_model: _RegisteredRecord | None = None


class SuccessRecord(StoredRecord):
    """What an entry needs of `_SUCCESS`."""

    rows: int
    status: dict[str, int]
    committed: str
    seconds: dict[str, FiniteFloat] = {}
    steady_images_per_second: FiniteFloat | None = None
    versions: dict[str, str] = {}


class MetricRecord(StoredRecord):
    """A metric; only the main one must be finite."""

    value: float
    lower: float | None = None
    upper: float | None = None


class EvaluationRecord(StoredRecord):
    """What an entry needs of the summary.json of an evaluation."""

    run: str
    rows: int
    bundle_sha256: str | None = None
    manifest_fingerprint: str | None = None
    metrics: dict[str, MetricRecord]


class SelectionRecord(StoredRecord):
    """What an entry needs of the summary.json of a selection."""

    run: str
    rows: int
    bundle_sha256: str | None = None


def build_entry(folder: FoundFolder, kind: Kind, state: State, **values: Any) -> RunEntry:
    """An entry; its texts have no credentials."""
    has_report = layout.REPORT_FILE in folder.files
    for name in ("model", "manifest", "problem"):
        if values.get(name) is not None:
            values[name] = hide_credentials(values[name])
    return RunEntry(
        kind=kind, state=state, path=folder.path, url=folder.url, has_report=has_report, **values
    )


def explain_problem(error: Exception) -> str:
    """The reason on one line, with the key of a wrong value."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"is not a record of imgcls ({place}: {first['msg']})"
    if isinstance(error, RecursionError):
        return "is not a record of imgcls (it is nested too deeply)"
    if isinstance(error, (KeyError, TypeError, AttributeError)):
        return f"is not a record of imgcls ({type(error).__name__}: {one_line(error)})"
    return one_line(error)


@contextlib.contextmanager
def name_file(name: str) -> Iterator[None]:
    """Raise OutputError with the name of the file that could not be read or is no record.

    Errors of imgcls, which have a path, are raised as they are.
    """
    try:
        yield
    except ImgclsError:
        raise
    except (*UNREADABLE, OSError) as error:
        raise OutputError(f"{name}: {explain_problem(error)}") from error


def check_size(size: int | None) -> None:
    """Raise ValueError for a file that is too large to be a record of imgcls."""
    if size is not None and size > MAX_RECORD_BYTES:
        raise ValueError(f"has {size / 1e6:,.0f} MB; a record of imgcls is smaller")


def get_section(tree: Any, *keys: str) -> Mapping[str, Any]:
    """A nested record; empty where a key is missing or the value is no record."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def get_text(tree: Any, *keys: str) -> str | None:
    """A text in nested records; None where a key is missing or the value is no text."""
    *above, name = keys
    found = get_section(tree, *above).get(name)
    return found if isinstance(found, str) else None


def read_record(folder: FoundFolder, name: str) -> dict[str, Any]:
    """A JSON object in a folder; raises ValueError for other content."""
    url = filesystem.join(folder.url, name)
    check_size(folder.sizes[name] if name in folder.sizes else filesystem.size(url))
    stored = json.loads(filesystem.read(url))
    if not isinstance(stored, dict):
        raise ValueError(f"is a {type(stored).__name__}, not an object")
    return stored


def format_time(time: datetime.datetime | None) -> str | None:
    """ISO 8601 in UTC."""
    return None if time is None else time.astimezone(datetime.UTC).isoformat(timespec="seconds")
