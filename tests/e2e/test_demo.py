"""The demo, and the committed manifests that belong to it."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imgcls import demo
from imgcls.cli import main
from tests.e2e.outputs import assert_exactly_once, success
from tests.processes import REPOSITORY, RayCluster, imgcls


def accuracy(output: Path) -> float:
    summary = pq.read_table(output / "metrics" / "summary.parquet").to_pylist()
    return float(next(row["value"] for row in summary if row["metric"] == "accuracy"))


def named_paths(text: str) -> list[Path]:
    """The paths in the last lines of the demo's output."""
    _, _, listing = text.partition("results:\n")
    places = [re.split(r" {2,}", line.strip(), maxsplit=1)[1] for line in listing.splitlines()]
    return [Path(place) for line in places for place in line.split(", ")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "epochs: Input should be greater than 0; found '0'"),
        (["--num-workers", "0"], "num_workers: Input should be greater than 0; found '0'"),
        (["--output", "s3://bucket/demo"], "output s3://bucket/demo: is a URL; pass a folder"),
        (["--output", "file.txt"], "output file.txt: cannot be written: "),
    ],
)
def test_the_demo_refuses_what_it_cannot_run_with(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    assert main(["demo", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file.txt"]


@pytest.mark.timeout(900)
def test_the_demo_trains_predicts_and_lists_its_results(
    cluster: RayCluster, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    # fewer than the default epochs, but enough for the accuracy below
    done = imgcls("demo", "--output", folder, "--epochs", 3, env=cluster.environment())
    assert done.returncode == 0, done.stderr
    predictions = folder / "predictions"
    assert_exactly_once(predictions, 359)
    assert accuracy(predictions) >= 0.97
    paths = named_paths(done.stdout)
    assert len(paths) == 8
    assert all(path.exists() for path in paths), paths


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_can_be_run_again(cluster: RayCluster, tmp_path: Path) -> None:
    predictions = tmp_path / "demo" / "predictions"
    bundles = set()
    for epochs in (1, 2):
        less = ("--epochs", epochs, "--num-workers", 1)
        done = imgcls("demo", "--output", tmp_path / "demo", *less, env=cluster.environment())
        assert done.returncode == 0, done.stderr
        assert_exactly_once(predictions, 359)
        bundles.add(success(predictions)["bundle_sha256"])
    assert len(bundles) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_committed_manifests_list_the_images_that_the_demo_writes(
    split: str, tmp_path: Path
) -> None:
    with (REPOSITORY / "manifests" / f"digits-{split}.csv").open(newline="") as stream:
        committed = [(row["path"], row["label"]) for row in csv.DictReader(stream)]
    written = dict(zip(("train", "test"), demo.write_digits(tmp_path), strict=True))[split]
    with written.open(newline="") as stream:
        made = [(row["path"], row["label"]) for row in csv.DictReader(stream)]
    assert committed == [(f"../demo/{path}", label) for path, label in made]
    assert all((tmp_path / path).exists() for path, _ in made)
    # seen from manifests/, the paths lead to where `make demo` writes by default
    assert demo.DemoConfig().output == "demo"
    assert os.path.normpath(f"manifests/../demo/{made[0][0]}") == f"demo/{made[0][0]}"
