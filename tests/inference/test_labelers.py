"""Labels of a run by its labeled neighbors: those of scikit-learn, without the image itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from imgcls.errors import ConfigError, ManifestError, RequestError
from imgcls.inference.labelers import TEMPERATURE
from imgcls.inference.relabel import relabel
from imgcls.runs.committed import open_run
from tests.conftest import write_manifest
from tests.runs.embedded import CLASSES, commit_run, save_with_head

LABELED, ROWS, K = 60, 120, 7


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return save_with_head(tmp_path / "bundle", CLASSES, head_seed=1)


def write_labels(folder: Path, rows: list[tuple[str, str]]) -> str:
    return str(write_manifest(folder / "labels.csv", rows, ("path", "label")))


def label(run: Path, labels: str, output: Path, **settings: Any) -> Any:
    relabel(
        source=str(run),
        labels={"path": labels, "root": "/"},
        output=str(output),
        scores=True,
        **settings,
    )
    return pq.read_table(output / "predictions")


def test_scores_are_those_of_scikit_learn(tmp_path: Path, bundle: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    vectors = commit_run(tmp_path / "run", bundle, ROWS)
    names = np.array(["ant", "bee", "cow"])[(vectors[:, :3]).argmax(1)]
    used = [row for row in range(LABELED) if row != 5]  # row 5 failed
    labels = write_labels(tmp_path, [(f"{row}.jpg", names[row]) for row in used])
    found = label(tmp_path / "run", labels, tmp_path / "out", k=K, threshold=0.6)
    assert open_run(str(tmp_path / "out")).classes == ("ant", "bee", "cow")

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = lambda distance: np.exp((1 - distance) / TEMPERATURE)  # noqa: E731
    for row in (0, 7, 59, 60, 119):
        others = [each for each in used if each != row]
        expected = (
            KNeighborsClassifier(K, weights=similarity, metric="cosine")
            .fit(unit[others], names[others])
            .predict_proba(unit[[row]])[0]
        )
        scores = found["scores"][row].as_py()
        assert scores == pytest.approx(expected, abs=1e-5), row
        confidence = found["confidence"][row].as_py()
        assert confidence == pytest.approx(max(expected), abs=1e-5)
        assert found["accepted"][row].as_py() == (confidence >= 0.6)
    assert found["status"][5].as_py() == "missing"
    assert found["predicted_label"][5].as_py() is None


def test_the_same_request_is_done_and_another_k_is_refused(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_run(tmp_path / "run", bundle, ROWS)
    rows = [(f"{row}.jpg", "ab"[row % 2], "ba"[row % 2]) for row in range(20)]
    rows.append(("elsewhere.jpg", "a", "b"))
    labels = str(write_manifest(tmp_path / "labels.csv", rows, ("path", "label", "other")))
    first = label(tmp_path / "run", labels, tmp_path / "out", k=3)
    printed = capsys.readouterr().out
    assert "labels: 19 images of 2 classes, 3 neighbors per image" in printed
    assert "2 images without an embedding" in printed
    assert "/5.jpg: missing" in printed
    assert "/elsewhere.jpg: is not in the run" in printed
    assert label(tmp_path / "run", labels, tmp_path / "out", k=3).equals(first)
    assert "committed before" in capsys.readouterr().out
    with pytest.raises(RequestError, match="bundle"):
        label(tmp_path / "run", labels, tmp_path / "out", k=4)
    # the same file with another column of labels
    with pytest.raises(RequestError, match="bundle"):
        relabel(
            source=str(tmp_path / "run"),
            labels={"path": labels, "root": "/", "label_column": "other"},
            output=str(tmp_path / "out"),
            scores=True,
            k=3,
        )
    # more neighbors than labeled images: all of the others
    label(tmp_path / "run", labels, tmp_path / "all", k=500)
    assert "18 neighbors per image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1.jpg", "a"), ("2.jpg", "b"), ("x/../1.jpg", "b")], "/1.jpg has labels 'a' and 'b'"),
        ([("1.jpg", "a"), ("5.jpg", "b")], "no image of class 'b' has an embedding"),
        ([("1.jpg", "a"), ("2.jpg", "a")], "has only one class"),
        ([("1.jpg", "")], "has no row with a label"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    tmp_path: Path, bundle: Path, rows: list[tuple[str, str]], message: str
) -> None:
    commit_run(tmp_path / "run", bundle, 20)
    labels = write_labels(tmp_path, rows)
    with pytest.raises((ManifestError, RequestError), match=message):
        label(tmp_path / "run", labels, tmp_path / "out")
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "pass either model or labels"),
        ({"model": "m", "labels": "l.csv"}, "pass either model or labels"),
        ({"labels": "l.csv", "embeddings": True}, "embeddings: are those of the source's bundle"),
    ],
)
def test_a_run_is_labeled_by_a_model_or_by_labels(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        relabel(source="run", output=str(tmp_path), **given)
