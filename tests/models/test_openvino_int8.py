"""A network quantized for OpenVINO: one verified file of its bundle, near the original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls.errors import BundleError, RequestError
from imgcls.evaluation.quantize import calibrate_bundle
from imgcls.models import openvino_int8
from imgcls.models.bundle import (
    INT8_FILE,
    Bundle,
    load_bundle,
    load_bundle_weights,
    save_bundle,
)
from imgcls.models.classifier import Classifier
from imgcls.models.cpu import read_cpu_flags
from tests.models.test_classifier import bundle_of, random_batch

pytestmark = pytest.mark.skipif("avx2" not in read_cpu_flags(), reason="this CPU has no AVX2")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = bundle_of(tmp_path_factory.mktemp("exact") / "b", "small_cnn")
    return Classifier.load(folder, precision="fp32", engine="torch", device="cpu")


@pytest.fixture(scope="module")
def quantized(exact: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Quantized, saved and loaded again."""
    images = list(random_batch(exact, 32, 1))
    made = calibrate_bundle(exact.bundle, "openvino", images, judged_images=1)
    folder = tmp_path_factory.mktemp("quantized") / "b"
    weights = load_bundle_weights(made)
    return save_bundle(str(folder), made.spec, weights, int8_model=made.unsaved_int8)


def test_outputs_in_int8_are_near_those_in_fp32(exact: Classifier, quantized: Bundle) -> None:
    classifiers = [Classifier(quantized, precision="int8", device="cpu") for _ in range(2)]
    rough = classifiers[0]
    assert rough.engine.startswith("openvino ")
    assert (rough.precision, rough.precision_reason) == ("int8", "as requested")
    batch = random_batch(exact, 8, 99)
    expected = exact.classify(batch, embeddings=True)
    found, again = (each.classify(batch, embeddings=True) for each in classifiers)
    assert expected.embedding is not None
    assert found.embedding is not None
    assert again.embedding is not None
    assert found.embedding.shape == (8, exact.embedding_width) == (8, rough.embedding_width)
    scale = np.abs(expected.embedding).max()
    np.testing.assert_allclose(found.embedding / scale, expected.embedding / scale, atol=0.1)
    assert (found.embedding != expected.embedding).any()
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.05)
    assert found.scores.tobytes() == again.scores.tobytes()
    assert found.embedding.tobytes() == again.embedding.tobytes()


def test_the_quantized_network_is_verified_with_its_bundle(
    quantized: Bundle, tmp_path: Path
) -> None:
    weights = load_bundle_weights(quantized)
    data = (Path(quantized.url) / INT8_FILE).read_bytes()
    copy = save_bundle(str(tmp_path / "b"), quantized.spec, weights, int8_model=data)
    assert copy.sha256 == quantized.sha256
    file = Path(copy.url) / INT8_FILE
    file.write_bytes(data[:-1] + b"x")
    for load in (lambda: load_bundle(copy.url), lambda: Classifier(copy, precision="int8")):
        with pytest.raises(BundleError, match=rf"{INT8_FILE} has SHA-256 .*copy the bundle again"):
            load()
    file.unlink()
    with pytest.raises(BundleError, match=INT8_FILE):
        load_bundle(copy.url)
    with pytest.raises(BundleError, match="the quantized network that the description names"):
        save_bundle(str(tmp_path / "other"), quantized.spec, weights)


def test_a_bundle_runs_in_int8_only_in_the_engine_it_is_quantized_for(
    quantized: Bundle, exact: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match=r"is quantized for openvino, not for torch; use --eng"):
        Classifier(quantized, precision="int8", engine="torch", device="cpu")
    with pytest.raises(BundleError, match="is not prepared for int8"):
        Classifier(exact.bundle, precision="int8", engine="openvino", device="cpu")
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: {"sse4_2"})
    with pytest.raises(RequestError, match="precision int8: this CPU has no AVX2"):
        Classifier(quantized, precision="int8", device="cpu")


def test_a_cpu_where_sums_overflow_needs_an_accuracy_of_its_kind(
    quantized: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = quantized.spec.int8
    assert int8 is not None
    without, with_vnni = (
        replace(
            quantized,
            spec=quantized.spec.model_copy(
                update={"int8": int8.model_copy(update={"has_vnni": has_vnni})}
            ),
        )
        for has_vnni in (False, True)
    )
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: {"avx2"})
    with pytest.raises(BundleError, match=r"was measured on a CPU with VNNI.* Quantize it again"):
        Classifier(with_vnni, precision="int8", device="cpu")
    assert Classifier(without, precision="int8", device="cpu").precision == "int8"
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: {"avx2", "avx_vnni"})
    assert Classifier(without, precision="int8", device="cpu").precision == "int8"


@pytest.mark.parametrize(
    ("flags", "labels", "chosen"),
    [
        ({"avx2"}, {"first_layer_only": [1, 2, 0], "enable": [1, 2, 3]}, "enable"),
        ({"avx2"}, {"first_layer_only": [1, 2, 3], "enable": [1, 0, 3]}, "first_layer_only"),
        ({"avx2", "avx512_vnni"}, {}, "first_layer_only"),  # nothing overflows
    ],
)
def test_weights_have_7_bits_where_more_labels_are_as_before(
    flags: set[str], labels: dict[str, list[int]], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(str):
        def clone(self) -> Model:
            return self

    answers = labels | {"exact": [1, 2, 3]}
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: flags)
    monkeypatch.setattr(openvino_int8, "_quantize", lambda model, images, fix: fix)
    monkeypatch.setattr(
        openvino_int8, "_predict_labels", lambda model, images, spec: np.array(answers[model])
    )
    spec: Any = None  # for the labels
    assert openvino_int8._quantize_for_this_cpu(Model("exact"), [], spec) == chosen


def test_a_multilabel_network_is_compared_by_its_labels(
    multilabel_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: {"avx2"})
    predict, found = openvino_int8._predict_labels, []
    monkeypatch.setattr(
        openvino_int8,
        "_predict_labels",
        lambda *args: found.append(predict(*args)) or found[-1],
    )
    classifier = Classifier.load(str(multilabel_bundle), precision="fp32", device="cpu")
    images = random_batch(classifier, 32, 1)
    made = calibrate_bundle(classifier.bundle, "openvino", list(images), judged_images=1)
    assert made.unsaved_int8 is not None
    expected = classifier.rank_scores(classifier.classify(images).scores)
    assert [{"red", "blue"}] * 32 == [set(each.labels or []) for each in expected]
    assert len(found) == 3  # exact, and with 7 bits in one layer and in all
    assert all(np.array_equal(each, [[True, False, True]] * 32) for each in found)


def test_without_nncf_the_command_that_installs_it_is_named(
    exact: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = openvino_int8.util.find_spec
    monkeypatch.setattr(
        openvino_int8.util, "find_spec", lambda name: None if name == "nncf" else find_spec(name)
    )
    with pytest.raises(RequestError, match=r"run: pip install 'imgcls\[int8\]'"):
        calibrate_bundle(exact.bundle, "openvino", list(random_batch(exact, 2)), judged_images=1)


def test_a_network_that_cannot_be_quantized_is_refused(
    exact: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("Exception from graph.cpp:1:\nno rule for this layer\n")

    monkeypatch.setattr(openvino_int8, "_quantize", refuse)
    with pytest.raises(BundleError, match=r"quantize its network: no rule .*; use --engine torch"):
        calibrate_bundle(exact.bundle, "openvino", list(random_batch(exact, 2)), judged_images=1)
