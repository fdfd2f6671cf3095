"""A committed run, and the places where it is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyiceberg.catalog import load_catalog
from pyiceberg.utils.config import Config

from tests.evaluation.runs import commit, drawn


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A committed run of 90 rows in three parts."""
    return commit(tmp_path / "run", drawn(90, failed=0.1), parts=3, group_rows=20)


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a catalog in a SQLite file, with a namespace `ml`."""
    (tmp_path / "warehouse").mkdir()
    monkeypatch.setenv("PYICEBERG_CATALOG__LOCAL__URI", f"sqlite:///{tmp_path}/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__LOCAL__WAREHOUSE", f"file://{tmp_path}/warehouse")
    # pyiceberg reads the environment once, when it is imported
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", Config())
    load_catalog("local").create_namespace("ml")
    return "local"
