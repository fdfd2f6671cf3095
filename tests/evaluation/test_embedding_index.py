"""The approximate index of a run's embeddings: built once, and of that run alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imgcls.errors import OutputError, RequestError
from imgcls.evaluation import embedding_index
from imgcls.evaluation.similar import find_indexed, find_nearest
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs.committed import CommittedRun, open_run
from tests.evaluation import runs
from tests.evaluation.test_similar import add_embeddings

pytest.importorskip("usearch")


def search_index(
    folder: str, run: CommittedRun, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return find_indexed(run, embedding_index.open_index(folder, run), queries, k)


def commit_run(path: Path, seed: int = 0, rows: int = 3000) -> str:
    """A run of clusters, with two equal images, some rows without embedding and one of zeros."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(30, 16))
    vectors = centers[rng.integers(0, 30, rows)] + 0.5 * rng.normal(size=(rows, 16))
    vectors[2] = 0
    vectors[rows - 1] = vectors[7]
    table = add_embeddings(runs.drawn(rows), vectors.astype(np.float16), lost=(0, 1500))
    return str(runs.commit(path, table, parts=3))


def test_its_rows_are_those_of_the_exact_search(tmp_path: Path) -> None:
    run = open_run(commit_run(tmp_path / "run"))
    rng = np.random.default_rng(1)
    queries = normalize_embeddings(rng.normal(size=(50, 16)).astype(np.float32))
    folder = tmp_path / "new" / "index"
    exact, found = (
        [dict(zip(zip(f, p, strict=True), s, strict=True)) for s, f, p in zip(*rows, strict=True)]
        for rows in (find_nearest(run, queries, 10), search_index(str(folder), run, queries, 10))
    )
    same = [(e[key], f[key]) for e, f in zip(exact, found, strict=True) for key in e.keys() & f]
    assert len(same) >= 495
    assert np.ptp(same, axis=1) == pytest.approx(0, abs=1e-3)
    assert sorted(each.name for each in folder.parent.iterdir()) == ["index"]
    built = {each.name: each.stat().st_mtime_ns for each in folder.iterdir()}
    search_index(str(folder), run, queries, 10)
    assert {each.name: each.stat().st_mtime_ns for each in folder.iterdir()} == built


def test_equal_images_are_in_row_order_and_all_rows_can_be_asked_for(tmp_path: Path) -> None:
    run = open_run(commit_run(tmp_path / "run", rows=300))
    _, file, position = find_nearest(run, np.eye(16, dtype=np.float32)[:1], 1000)
    own = (file == 0) & (position == 7)
    query = np.eye(16, dtype=np.float32)[:1]
    found, file, position = search_index(str(tmp_path / "index"), run, query, 1000)
    assert found.shape == own.shape == (1, 298)
    order = list(zip(file[0], position[0], strict=True))
    assert order.index((0, 7)) + 1 == order.index((2, 99))


def test_an_index_of_another_run_is_refused(tmp_path: Path) -> None:
    query = np.eye(16, dtype=np.float32)[:1]
    first, second = (open_run(commit_run(tmp_path / str(i), rows=100 + i)) for i in range(2))
    search_index(str(tmp_path / "index"), first, query, 1)
    with pytest.raises(RequestError, match=r"index .*index: is of another run than .*1; pass"):
        search_index(str(tmp_path / "index"), second, query, 1)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    query = np.eye(16, dtype=np.float32)[:1]
    run = open_run(commit_run(tmp_path / "run", rows=100))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be"):
        search_index(str(tmp_path / "file"), run, query, 1)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(RequestError, match="must be a folder of a file system"):
        search_index("s3://bucket/index", run, query, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="cannot be"):
        search_index(str(tmp_path / "full"), run, query, 1)
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["mine"]
    search_index(str(tmp_path / "index"), run, query, 1)
    (tmp_path / "index" / "embeddings.usearch").write_bytes(b"broken")
    with pytest.raises(OutputError, match="or delete it, so that the index is built again"):
        search_index(str(tmp_path / "index"), run, query, 1)


def test_a_build_that_is_killed_leaves_no_index(tmp_path: Path) -> None:
    url = commit_run(tmp_path / "run", rows=100)
    code = (
        "import os, sys; from usearch.index import Index; import numpy as np\n"
        "Index.save = lambda *_: os.kill(os.getpid(), 9)\n"
        "from imgcls.evaluation.embedding_index import open_index\n"
        "from imgcls.runs.committed import open_run\n"
        f"open_index({str(tmp_path / 'index')!r}, open_run({url!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "index").exists()
    found, *_ = search_index(
        str(tmp_path / "index"), open_run(url), np.eye(16, dtype=np.float32)[:1], 1
    )
    assert found.shape == (1, 1)


def test_as_many_rows_as_asked_are_found_among_many_equal_images(tmp_path: Path) -> None:
    """An index alone finds a part of them, and which differs from build to build."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 8)).astype(np.float16)
    is_equal = np.zeros(20_000, bool)
    is_equal[rng.permutation(20_000)[:15_000]] = True
    vectors[is_equal] = 1
    table = add_embeddings(runs.drawn(20_000, scores=False), vectors)
    run = open_run(str(runs.commit(tmp_path / "run", table)))
    queries = np.full((2, 8), 8**-0.5, np.float32)
    found, file, position = search_index(str(tmp_path / "index"), run, queries, 5000)
    assert found == pytest.approx(np.ones((2, 5000)), abs=1e-3)
    assert (file == 0).all()
    assert is_equal[position].all()
    assert [len(set(each)) for each in position.tolist()] == [5000, 5000]
