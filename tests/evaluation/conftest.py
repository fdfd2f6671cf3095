"""A run that several modules evaluate."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.evaluation.runs import commit, drawn


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return drawn(3000, 1, failed=0.05, unlabeled=0.1, unknown=0.05, sharpness=1.5)


@pytest.fixture(scope="module")
def run(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commit(tmp_path_factory.mktemp("runs") / "out", table, parts=3, group_rows=200)
