"""Errors of torchvision's JPEG decoder: about an image, or about the device."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import imgcls
from imgcls.data.cuda import DecodeStage
from imgcls.data.decoding import nvjpeg
from imgcls.data.decoding.lazy_torchvision import torchvision
from tests.data.pictures import drawn, encoded
from tests.fake_cuda import FakeCuda
from tests.fake_cuda import cuda as cuda

GPU = torch.device("cuda", 0)
PREFIX = "Error while decoding JPEG images: "
JPEG = encoded(drawn(64, 48), "JPEG")


@pytest.fixture(autouse=True)
def no_idle_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeStage, "_idle", {})


def fail_with(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fail)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError(PREFIX + "CUDA out of memory. Tried"), torch.OutOfMemoryError),
        (RuntimeError(PREFIX + "Failed to decode batch: 5"), torch.OutOfMemoryError),
        (torch.AcceleratorError("illegal memory access"), torch.AcceleratorError),
        (RuntimeError("Failed to initialize nvjpeg with hardware backend: 6"), RuntimeError),
    ],
)
def test_an_error_that_no_image_causes_is_raised(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, error: RuntimeError,
    expected: type[RuntimeError],
) -> None:  # fmt: skip
    fail_with(monkeypatch, error)
    with pytest.raises(RuntimeError) as found, DecodeStage(GPU) as stage:
        nvjpeg.decode_jpegs([JPEG], stage)
    assert type(found.value) is expected


def test_the_device_is_idle_before_memory_of_a_failed_batch_is_used_again(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        cuda.launch(torch.zeros(1))
        raise RuntimeError(PREFIX + "Failed to parse jpeg stream: 3")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fail)
    with DecodeStage(GPU) as stage:
        assert nvjpeg.decode_jpegs([JPEG], stage) == [None]
        cuda.check_idle(cuda.current_stream(GPU))
        cuda.failure = torch.AcceleratorError("CUDA error: an illegal memory access")
        with pytest.raises(torch.AcceleratorError):
            nvjpeg.decode_jpegs([JPEG], stage)


def test_a_cpu_has_no_failures_of_a_device_and_rejects_damaged_files_alone() -> None:
    with DecodeStage(torch.device("cpu")) as stage:
        found = nvjpeg.decode_jpegs([JPEG, b"junk", JPEG], stage)
    assert [None if tensor is None else tuple(tensor.shape) for tensor in found] == [
        (3, 48, 64), None, (3, 48, 64),
    ]  # fmt: skip
    expected = torch.frombuffer(
        bytearray(Image.open(io.BytesIO(JPEG)).convert("RGB").tobytes()), dtype=torch.uint8
    )
    assert found[0] is not None
    assert torch.equal(found[0].permute(1, 2, 0).flatten(), expected)


def test_a_device_that_cannot_decode_is_reported_with_the_reason(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nvjpeg.find_fault(torch.device("cpu")) is None
    fail_with(monkeypatch, RuntimeError("torchvision was not built with nvJPEG"))
    assert nvjpeg.find_fault(GPU) == "torchvision was not built with nvJPEG"
    fail_with(monkeypatch, RuntimeError(PREFIX + "Failed to parse jpeg stream: 3"))
    assert nvjpeg.find_fault(GPU) == "it rejects a JPEG that Pillow has written"


def test_no_other_module_uses_the_image_decoders_of_torchvision() -> None:
    package = Path(imgcls.__file__).parent
    using = {path.name for path in package.rglob("*.py") if "torchvision.io" in path.read_text()}
    assert using == {"nvjpeg.py"}
