"""A run and a browser that several modules use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.browser import launched
from tests.evaluation.runs import commit, drawn


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return drawn(3000, 1, failed=0.05, unlabeled=0.1, unknown=0.05, sharpness=1.5)


@pytest.fixture(scope="module")
def run(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commit(tmp_path_factory.mktemp("runs") / "out", table, parts=3, group_rows=200)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser
