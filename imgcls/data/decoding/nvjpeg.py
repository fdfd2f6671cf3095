"""nvJPEG, called through torchvision: the only use of torchvision's image decoders.

torchvision deprecates them since 0.29 in favor of torchcodec, whose `decoders.decode_jpeg`, from
0.16 on, takes the same batch of encoded tensors, mode and device. It differs in three points:

- It applies the EXIF orientation; `DeviceJpeg.orientation` would have to be 1.
- It decodes on the current stream and waits for it, where torchvision uses a stream of its own.
- Its errors have no common beginning (`_DECODER_ERROR`): "Failed to get image info: 3".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from PIL import Image

from imgcls.data.cuda import DecodeStage
from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.data.encode_image import encode_jpeg
from imgcls.errors import one_line

_DECODER_ERROR = "Error while decoding JPEG images"
"""How torchvision begins the message of any error within nvJPEG, whatever its kind."""
_OUT_OF_MEMORY = re.compile(r"out of memory|Failed to [\w ]+: 5\b")
"""Messages of an allocation that failed; 5 is NVJPEG_STATUS_ALLOCATOR_FAILURE."""


def decode_jpegs(files: Sequence[bytes], stage: DecodeStage) -> list[torch.Tensor | None]:
    """Decode JPEGs to (3, H, W) uint8 RGB, as stored, on the device of a stage.

    Returns None for a file that the decoder rejects. Such a file fails its batch, which is then
    bisected.
    Raises torch.OutOfMemoryError, torch.AcceleratorError for a device that has failed, or
    RuntimeError if there is no decoder.
    """
    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    return _decode_or_bisect(encoded, stage)


def _decode_or_bisect(encoded: list[torch.Tensor], stage: DecodeStage) -> list[torch.Tensor | None]:
    stage.wait_for_kernels()
    try:
        return list(
            torchvision.io.decode_jpeg(
                encoded, torchvision.io.ImageReadMode.RGB, device=stage.device
            )
        )
    except RuntimeError as error:
        if stage.device.type == "cuda":
            _raise_device_failure(error, stage.device)
    if len(encoded) == 1:
        return [None]
    middle = len(encoded) // 2
    return [
        *_decode_or_bisect(encoded[:middle], stage),
        *_decode_or_bisect(encoded[middle:], stage),
    ]


def _raise_device_failure(error: RuntimeError, device: torch.device) -> None:
    """Raise unless an error of the decoder is about the images.

    torchvision reports everything as RuntimeError, also a device without memory.
    """
    message = str(error)
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        raise error
    if _OUT_OF_MEMORY.search(message):
        raise torch.OutOfMemoryError(message) from error
    if _DECODER_ERROR not in message:
        raise error
    # nvJPEG may still write to the outputs, which are freed; also raises a device's failure
    torch.cuda.synchronize(device)


def find_fault(device: torch.device) -> str | None:
    """Why a device cannot decode a JPEG; None when it can."""
    try:
        with DecodeStage(device) as stage:
            [pixels] = decode_jpegs([encode_jpeg(Image.new("RGB", (16, 16)))], stage)
    except RuntimeError as error:
        return one_line(error)
    return "it rejects a JPEG that Pillow has written" if pixels is None else None
