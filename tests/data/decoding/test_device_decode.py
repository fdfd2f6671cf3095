"""Batches decoded on a device: its streams, and what nvJPEG rejects, on fake streams."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imgcls.data.cuda import DecodeStage
from imgcls.data.decoding import decode, device_decode, device_resize, open_image
from imgcls.data.decoding.device_decode import DeviceJpeg
from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import ImageError
from tests.data.pictures import decode_by_device, drawn, encoded
from tests.fake_cuda import FakeCuda
from tests.fake_cuda import cuda as cuda

GPU = torch.device("cuda", 0)
SPEC = Preprocess(resize=24, crop=16, decode="fast")
REJECTED = 77
"""Width of the images that the decoder of the tests rejects, as nvJPEG rejects some files."""


def jpeg_of(width: int, height: int = 60, **options: Any) -> bytes:
    return encoded(drawn(width, height), "JPEG", **options)


class Decoder:
    """Stands for nvJPEG: writes on a stream of its own, which waits for no other."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.batches: list[list[int]] = []
        """Widths of the images of each call."""

    def __call__(self, files: Sequence[torch.Tensor], mode: Any, device: Any) -> list[torch.Tensor]:
        self._cuda.check_idle(self._cuda.current_stream(device))
        images = [Image.open(io.BytesIO(file.numpy().tobytes())) for file in files]
        self.batches.append([image.width for image in images])
        if REJECTED in self.batches[-1]:
            raise RuntimeError("Error while decoding JPEG images: Failed to decode jpeg stream: 4")
        return [
            torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images
        ]


@pytest.fixture
def decoder(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    made = Decoder(cuda)
    resize: Callable[..., torch.Tensor] = device_resize.resize_on_device
    monkeypatch.setattr(DecodeStage, "_idle", {})
    monkeypatch.setattr(torchvision.io, "decode_jpeg", made)
    monkeypatch.setattr(
        device_resize,
        "resize_on_device",
        lambda tensor, *args: cuda.launch(resize(tensor, *args), tensor),
    )
    return made


def decode_batch(files: Sequence[bytes]) -> list[Any]:
    return decode_by_device(files, SPEC, GPU)


def test_pixels_of_every_batch_can_be_read_by_the_forward_pass(
    cuda: FakeCuda, decoder: Decoder
) -> None:
    files = [jpeg_of(90), jpeg_of(100), jpeg_of(REJECTED)]
    for _ in range(2):  # the second batch gets memory of the first
        pixels = [result[0] for result in decode_batch(files)]
        cuda.launch(torch.stack(pixels), *pixels)
    assert len(cuda.streams) == 1


def test_the_decoder_gets_no_memory_that_kernels_still_read(
    cuda: FakeCuda, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeStage, "wait_for_kernels", lambda stage: None)
    monkeypatch.setattr(device_decode, "MAX_DECODED_BYTES", 1)
    with pytest.raises(AssertionError, match="may run"):
        decode_batch([jpeg_of(90), jpeg_of(100)])


def test_a_file_that_the_decoder_rejects_is_decoded_on_a_cpu_and_no_other(
    decoder: Decoder,
) -> None:
    widths = [80, 81, 82, REJECTED, 83, 84, 85, 86]
    files = [jpeg_of(width) for width in widths]
    results = decode_batch(files)
    assert [size for _, size in results] == [(width, 60) for width in widths]
    expected, _ = decode.decode_image(files[3], SPEC)
    assert (results[3][0].numpy() == expected).all()
    assert decoder.batches == [
        widths, widths[:4], widths[:2], widths[2:4], [82], [REJECTED], widths[4:],
    ]  # fmt: skip


@pytest.mark.parametrize(("most", "batches"), [
    (3 * 60 * 200, [[90, 100], [110], [300]]), (3 * 60 * 190, [[90, 100], [110], [300]]),
    (3 * 60 * 189, [[90], [100], [110], [300]]), (10**9, [[90, 100, 110, 300]]),
])  # fmt: skip
def test_full_size_images_on_the_device_have_a_maximum_size(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, most: int, batches: list[list[int]]
) -> None:
    monkeypatch.setattr(device_decode, "MAX_DECODED_BYTES", most)
    results = decode_batch([jpeg_of(width) for width in (90, 100, 110, 300)])
    assert decoder.batches == batches
    assert [size for _, size in results] == [(width, 60) for width in (90, 100, 110, 300)]


def with_adobe_marker(data: bytes, transform: int) -> bytes:
    """A JPEG whose application data are an Adobe marker alone."""
    size = int.from_bytes(data[4:6], "big")
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    return data[:2] + marker + data[4 + size :]


def test_jpegs_that_may_store_rgb_are_decoded_by_libjpeg(decoder: Decoder) -> None:
    plain = jpeg_of(90)
    frame = plain.index(b"\xff\xc0")
    letters = bytearray(plain)
    scan = plain.index(b"\xff\xda")
    for place, letter in enumerate(b"RGB"):
        letters[frame + 10 + 3 * place] = letters[scan + 5 + 2 * place] = letter
    size = int.from_bytes(plain[4:6], "big")
    by_identifiers = bytes(letters[:2] + letters[4 + size :])
    by_marker, not_rgb = with_adobe_marker(plain, 0), with_adobe_marker(plain, 1)
    for data in (by_marker, by_identifiers):
        ((pixels, _),) = decode_batch([data])
        assert decoder.batches == []
        assert (pixels == decode.decode_image(data, SPEC)[0]).all()
        # the same samples, but taken for RGB
        assert abs(pixels.astype(int) - decode_batch([plain])[0][0].numpy()).mean() > 10
        decoder.batches.clear()
    decode_batch([not_rgb])
    assert decoder.batches == [[90]]


@pytest.mark.parametrize(
    ("options", "is_for_device"),
    [
        ({}, True), ({"subsampling": 0}, True), ({"subsampling": 1}, True),
        ({"restart_marker_blocks": 4}, True), ({"progressive": True}, False),
    ],
)  # fmt: skip
def test_baseline_jpegs_are_left_for_the_device(
    options: dict[str, Any], is_for_device: bool
) -> None:
    in_full = options.get("subsampling", 0) == 0  # a gray file can state subsampling, too
    for image, suits in (
        (drawn(90, 60), True), (drawn(90, 60).convert("L"), in_full),
        (drawn(90, 60).convert("CMYK"), False),
    ):  # fmt: skip
        data = encoded(image, "JPEG", **options)
        found = device_decode.prepare_file(data, SPEC)
        assert isinstance(found, DeviceJpeg) == (is_for_device and suits)
        exact = SPEC.model_copy(update={"decode": "exact"})
        assert not isinstance(device_decode.prepare_file(data, exact), DeviceJpeg)


@pytest.mark.parametrize(
    ("sampling", "is_for_device"),
    [((1, 2), True), ((4, 1), False), ((1, 4), False), ((4, 2), False), ((3, 1), False)],
)
def test_unusual_subsampling_is_decoded_by_libjpeg(
    sampling: tuple[int, int], is_for_device: bool
) -> None:
    """Only the header decides: nvJPEG rejects some of them, with their whole batch."""
    data = bytearray(jpeg_of(90))
    data[data.index(b"\xff\xc0") + 11] = 16 * sampling[0] + sampling[1]
    header = open_image.read_header(bytes(data), 10**6)
    assert device_decode._is_for_device(bytes(data), header, SPEC) == is_for_device


def decode_on_cpu(data: bytes) -> Any:
    try:
        return decode.decode_image(data, SPEC)
    except ImageError as error:
        return error


@pytest.mark.parametrize(("format", "damage"), [
    ("PNG", None), ("WEBP", None), ("GIF", None), ("BMP", None), ("JPEG", 2), ("PNG", 2),
])  # fmt: skip
def test_other_files_and_damaged_ones_are_not(format: str, damage: int | None) -> None:
    data = encoded(drawn(90, 60), format)
    data = data[: len(data) // damage] if damage else data
    try:
        found: object = device_decode.prepare_file(data, SPEC)
    except ImageError as error:
        found = error
    expected = decode_on_cpu(data)
    if isinstance(expected, ImageError):
        assert (type(found), str(found)) == (type(expected), str(expected))
    else:
        assert isinstance(found, tuple)
        assert (found[0] == expected[0]).all()
        assert found[1] == (90, 60)


def test_a_device_without_memory_is_no_property_of_an_image(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decode_batch([jpeg_of(90)])


# ------------------------------------------------------------------ on a GPU

KINDS: dict[str, bytes] = {
    "baseline": jpeg_of(400, 300),
    "progressive": jpeg_of(400, 300, progressive=True),
    "4:4:4": jpeg_of(400, 300, subsampling=0),
    "4:2:2": jpeg_of(400, 300, subsampling=1),
    "restart": jpeg_of(400, 300, restart_marker_blocks=4),
    "gray": encoded(drawn(400, 300).convert("L"), "JPEG"),
    "odd": jpeg_of(401, 299),
    "rgb": with_adobe_marker(jpeg_of(400, 300), 0),
    "png": encoded(drawn(400, 300), "PNG"),
}


@pytest.mark.gpu
def test_a_gpu_decodes_every_kind_as_a_cpu_does_and_finds_the_same_damage() -> None:
    files = list(KINDS.values())
    damaged = [data[: len(data) * part // 4] for data in files for part in (1, 2, 3)]
    results = decode_batch([*files, *damaged, b"junk"])
    torch.cuda.current_stream().synchronize()
    for data, result in zip([*files, *damaged, b"junk"], results, strict=True):
        expected = decode_on_cpu(data)
        assert type(result) is type(expected)
        if isinstance(expected, ImageError):
            assert (result.status, str(result)) == (expected.status, str(expected))
            continue
        assert result[1] == expected[1]
        # nvJPEG and the resize on the device round differently
        pixels = torch.as_tensor(result[0]).cpu().numpy()
        assert np.abs(pixels - expected[0].astype(int)).mean() < 2


@pytest.mark.gpu
def test_a_second_gpu_decodes_to_the_pixels_of_the_first() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    files = [*KINDS.values(), *(jpeg_of(800 + 8 * i, 600) for i in range(8))]
    first = decode_by_device(files, SPEC, "cuda:0")
    second = decode_by_device(files, SPEC, "cuda:1")
    assert torch.cuda.current_device() == 0
    for one, other in zip(first, second, strict=True):
        assert one[1] == other[1]
        assert torch.equal(torch.as_tensor(one[0]).cpu(), torch.as_tensor(other[0]).cpu())


@pytest.mark.gpu
def test_a_gpu_without_memory_to_decode_is_no_error_of_an_image() -> None:
    files = [jpeg_of(8000, 6000)] * 2
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(GPU)
    blocks = [torch.empty(free - 200_000_000, dtype=torch.uint8, device=GPU)]
    try:
        with pytest.raises(torch.OutOfMemoryError):
            decode_batch(files)
    finally:
        blocks.clear()
        torch.cuda.empty_cache()
    assert all(isinstance(result, tuple) for result in decode_batch(files))


@pytest.mark.gpu
def test_threads_that_decode_and_compute_get_the_pixels_of_one_that_does_not() -> None:
    files = [jpeg_of(1200 + 8 * index, 900) for index in range(16)]

    def run(order: Sequence[int]) -> torch.Tensor:
        pixels = decode_on_gpu([files[index] for index in order])
        work = torch.randn(4096, 4096, device=GPU)
        for _ in range(20):  # kernels that keep the forward stream behind
            work = work @ work / 4096
        return torch.stack(pixels).cpu()[np.argsort(order)]

    def decode_on_gpu(batch: Sequence[bytes]) -> list[torch.Tensor]:
        return [result[0] for result in decode_batch(batch)]

    torch.cuda.synchronize()
    expected = torch.stack(decode_on_gpu(files)).cpu()
    orders = [np.random.default_rng(seed).permutation(len(files)) for seed in range(40)]
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(run, orders):
            assert torch.equal(found, expected)
