"""An int8 bundle records its measured cost and is otherwise the same bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import OutputError, RequestError
from imgcls.evaluation import quantize
from imgcls.evaluation.config import QuantizeConfig
from imgcls.evaluation.quantize import quantize_bundle
from imgcls.models.bundle import load_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.config import ImportConfig
from imgcls.models.cpu import read_cpu_flags
from imgcls.models.import_weights import import_model
from imgcls.models.precision import INT8_FLAGS
from tests.conftest import COLORS, write_manifest

pytestmark = pytest.mark.skipif("avx2" not in read_cpu_flags(), reason="this CPU has no AVX2")


@pytest.fixture(params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "torch" and not read_cpu_flags() & INT8_FLAGS:
        pytest.skip("this machine does not multiply int8 in torch")
    return str(request.param)


def order(manifest: Path, bundle: Path, output: Path, **more: object) -> QuantizeConfig:
    return QuantizeConfig.model_validate(
        {"model": str(bundle), "manifest": str(manifest), "output": str(output), **more}
    )


def test_the_cost_is_measured_on_images_that_were_not_used_for_calibration(
    colors: Callable[..., Path],
    color_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    manifest, output = colors(70), tmp_path / "int8"
    (tmp_path / "images" / "00003.jpg").write_bytes(b"broken")
    (tmp_path / "images" / "00005.jpg").unlink()
    made = quantize_bundle(order(manifest, color_bundle, output, images=64, engine=engine))
    int8 = made.spec.int8
    assert int8 is not None
    assert (int8.calibration_images, int8.judged_images) == (32, 32)
    assert int8.has_vnni == bool(read_cpu_flags() & INT8_FLAGS)
    assert (int8.engine, made.spec.int8) == (engine, load_bundle(str(output)).spec.int8)
    before = load_bundle(str(color_bundle))
    assert made.weights_sha256 == before.weights_sha256
    assert made.spec.model_copy(update={"int8": None}) == before.spec
    drawn = np.random.default_rng(0).permutation(70).tolist()
    good = [i for i in drawn if i not in (3, 5)][1:64:2]
    files = [str(tmp_path / "images" / f"{i:05d}.jpg") for i in good]
    labels = np.array([list(COLORS)[i % 3] for i in good])
    rough, exact = (
        np.array(
            [
                one.label
                for one in Classifier(made, precision=precision, device="cpu").predict(files)
            ]
        )
        for precision in ("int8", "fp32")
    )
    assert int8.agreement == (rough == exact).mean()
    assert int8.accuracy == (rough == labels).mean()
    assert int8.accuracy_fp32 == (exact == labels).mean()
    out = capsys.readouterr().out
    assert f"{int8.agreement:.1%} of 32 images labeled as in fp32; accuracy" in out
    assert "times the throughput of" in out


def test_the_cost_of_a_multilabel_model_is_measured_by_its_decisions(
    colors: Callable[..., Path],
    multilabel_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    colors(40)
    rows = [
        (f"images/{i:05d}.jpg", *[("1", "0", "1"), ("1", "1", ""), ("", "", "")][i % 3])
        for i in range(40)
    ]
    manifest = write_manifest(tmp_path / "many.csv", rows, ("path", "red", "green", "blue"))
    config = order(manifest, multilabel_bundle, tmp_path / "int8", engine=engine)
    columns = config.manifest.model_copy(update={"label_columns": ["red", "green", "blue"]})
    made = quantize_bundle(config.model_copy(update={"manifest": columns}))
    int8 = made.spec.int8
    assert int8 is not None
    judged = np.random.default_rng(0).permutation(40).tolist()[1::2]
    files = [str(tmp_path / "images" / f"{i:05d}.jpg") for i in judged]
    rough, exact = (
        [one.labels for one in Classifier(made, precision=precision, device="cpu").predict(files)]
        for precision in ("int8", "fp32")
    )
    assert int8.agreement == np.mean([a == b for a, b in zip(rough, exact, strict=True)])
    shares = []
    for predicted in (rough, exact):
        correct = [
            (name in (labels or [])) == (value == "1")
            for labels, (_, *values) in zip(predicted, [rows[i] for i in judged], strict=True)
            for name, value in zip(("red", "green", "blue"), values, strict=True)
            if value
        ]
        shares.append(np.mean(correct))
    assert (int8.accuracy, int8.accuracy_fp32) == pytest.approx(tuple(shares))
    assert 0.5 < shares[1] < 1
    out = capsys.readouterr().out
    assert f"{int8.agreement:.1%} of 20 images labeled as in fp32; correct decisions" in out


def test_several_labels_per_image_are_not_used_for_a_model_that_predicts_one(
    colors: Callable[..., Path],
    color_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = order(colors(40), color_bundle, tmp_path / "int8")
    labels = config.manifest.model_copy(update={"label_delimiter": "|"})
    int8 = quantize_bundle(config.model_copy(update={"manifest": labels})).spec.int8
    assert int8 is not None
    assert int8.accuracy is None
    assert "may have several labels per image, the bundle predicts one" in capsys.readouterr().out


def test_a_multilabel_model_needs_no_labels_either(
    colors: Callable[..., Path], multilabel_bundle: Path, tmp_path: Path
) -> None:
    colors(40)
    manifest = ManifestConfig(path=str(tmp_path / "images"))
    config = QuantizeConfig(
        manifest=manifest, model=str(multilabel_bundle), output=str(tmp_path / "int8")
    )
    int8 = quantize_bundle(config).spec.int8
    assert int8 is not None
    assert int8.agreement > 0.5
    assert int8.accuracy is int8.accuracy_fp32 is None


def test_without_labels_only_agreement_is_measured(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    colors(40)
    manifest = ManifestConfig(path=str(tmp_path / "images"))
    config = QuantizeConfig(
        manifest=manifest, model=str(color_bundle), output=str(tmp_path / "int8")
    )
    int8 = quantize_bundle(config).spec.int8
    assert int8 is not None
    assert int8.accuracy is int8.accuracy_fp32 is None


@pytest.mark.parametrize(
    ("flags", "engine", "reason"),
    [
        ({"avx2", "avx512_vnni"}, "torch", "this CPU has VNNI or AMX"),
        ({"avx2"}, "openvino", "this CPU has neither VNNI nor AMX, which int8 in torch requires"),
    ],
)
def test_the_engine_is_chosen_by_the_instructions_of_the_cpu(
    flags: set[str], engine: str, reason: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: flags)
    assert quantize._choose_engine("auto") == engine
    assert capsys.readouterr().out == f"engine  {engine}: {reason}\n"


def test_images_of_all_classes_of_a_sorted_manifest_are_drawn(
    colors: Callable[..., Path], color_bundle: Path
) -> None:
    manifest = colors(90)
    header, *rows = manifest.read_text().splitlines()
    by_class = sorted(rows, key=lambda row: row.split(",")[1])
    manifest.write_text("\n".join([header, *by_class]))
    opened = open_manifest(ManifestConfig(path=str(manifest)))
    _, labels = quantize._read_pixels(opened, load_bundle(str(color_bundle)), 20)
    assert set(labels[::2]) == set(labels[1::2]) == {0, 1, 2}


def test_impossible_requests_are_rejected_before_anything_is_written(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    manifest = colors(20)
    with pytest.raises(RequestError, match="20 images can be read; int8 needs at least 32"):
        quantize_bundle(order(manifest, color_bundle, tmp_path / "int8"))
    assert not (tmp_path / "int8").exists()
    with pytest.raises(RequestError, match="is the input bundle"):
        quantize_bundle(order(manifest, color_bundle, color_bundle))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "bundle.json").write_text("{}")
    with pytest.raises(OutputError, match="already has a bundle; pass --overwrite"):
        quantize_bundle(order(manifest, color_bundle, tmp_path / "there"))


@pytest.mark.shared
@pytest.mark.parametrize(
    "engine", ["torch", pytest.param("openvino", marks=pytest.mark.slow)], indirect=True
)
def test_real_weights_agree_on_real_photographs(shared: Path, tmp_path: Path, engine: str) -> None:
    weights = shared / "weights"
    config = ImportConfig(
        arch="squeezenet1_0",
        weights=str(weights / "squeezenet1_0-imagenet.pth"),
        classes=str(weights / "imagenet-classes.txt"),
        output=str(tmp_path / "bundle"),
    )
    import_model(config)
    manifest = shared / "data" / "imagenet-sample" / "manifest.csv"
    asked = order(manifest, tmp_path / "bundle", tmp_path / "int8", engine=engine)
    int8 = quantize_bundle(asked).spec.int8
    assert int8 is not None
    assert int8.judged_images == 167
    assert int8.agreement > 0.9  # 158 of 167 were the same when this was written
    assert int8.accuracy is not None
    assert int8.accuracy_fp32 is not None
    assert abs(int8.accuracy - int8.accuracy_fp32) < 0.03
