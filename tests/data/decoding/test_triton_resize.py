"""The kernels' pixels are those of a CPU; without a GPU they run on Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import DecodedImage, apply_tensor_orientation, resize_tensor

triton = pytest.importorskip("triton")

SIZES = [(1, 1), (15, 13), (11, 9), (8, 8), (3, 14), (5, 4), (10, 17), (1, 9)]
"""(width, height) as stored; the n-th has the EXIF orientation n."""
SPECS = {
    mode: Preprocess(resize=10, crop=8, mode=mode, interpolation=interpolation)
    for mode, interpolation in (("crop", "bilinear"), ("pad", "bilinear"), ("squash", "bicubic"))
}
LARGE = Preprocess(resize=20, crop=20)
"""Resized with smaller blocks: several programs for the image, several blocks for the weights."""


def make_images(device: str = "cpu") -> list[DecodedImage]:
    """Noise, which shows a wrong weight or pixel better than a photograph does."""
    generator = np.random.default_rng(0)
    images = []
    for orientation, (width, height) in enumerate(SIZES, start=1):
        noise = generator.integers(0, 256, (height, width, 3), np.uint8)
        shown = (height, width) if orientation >= 5 else (width, height)
        pixels = torch.from_numpy(noise).permute(2, 0, 1).to(device)
        images.append(DecodedImage(pixels, orientation, shown))
    return images


def make_large_image() -> DecodedImage:
    noise = np.random.default_rng(1).integers(0, 256, (3, 5, 6), np.uint8)
    return DecodedImage(torch.from_numpy(noise), 1, (6, 5))


def resize_on_cpu(image: DecodedImage, spec: Preprocess) -> Any:
    upright = apply_tensor_orientation(image.pixels.cpu(), image.orientation)
    return resize_tensor(upright, image.display_size, spec)


def run_interpreter(path: str) -> None:
    """Write the pixels of all cases; Triton must be imported with TRITON_INTERPRET set."""
    from imgcls.data.decoding import triton_resize

    images = make_images()
    found = {mode: triton_resize.resize_with_triton(images, spec) for mode, spec in SPECS.items()}
    triton_resize.BLOCK = triton_resize.COLUMNS = 16
    found["large"] = triton_resize.resize_with_triton([make_large_image()], LARGE)
    np.savez(path, **{name: pixels.numpy() for name, pixels in found.items()})


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("triton") / "pixels.npz"
    command = (
        f"from tests.data.decoding import test_triton_resize as t; t.run_interpreter({str(path)!r})"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", command], env=environment, check=True, timeout=200)
    with np.load(path) as pixels:
        yield pixels


@pytest.mark.parametrize("mode", SPECS)
def test_pixels_are_those_of_a_cpu(interpreted: Any, mode: str) -> None:
    expected = np.stack([resize_on_cpu(image, SPECS[mode]) for image in make_images()])
    assert np.ptp(expected) > 200
    np.testing.assert_array_equal(interpreted[mode], expected)


def test_images_larger_than_a_block_have_the_pixels_of_a_cpu(interpreted: Any) -> None:
    expected = resize_on_cpu(make_large_image(), LARGE)
    np.testing.assert_array_equal(interpreted["large"][0], expected)


def test_the_kernels_compile_and_round_as_a_cpu_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from imgcls.data.decoding import triton_resize

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arrays = {"table": "*i64", "weights": "*i16", "starts": "*i32", "shifts": "*i32"}
    for kernel, signature, constants in (
        (triton_resize._compute_weights, {}, {"CROP": 224, "BICUBIC": True, "BLOCK": 128}),
        (triton_resize._resize, {"output": "*u8"}, {"CROP": 224, "ROWS": 8, "COLUMNS": 64}),
    ):
        types = {**arrays, **signature, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, types, constants)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 75, 32), options=triton_resize.OPTIONS
        )
        assert ".target sm_75" in compiled.asm["ptx"]
        assert "fma" not in compiled.asm["ptx"]


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", SPECS)
def test_a_gpu_has_the_pixels_of_a_cpu(mode: str) -> None:
    from imgcls.data.decoding.triton_resize import resize_with_triton

    images = make_images("cuda")
    expected = np.stack([resize_on_cpu(image, SPECS[mode]) for image in images])
    found = resize_with_triton(images, SPECS[mode])
    np.testing.assert_array_equal(found.cpu().numpy(), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
