"""OpenVINO gives the logits and features of torch, and the same bytes each time."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from imgcls.errors import BundleError, RequestError
from imgcls.models import (
    engines,
    openvino_cache,
    openvino_engine,
    openvino_package,
    torch_engine,
)
from imgcls.models.bundle import Bundle, load_bundle
from imgcls.models.cache_folder import find_cache_folder
from imgcls.models.classifier import Classifier
from imgcls.models.openvino_engine import ConversionError, OpenVinoEngine
from imgcls.models.precision import has_native_bf16
from tests.models.test_classifier import bundle_of, random_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(str(bundle_of(tmp_path_factory.mktemp("small") / "b", "small_cnn")))


@pytest.fixture(scope="module")
def converted(small: Bundle) -> Classifier:
    return Classifier(small, precision="fp32", engine="openvino", device="cpu")


# ------------------------------------------------------------------ the same outputs as torch


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small_cnn", {}),
        ("resnet18", {}),
        ("squeezenet1_1", {}),  # a convolution as its head
        pytest.param(
            "googlenet",
            {"transform_input": True, "aux_logits": True, "init_weights": False},
            marks=pytest.mark.slow,
        ),
        pytest.param("timm:vit_tiny_patch16_224", {}, marks=pytest.mark.slow),
    ],
)
def test_fp32_outputs_are_those_of_torch(tmp_path: Path, name: str, options: Any) -> None:
    bundle = load_bundle(str(bundle_of(tmp_path / "b", name, options=options)))
    torchs = Classifier(bundle, precision="fp32", engine="torch", device="cpu")
    found = Classifier(bundle, precision="fp32", engine="openvino", device="cpu")
    batch = random_batch(torchs, 3)
    pixels = torch.from_numpy(batch)
    with torch.inference_mode():
        expected, features = torchs._engine.run(pixels, features=True)
        logits, seen = found._engine.run(pixels, features=True)
    assert features is not None
    assert seen is not None
    assert (logits.dtype, seen.dtype) == (torch.float32, torch.float32)
    assert seen.shape == (3, found.embedding_width)
    for right, other in ((expected, logits), (features, seen)):
        np.testing.assert_allclose(other, right, atol=1e-5 * float(right.abs().max()))
    scored = found.classify(batch)
    np.testing.assert_allclose(scored.scores, torchs.classify(batch).scores, atol=1e-5)
    assert scored.embedding is None


def test_images_that_run_in_parts_have_the_outputs_of_single_ones(
    converted: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = converted._engine
    size, compiled, parts_seen = engine._part_rows, engine._compiled, []

    def run(inputs: Any) -> Any:
        parts_seen.append(len(inputs))
        return compiled(inputs)

    monkeypatch.setattr(engine, "_compiled", run)
    pixels = torch.from_numpy(random_batch(converted, 2 * size + 3))
    logits, features = engine.run(pixels, features=True)
    assert size == openvino_engine.IMAGES_PER_THREAD * torch.get_num_threads()
    assert parts_seen == [size, size, 3]
    alone = [engine.run(pixels[i : i + 1], features=True) for i in range(len(pixels))]
    for seen, parts in zip((logits, features), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(seen, torch.cat(parts), rtol=0, atol=0)
    assert engine.run(pixels, features=False)[1] is None


@pytest.mark.skipif(not has_native_bf16(CPU), reason="this CPU has no bfloat16 instructions")
def test_bf16_outputs_are_near_those_in_fp32(small: Bundle, converted: Classifier) -> None:
    rough = Classifier(small, precision="bf16", engine="openvino", device="cpu")
    batch = random_batch(rough, 4)
    expected, found = (each.classify(batch, embeddings=True) for each in (converted, rough))
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.02)
    assert found.embedding is not None
    assert expected.embedding is not None
    assert (found.embedding != expected.embedding).any()
    scale = np.abs(expected.embedding).max()
    np.testing.assert_allclose(found.embedding / scale, expected.embedding / scale, atol=0.05)


def test_an_image_has_the_same_bytes_in_every_batch(small: Bundle, converted: Classifier) -> None:
    again = Classifier(small, precision="fp32", engine="openvino", device="cpu")
    batch = random_batch(converted, 7)
    whole = converted.classify(batch, embeddings=True)
    assert whole.embedding is not None
    for count in (1, 2, 7):
        for start in range(0, 7, count):
            part = again.classify(batch[start : start + count], embeddings=True)
            assert part.embedding is not None
            rows = slice(start, start + count)
            assert part.scores.tobytes() == whole.scores[rows].tobytes()
            assert part.embedding.tobytes() == whole.embedding[rows].tobytes()


def test_threads_do_not_disturb_each_other(converted: Classifier) -> None:
    batches = [random_batch(converted, 1 + seed % 3, seed) for seed in range(24)]
    expected = [converted.classify(batch).scores for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: converted.classify(batch).scores, batches))
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def test_the_engine_is_named_with_its_version(converted: Classifier) -> None:
    import openvino

    assert converted.engine == f"openvino {openvino.__version__.partition('-')[0]}"


def test_no_usage_report_is_sent(converted: Classifier) -> None:
    """The package that sends it is not imported, neither with OpenVINO nor for a conversion."""
    assert [name for name in sys.modules if name.startswith("openvino_telemetry.")] == []


# ------------------------------------------------------------------ networks it cannot run


class _Network(nn.Module):
    """A network with a layer of a test between its features and its head."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc(self.layer(self.stem(inputs).mean((2, 3))))
        return output


def _keep_batch_size(x: torch.Tensor) -> torch.Tensor:
    return x * torch.ones(int(x.shape[0]), 1)


def _branch(x: torch.Tensor) -> torch.Tensor:
    """What is traced for an image of zeros is not what is computed for others."""
    return x if bool((x[:, :1] == x[0, 0]).all()) else 2 * x


@pytest.fixture(params=["svd", "batch size", "branch"])
def unconvertible(
    request: pytest.FixtureRequest, small: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Bundle, str]:
    """A bundle whose network OpenVINO cannot run, and the reason."""
    layer, reason = {
        "svd": (lambda x: torch.linalg.svd(x)[0][:, :4], "aten::linalg_svd"),
        "batch size": (_keep_batch_size, "mismatch|batches of one size only"),
        "branch": (_branch, "logits differ from torch's"),
    }[request.param]
    torch.manual_seed(0)
    monkeypatch.setattr(openvino_engine, "load_network", lambda *_: _Network(layer).eval())
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    return small, reason


def test_a_network_that_cannot_be_converted_is_refused_with_the_reason(
    unconvertible: tuple[Bundle, str],
) -> None:
    bundle, reason = unconvertible
    with pytest.raises(ConversionError, match=reason):
        OpenVinoEngine(bundle, "fp32")
    with pytest.raises(BundleError, match=rf"cannot run its network: .*({reason}).*--engine torch"):
        Classifier(bundle, precision="fp32", engine="openvino", device="cpu")
    assert not list(Path(find_cache_folder(openvino_cache.FOLDER)).glob("*.zip"))


def test_weights_that_do_not_fit_are_the_fault_of_the_bundle(
    small: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch_engine, "load_bundle_weights", lambda bundle: {})
    with pytest.raises(BundleError, match="the weights do not fit"):
        Classifier(small, engine="openvino", device="cpu", precision="fp32")


# ------------------------------------------------------------------ requests it cannot serve


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_package, "is_openvino_installed", lambda: False)
    with pytest.raises(RequestError, match=r"run: pip install 'imgcls\[openvino\]'"):
        Classifier(small, engine="openvino", precision="fp32", device="cpu")
    assert Classifier(small, device="cpu").engine == f"torch {torch.__version__}"


def test_a_compiled_network_is_refused(small: Bundle) -> None:
    with pytest.raises(RequestError, match="engine openvino: takes no compiled network"):
        Classifier(small, engine="openvino", device="cpu", compile=True)


def test_bf16_is_refused_where_openvino_has_none(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_native_bf16", lambda device: False)
    with pytest.raises(RequestError, match=r"no bfloat16 instructions.*--precision fp32"):
        Classifier(small, engine="openvino", precision="bf16", device="cpu")
