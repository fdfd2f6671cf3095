"""How a run and its metrics were made, as sentences for the report, and its settings as a list."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from imgcls.evaluation.result import RunEvaluation
from imgcls.formatting import format_count, format_duration

MAX_VALUE = 300
"""Characters of a setting that are shown."""


def describe_making(evaluation: RunEvaluation) -> list[tuple[str, str]]:
    """Model, data, labels, prediction, metrics and software of a run: topic and sentences."""
    return list(_list_topics(evaluation))


def _list_topics(evaluation: RunEvaluation) -> Iterator[tuple[str, str]]:
    run, counts = evaluation.run, evaluation.counts
    config, success = run.provenance["config"], run.success_record
    architecture = run.run_record.get("architecture")
    network = "" if architecture is None else f" with the network {architecture}"
    yield (
        "Model",
        f"The bundle {config['model']}{network} and "
        f"{format_count(len(run.classes), 'class', 'classes')}. Its SHA-256 is "
        f"{run.bundle_sha256}.",
    )
    failed = counts.rows - counts.ok
    yield (
        "Data",
        f"{format_count(counts.rows, 'row')} of the manifest {config['manifest']['path']} "
        f"(fingerprint {run.manifest_fingerprint}), "
        f"{f'{counts.ok:,}' if failed else 'all'} with a prediction"
        f"{f' and {failed:,} without' if failed else ''}.",
    )
    yield "Labels", _describe_labels(evaluation)
    how = ", ".join([*success["precision"], *success.get("engine", ())])  # 0.1 had no engine
    yield (
        "Prediction",
        f"Committed on {spell_time(success['committed'])} after "
        f"{format_duration(success['seconds']['wall'])} ({how}), as run {success['run_id']} in "
        f"{run.url}.",
    )
    yield (
        "Metrics",
        "Counted from the committed table, without running the model again. Intervals are 95% "
        "intervals: Wilson's for shares of images, bootstrap intervals for other metrics.",
    )
    yield "Software", describe_software(run.provenance, success["versions"])


def _describe_labels(evaluation: RunEvaluation) -> str:
    run, labels = evaluation.run, evaluation.config.labels
    labeled = evaluation.counts.labeled
    if not evaluation.has_labels:
        return "None: the run has no labels, so that nothing about its accuracy is known."
    source = f"The column {run.label_column} of the manifest"
    if labels is not None:
        source = f"The table {labels.path}, joined by {evaluation.config.on or run.path_column}"
    elif run.label_column is None:
        source = "The label columns of the manifest"
    return f"{source}: {format_count(labeled, 'prediction')} with a label that is a class."


def describe_software(provenance: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Versions, code and machine of a run or a training; earlier versions recorded fewer."""
    software = [f"{name} {version}" for name, version in versions.items()]
    if provenance.get("python"):
        software.append(f"Python {provenance['python']}")
    parts = [", ".join(software) or "versions unknown"]
    if provenance.get("git_commit"):
        parts.append(f"commit {provenance['git_commit']}")
    if provenance.get("host"):
        parts.append(f"started on {provenance['host']}")
    return "; ".join(parts) + "."


def list_settings(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings that have a value, by their dotted names."""
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found += list_settings(value, f"{prefix}{name}.")
        elif value is not None and value != [] and value != {} and value != "":
            found.append((f"{prefix}{name}", _format_setting(value)))
    return found


def _format_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = ", ".join(str(each) for each in value) if isinstance(value, list) else str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def spell_date(text: str) -> str:
    """The date of an ISO 8601 time in words: November 29, 2026."""
    time = datetime.datetime.fromisoformat(text)
    return f"{_MONTHS[time.month - 1]} {time.day}, {time.year}"


def spell_time(text: str) -> str:
    """An ISO 8601 time in words: November 29, 2026 at 23:10 UTC."""
    time = datetime.datetime.fromisoformat(text)
    if time.tzinfo is not None:
        time = time.astimezone(datetime.UTC)
    return f"{spell_date(time.isoformat())} at {time:%H:%M} UTC"


_MONTHS = (  # strftime would use the language of the system
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
