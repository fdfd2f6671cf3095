"""The benchmark of the labeling loop: equal first labels, paired differences, settings."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import labeling_loop
from benchmarks.labeling_loop import Embedded
from tests.runs.embedded import CLASSES, PART_ROWS, commit_run, drop_predictions, save_with_head

ROWS = 60


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes with 30 empty files each."""
    for number in range(ROWS):
        file = tmp_path / "train" / ("down", "up")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "train"


def test_a_paired_difference_is_more_exact_than_the_accuracies() -> None:
    mean, margin = labeling_loop.compare_pairs([0.91, 0.71, 0.82], [0.90, 0.70, 0.80])
    assert mean == pytest.approx(0.04 / 3)
    assert margin == pytest.approx(4.303 * 0.00577 / math.sqrt(3), rel=1e-3)
    line = labeling_loop.describe("margin", [0.91, 0.71, 0.82], [0.90, 0.70, 0.80])
    assert line.split("  ")[-1] == "+1.33 points (95%: -0.10 to +2.77)"
    assert math.isnan(labeling_loop.compare_pairs([0.5], [0.4])[1])


def test_the_first_labels_are_as_many_of_each_class_and_those_of_the_seed(images: Path) -> None:
    rows = labeling_loop.draw_labels(images, 8, 3)
    assert sorted(label for _, label in rows) == ["down"] * 4 + ["up"] * 4
    assert labeling_loop.draw_labels(images, 8, 3) == rows
    assert labeling_loop.draw_labels(images, 8, 4) != rows
    with pytest.raises(SystemExit, match="7: is not a multiple of the 2 classes"):
        labeling_loop.draw_labels(images, 7, 0)


def test_settings_are_those_of_the_command() -> None:
    words = ["select", "a", "b", "--arch", "small_cnn", "--weights", "w.pth", "--rules", "margin"]
    options = labeling_loop.parse([*words, "--set", "epochs=3", "augment.hflip=0"])
    assert (options.rules, options.seeds) == (["margin"], 5)
    assert labeling_loop.parse_settings(options.set) == {"epochs": 3, "augment.hflip": 0}
    with pytest.raises(SystemExit):
        labeling_loop.parse(["select", "a", "b"])


@pytest.mark.slow
def test_rounds_of_selected_and_of_random_labels(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = commit_pool_and_test(images, tmp_path / "out")
    words = ["select", str(images), str(images), "--arch", "small_cnn", "--weights", "w"]
    words += ["--output", str(embedded.pool.parent)]
    labeling_loop.main(
        [*words, "--rules", "margin-diverse", "--counts", "10", "16", "--seeds", "1"]
    )
    assert capsys.readouterr().out.count(" labels  margin-diverse ") == 2
    read = {}
    for name in ("first-0", "random-0-16", "margin-diverse-0-16"):
        with (tmp_path / "out" / name / "labels.csv").open(newline="") as stream:
            read[name] = [row["path"] for row in csv.DictReader(stream)]
    for name, paths in read.items():
        assert paths[:10] == read["first-0"]
        assert len(set(paths)) == len(paths) == (10 if name == "first-0" else 16)
    assert read["margin-diverse-0-16"] != read["random-0-16"]


def commit_pool_and_test(images: Path, output: Path) -> Embedded:
    """Runs like those of `imgcls embed`: of all images without labels, and of 40 labeled rows."""
    bundle = save_with_head(output / "backbone", CLASSES, 1)
    rows = labeling_loop.draw_rows(images, 10**9, 0)
    embedded = Embedded(output / "pool", output / "test")
    commit_images(embedded.pool, bundle, [(path, None) for path, _ in rows])
    commit_images(embedded.test, bundle, rows[:20] + rows[-20:])
    return embedded


def commit_images(run: Path, bundle: Path, rows: Sequence[tuple[str, str | None]]) -> None:
    commit_run(run, bundle, len(rows))
    drop_predictions(run)
    for part, file in enumerate(sorted((run / "predictions").iterdir())):
        table = pq.read_table(file)
        own = rows[part * PART_ROWS :][: table.num_rows]
        width = table.schema.field("embedding").type.list_size
        vectors = np.random.default_rng(part).normal(size=(len(own), width)).astype(np.float32)
        columns = {
            "path": pa.array([path for path, _ in own], pa.string()),
            "label": pa.array([label for _, label in own], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width),
            "status": pa.array(["ok"] * len(own)).dictionary_encode(),
            "error": pa.nulls(len(own), pa.string()),
        }
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        pq.write_table(table, file)
