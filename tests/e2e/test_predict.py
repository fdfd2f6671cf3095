"""The predict job as a user runs it: a command, a real Ray cluster, files on disk."""

from __future__ import annotations

import functools
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.decoding import decode
from imgcls.data.manifests.delta_table import open_delta_table
from imgcls.models.bundle import load_bundle
from imgcls.models.classifier import Classifier
from tests.conftest import draw, save, write_manifest
from tests.e2e.outputs import assert_exactly_once, committed, parquet, success, table
from tests.processes import ALONE, RayCluster, run_here


@pytest.fixture
def predict(joined: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `imgcls predict` on the test cluster."""
    return functools.partial(run_here, "predict")


def assert_close(found: pa.Table, expected: pa.Table) -> None:
    """The same tables, but for 1e-6 in the scores and so in the order of ties."""
    assert found.schema.equals(expected.schema)
    for name in found.schema.names:
        ours, theirs = found[name].to_pylist(), expected[name].to_pylist()
        if name in ("confidence", "topk_scores", "label_score", "scores"):
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)
        else:
            assert ours == theirs, name


@pytest.mark.parametrize(
    "place", ["disk", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)
def test_every_row_is_labeled_and_the_columns_come_through(
    predict: Callable[..., subprocess.CompletedProcess[str]],
    colors: Callable[..., Path],
    placed_bundle: Path,
    place: Path,
) -> None:
    manifest, output = colors(150, place), place / "out"
    arguments = ("--manifest", manifest, "--model", placed_bundle, "--output", output)
    done = predict(*arguments, "--scores", "--embeddings", "--top-k", 2, "--threshold", 0.4)
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 150)
    assert found.schema.names == [
        *("path", "label", "camera", "row", "predicted_label", "confidence", "accepted"),
        *("topk_labels", "topk_scores", "label_score", "label_rank", "scores", "embedding"),
        *("width", "height", "status", "error"),
    ]
    assert found["camera"].to_pylist()[:3] == ["camera 0", "camera 1", "camera 0"]
    assert set(found["status"].to_pylist()) == {"ok"}
    assert found["width"].to_pylist() == [64] * 150
    first = found.slice(0, 1).to_pylist()[0]
    assert first["topk_labels"][0] == first["predicted_label"]
    assert len(first["topk_labels"]) == 2
    assert first["confidence"] == first["topk_scores"][0]
    assert first["accepted"] == (first["confidence"] >= 0.4)
    assert sum(first["scores"]) == pytest.approx(1, abs=1e-2)
    for name in ("summary", "per_class", "confusion", "calibration", "errors"):
        assert (output / "metrics" / f"{name}.parquet").exists()
    summary = parquet(output / "metrics" / "summary.parquet").to_pylist()
    accuracy = next(m["value"] for m in summary if m["metric"] == "accuracy")
    right = [
        p == t
        for p, t in zip(
            found["predicted_label"].to_pylist(), found["label"].to_pylist(), strict=True
        )
    ]
    assert accuracy == pytest.approx(np.mean(right))
    body = success(output)
    assert body["status"] == {"ok": 150}
    assert body["bundle_sha256"] == load_bundle(str(placed_bundle)).sha256

    again = predict(
        *(*arguments, "--scores", "--embeddings", "--top-k", 2, "--threshold", 0.4, "--explain", 3)
    )
    assert again.returncode == 0, again.stderr
    assert "committed before" in again.stdout
    assert success(output) == body
    explained = parquet(output / "_explanations" / "explanations.parquet").to_pylist()
    assert len(explained) == 3
    assert all((output / "_explanations" / row["file"]).exists() for row in explained)

    quiet = place / "quiet"
    nothing = predict(
        *(*arguments[:4], "--output", quiet, "--since", output),
        *("--scores", "--embeddings", "--top-k", 2, "--threshold", 0.4),
    )
    assert nothing.returncode == 0, nothing.stderr
    assert parquet(quiet / "predictions").num_rows == 0
    assert parquet(quiet / "predictions").schema == found.schema

    relabeled = run_here(
        *("relabel", output, "--model", placed_bundle, "--output", place / "relabeled"),
        *("--scores", "--embeddings", "--top-k", 2, "--threshold", 0.4),
    )
    assert relabeled.returncode == 0, relabeled.stderr
    assert_close(table(place / "relabeled"), found)

    trained = run_here(
        *("train", manifest, "--data.embeddings", output, "--output", place / "trained"),
        *("--data.val", manifest),
    )
    assert trained.returncode == 0, trained.stderr
    right = run_here("relabel", output, "--model", place / "trained", "--output", place / "right")
    assert right.returncode == 0, right.stderr
    # the colors of the images show their classes
    assert (table(place / "right")["label_rank"].to_numpy() == 1).mean() >= 0.98

    other = predict(*arguments, "--top-k", 3)
    assert other.returncode == 2
    assert "settings.top_k: 2 then, 3 now" in other.stderr
    assert "--overwrite" in other.stderr
    assert committed(output)


def test_predictions_equal_the_classifier_called_directly_bit_for_bit(
    predict: Callable[..., subprocess.CompletedProcess[str]], shared: Path, tmp_path: Path
) -> None:
    bundle, output = tmp_path / "bundle", tmp_path / "out"
    made = run_here(
        *("model", "import", "--arch", "squeezenet1_0", "--output", bundle),
        *("--weights", shared / "weights" / "squeezenet1_0-imagenet.pth"),
        *("--classes", shared / "weights" / "imagenet-classes.txt"),
    )
    assert made.returncode == 0, made.stderr
    manifest = shared / "data" / "imagenet-sample" / "manifest.csv"
    done = predict("--manifest", manifest, "--model", bundle, "--output", output, "--scores")
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 334)

    classifier = Classifier.load(str(bundle), device="cpu")
    folder = manifest.parent
    pixels = [
        decode.decode_image((folder / path).read_bytes(), classifier.preprocess)[0]
        for path in found["path"].to_pylist()
    ]
    direct = np.concatenate(
        [classifier.classify(np.stack(pixels[i : i + 32])).scores for i in range(0, 334, 32)]
    )
    best = direct.max(1)
    assert found["confidence"].to_numpy().tobytes() == best.tobytes()
    labels = [classifier.classes[i] for i in direct.argmax(1)]
    assert found["predicted_label"].to_pylist() == labels
    scores = np.stack(found["scores"].to_numpy())
    assert scores.tobytes() == direct.tobytes()
    rank = np.array(found["label_rank"].to_pylist())
    assert abs(int((rank == 1).sum()) - 215) <= 4
    assert abs(int((rank <= 5).sum()) - 274) <= 4


@pytest.mark.parametrize(
    "place", ["disk", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)
def test_unlabeled_folders_get_counts_and_a_confidence_histogram(
    predict: Callable[..., subprocess.CompletedProcess[str]],
    colors: Callable[..., Path],
    placed_bundle: Path,
    place: Path,
) -> None:
    colors(40, place)
    output = place / "out"
    done = predict(
        "--manifest", place / "images", "--model", placed_bundle, "--output", output, *ALONE
    )
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 40)
    assert "label_rank" not in found.schema.names
    per_class = parquet(output / "metrics" / "per_class.parquet")
    assert sum(per_class["predicted"].to_pylist()) == 40
    bins = parquet(output / "metrics" / "calibration.parquet")
    assert sum(bins["count"].to_pylist()) == 40
    assert bins["accuracy"].null_count == len(bins)


@pytest.mark.parametrize(
    ("layout", "host_share", "place"),
    [
        pytest.param("gpu", 1, "disk", marks=pytest.mark.slow),
        ("gpu_decode", 0.5, "s3"),
        pytest.param("gpu", 1, "s3", marks=pytest.mark.slow),
        pytest.param("gpu_decode", 0, "disk", marks=pytest.mark.slow),
    ],
    indirect=["place"],
)
def test_the_gpu_layouts_write_the_same_table(
    layout: str,
    host_share: float,
    joined: None,
    colors: Callable[..., Path],
    placed_bundle: Path,
    place: Path,
) -> None:
    manifest = colors(100, place)
    (place / "images" / "00007.jpg").write_bytes(b"broken")
    base = (
        *("predict", "--manifest", manifest, "--model", placed_bundle, "--max-error-rate", 0.5),
        *("--scale.batch-size", 32, "--decode", "fast" if layout == "gpu_decode" else "exact"),
    )
    plain = run_here(*base, "--output", place / "cpu", *ALONE)
    assert plain.returncode == 0, plain.stderr
    with RayCluster.start(cpus=2, gpus=1, fork=True) as logical, logical.joined():
        asked = ("--scale.layout", layout, "--scale.cpu-decode-fraction", host_share)
        refused = run_here(*base, "--engine", "openvino", "--output", place / "refused", *asked)
        assert refused.returncode == 2, refused.stderr
        assert "engine openvino: runs on CPUs only" in refused.stderr
        assert not (place / "refused").exists()
        done = run_here(*base, "--output", place / layout, *asked)
        assert done.returncode == 0, done.stderr
    assert "1 model worker on GPUs" in done.stdout
    assert table(place / layout).equals(table(place / "cpu"))


def count_published(delta: Path) -> Counter[str]:
    """Rows of a Delta table by status; no row is in it twice."""
    found = open_delta_table(str(delta)).to_pyarrow_table()
    assert len(set(found["row"].to_pylist())) == found.num_rows
    return Counter(found["status"].to_pylist())


@pytest.mark.parametrize(
    "place", [pytest.param("disk", marks=pytest.mark.slow), "s3"], indirect=True
)
def test_failed_rows_are_retried_alone_and_the_rest_is_kept(
    predict: Callable[..., subprocess.CompletedProcess[str]],
    colors: Callable[..., Path],
    placed_bundle: Path,
    place: Path,
) -> None:
    manifest, output = colors(100, place), place / "out"
    lost = place / "images" / "00042.jpg"
    data = lost.read_bytes()
    lost.unlink()
    (place / "images" / "00077.jpg").write_bytes(b"")
    delta = place / "table"
    arguments = ("--manifest", manifest, "--model", placed_bundle, "--output", output)
    arguments = (*arguments, "--publish", f"delta:{delta}", *ALONE)
    refused = predict(*arguments)
    assert refused.returncode == 3
    assert "2 of 100 rows failed" in refused.stderr
    assert not committed(output)
    assert not (delta / "_delta_log").exists()
    before = table(output)
    errors = parquet(output / "metrics" / "errors.parquet").to_pylist()
    assert [(e["row"], e["status"]) for e in errors] == [(42, "missing"), (77, "empty")]

    lost.write_bytes(data)
    retried = predict(*arguments, "--retry-errors", "--max-error-rate", 0.01)
    assert retried.returncode == 0, retried.stderr
    assert "2 rows that failed before" in retried.stdout
    after = assert_exactly_once(output, 100)
    assert after["status"].to_pylist().count("ok") == 99
    assert after["predicted_label"].to_pylist()[42] is not None
    kept = [row for row in range(100) if row not in (42, 77)]
    assert after.take(kept).equals(before.take(kept).cast(after.schema))
    assert success(output)["status"] == {"empty": 1, "ok": 99}
    assert count_published(delta) == {"empty": 1, "ok": 99}

    save(draw("red", seed=77), place / "images" / "00077.jpg")
    repaired = predict(*arguments, "--retry-errors")
    assert repaired.returncode == 0, repaired.stderr
    whole = assert_exactly_once(output, 100)
    assert set(whole["status"].to_pylist()) == {"ok"}
    assert whole.take(kept).equals(after.take(kept).cast(whole.schema))
    assert "100 rows, which replace those of an earlier commit" in repaired.stdout
    assert count_published(delta) == {"ok": 100}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--manifest": "empty.csv"}, "has no rows"),
        ({"--manifest": "other.csv"}, "is a class of the model"),
        ({"--scale.layout": "gpu"}, "needs a GPU"),
        ({"--scale.workers": 7}, "at most 2"),
    ],
)
def test_a_request_that_cannot_be_planned_exits_2_before_an_image_is_read(
    change: dict[str, object],
    message: str,
    predict: Callable[..., subprocess.CompletedProcess[str]],
    colors: Callable[..., Path],
    color_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others are refused before a Ray session is started: tests/inference/test_predict.py."""
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "empty.csv", [], ("path", "label"))
    write_manifest(tmp_path / "other.csv", [("images/00000.jpg", "cat")], ("path", "label"))
    options = {"--manifest": colors(6), "--model": color_bundle, "--output": "out"} | change
    done = predict(*(part for pair in options.items() for part in pair))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "place", ["disk", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)
def test_large_manifests_are_rolled_up_into_several_files(
    predict: Callable[..., subprocess.CompletedProcess[str]],
    colors: Callable[..., Path],
    placed_bundle: Path,
    place: Path,
) -> None:
    manifest, output = colors(100, place), place / "out"
    nested = pa.table(
        {
            "file": [f"{i:05d}.jpg" for i in range(100)],
            "meta": [{"site": i % 3, "tags": ["a"] * (i % 2)} for i in range(100)],
        }
    )
    with (place / "nested.parquet").open("wb") as stream:
        pq.write_table(nested, stream)
    done = predict(
        *("--manifest", place / "nested.parquet", "--manifest.path-column", "file"),
        *("--manifest.root", manifest.parent / "images", "--model", placed_bundle),
        *("--output", output, "--chunk-rows", 8, "--part-rows", 30, "--limit", 90, *ALONE),
    )
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 90)
    assert len(list((output / "predictions").iterdir())) == 4
    assert found.select(["file", "meta"]).equals(nested.slice(0, 90))
    run = json.loads((output / "_run.json").read_text())
    assert run["plan"]["part_rows"] == 24
    assert all(file.name.startswith("part-") for file in (output / "predictions").iterdir())
