"""`imgcls similar`: the rows with the highest cosine similarity, found exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import imgcls
from imgcls.errors import ImageError, RequestError, StorageMissing
from imgcls.evaluation import similar
from imgcls.models.bundle import load_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs import embeddings
from imgcls.runs.committed import open_run
from tests.conftest import COLORS, draw
from tests.evaluation import runs

IMAGES = 12


def add_embeddings(table: pa.Table, vectors: np.ndarray, lost: tuple[int, ...] = ()) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.ravel()),
        vectors.shape[1],
        mask=pa.array(np.isin(np.arange(len(vectors)), lost)),
    )
    return table.append_column("embedding", column)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_the_nearest_rows_are_those_of_all_pairs(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_BATCH_ROWS", 37)
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(500, 6)).astype(kind)
    vectors[200] = 0
    vectors[[40, 300, 480]] = vectors[7]  # the same picture
    table = add_embeddings(runs.drawn(500), vectors, lost=(9, 250))
    run = open_run(str(runs.commit(tmp_path / "run", table, parts=3)))
    queries = normalize_embeddings(np.vstack([vectors[7], rng.normal(size=6)]).astype(np.float32))
    found, file, position = similar.find_nearest(run, queries, 20)

    unit = normalize_embeddings(vectors.astype(np.float32))
    expected = queries @ unit.T
    expected[:, [9, 200, 250]] = -2
    order = np.argsort(-expected, axis=1, kind="stable")[:, :20]
    starts = np.array([0, 166, 333])
    np.testing.assert_array_equal(starts[file] + position, order)
    np.testing.assert_allclose(found, np.take_along_axis(expected, order, 1), atol=1e-6)
    assert (starts[file] + position)[0, :4].tolist() == [7, 40, 300, 480]
    every, *_ = similar.find_nearest(run, queries, 1000)
    assert every.shape == (2, 497)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(IMAGES)]
    for i, file in enumerate(files):
        draw(list(COLORS)[i % 3], seed=i).save(file)
    return files


@pytest.fixture
def run(tmp_path: Path, pictures: list[Path], color_bundle: Path) -> Path:
    """A run over the pictures, by the bundle."""
    vectors = Classifier.load(str(color_bundle), device="cpu").embed(pictures)
    table = runs.drawn(IMAGES, scores=False)
    table = table.set_column(0, "path", pa.array([file.name for file in pictures]))
    bundle = load_bundle(str(color_bundle))
    return runs.commit(
        tmp_path / "run",
        add_embeddings(table, vectors),
        bundle_sha256=bundle.sha256,
        model=str(color_bundle),
    )


def test_an_image_of_the_run_is_the_most_similar_to_itself(
    run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [str(pictures[4]), str(pictures[8])]
    output = tmp_path / "found.parquet"
    table = imgcls.find_similar(run=str(run), to=chosen, k=3, output=str(output))
    assert table.schema.names == [
        *("query", "rank", "similarity", "row", "path", "predicted_label", "confidence")
    ]
    rows = table.to_pylist()
    assert [(row["query"], row["rank"]) for row in rows] == [
        (name, rank) for name in chosen for rank in (1, 2, 3)
    ]
    assert [rows[0]["path"], rows[3]["path"]] == ["4.png", "8.png"]
    assert [rows[0]["similarity"], rows[3]["similarity"]] == pytest.approx([1, 1], abs=1e-5)
    first = [row["similarity"] for row in rows[:3]]
    assert first == sorted(first, reverse=True)
    # the same color is nearest
    assert {int(row["path"].removesuffix(".png")) % 3 for row in rows[:3]} == {1}
    assert pq.read_table(output).equals(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"similar to {chosen[0]}"
    assert lines[1].split()[:3] == ["1", "1.0000", "4.png"]
    assert len(lines) == 8


def test_wrong_requests_are_refused(
    run: Path, pictures: list[Path], tmp_path: Path, overflowing_bundle: Path
) -> None:
    one = str(pictures[0])

    def refuse(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            imgcls.find_similar(**{"run": str(run), "to": one} | changes)

    refuse(StorageMissing, "gone.png", to=[one, str(tmp_path / "gone.png")])
    (tmp_path / "broken.png").write_bytes(b"broken")
    refuse(ImageError, "broken.png", to=str(tmp_path / "broken.png"))
    refuse(RequestError, "was made by another bundle", model=str(overflowing_bundle))
    refuse(RequestError, "pass its folder as --model", model=str(tmp_path / "none"))
    plain = runs.commit(tmp_path / "plain", runs.drawn(3))
    refuse(RequestError, "has no embeddings; label it with", run=str(plain))
