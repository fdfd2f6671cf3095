"""The labeling loop: a head, a nightly run, a selection, a person's labels, a better head."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.conftest import COLORS, draw, write_manifest
from tests.data.annotations.filled import fill_label_studio
from tests.e2e.outputs import assert_exactly_once
from tests.processes import ALONE, run_here


def draw_images(folder: Path, count: int) -> dict[str, str]:
    """Images of all colors; their classes by path."""
    folder.mkdir(parents=True)
    names = list(COLORS)
    classes = {}
    for number in range(count):
        path = folder / f"{number:03d}.jpg"
        name = names[number % len(names)]
        draw(name, seed=number).save(path)
        classes[str(path)] = name
    return classes


def run(*words: object) -> str:
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_accuracy(output: Path) -> float:
    rows = pq.read_table(output / "metrics" / "summary.parquet").to_pylist()
    return float({row["metric"]: row["value"] for row in rows}["accuracy"])


def test_labels_of_a_selection_make_a_better_model_that_the_next_night_uses(
    joined: None, color_bundle: Path, tmp_path: Path
) -> None:
    pool = draw_images(tmp_path / "pool", 60)
    test = draw_images(tmp_path / "test", 24)
    pool_csv = write_manifest(tmp_path / "pool.csv", [(path,) for path in pool], ("path",))
    test_csv = write_manifest(tmp_path / "test.csv", list(test.items()), ("path", "label"))
    # no image of the class blue is labeled yet
    seed_rows = [(path, pool[path]) for path in list(pool)[:27] if pool[path] != "blue"]
    seed = write_manifest(tmp_path / "seed.csv", seed_rows, ("path", "label"))
    settings = ("--precision", "fp32", "--embeddings", "float16", "--scores", *ALONE)
    current = tmp_path / "models" / "current"
    current.parent.mkdir()

    run("predict", pool_csv, "--model", color_bundle, "--output", tmp_path / "embedded", *settings)
    first = tmp_path / "models" / "1"
    run("train", seed, "--data.embeddings", tmp_path / "embedded", "--output", first)
    current.symlink_to(first)

    nights = tmp_path / "nights"
    night = ("predict", pool_csv, "--model", current, "--output", f"{nights}/{{date}}",
             "--since", nights, *settings)  # fmt: skip
    run(*night, "--date", "2026-11-01")
    assert_exactly_once(nights / "2026-11-01", 60)

    selected = tmp_path / "next"
    run("select", nights / "2026-11-01", "--count", 18, "--diverse", "--max-similarity", 1.0,
        "--exclude", seed, "--output", selected, "--format", "label-studio")  # fmt: skip
    chosen = pq.read_table(selected / "manifest.parquet")["path"].to_pylist()
    assert len(set(chosen)) == 18
    assert not set(chosen) & {path for path, _ in seed_rows}
    assert "blue" in {pool[path] for path in chosen}

    export = fill_label_studio(selected, {path: [pool[path]] for path in chosen})
    labeled = tmp_path / "labeled.parquet"
    run("labels", "import", export, "--onto", seed, "--output", labeled, "--new-classes")
    rows = pq.read_table(labeled).to_pylist()
    assert {row["path"]: row["label"] for row in rows} == {
        **dict(seed_rows), **{path: pool[path] for path in chosen},
    }  # fmt: skip
    assert [row["labeled_by"] for row in rows].count("ann@example.com") == 18

    second = tmp_path / "models" / "2"
    run("train", labeled, "--data.embeddings", tmp_path / "embedded", "--output", second)
    run("predict", test_csv, "--model", first, "--output", tmp_path / "test-1", *settings)
    run("relabel", tmp_path / "test-1", "--model", second, "--output", tmp_path / "test-2")
    run("compare", tmp_path / "test-1", tmp_path / "test-2", "--output", tmp_path / "compared")
    unknown = pq.read_table(tmp_path / "test-1" / "predictions")
    assert set(unknown["predicted_label"].to_pylist()) == {"green", "red"}
    assert read_accuracy(tmp_path / "test-2") > 0.9

    current.unlink()
    current.symlink_to(second)
    draw("blue", seed=99).save(tmp_path / "pool" / "new.jpg")
    new = [*pool, str(tmp_path / "pool" / "new.jpg")]
    write_manifest(pool_csv, [(path,) for path in new], ("path",))
    run(*night, "--date", "2026-11-02")
    (row,) = assert_exactly_once(nights / "2026-11-02", 1).to_pylist()
    assert row["predicted_label"] == "blue"
    lineage = run("runs", tmp_path, "--lineage", nights / "2026-11-02")
    assert json.loads((second / "bundle.json").read_text())["sha256"] in lineage
    assert "ann@example.com" in lineage
