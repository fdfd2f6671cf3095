"""`predict --publish`: which runs it publishes, and what it refuses before it starts Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from deltalake import DeltaTable

from imgcls.cli import main
from imgcls.inference.config import PredictConfig
from imgcls.inference.publish_runs import publish_runs
from imgcls.publishing.publish import publish_run
from imgcls.runs import layout
from tests.evaluation.runs import commit, drawn
from tests.publishing.tables import set_run_id


def commit_night(labels: Path, number: int, publish: str | None, rows: int = 5) -> Path:
    """A committed night, of a command with this `--publish`."""
    folder = labels / f"date=2026-11-{number:02d}"
    run = set_run_id(commit(folder, drawn(5, seed=number).slice(0, rows)), f"night{number}")
    record = json.loads((run / layout.RUN_FILE).read_text())
    record["sequence"] = number
    record["provenance"]["config"]["publish"] = publish
    (run / layout.RUN_FILE).write_text(json.dumps(record))
    return run


def count_runs(table: Path) -> Counter[str]:
    return Counter(DeltaTable(str(table)).to_pyarrow_table()["run_id"].to_pylist())


def test_a_night_publishes_those_that_were_committed_and_not_published(tmp_path: Path) -> None:
    labels, table = tmp_path / "labels", tmp_path / "table"
    target = f"delta:{table}"
    commit_night(labels, 1, None)  # before there was a table
    publish_run(str(commit_night(labels, 2, target)), target)
    commit_night(labels, 3, target)
    commit_night(labels, 4, target, rows=0)
    commit_night(labels, 5, "delta:other")
    tonight = commit_night(labels, 6, target)
    config = PredictConfig(
        manifest="m.csv",  # type: ignore[arg-type]
        model="bundle",
        output=f"{labels}/date={{date}}",
        since=str(labels),  # type: ignore[arg-type]
        publish=target,
    )
    for _ in range(2):
        publish_runs(config, [str(tonight)])
        assert count_runs(table) == {"night2": 5, "night3": 5, "night6": 5}


def test_a_run_that_is_refused_is_not_published(tmp_path: Path) -> None:
    run = commit_night(tmp_path, 1, None)
    (run / layout.SUCCESS_FILE).unlink()
    config = PredictConfig(
        manifest="m.csv",  # type: ignore[arg-type]
        model="bundle",
        output=str(run),
        publish=f"delta:{tmp_path}/table",
    )
    publish_runs(config, [str(run)])
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("table", "publish table: is not a target"),
        ("delta:file/table", "delta:{}/file/table: "),
        ("delta:table", "column 'site' is string, and int64 in manifest"),
        ("delta:fresh", "column 'run_id' is a column that publishing adds"),
        ("iceberg:nowhere.ml.labels", "PYICEBERG_CATALOG__NOWHERE__URI"),
    ],
)
def test_a_target_that_cannot_be_published_to_exits_2_before_ray_starts(
    target: str,
    message: str,
    colors: Callable[..., Path],
    color_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    text = drawn(2).append_column("site", pa.array(["a", "b"]))
    publish_run(str(commit(tmp_path / "run", text)), f"delta:{tmp_path}/table")
    images = colors(3)
    name = "run_id" if target == "delta:fresh" else "site"
    paths = [str(path) for path in sorted(images.parent.glob("**/*.jpg"))[:2]]
    pq.write_table(pa.table({"path": paths, name: [1, 2]}), tmp_path / "m.parquet")
    words = ["--manifest", "m.parquet", "--model", str(color_bundle), "--output", "out"]
    assert main(["predict", *words, "--publish", target]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
    assert not ray.is_initialized()
