"""Convolutions in int8 stay near what they are in floating point."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imgcls.errors import BundleError
from imgcls.models import precision, zoo
from imgcls.models.bundle import Int8Calibration, load_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.cpu import read_cpu_flags
from imgcls.models.fold_batchnorm import fold_batch_norms
from imgcls.models.fuse_cpu import FusedConv2d
from imgcls.models.int8 import (
    Dequantize,
    Quantize,
    QuantizedConv2d,
    QuantizedMaxPool2d,
    quantize_network,
)
from imgcls.models.int8_calibration import record_int8_ranges, record_ranges
from tests.models.test_classifier import bundle_of, random_batch
from tests.models.test_fuse_cpu import Sum

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not read_cpu_flags() & precision.INT8_FLAGS,
    reason="this machine does not multiply int8",
)


@pytest.mark.parametrize(
    ("name", "convolutions", "floating"),
    [
        ("resnet18", 20, 1),  # the residual of the last block, which ends in floating point
        ("squeezenet1_0", 25, 0),
        ("densenet121", 120, 0),
        ("mobilenet_v2", 52, 0),
        ("googlenet", 57, 0),
        ("small_cnn", 6, 0),
    ],
)
@torch.inference_mode()
def test_a_quantized_network_stays_near_the_original(
    name: str, convolutions: int, floating: int
) -> None:
    torch.manual_seed(0)
    architecture = zoo.resolve_architecture(name)
    network = fold_batch_norms(zoo.build_network(architecture, 7).eval()).to(
        memory_format=torch.channels_last
    )
    side = zoo.get_default_preprocess(architecture).crop
    batch = torch.randn(8, 3, side, side).to(memory_format=torch.channels_last)
    expected = network(batch)
    shown = copy.deepcopy(network)
    halves = [batch[:4], batch[4:]]
    ranges = record_ranges(shown, side, keep=zoo.find_head(shown)[1], batches=halves)
    made = quantize_network(network, side, keep=zoo.find_head(network)[1], ranges=ranges)
    spread = float((expected - expected.mean(0)).abs().mean())
    apart = float((made(batch) - expected).abs().mean())
    assert apart < max(0.5 * spread, 0.05 * float(expected.abs().mean()))
    kinds = [type(module) for module in made.modules()]
    assert kinds.count(QuantizedConv2d) == convolutions
    assert kinds.count(Dequantize) == floating
    assert kinds.count(FusedConv2d) == 0


@pytest.mark.parametrize("kind", ["residual", "input", "position", "strided"])
@torch.inference_mode()
def test_a_sum_in_int8_stays_near_that_of_the_steps(kind: str) -> None:
    torch.manual_seed(0)
    network = Sum(kind, nn.ReLU()).eval().to(memory_format=torch.channels_last)
    batch = torch.randn(5, 3, 16, 16).to(memory_format=torch.channels_last)
    expected = network(batch)
    copied = copy.deepcopy(network)
    ranges = record_ranges(copied, 16, keep=copied.head, batches=[batch])
    made = quantize_network(network, 16, keep=network.head, ranges=ranges)
    assert any(isinstance(module, QuantizedConv2d) for module in made.modules())
    assert float((made(batch) - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("side", [7, 8, 13, 14])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [(3, 2, 1, False), (3, 2, 0, True), (2, 2, 0, False), (3, 1, 1, False), (2, 2, 0, True)],
)
def test_pooling_in_int8_is_torchs(
    kernel: int, stride: int, padding: int, ceil: bool, side: int
) -> None:
    torch.manual_seed(side)
    pixels = torch.randint(0, 256, (2, 5, side, side + 1), dtype=torch.uint8)
    pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    expected = pool(pixels.float()).to(torch.uint8)
    found = QuantizedMaxPool2d(pool)(pixels.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, expected)


def test_a_value_survives_the_way_there_and_back_to_half_a_step() -> None:
    values = torch.cat([torch.zeros(1), torch.linspace(-1, 3, 1000)])
    scale, zero = 4 / 255, 64
    found = Dequantize(scale, zero, torch.float32)(Quantize(scale, zero)(values))
    assert float((found - values).abs().max()) <= scale / 2 + 1e-6
    assert float(found[values == 0].abs().max()) == 0


def test_ranges_of_another_network_are_refused(tmp_path: Path) -> None:
    bundle = load_bundle(str(bundle_of(tmp_path / "bundle", "small_cnn")))
    other = Int8Calibration(ranges={"x": {}}, calibration_images=1, judged_images=1, agreement=1)
    changed = replace(bundle, spec=bundle.spec.model_copy(update={"int8": other}))
    with pytest.raises(BundleError, match="measured on another network; quantize it again"):
        Classifier(changed, precision="int8", device="cpu")
    with pytest.raises(BundleError, match="is not prepared for int8"):
        Classifier(bundle, precision="int8", device="cpu")


def test_a_classifier_in_int8_answers_nearly_as_it_does_otherwise(tmp_path: Path) -> None:
    bundle = load_bundle(str(bundle_of(tmp_path / "bundle", "resnet18")))
    exact = Classifier(bundle, precision="fp32", device="cpu")
    ranges = record_int8_ranges(bundle, [random_batch(exact, 8, seed) for seed in range(4)])
    calibration = Int8Calibration(
        ranges=ranges, calibration_images=32, judged_images=1, agreement=1
    )
    changed = replace(bundle, spec=bundle.spec.model_copy(update={"int8": calibration}))
    rough = Classifier(changed, precision="int8", device="cpu")
    assert (rough.precision, rough.precision_reason) == ("int8", "as requested")
    batch = random_batch(exact, 8, 99)
    expected = exact.classify(batch, embeddings=True)
    found = rough.classify(batch, embeddings=True)
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.02)
    assert found.embedding is not None
    assert expected.embedding is not None
    assert found.embedding.shape == expected.embedding.shape


def test_without_a_convolution_there_is_nothing_to_quantize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(str(bundle_of(tmp_path / "bundle", "small_cnn")))
    monkeypatch.setattr(
        "imgcls.models.int8_calibration.insert_fused_convolutions", lambda *_, **__: None
    )
    with pytest.raises(
        BundleError, match=r"int8: the network has no convolution that can be .*; use --engine"
    ):
        record_int8_ranges(bundle, [])
