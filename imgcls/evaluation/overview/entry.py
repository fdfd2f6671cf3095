"""One output in a folder: what it is, its state, and its key numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from imgcls.data.storage.credentials import hide_credentials

Kind = Literal[
    "predictions",
    "embeddings",
    "history",
    "bundle",
    "training",
    "tune",
    "evaluation",
    "comparison",
    "selection",
    "unknown",
]
"""training: one that has not written its bundle. unknown: files that imgcls cannot read."""

State = Literal["committed", "running", "waiting", "refused", "finished", "damaged", "foreign"]
"""Of a run as in `imgcls status`; finished: an output that is written at once. damaged: a file of
imgcls that cannot be read. foreign: a file that another tool wrote."""

_METRIC_LABELS = {
    "accuracy": "accuracy",
    "mean_average_precision": "mAP",
    "val_accuracy": "validation accuracy",
    "val_mean_average_precision": "validation mAP",
}


@dataclass(frozen=True)
class Headline:
    """The main metric of an output, as it is stored.

    name:         name in the files of the output
    value:        fraction
    lower, upper: ends of the 95% interval; None where none is stored
    rows:         number of labeled rows; None where it is not stored
    """

    name: str
    value: float
    lower: float | None = None
    upper: float | None = None
    rows: int | None = None

    @property
    def label(self) -> str:
        """Name for people."""
        return _METRIC_LABELS.get(self.name, self.name)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval; None unless both of its ends are stored."""
        return None if self.lower is None or self.upper is None else (self.lower, self.upper)


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """An output, as its own files describe it; None where they do not.

    Attributes
    ----------
    kind, state : str
        See `Kind` and `State`.
    path, url : str
        Path below the searched folder, and absolute path or URL.
    problem : str or None
        Why it is damaged, foreign or refused.
    task : str or None
        single_label or multilabel.
    model, bundle_sha256, registered : str or None
        Bundle folder, its hash, and name and version in the MLflow model registry. A bundle is its
        own model.
    manifest, fingerprint : str or None
        Path of the manifest, and the fingerprint of its rows.
    rows : int or None
        Rows of the manifest; of a bundle, training images.
    date : str or None
        ISO 8601, UTC: of the commit or the start; else of the file.
    seconds : float or None
        Duration.
    headline : Headline or None
        Main metric.
    error_rate, psi : float or None
        Fraction of rows without a prediction; largest population stability index of its drift.
    images_per_second : float or None
        Throughput without start-up.
    versions : dict
        Package versions.
    git_commit : str or None
        Commit of the code.
    is_current : bool
        Whether the newest committed run next to it, or a run of this bundle, is the newest one.
    has_report : bool
        Whether it has a report.html.
    record : dict
        Its description: `_run.json`, or `bundle.json`'s provenance, or summary.json.
    """

    kind: Kind
    state: State
    path: str
    url: str
    problem: str | None = None
    task: str | None = None
    model: str | None = None
    bundle_sha256: str | None = None
    registered: str | None = None
    manifest: str | None = None
    fingerprint: str | None = None
    rows: int | None = None
    date: str | None = None
    seconds: float | None = None
    headline: Headline | None = None
    error_rate: float | None = None
    psi: float | None = None
    images_per_second: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    is_current: bool = False
    has_report: bool = False
    record: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def model_name(self) -> str:
        """Last part of the bundle's path, or its name and version in the registry."""
        if self.registered is not None:
            return self.registered
        return (self.model or "").rstrip("/").rpartition("/")[2]

    def to_json(self) -> dict[str, Any]:
        """All but the record, as JSON values."""
        values = asdict(self)
        del values["record"]
        values["url"] = hide_credentials(self.url)
        return values
