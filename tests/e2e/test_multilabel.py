"""Images with any number of labels: trained, labeled, killed and resumed, evaluated, served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from upath import UPath

from imgcls.models.classifier import Classifier
from tests.conftest import COLORS, copied, draw, save
from tests.e2e.outputs import assert_exactly_once, committed, parquet
from tests.processes import ALONE, RayCluster, run_here, started, wait_for

pytestmark = pytest.mark.timeout(900)
NAMES = list(COLORS)


def draw_stripes(labels: Sequence[str], seed: int) -> Image.Image:
    """A gray image with a stripe of each color."""
    picture = Image.new("RGB", (96, 64), "gray")
    for place, name in enumerate(labels):
        picture.paste(draw(name, (32, 64), seed), (32 * place, 0))
    return picture


def write_stripes(folder: Path, count: int, seed: int = 0) -> Path:
    """Images of none to all colors, and a manifest with lists of labels; one file is broken."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        labels = [name for name in NAMES if rng.random() < 0.5]
        file = f"images/{seed}-{number:04d}.jpg"
        save(draw_stripes(rng.permutation(labels).tolist(), number), folder / file, quality=90)
        rows.append({"path": file, "labels": labels, "camera": f"camera {number % 2}"})
    (folder / "images" / f"{seed}-0005.jpg").write_bytes(b"broken")
    kinds = pa.schema(
        [("path", pa.string()), ("labels", pa.list_(pa.string())), ("camera", pa.string())]
    )
    with (UPath(folder) / "manifest.parquet").open("wb") as stream:
        pq.write_table(pa.Table.from_pylist(rows, schema=kinds), stream)
    return folder / "manifest.parquet"


def label_sets(table: pa.Table, column: str) -> list[set[str] | None]:
    return [None if each is None else set(each) for each in table[column].to_pylist()]


def test_several_labels_are_learned_predicted_and_evaluated(joined: None, tmp_path: Path) -> None:
    train, test = (write_stripes(tmp_path / name, 160, seed) for seed, name in enumerate("ab"))
    bundle, output = tmp_path / "bundle", tmp_path / "out"
    trained = run_here(
        *("train", train, "--output", bundle, "--model", "small_cnn", "--model.options"),
        *("{width: 8}", "--epochs", 12, "--batch-size", 16, "--augment", "light"),
        *("--augment.mixup", 0.2, "--best-by", "val_mean_average_precision"),
    )
    assert trained.returncode == 0, trained.stderr
    assert "val mAP" in trained.stdout
    body = json.loads((bundle / "bundle.json").read_text())
    assert (body["task"], body["format_version"], body["threshold"]) == ("multilabel", 2, 0.5)
    assert body["classes"] == sorted(NAMES)

    done = run_here(
        *("predict", test, "--model", bundle, "--output", output, "--precision", "fp32"),
        *("--max-error-rate", 0.05),
    )
    assert done.returncode == 0, done.stderr
    assert "micro F1" in done.stdout
    found = assert_exactly_once(output, 160)
    assert found.schema.names == [
        *("path", "labels", "camera", "row", "predicted_labels", "accepted", "topk_labels"),
        *("topk_scores", "scores", "width", "height", "status", "error"),
    ]
    assert found["predicted_labels"].is_null().to_pylist() == [row == 5 for row in range(160)]
    truth, predicted = label_sets(found, "labels"), label_sets(found, "predicted_labels")
    agreeing = [a == b for a, b in zip(truth, predicted, strict=True) if b is not None]
    assert np.mean(agreeing) > 0.8
    scores = np.array([each for each in found["scores"].to_pylist() if each], np.float32)
    assert scores.sum(1).max() > 1.5, "scores of one image need not add up to 1"
    by_row = [
        {name for name, score in zip(body["classes"], each, strict=True) if score >= 0.5}
        for each in scores
    ]
    assert by_row == [each for each in predicted if each is not None]

    classifier = Classifier.load(str(bundle), precision="fp32", device="cpu")
    paths = [tmp_path / "b" / path for path in found["path"].to_pylist()[:5]]
    alone = [prediction.labels for prediction in classifier.predict(paths)]
    assert alone == found["predicted_labels"].to_pylist()[:5]

    evaluated = run_here("evaluate", output, "--slice-by", "camera")
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((output / "summary.json").read_text())["metrics"]
    assert metrics["mean_average_precision"]["value"] > 0.9
    assert metrics["subset_accuracy"]["value"] == pytest.approx(np.mean(agreeing))
    assert "predicted_label" not in found.schema.names


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_killed_run_of_several_labels_is_resumed_and_nights_add_to_it(
    cluster: RayCluster, joined: None, place: Path, multilabel_bundle: Path
) -> None:
    bundle = copied(multilabel_bundle, place / "bundle")
    manifest = write_stripes(place, 60)
    settings = (
        *("--model", bundle, "--precision", "fp32", "--max-error-rate", 0.2, "--chunk-rows", 4),
        *("--lease-seconds", 5, *ALONE),
    )
    alone = run_here("predict", manifest, "--output", place / "alone", *settings)
    assert alone.returncode == 0, alone.stderr
    expected = assert_exactly_once(place / "alone", 60)

    nights = place / "nights"
    words = ("predict", manifest, "--output", f"{nights}/{{date}}", "--since", nights, *settings)
    tonight = nights / "2026-11-01"
    with started(*words, "--date", "2026-11-01", env=cluster.environment()) as driver:
        wait_for(lambda: list(tonight.glob("_staging/part-*/chunk-*")), 120, every=0.05)
        driver.kill()
    assert not committed(tonight)
    first = run_here(*words, "--date", "2026-11-01")
    assert first.returncode == 0, first.stderr
    assert assert_exactly_once(tonight, 60).equals(expected)

    write_stripes(place, 66)  # six new rows; those before are as they were
    second = run_here(*words, "--date", "2026-11-02")
    assert second.returncode == 0, second.stderr
    added = assert_exactly_once(nights / "2026-11-02", 7)  # the broken one is tried again
    compacted = run_here("history", "compact", nights, "--output", place / "latest")
    assert compacted.returncode == 0, compacted.stderr
    latest = parquet(place / "latest" / "predictions")
    assert latest.num_rows == 66
    rows = {Path(row["path"]).name: row["predicted_labels"] for row in latest.to_pylist()}
    for table in (expected, added):
        for row in table.to_pylist():
            assert rows[Path(row["path"]).name] == row["predicted_labels"]
    evaluated = run_here("evaluate", place / "latest")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "mAP" in evaluated.stdout


def test_labels_of_another_kind_than_the_bundle_are_refused_before_work_starts(
    joined: None, tmp_path: Path, color_bundle: Path, multilabel_bundle: Path
) -> None:
    manifest = write_stripes(tmp_path, 6)
    words = ("predict", manifest, "--model", color_bundle, "--output", tmp_path / "out")
    refused = run_here(*words, "--manifest.label-column", "labels")
    assert refused.returncode == 2
    assert "column 'labels' may have several labels per image" in refused.stderr
    assert not (tmp_path / "out").exists()
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("path,tags\na.jpg,cat;dog\n")
    refused = run_here(
        *("predict", "--manifest.path", foreign, "--manifest.label-column", "tags"),
        *(
            "--manifest.label-delimiter",
            ";",
            "--model",
            multilabel_bundle,
            "--output",
            tmp_path / "out",
        ),
    )
    assert refused.returncode == 2
    assert "no label in column 'tags' is a class of the model" in refused.stderr
