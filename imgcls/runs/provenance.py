"""Provenance record of a run: configuration, code version, library versions, time and host."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import imgcls
from imgcls.cluster.node_report import find_versions


def build_provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance record of a resolved configuration, as JSON values."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "git_commit": _find_git_commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": find_versions(),
    }


def list_differences(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """One line for each value, at any depth, in which two records differ."""
    lines = []
    for key in sorted({*now, *then}):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += list_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} then, {new!r} now")
    return lines


def _find_git_commit() -> str | None:
    """Commit of the package's own checkout, with `-dirty` when files have changed since."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(imgcls.__file__)))
    if not os.path.exists(os.path.join(root, ".git")):
        return None  # installed, or uploaded with a job
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
