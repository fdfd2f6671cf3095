"""Outputs that several modules read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.overview.outputs import make_outputs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, color_bundle: Path) -> tuple[Path, Any]:
    """A folder of outputs, which no test changes, and its bundles by name."""
    folder = tmp_path_factory.mktemp("outputs")
    return folder, make_outputs(folder, color_bundle)
