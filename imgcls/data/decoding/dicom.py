"""DICOM images, opened by Pillow through pydicom, with the window that the file states.

Importing this module registers the format with Pillow.

Decoded are single frames: gray with a window or a VOI LUT, gray of the full range of its bits, RGB,
YBR and palette color. Whatever has no certain value of black and white is UnsupportedImage.
Source: DICOM PS3.3, C.7.6.3 (pixels), C.11.1 (modality LUT), C.11.2 (VOI LUT, windows).
"""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, ImageFile
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RLELossless

from imgcls.data.decoding import jpeg
from imgcls.errors import ImageError, TruncatedImage, UnsupportedImage

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
_JPEG_SYNTAXES = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_LOSSLESS_SYNTAXES = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS_SYNTAXES = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000_SYNTAXES = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
_PYDICOM_DECODERS = {
    **dict.fromkeys((*_JPEG_SYNTAXES, *_JPEG_2000_SYNTAXES), "pillow"),
    RLELossless: "pydicom",
}
_DECODED_SYNTAXES = frozenset((*_PYDICOM_DECODERS, *_LOSSLESS_SYNTAXES, *_JPEG_LS_SYNTAXES))
_PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")

# what is unusual in a header becomes an error here, or does not matter
warnings.filterwarnings("ignore", module="pydicom")
logging.getLogger("pydicom").setLevel(logging.ERROR)


class DicomImageFile(ImageFile.ImageFile):
    """A DICOM file as an image of Pillow, in mode L or RGB; its pixels are decoded on `load`."""

    format = "DICOM"
    format_description = "DICOM"

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        if data[128:132] != b"DICM":
            raise SyntaxError("not a DICOM file")
        dataset = _read_dataset(data)
        _check_is_supported(dataset, data)
        self._size = (int(dataset.Columns), int(dataset.Rows))
        self._mode = "L" if dataset.PhotometricInterpretation in _GRAY else "RGB"
        self._dataset: FileDataset | None = dataset

    def load(self) -> Any:
        if self._dataset is not None:
            dataset, self._dataset = self._dataset, None
            pixels = _decode_gray(dataset) if self.mode == "L" else _decode_color(dataset)
            self.im = Image.fromarray(pixels).im
        return Image.Image.load(self)


def _read_dataset(data: bytes) -> FileDataset:
    if _DEFLATED_SYNTAX in data[:2048]:
        raise UnsupportedImage("DICOM: deflated data, of unlimited size")
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except (EOFError, OSError) as error:
        raise TruncatedImage(f"the DICOM file is truncated ({len(data):,} bytes)") from error


def _check_is_supported(dataset: FileDataset, data: bytes) -> None:
    if "PixelData" not in dataset:
        kind = dataset.file_meta.get("MediaStorageSOPClassUID")
        if any(tag in data for tag in _PIXEL_DATA_TAGS) or (kind and "Image" in kind.name):
            raise TruncatedImage(f"the DICOM file is truncated ({len(data):,} bytes)")
        kind = dataset.get("Modality", "unknown")
        raise UnsupportedImage(f"a DICOM object without integer pixels (modality {kind})")
    missing = [
        name
        for name in ("Rows", "Columns", "BitsStored", "PhotometricInterpretation")
        if dataset.get(name) is None
    ]
    if missing:
        raise ImageError(f"the DICOM file is damaged: it has no {missing[0]}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UnsupportedImage(f"a DICOM series of {frames:,} frames; export one of them")
    photometric = dataset.PhotometricInterpretation
    if photometric not in (*_GRAY, *_COLORS):
        raise UnsupportedImage(f"DICOM: photometric interpretation {photometric!r}")
    if int(dataset.BitsStored) > 16:
        raise UnsupportedImage(f"DICOM: samples of {dataset.BitsStored} bits")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax not in _DECODED_SYNTAXES:
        raise UnsupportedImage(f"DICOM: transfer syntax {syntax.name}")
    if photometric in _GRAY and not _has_range(dataset):
        raise UnsupportedImage(
            "DICOM: signed or rescaled samples without a window: the values of black and white "
            "are unknown"
        )


def _has_range(dataset: FileDataset) -> bool:
    if _has_window(dataset) or dataset.get("VOILUTSequence"):
        return True
    is_rescaled = dataset.get("ModalityLUTSequence") or (
        float(dataset.get("RescaleSlope") or 1),
        float(dataset.get("RescaleIntercept") or 0),
    ) != (1.0, 0.0)
    return not is_rescaled and not dataset.get("PixelRepresentation")


def _has_window(dataset: FileDataset) -> bool:
    return dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None


def _decode_samples(dataset: FileDataset) -> npt.NDArray[Any]:
    """The stored samples: (H, W), or (H, W, 3) with YBR converted to RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:
        (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
        found, stated = jpeg.read_frame_size(frame), (dataset.Columns, dataset.Rows)
        if syntax not in _JPEG_2000_SYNTAXES and found != stated:
            raise ImageError(f"the DICOM file is damaged: a picture of {found} in one of {stated}")
        if syntax in _LOSSLESS_SYNTAXES:
            return _set_sign(imagecodecs.ljpeg_decode(frame), dataset)
        if syntax in _JPEG_LS_SYNTAXES:
            return _set_sign(imagecodecs.jpegls_decode(frame), dataset)
        if syntax in _JPEG_SYNTAXES:
            jpeg.verify_jpeg(frame.rstrip(b"\0"))
    try:
        return pixel_array(dataset, decoding_plugin=_PYDICOM_DECODERS.get(syntax, ""))
    except ValueError as error:
        if "less than expected" not in str(error):
            raise
        raise TruncatedImage(f"the DICOM file is truncated in its pixels: {error}") from error


def _set_sign(samples: npt.NDArray[Any], dataset: FileDataset) -> npt.NDArray[Any]:
    """Samples as signed integers where the header states so; a codestream does not."""
    if not dataset.get("PixelRepresentation"):
        return samples
    unused = 32 - int(dataset.BitsStored)
    return samples.astype(np.int32) << unused >> unused


def _decode_gray(dataset: FileDataset) -> npt.NDArray[np.uint8]:
    values = apply_modality_lut(_decode_samples(dataset), dataset)
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        share = apply_voi(values, dataset).astype(np.float64) / (2**bits - 1)
    elif _has_window(dataset):
        share = _apply_window(values.astype(np.float64), dataset)
    else:
        share = values.astype(np.float64) / (2 ** int(dataset.BitsStored) - 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return _to_8_bits(share)


def _apply_window(values: npt.NDArray[np.float64], dataset: FileDataset) -> npt.NDArray[np.float64]:
    """Map the window to 0 (black) to 1 (white). Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    center, width = (_get_first(dataset, name) for name in ("WindowCenter", "WindowWidth"))
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if width < (1 if function == "LINEAR" else np.finfo(float).tiny):
        raise ImageError(f"the DICOM file is damaged: its window has the width {width:g}")
    if function == "LINEAR":
        if width == 1:
            return (values > center - 0.5).astype(np.float64)
        return (values - (center - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    raise UnsupportedImage(f"DICOM: the window function {function!r}")


def _get_first(dataset: FileDataset, name: str) -> float:
    value = dataset.get(name)
    return float(value[0] if isinstance(value, MultiValue) else value)


def _decode_color(dataset: FileDataset) -> npt.NDArray[np.uint8]:
    samples = _decode_samples(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        samples = apply_color_lut(samples, dataset)
        bits = samples.dtype.itemsize * 8
    elif dataset.get("PixelRepresentation"):
        raise UnsupportedImage("DICOM: signed samples of colors")
    else:
        bits = int(dataset.BitsStored)
    return _to_8_bits(samples.astype(np.float64) / (2**bits - 1))


def _to_8_bits(share: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return np.round(share.clip(0, 1) * 255).astype(np.uint8)


Image.register_open("DICOM", DicomImageFile)
