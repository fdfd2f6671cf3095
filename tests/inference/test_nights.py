"""Earlier runs: those with predictions and those with embeddings alone are kept apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imgcls.errors import RequestError
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.nights import find_past_runs
from tests.runs.embedded import CLASSES, commit_run, drop_predictions, save_with_head


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run of `imgcls predict` and one of `imgcls embed`."""
    bundle = save_with_head(tmp_path / "bundle", CLASSES, head_seed=1)
    for name in ("labels", "embedded"):
        commit_run(tmp_path / "runs" / name, bundle, 20)
    drop_predictions(tmp_path / "runs" / "embedded")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("has_predictions", "kept", "other"),
    [(True, "labels", "embed`: .*embedded"), (False, "embedded", "predict`: .*labels")],
)
def test_runs_of_the_other_command_do_not_count(
    runs: Path,
    has_predictions: bool,
    kept: str,
    other: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = find_past_runs(str(runs)).select(has_predictions=has_predictions)
    assert [Path(run.url).name for run in found.committed] == [kept]
    printed = capsys.readouterr().out
    assert re.search(f"ignored, of `imgcls {other}", printed), printed


def test_a_history_has_runs_of_one_command(runs: Path, tmp_path: Path) -> None:
    config = CompactConfig(source=str(runs), output=str(tmp_path / "history"))
    with pytest.raises(RequestError, match="holds runs of `imgcls predict` and of `imgcls embed`"):
        compact(config)
