"""`imgcls relabel`: a head's scores of a run's embeddings; rows without one have no prediction."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.errors import BundleError, OutputError, RequestError
from imgcls.inference import relabel as job
from imgcls.inference.config import RelabelConfig
from imgcls.inference.relabel import relabel
from imgcls.models import zoo
from imgcls.models.bundle import (
    VectorScaling,
    load_bundle,
    load_bundle_weights,
    save_bundle,
)
from imgcls.runs import layout
from tests.runs.embedded import CLASSES, OTHERS, commit_run, save_with_head


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_head(tmp_path_factory.mktemp("bundle") / "b", CLASSES, 1)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same body with a calibrated head for other classes."""
    scaling = VectorScaling(scale=[1.0, 1.4], bias=[0.2, -0.1])
    more = {"temperature": 0.3, "vector_scaling": scaling, "thresholds": {"dark": 0.6}}
    return save_with_head(tmp_path_factory.mktemp("newer") / "b", OTHERS, 2, **more)


def compute_expected(bundle: Path, vectors: np.ndarray) -> np.ndarray:
    """(N, C) scores of embeddings, from the definitions."""
    made = load_bundle(str(bundle))
    network = zoo.build_network(made.spec.architecture, len(made.spec.classes))
    network.load_state_dict(load_bundle_weights(made))
    _, head = zoo.find_head(network)
    weight, bias = (each.detach().double().numpy() for each in (head.weight, head.bias))
    logits = (vectors.astype(np.float64) @ weight.T + bias) / made.spec.temperature
    log_scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    if made.spec.vector_scaling is not None:
        scaling = made.spec.vector_scaling
        log_scores = log_scores * np.array(scaling.scale) + np.array(scaling.bias)
    scores = np.exp(log_scores)
    found: np.ndarray = scores / scores.sum(1, keepdims=True)
    return found


def read(folder: Path) -> pa.Table:
    return pq.read_table(folder / layout.PREDICTIONS_FOLDER)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_scores_are_those_of_the_new_head(
    tmp_path: Path, bundle: Path, newer: Path, kind: str
) -> None:
    vectors = commit_run(tmp_path / "run", bundle, kind=kind)
    result = relabel(
        source=str(tmp_path / "run"), model=str(newer), output=str(tmp_path / "out"), scores=True
    )
    assert (result.rows, result.status) == (20, {"missing": 1, "ok": 19})
    table = read(tmp_path / "out")
    assert table.schema.names == [
        *("path", "label", "camera", "row", "predicted_label", "confidence", "accepted"),
        *("topk_labels", "topk_scores", "label_score", "label_rank", "scores"),
        *("width", "height", "status", "error"),
    ]
    before = read(tmp_path / "run")
    for name in ("path", "label", "camera", "row", "width", "height", "status", "error"):
        assert table[name].to_pylist() == before[name].to_pylist(), name
    expected = compute_expected(newer, vectors)
    for row, found in enumerate(table.to_pylist()):
        if row == 5:
            assert found["predicted_label"] is found["confidence"] is found["scores"] is None
            assert found["accepted"] is False
            continue
        assert found["scores"] == pytest.approx(expected[row], abs=1e-6)
        best = OTHERS[int(expected[row].argmax())]
        assert found["predicted_label"] == best == found["topk_labels"][0]
        assert found["accepted"] == (found["confidence"] >= (0.6 if best == "dark" else 0.0))
        known = found["label"] in OTHERS
        own = expected[row][OTHERS.index(found["label"])] if known else None
        assert found["label_score"] == (pytest.approx(own, abs=1e-6) if known else None)
        assert (found["label_rank"] is None) == (not known)
    names = [file.name for file in sorted((tmp_path / "out" / "predictions").iterdir())]
    assert names == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    errors = pq.read_table(tmp_path / "out" / "metrics" / "errors.parquet").to_pylist()
    assert [(row["row"], row["status"]) for row in errors] == [(5, "missing")]


def test_an_image_without_its_embedding_has_no_prediction(
    tmp_path: Path, bundle: Path, newer: Path
) -> None:
    commit_run(tmp_path / "run", bundle, kind="float16", lost=[7, 16])
    result = relabel(source=str(tmp_path / "run"), model=str(newer), output=str(tmp_path / "out"))
    assert result.status == {"missing": 1, "not_finite": 2, "ok": 17}
    rows = read(tmp_path / "out").to_pylist()
    assert [row["row"] for row in rows if row["status"] == "not_finite"] == [7, 16]
    assert rows[7]["predicted_label"] is None
    assert "no embedding" in rows[7]["error"]


def test_copied_embeddings_are_labeled_again_by_a_third_head(
    tmp_path: Path, bundle: Path, newer: Path
) -> None:
    commit_run(tmp_path / "run", bundle, kind="float16", lost=[7])
    chain = relabel(
        source=str(tmp_path / "run"), model=str(newer), output=str(tmp_path / "second"),
        embeddings=True,
    )  # fmt: skip
    second, first = read(tmp_path / "second"), read(tmp_path / "run")
    assert second["embedding"].combine_chunks().equals(first["embedding"].combine_chunks())
    # with the bundle that `relabel` wrote into its record
    third = relabel(source=chain.output, model=str(bundle), output=str(tmp_path / "third"))
    assert third.status == {"missing": 1, "not_finite": 1, "ok": 18}
    assert set(read(tmp_path / "third")["predicted_label"].to_pylist()) <= {*CLASSES, None}


def test_a_run_without_rows_is_committed(tmp_path: Path, bundle: Path, newer: Path) -> None:
    commit_run(tmp_path / "run", bundle, 0)
    result = relabel(source=str(tmp_path / "run"), model=str(newer), output=str(tmp_path / "out"))
    assert result.rows == 0
    assert read(tmp_path / "out").schema.names[:4] == ["path", "label", "camera", "row"]


def test_an_interrupted_run_is_resumed_at_its_first_missing_part(
    tmp_path: Path, bundle: Path, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_run(tmp_path / "run", bundle)
    request = {"source": str(tmp_path / "run"), "model": str(newer)}
    relabel(**request, output=str(tmp_path / "whole"))
    label_part, labeled = job._Relabeling._label_part, Counter[int]()

    def stop_at_1(self: Any, plan: Any, part: int, url: str) -> Any:
        if part == 1 and not labeled[1]:
            labeled[1] += 1
            raise KeyboardInterrupt
        labeled[part] += 1
        return label_part(self, plan, part, url)

    monkeypatch.setattr(job._Relabeling, "_label_part", stop_at_1)
    with pytest.raises(KeyboardInterrupt):
        relabel(**request, output=str(tmp_path / "out"))
    first = tmp_path / "out" / "predictions" / "part-00000.parquet"
    at = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    with pytest.raises(OutputError, match=r"settings\.top_k: 2 then, 1 now"):
        relabel(**request, output=str(tmp_path / "out"), top_k=1)
    relabel(**request, output=str(tmp_path / "out"))
    assert first.stat().st_mtime_ns == at
    for file in (tmp_path / "whole" / "predictions").iterdir():
        assert (tmp_path / "out" / "predictions" / file.name).read_bytes() == file.read_bytes()
    again = relabel(**request, output=str(tmp_path / "out"))
    assert (again.rows, again.counts) == (20, None)


def test_a_run_whose_failed_rows_were_retried_is_another_source(
    tmp_path: Path, bundle: Path, newer: Path
) -> None:
    """The rows of the earlier commit are not returned as those of the new one."""
    commit_run(tmp_path / "run", bundle)
    request = {"source": str(tmp_path / "run"), "model": str(newer)}
    relabel(**request, output=str(tmp_path / "out"))
    success = tmp_path / "run" / layout.SUCCESS_FILE
    later = json.loads(success.read_text()) | {"committed": "2026-01-02T00:00:00+00:00"}
    success.write_text(json.dumps(later))
    with pytest.raises(OutputError, match=r"settings\.relabeled: .*01-01.* then, .*01-02.* now"):
        relabel(**request, output=str(tmp_path / "out"))
    assert relabel(**request, output=str(tmp_path / "out"), overwrite=True).counts is not None


def test_wrong_requests_write_nothing(tmp_path: Path, bundle: Path, newer: Path) -> None:
    commit_run(tmp_path / "run", bundle)
    source, output = str(tmp_path / "run"), str(tmp_path / "out")

    def refuse(error: type[Exception], match: str, **changes: str) -> None:
        asked = {"source": source, "model": str(newer), "output": output} | changes
        with pytest.raises(error, match=match):
            relabel(RelabelConfig.model_validate(asked))
        assert not Path(output).exists()

    refuse(OutputError, "holds no labeling run", source=str(tmp_path / "none"))
    refuse(RequestError, "output: is the run to label again", output=source + "/")
    refuse(RequestError, "was made by another bundle", source_model=str(newer))
    refuse(RequestError, "pass its folder as --source-model", source_model=str(tmp_path / "gone"))
    tuned = save_with_head(tmp_path / "tuned", OTHERS, 3)
    weights = dict(load_bundle_weights(load_bundle(str(tuned))))
    name = next(each for each in sorted(weights) if not each.startswith("head."))
    weights[name] = weights[name] + 1e-6
    save_bundle(str(tmp_path / "moved"), load_bundle(str(tuned)).spec, weights)
    refuse(BundleError, f"weight {name} differs, as after", model=str(tmp_path / "moved"))
    preprocess = load_bundle(str(bundle)).spec.preprocess
    darker = preprocess.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    other = save_with_head(tmp_path / "other", OTHERS, 3, preprocess=darker)
    refuse(BundleError, "the preprocessing differs", model=str(other))
    wide = save_with_head(tmp_path / "resnet", OTHERS, 3, "resnet18")
    refuse(BundleError, "its network is resnet18, not small_cnn", model=str(wide))
    plain = tmp_path / "plain"
    commit_run(plain, bundle)
    for file in (plain / "predictions").iterdir():
        pq.write_table(pq.read_table(file).drop_columns("embedding"), file)
    refuse(RequestError, "has no embeddings; label it with", source=str(plain))
