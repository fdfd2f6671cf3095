"""Exported files give the scores of the classifier, without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from imgcls.config import build
from imgcls.errors import OutputError, RequestError, RunFailed, StorageError
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, VectorScaling, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.config import ExportConfig
from imgcls.models.export import compare_scores, export_bundle
from imgcls.models.multilabel import MULTILABEL
from tests.conftest import draw

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")


def asked(bundle: Path, output: Path, **more: object) -> ExportConfig:
    return build(ExportConfig, {"model": str(bundle), "output": str(output), **more})


def pictures(folder: Path) -> list[Path]:
    """As they come: plain, transparent over hidden colors, of 16 bits, turned by EXIF."""
    plain = draw("green", (90, 60))
    see_through = draw("red", (90, 60)).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((90, 60)))
    deep = Image.fromarray(np.linspace(0, 40_000, 90 * 60).reshape(60, 90).astype(np.uint16))
    turned = Image.Exif()
    turned[274] = 6
    files = [folder / f"{name}.png" for name in ("plain", "see-through", "deep", "turned")]
    for file, image in zip(files, (plain, see_through, deep, plain), strict=True):
        image.save(file, **({"exif": turned} if file.stem == "turned" else {}))
    return files


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_every_format_gives_the_classifiers_scores(
    tmp_path: Path, mode: Any, color_bundle: Path
) -> None:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 8})
    torch.manual_seed(1)
    network = zoo.build_network(architecture, 3)
    spec = BundleSpec(
        architecture=architecture,
        classes=["red", "green", "blue"],
        preprocess=zoo.get_default_preprocess(architecture).model_copy(
            update={"mode": mode, "resize": 40}
        ),
        temperature=0.05,
        vector_scaling=VectorScaling(scale=[1.0, 1.3, 0.7], bias=[0.1, -0.2, 0.0]),
        thresholds={"red": 0.5},
    )
    save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())
    output = tmp_path / "out"
    description = export_bundle(
        asked(tmp_path / "bundle", output, formats="onnx,program,torchscript")
    )
    assert set(description["files"]) == {"model.onnx", "model.pt2", "model.ts"}
    assert all(each["largest_difference"] < 1e-5 for each in description["files"].values())
    # any number of images at a time
    session = onnxruntime.InferenceSession(output / "model.onnx")
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    for count in (1, 5):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        scores = session.run(None, {"pixels": pixels})[0]
        assert scores == pytest.approx(classifier.classify(pixels).scores, abs=1e-5)
    # the example, somewhere else, with nothing of ours
    moved = tmp_path / "elsewhere"
    shutil.copytree(output, moved)
    for image in pictures(tmp_path):
        done = subprocess.run(
            [sys.executable, "-I", moved / "example.py", image],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (expected,) = classifier.predict([image], top_k=3)
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [name for _, name in lines] == expected.topk_labels, image
        assert [float(score) for score, _ in lines] == pytest.approx(expected.topk_scores, abs=0.02)
    assert json.loads((moved / "model.json").read_text())["thresholds"] == {"red": 0.5}
    assert "imgcls" not in (moved / "example.py").read_text()
    _, front, text = (moved / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    assert "## Exported files" in text


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "mobilenet_v3_small", pytest.param("vit_b_16", marks=pytest.mark.slow)],
)
def test_networks_of_other_kinds_can_be_exported(tmp_path: Path, name: str) -> None:
    architecture = zoo.resolve_architecture(name)
    torch.manual_seed(0)
    network = zoo.build_network(architecture, 4)
    spec = BundleSpec(
        architecture=architecture,
        classes=list("abcd"),
        preprocess=zoo.get_default_preprocess(architecture),
    )
    save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())
    description = export_bundle(asked(tmp_path / "bundle", tmp_path / "out"))
    assert description["files"]["model.onnx"]["largest_difference"] < 1e-4


def test_images_to_compare_by_may_be_given(tmp_path: Path, color_bundle: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(6):
        draw("red", seed=seed).save(tmp_path / "images" / f"{seed}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    description = export_bundle(
        asked(color_bundle, tmp_path / "out", images=str(tmp_path / "images"))
    )
    assert description["files"]["model.onnx"]["images"] == 6


def test_other_labels_are_not_passed_off_as_the_same() -> None:
    expected = np.array([[0.7, 0.3], [0.4, 0.6]], np.float32)
    assert compare_scores("onnx", expected, expected + 1e-6)["images"] == 2
    with pytest.raises(RunFailed, match="1 of 2 images have another label"):
        compare_scores("onnx", expected, expected[:, ::-1] * [[1], [0]] + expected * [[0], [1]])
    close = np.array([[0.5001, 0.4999]], np.float32)
    assert compare_scores("onnx", close, close[:, ::-1])["images"] == 1


def test_an_export_of_a_multilabel_model_has_its_scores_and_labels(
    tmp_path: Path, multilabel_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, image = tmp_path / "out", tmp_path / "red.png"
    draw("red", (90, 60)).save(image)
    made = export_bundle(asked(multilabel_bundle, output, formats="onnx,program,torchscript"))
    assert made["task"] == "multilabel"
    assert (made["threshold"], made["thresholds"]) == (0.5, {"green": 0.7, "blue": 0.2})
    for each in made["files"].values():
        assert (each["images"], each["same_label"]) == (16, 16)
        assert each["largest_difference"] < 1e-5
    assert "16 of 16 images have the same labels, scores differ by" in capsys.readouterr().out
    classifier = Classifier.load(str(multilabel_bundle), precision="fp32", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    session = onnxruntime.InferenceSession(output / "model.onnx")
    scores = session.run(None, {"pixels": pixels})[0]
    assert scores == pytest.approx(classifier.classify(pixels).scores, abs=1e-5)

    def run_example() -> list[list[str]]:
        done = subprocess.run(
            [sys.executable, "-I", output / "example.py", image],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    (expected,) = classifier.predict([image], top_k=3)
    best = dict(zip(expected.topk_labels, expected.topk_scores, strict=True))
    lines = run_example()
    assert [name for _, name in lines] == expected.labels == ["red", "blue"]
    assert [float(score) for score, _ in lines] == pytest.approx(
        [best["red"], best["blue"]], abs=0.02
    )
    changed = json.loads((output / "model.json").read_text()) | {"threshold": 0.95}
    (output / "model.json").write_text(json.dumps(changed | {"thresholds": {}}))
    assert run_example() == [["no", "label"]]
    card = (output / "README.md").read_text()
    assert "all classes whose score reaches their threshold" in card


def test_decisions_with_a_clear_margin_must_be_the_same() -> None:
    thresholds = [0.5, 0.2, 2.0]
    expected = np.array([[0.7, 0.1, 0.9], [0.505, 0.3, 0.1]], np.float32)

    def compare(scores: Any) -> dict[str, Any]:
        found = np.array(scores, np.float32)
        return compare_scores("onnx", expected, found, MULTILABEL, thresholds)

    found = compare([[0.6, 0.15, 0.1], [0.495, 0.3, 0.1]])
    assert (found["images"], found["same_label"]) == (2, 1)  # 0.505 is close to its threshold
    assert found["largest_difference"] == pytest.approx(0.8)
    for scores in (
        [[0.7, 0.25, 0.9], [0.505, 0.3, 0.1]],  # one label more
        [[0.7, 0.1, 0.9], [0.505, 0.1, 0.1]],  # one label less
    ):
        with pytest.raises(RunFailed, match="1 of 2 images have other labels"):
            compare(scores)
    with pytest.raises(RunFailed):
        compare(np.full((2, 3), np.nan))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path: Path, color_bundle: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(RequestError, match="is empty"):
        export_bundle(asked(color_bundle, output, formats=[]))
    with pytest.raises(RequestError, match="no such file or folder"):
        export_bundle(asked(color_bundle, output, images=str(tmp_path / "none")))
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(RequestError, match=r"--images\.path-column"):
        export_bundle(asked(color_bundle, output, images=str(table)))
    assert not output.exists()
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"contains mine\.txt"):
        export_bundle(asked(color_bundle, output))
    # nor is a bundle, whose card would be that of the export
    card = (color_bundle / "README.md").read_bytes()
    with pytest.raises(OutputError, match="is a bundle"):
        export_bundle(asked(color_bundle, color_bundle, overwrite=True))
    assert (color_bundle / "README.md").read_bytes() == card


def test_new_models_are_never_described_by_an_earlier_export(
    tmp_path: Path, color_bundle: Path, multilabel_bundle: Path
) -> None:
    output = tmp_path / "out"
    export_bundle(asked(color_bundle, output, formats="torchscript"))
    (output / "README.md").unlink()
    (output / "README.md" / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"README\.md"):
        export_bundle(asked(multilabel_bundle, output, formats="torchscript", overwrite=True))
    assert not (output / "model.json").exists()


def test_a_bundle_without_a_card_can_be_exported(tmp_path: Path, color_bundle: Path) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(color_bundle, copied)
    (copied / "README.md").unlink()
    export_bundle(asked(copied, tmp_path / "out", formats="torchscript"))
    assert "small_cnn, 3 classes" in (tmp_path / "out" / "README.md").read_text()
    (copied / "README.md").write_bytes("# Schön".encode("latin-1"))
    export_bundle(asked(copied, tmp_path / "out", formats="torchscript", overwrite=True))
    assert "# Sch\ufffdn" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
