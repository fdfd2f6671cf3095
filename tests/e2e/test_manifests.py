"""Manifests that are no single file, through the real command; test_fuzz has CSV in all forms."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import COLORS, draw, save
from tests.e2e.outputs import assert_exactly_once
from tests.processes import run_here


@pytest.mark.parametrize(
    "place", [pytest.param("disk", marks=pytest.mark.slow), "s3"], indirect=True
)
def test_a_folder_per_class_is_a_labeled_manifest(
    joined: None, placed_bundle: Path, place: Path
) -> None:
    tree = place / "tree"
    for i in range(12):
        name = list(COLORS)[i % 3]
        file = tree / name / "deep er" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save(draw(name, seed=i), file)
    (tree / "red" / "notes.txt").write_text("no image")
    done = run_here(
        *("predict", "--manifest", tree, "--model", placed_bundle, "--output", place / "out"),
    )
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(place / "out", 12)
    paths = found["path"].to_pylist()
    assert paths == sorted(paths)
    assert found["label"].to_pylist() == [path.partition("/")[0] for path in paths]
    assert set(found["status"].to_pylist()) == {"ok"}
    assert found["label_rank"].null_count == 0


@pytest.mark.parametrize(
    "place", ["disk", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)
def test_a_glob_of_parquet_files_with_other_column_names_is_labeled_in_order(
    joined: None, placed_bundle: Path, place: Path
) -> None:
    for i in range(12):
        save(draw("red", seed=i), place / f"{i}.jpg")
    whole = pa.table(
        {
            "id": pa.array(range(12), pa.int16()),
            "image": pa.array([f"{i}.jpg" for i in range(12)]).dictionary_encode(),
            "colour": [("red", "green", None)[i % 3] for i in range(12)],
        }
    )
    for start in (8, 0, 4):
        with (place / f"night-{start:02d}.parquet").open("wb") as stream:
            pq.write_table(whole.slice(start, 4), stream)
    done = run_here(
        *("predict", "--manifest", place / "night-*.parquet", "--manifest.path-column", "image"),
        *("--manifest.label-column", "colour", "--model", placed_bundle),
        *("--output", place / "out"),
    )
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(place / "out", 12)
    assert found["id"].to_pylist() == list(range(12))
    assert found["image"].to_pylist() == whole["image"].to_pylist()
    assert found.schema.field("image").type == whole.schema.field("image").type
    assert [rank is None for rank in found["label_rank"].to_pylist()] == [
        i % 3 == 2 for i in range(12)
    ]
