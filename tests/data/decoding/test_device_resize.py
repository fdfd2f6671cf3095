"""A batch is resized by a kernel only where its pixels were found to be right."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imgcls.data.decoding import device_resize
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import DecodedImage, apply_tensor_orientation, resize_tensor
from tests.fake_cuda import DeviceTensor, FakeCuda
from tests.fake_cuda import cuda as cuda

SPEC = Preprocess(resize=24, crop=16)
Kernel = Callable[[Sequence[DecodedImage], Preprocess], torch.Tensor]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_resize, "_kernels", {})


def make_image(*, on_gpu: bool) -> DecodedImage:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    pixels = torch.from_numpy(noise).permute(2, 0, 1)
    return DecodedImage(pixels.as_subclass(DeviceTensor) if on_gpu else pixels, 6, (20, 30))


def resize_on_cpu(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
    found = []
    for image in images:
        pixels = image.pixels.as_subclass(torch.Tensor)
        upright = apply_tensor_orientation(pixels, image.orientation)
        found.append(torch.from_numpy(resize_tensor(upright, image.display_size, spec)))
    return torch.stack(found)


def install(monkeypatch: pytest.MonkeyPatch, kernel: Kernel | None) -> None:
    """Let a function pass for the kernel; None: it cannot be imported."""
    module = None if kernel is None else SimpleNamespace(resize_with_triton=kernel)
    monkeypatch.setitem(sys.modules, "imgcls.data.decoding.triton_resize", module)


def test_a_kernel_that_was_verified_gets_the_whole_batch(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batches: list[int] = []

    def kernel(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
        batches.append(len(images))
        return resize_on_cpu(images, spec)

    install(monkeypatch, kernel)
    for _ in range(2):
        found = device_resize.resize_batch([make_image(on_gpu=True)] * 3, SPEC)
    assert batches == [len(device_resize.SAMPLE_SIZES), 3, 3]
    assert [tuple(pixels.shape) for pixels in found] == [(3, 16, 16)] * 3
    assert torch.equal(torch.stack(found), resize_on_cpu([make_image(on_gpu=False)] * 3, SPEC))
    assert caplog.messages == []


def fail(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler.\nSet the environment variable CC")


def shift(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
    wrong: torch.Tensor = resize_on_cpu(images, spec).clone()
    wrong[-1, 0, 0, 0] ^= 2
    return wrong


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (None, "ModuleNotFoundError: import of imgcls.data.decoding.triton_resize halted"),
        (fail, "RuntimeError: Failed to find C compiler. Set the environment variable CC"),
        (shift, "its kernel's pixels differ from a CPU's by up to 2 of 255"),
    ],
    ids=["no Triton", "no compiler", "wrong pixels"],
)
def test_without_a_kernel_torch_resizes_each_image_and_the_reason_is_logged_once(
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kernel: Kernel | None,
    reason: str,
) -> None:
    def resize_one(upright: torch.Tensor, size: tuple[int, int], spec: Preprocess) -> torch.Tensor:
        pixels = upright.as_subclass(torch.Tensor)
        return torch.from_numpy(resize_tensor(pixels, size, spec))

    install(monkeypatch, kernel)
    monkeypatch.setattr(device_resize, "resize_on_device", resize_one)
    images = [make_image(on_gpu=True)] * 2
    with caplog.at_level(logging.WARNING, "imgcls"):
        for _ in range(2):
            found = device_resize.resize_batch(images, SPEC)
            assert torch.equal(torch.stack(found), resize_on_cpu(images, SPEC))
    (message,) = caplog.messages
    assert message.startswith("cuda:1 resizes images one by one, which is slower: ")
    assert reason in message


def test_a_gpu_without_memory_is_no_reason_to_do_without_a_kernel(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    install(monkeypatch, kernel)
    with pytest.raises(torch.OutOfMemoryError):
        device_resize.resize_batch([make_image(on_gpu=True)], SPEC)
    assert device_resize._kernels == {}


def test_a_gpu_that_failed_is_reported_as_such(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
        if len(images) == len(device_resize.SAMPLE_SIZES):
            return resize_on_cpu(images, spec)
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    install(monkeypatch, kernel)
    with pytest.raises(RuntimeError, match="Triton"):
        device_resize.resize_batch([make_image(on_gpu=True)], SPEC)
    cuda.failure = torch.AcceleratorError("CUDA error: an illegal memory access")
    with pytest.raises(torch.AcceleratorError):
        device_resize.resize_batch([make_image(on_gpu=True)], SPEC)


def test_a_cpu_resizes_each_image_without_a_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, None)
    (found,) = device_resize.resize_batch([make_image(on_gpu=False)], SPEC)
    assert torch.equal(found[None], resize_on_cpu([make_image(on_gpu=False)], SPEC))
    assert caplog.messages == []
    assert device_resize.resize_batch([], SPEC) == []


@pytest.mark.gpu
def test_a_gpu_has_a_kernel_and_the_pixels_of_a_cpu() -> None:
    image = make_image(on_gpu=False)
    on_gpu = DecodedImage(image.pixels.cuda(), image.orientation, image.display_size)
    (found,) = device_resize.resize_batch([on_gpu], SPEC)
    assert torch.equal(found[None].cpu(), resize_on_cpu([image], SPEC))
    assert None not in device_resize._kernels.values()
