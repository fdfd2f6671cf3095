"""OpenVINO engine: the network of a bundle on a CPU, converted from PyTorch once.

Normalization is part of the converted network. One network serves all batch sizes: the logits and
features of an image depend neither on the size of its batch nor on its place in it.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage.storage_settings import use_settings
from imgcls.errors import BundleError
from imgcls.models.bundle import Bundle, load_int8_model, read_verified_weights
from imgcls.models.head import MIN_ROWS, HeadNetwork
from imgcls.models.normalize import Normalizer
from imgcls.models.openvino_cache import CachedNetwork
from imgcls.models.openvino_package import import_openvino
from imgcls.models.precision import RunPrecision
from imgcls.models.torch_engine import load_network

_PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Maximum difference of logits from torch's in fp32, as a fraction of the largest. Measured on
ImageNet networks: up to 2e-6 and 0.04."""
MODEL_FILES = ("model.xml", "model.bin")
"""Files of a network: its graph and its weights."""
IMAGES_PER_THREAD = 8
"""Images that run at a time, per thread. Measured with one thread, 8 are between 7 % slower and
19 % faster than 32."""
_CHECKED_IMAGES = MIN_ROWS + 1
"""Number of images in the comparison with torch, other than in the traced batch: a network that
is traced for one batch size only is found."""


class ConversionError(Exception):
    """OpenVINO cannot run a network; torch can."""


class OpenVinoEngine:
    """The network of a bundle in OpenVINO, with as many threads as torch has.

    Raises ConversionError for a network that cannot be converted, or whose logits differ from
    those of torch; BundleError if the weights do not fit the network.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: RunPrecision) -> None:
        self.version = metadata.version("openvino")
        self._lock = threading.Lock()
        self._part_rows = IMAGES_PER_THREAD * torch.get_num_threads()
        load = self._load_quantized if precision == "int8" else self._load_converted
        try:
            load(bundle, precision)
        except (ConversionError, BundleError):
            raise
        except Exception as error:  # of many kinds: of the tracer, the converter and the plugin
            raise ConversionError(summarize_error(error)) from error
        self.embedding_width: int = self._compiled.output(1).partial_shape[1].get_length()

    def _load_quantized(self, bundle: Bundle, precision: RunPrecision) -> None:
        packed = load_int8_model(bundle)
        assert packed is not None
        self._compiled = compile_network(unpack_model(packed), precision)

    def _load_converted(self, bundle: Bundle, precision: RunPrecision) -> None:
        cached = CachedNetwork(bundle, precision)
        if self._load_cached(cached, bundle, precision):
            return
        with cached.take_turn():
            if not self._load_cached(cached, bundle, precision):
                self._convert(cached, bundle, precision)

    def _load_cached(self, cached: CachedNetwork, bundle: Bundle, precision: RunPrecision) -> bool:
        """Whether the network is kept on this machine, and not damaged."""
        packed = cached.read()
        if packed is None:
            return False
        is_loaded = False
        with contextlib.suppress(Exception):  # of many kinds: of the zip file and of OpenVINO
            self._compiled = compile_network(unpack_model(packed), precision)
            is_loaded = True
        del packed
        if is_loaded:
            with use_settings(bundle.storage):
                read_verified_weights(bundle)  # as every process that loads a bundle
        return is_loaded

    def _convert(self, cached: CachedNetwork, bundle: Bundle, precision: RunPrecision) -> None:
        cpu = torch.device("cpu")
        network = HeadNetwork(load_network(bundle, cpu, torch.float32), in_fp32=False).eval()
        model, packed = convert_network(network, bundle.spec.preprocess), None
        with contextlib.suppress(OSError, RuntimeError):  # no room for temporary files
            made = pack_model(model)
            model, packed = unpack_model(made), made  # as in all processes that do not convert
        self._compiled = compile_network(model, precision)
        self._check_logits(network, bundle.spec.preprocess, precision)
        if packed is not None:
            cached.write(packed)

    def upload(self, batch: Pixels | torch.Tensor) -> torch.Tensor:
        """The batch as a tensor on the CPU."""
        return (batch if isinstance(batch, torch.Tensor) else torch.from_numpy(batch)).cpu()

    def run(
        self, pixels: torch.Tensor, *, features: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, C) logits and (N, E) features, None unless requested.

        pixels: (N, 3, crop, crop) uint8, N >= 1; channels last are not copied
        """
        inputs = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        logits, kept = [], []
        for start in range(0, len(inputs), self._part_rows):
            with self._lock:  # a compiled network has one set of output buffers
                outputs = self._compiled(inputs[start : start + self._part_rows])
                logits.append(torch.from_numpy(outputs[0].copy()))
                if features:
                    kept.append(torch.from_numpy(outputs[1].copy()))
        return torch.cat(logits), torch.cat(kept) if features else None

    def _check_logits(
        self, network: HeadNetwork, preprocess: Preprocess, precision: RunPrecision
    ) -> None:
        """Raise ConversionError if logits or features are not those of torch."""
        side = preprocess.crop
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (_CHECKED_IMAGES, 3, side, side), dtype=np.uint8)
        with torch.inference_mode():
            expected = network(Normalizer(preprocess, torch.device("cpu"))(pixels))
        found = self.run(torch.from_numpy(pixels), features=True)
        for what, right, seen in zip(("logits", "features"), expected, found, strict=True):
            assert seen is not None
            if seen.shape != right.shape:
                raise ConversionError("it takes batches of one size only")
            apart = float((right - seen).abs().max())
            allowed = _TOLERANCE[precision] * float(right.abs().max())
            if not apart <= allowed:
                raise ConversionError(
                    f"its {what} differ from torch's by {apart:.2g}, more than {allowed:.2g}"
                )


def summarize_error(error: Exception) -> str:
    """The line of OpenVINO's long messages that has the reason."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    unknown = [line for line in lines if line.startswith("No conversion rule found")]
    return (unknown or lines[-1:] or [type(error).__name__])[0]


def convert_network(network: HeadNetwork, preprocess: Preprocess) -> Any:
    """A model of (N, crop, crop, 3) uint8 to logits and features."""
    openvino = import_openvino()
    side = preprocess.crop
    example = torch.zeros(MIN_ROWS, 3, side, side)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # about torch.jit, which OpenVINO's converter reads
        traced = torch.jit.freeze(torch.jit.trace(network, example, check_trace=False))
        model = openvino.convert_model(traced, example_input=example, input=[[-1, 3, side, side]])
    steps = openvino.preprocess.PrePostProcessor(model)
    pixels = steps.input(0)
    pixels.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    pixels.model().set_layout(openvino.Layout("NCHW"))
    mean, std = ([255 * each for each in values] for values in (preprocess.mean, preprocess.std))
    pixels.preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
    return steps.build()


def pack_model(model: Any) -> bytes:
    """A model as one file, the same bytes for the same model."""
    target = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(target, "w") as packed:
        graph = Path(folder, MODEL_FILES[0])
        import_openvino().save_model(model, graph, compress_to_fp16=False)
        for name in MODEL_FILES:
            without_time = zipfile.ZipInfo(name)
            packed.writestr(without_time, Path(folder, name).read_bytes())
    return target.getvalue()


def unpack_model(packed: bytes) -> Any:
    """The model that `pack_model` packed, such as the `INT8_FILE` of a bundle."""
    with zipfile.ZipFile(io.BytesIO(packed)) as files:
        contents = [files.read(name) for name in MODEL_FILES]
    return import_openvino().Core().read_model(*contents)


def compile_network(model: Any, precision: RunPrecision) -> Any:
    """A model that runs on the threads that torch has."""
    return (
        import_openvino()
        .Core()
        .compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[precision],
                # a batch at a time, on all threads of this process; the machine may have others
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "ENABLE_CPU_PINNING": False,
            },
        )
    )
