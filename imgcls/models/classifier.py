"""uint8 pixels in, calibrated scores out: the one place where a trained network is run.

Owns precision, memory format, normalising on the device, temperature and top-k. Knows nothing of
manifests or Ray; labelling, evaluation and serving all go through it, so they agree.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imgcls.data import decode
from imgcls.data.decode import Pixels
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import StorageConfig
from imgcls.errors import (
    BundleError,
    ImageError,
    ImgclsError,
    NotFinite,
    RequestError,
    StorageError,
    one_line,
)
from imgcls.models import int8, sources, zoo
from imgcls.models.bundle import Bundle, Precision, load_bundle, load_bundle_weights, require_int8
from imgcls.models.cuda_graph import AsyncDownload, CudaGraphRunner, CudaTimer
from imgcls.models.fold_batchnorm import fold_batch_norms
from imgcls.models.fuse_cpu import fuse_convolutions
from imgcls.models.int8 import ValueRanges
from imgcls.models.normalize import Normalizer
from imgcls.models.notebook_repr import render_failed_prediction, render_prediction
from imgcls.models.sources import ImageSource


@dataclass(frozen=True)
class Scores:
    """What the network says of N images.

    scores:    (N, C) float32, softmax of the logits over the temperature, in class order; all NaN
        for an image whose logits are not all finite (see `finite`)
    embedding: (N, E) float32 input of the final layer, averaged over space; None unless asked for
    """

    scores: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32] | None = None

    @property
    def is_finite(self) -> npt.NDArray[np.bool_]:
        """(N,) bool: whether the network gave numbers for an image.

        Sound weights can still overflow in one of the layers for an image, above all in half
        precision. Such a row must not be given a label.
        """
        return ~np.isnan(self.scores[:, 0])


class PendingScores:
    """Scores that a GPU may still be working on."""

    def __init__(
        self, scores: torch.Tensor, embedding: torch.Tensor | None, watch: CudaTimer
    ) -> None:
        watch.stop()
        self._watch = watch
        self._scores = AsyncDownload(scores)
        self._embedding = None if embedding is None else AsyncDownload(embedding)

    def get(self) -> Scores:
        """The scores; waits for them."""
        embedding = None if self._embedding is None else self._embedding.get().numpy()
        return Scores(self._scores.get().numpy(), embedding)

    def gpu_seconds(self) -> float:
        """Time that a GPU worked on them; 0 on a CPU. Waits for the end."""
        return self._watch.elapsed_seconds()


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: labels and scores of the top k, best first.

    source: the image as it was given, for a notebook to show it
    """

    label: str
    confidence: float
    accepted: bool
    topk_labels: list[str]
    topk_scores: list[float]
    source: ImageSource | None = field(default=None, repr=False, compare=False)
    status: str = "ok"
    error: str | None = None

    def _repr_html_(self) -> str:
        return render_prediction(self.source, self.topk_labels, self.topk_scores, self.accepted)


@dataclass(frozen=True)
class FailedPrediction:
    """An image that could not be read or decoded, in the place of its prediction.

    status, error: as in the columns of a labeling run; the other fields are those of `Prediction`
    """

    status: str
    error: str
    source: ImageSource | None = field(default=None, repr=False, compare=False)
    label: None = None
    confidence: None = None
    accepted: bool = False
    topk_labels: list[str] = field(default_factory=list)
    topk_scores: list[float] = field(default_factory=list)

    def _repr_html_(self) -> str:
        return render_failed_prediction(self.source, self.error)


AnyPrediction = TypeVar("AnyPrediction", bound=Prediction | FailedPrediction)


class Predictions(list[AnyPrediction]):
    """Predictions in the order of their images; a notebook shows them as pictures with bars."""

    def _repr_html_(self) -> str:
        shown = "".join(prediction._repr_html_() for prediction in self[:MAX_SHOWN])
        more = len(self) - MAX_SHOWN
        return shown + (f"<p>and {more:,} more</p>" if more > 0 else "")


MAX_SHOWN = 24


class Classifier:
    """A bundle's network, ready to run on one device.

    precision: `auto` takes bf16 where the hardware multiplies it natively, else fp32;
        `self.precision` is what was taken and `self.precision_reason` says why
    batch_size: on a GPU, the size of most batches, for which kernels are recorded and replayed
    decode: `exact` decodes JPEGs whole, `fast` large ones at a fraction of their size; by default
        the bundle's own
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: Precision = "auto",
        device: str | torch.device | None = None,
        compile: bool = False,
        batch_size: int | None = None,
        decode: DecodeMode | None = None,
    ) -> None:
        bundle = bundle.with_decode(decode)
        self.bundle = bundle
        self.classes = bundle.spec.classes
        self.preprocess = bundle.spec.preprocess
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision, self.precision_reason = choose_precision(precision, self.device)
        self._dtype = _choose_float_dtype(self.precision, self.device)
        self._network = load_network(bundle, self.device, self._dtype)
        _, last = zoo.find_head(self._network)
        if self.precision == "int8":
            self._network = _quantize_from_bundle(self._network, bundle, last)
        elif self.device.type == "cpu" and not compile:
            self._network = fuse_convolutions(self._network, self.preprocess.crop, spare=last)
        if self._dtype == torch.bfloat16:
            _run_head_in_fp32(self._network)
        _pad_small_head_batches(self._network)
        self._normalise = Normalizer(self.preprocess, self.device)
        scaling = bundle.spec.vector_scaling
        self._scaling = None
        if scaling is not None:
            pair = torch.tensor([scaling.scale, scaling.bias], device=self.device)
            self._scaling = (pair[0], pair[1])
        self._thresholds = np.array(bundle.spec.resolve_thresholds(), np.float32)
        compile = compile and self.precision != "int8"
        self._forward = torch.compile(self._network) if compile else self._network
        if self.device.type == "cuda" and batch_size is not None:
            self._forward = self._record_cuda_graph(batch_size)

    @property
    def embedding_width(self) -> int:
        """E, the length of an embedding."""
        return zoo.get_embedding_width(self._network)

    @classmethod
    def load(
        cls, url: str, *, storage: StorageConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> Classifier:
        """Load the classifier of a bundle.

        Parameters
        ----------
        url
            Path or URL of the bundle folder.
        storage
            How to reach its store, as in `{"endpoint_url": "http://localhost:9000"}`.
        **options
            As for the constructor.

        Raises
        ------
        BundleError
            The bundle is missing or damaged.
        """
        return cls(load_bundle(url, storage=storage), **options)

    def classify(self, batch: Pixels | torch.Tensor, *, embeddings: bool = False) -> Scores:
        """Scores of a batch: (N, 3, crop, crop) uint8 RGB, N at least 1; a tensor on any device."""
        return self.submit(batch, embeddings=embeddings).get()

    @torch.inference_mode()
    def submit(self, batch: Pixels | torch.Tensor, *, embeddings: bool = False) -> PendingScores:
        """As `classify`, without waiting for a GPU to be done."""
        pixels = self._normalise.upload(batch)
        watch = CudaTimer(self.device)
        logits, features = self._run_network(pixels, embeddings)
        logits = logits[: len(pixels)].float() / self.bundle.spec.temperature
        if self._scaling is not None:
            logits = torch.log_softmax(logits, dim=1) * self._scaling[0] + self._scaling[1]
        embedding = None if features is None else features.float()
        # softmax alone would turn a logit of minus infinity into a score of 0
        finite = torch.isfinite(logits).all(dim=1, keepdim=True)
        scores = torch.softmax(logits, dim=1).where(finite, math.nan)
        return PendingScores(scores, embedding, watch)

    def build_not_finite_error(self) -> NotFinite:
        """The error of an image that the network gives no numbers for."""
        remedy = "" if self.precision == "fp32" else "; run it with --precision fp32"
        return NotFinite(
            f"the network of {self.bundle.url} gives NaN or infinity for this image in "
            f"{self.precision}{remedy}"
        )

    @overload
    def predict(
        self,
        images_: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = ...,
        batch_size: int = ...,
        errors: Literal["raise"] = ...,
    ) -> Predictions[Prediction]: ...

    @overload
    def predict(
        self,
        images_: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = ...,
        batch_size: int = ...,
        errors: Literal["return"],
    ) -> Predictions[Prediction | FailedPrediction]: ...

    def predict(
        self,
        images_: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        errors: Literal["raise", "return"] = "raise",
    ) -> Predictions[Any]:
        """Label images given as paths, URLs, bytes of a file, Pillow images or uint8 arrays.

        images_: one image, or any iterable of images; four-dimensional arrays are many
        top_k:   labels per image; all classes where there are fewer
        errors:  "raise" for an exception at the first image that cannot be read or decoded,
            "return" for a FailedPrediction in its place

        The files of one batch are in memory at a time. A Pillow image is resized by Pillow, a file
        by what is fastest for it: their last bits may differ.
        Raises RequestError for other types and values, StorageError or ImageError that names the
        image; among them NotFinite, where the network gives NaN or infinity for it.
        """
        _check_positive(top_k=top_k, batch_size=batch_size)
        if errors not in ("raise", "return"):
            raise RequestError(f"errors: {errors!r} is neither 'raise' nor 'return'")
        found: Predictions[Any] = Predictions()
        for batch in sources.iterate_batches(images_, batch_size):
            ready: list[Pixels] = []
            answers: list[Prediction | FailedPrediction | None] = []
            for place, item in enumerate(batch, len(found)):
                try:
                    ready.append(sources.load_pixels(item, self.preprocess))
                    answers.append(None)
                except ImgclsError as error:
                    answers.append(_build_failed_prediction(error, item, place, errors))
            ranked = iter(self._predict_pixels(ready, top_k))
            for at, item in enumerate(batch):
                if answers[at] is None:
                    answer = next(ranked)
                    answers[at] = (
                        _build_failed_prediction(answer, item, len(found) + at, errors)
                        if isinstance(answer, NotFinite)
                        else replace(answer, source=item)
                    )
            found += answers
        return found

    def _predict_pixels(self, pixels: list[Pixels], top_k: int) -> list[Prediction | NotFinite]:
        if not pixels:
            return []
        scored = self.classify(decode.stack_images(pixels))
        ranked = self.rank_scores(scored.scores, top_k=top_k)
        return [
            prediction if finite else self.build_not_finite_error()
            for prediction, finite in zip(ranked, scored.is_finite, strict=True)
        ]

    def rank_scores(
        self,
        scores: npt.NDArray[np.float32],
        *,
        top_k: int = 5,
        threshold: float | None = None,
    ) -> list[Prediction]:
        """What (N, C) scores say of N images.

        threshold: takes the place of the bundle's
        Raises RequestError for a top_k below 1.
        """
        _check_positive(top_k=top_k)
        top, values = select_top_k(scores, top_k)
        needed = self._thresholds if threshold is None else np.full(len(self.classes), threshold)
        reached = values[:, 0] >= needed.astype(np.float32)[top[:, 0]]
        return [
            Prediction(
                label=self.classes[best[0]],
                confidence=float(value[0]),
                accepted=bool(accepted),
                topk_labels=[self.classes[i] for i in best],
                topk_scores=[float(v) for v in value],
            )
            for best, value, accepted in zip(top, values, reached, strict=True)
        ]

    @torch.inference_mode()
    def _record_cuda_graph(self, batch_size: int) -> CudaGraphRunner:
        crop = self.preprocess.crop
        example = torch.empty((batch_size, 3, crop, crop), dtype=self._dtype, device=self.device)
        return CudaGraphRunner(self._forward, example.to(memory_format=torch.channels_last))

    def _run_network(
        self, pixels: torch.Tensor, embeddings: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = self._normalise(pixels).to(self._dtype)
        if not embeddings:
            return self._forward(inputs), None
        caught: list[torch.Tensor] = []
        _, head = zoo.find_head(self._network)
        me = threading.get_ident()

        def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if threading.get_ident() == me:  # other threads may be running the same network
                caught.append(args[0])

        hook = head.register_forward_pre_hook(catch)
        try:
            logits = self._network(inputs)
        finally:
            hook.remove()
        features = caught[-1][: len(pixels)]
        return logits, features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise RequestError(f"{name}: {value!r} is not a whole number of at least 1")


def _build_failed_prediction(
    error: ImgclsError, source: ImageSource, place: int, errors: Literal["raise", "return"]
) -> FailedPrediction:
    """The answer for an image that cannot be used; raises the error, with its name, if asked to."""
    name = sources.describe_source(source, place)
    words = str(error) if name in str(error) else f"{name}: {error}"
    if not isinstance(error, (StorageError, ImageError)):
        raise type(error)(words) from error  # another type or value is a mistake of the caller's
    if errors == "raise":
        raise type(error)(words) from error
    return FailedPrediction(error.status, words, source)


def select_top_k(
    scores: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(N, k) class indices and their scores, best first; ties go to the lower index. k >= 1."""
    k = min(k, scores.shape[1])
    if k == 1:
        order = scores.argmax(1)[:, None]
    else:
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def record_int8_ranges(bundle: Bundle, batches: Iterable[Pixels]) -> ValueRanges:
    """What the convolutions of a bundle's network see, for int8.

    batches: (N, 3, crop, crop) uint8 RGB
    Raises BundleError when it has none that could be quantised.
    """
    device = torch.device("cpu")
    dtype = _choose_float_dtype("auto", device)
    network = load_network(bundle, device, dtype)
    normalise = Normalizer(bundle.spec.preprocess, device)
    inputs = (normalise(batch).to(dtype) for batch in batches)
    side = bundle.spec.preprocess.crop
    try:
        return int8.record_ranges(network, side, spare=zoo.find_head(network)[1], batches=inputs)
    except ValueError as error:
        raise BundleError(f"bundle {bundle.url}: int8: {error}") from error


def choose_precision(
    wanted: Precision, device: torch.device
) -> tuple[Literal["fp32", "bf16", "int8"], str]:
    """The precision to run at on a device, and why.

    Raises RequestError for int8 on a GPU, or on a CPU that does not multiply it.
    """
    if wanted == "int8" and device.type != "cpu":
        raise RequestError("precision int8: is for CPUs; a GPU does better with bf16, or auto")
    if wanted == "int8" and not _read_cpu_flags() & _INT8_FLAGS:
        raise RequestError(
            f"precision int8: this CPU has none of {', '.join(sorted(_INT8_FLAGS))}, without which "
            "sums overflow; say --precision auto"
        )
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has it") if native else ("fp32", "the GPU has no bfloat16")
    flags = _read_cpu_flags()
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return "bf16", f"the CPU has {name}"
    return "fp32", "the CPU has no bfloat16 instructions"


def load_network(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The bundle's network in eval mode, its batch norms folded, channels last."""
    network = zoo.build_network(bundle.spec.architecture, len(bundle.spec.classes))
    try:
        network.load_state_dict(load_bundle_weights(bundle))
    except RuntimeError as error:
        raise BundleError(
            f"bundle {bundle.url}: the weights do not fit: {one_line(error)}"
        ) from error
    return fold_batch_norms(network.eval()).to(device, dtype).to(memory_format=torch.channels_last)


def _quantize_from_bundle(network: nn.Module, bundle: Bundle, last: nn.Module) -> nn.Module:
    ranges = require_int8(bundle).ranges
    try:
        return int8.quantize_network(
            network, bundle.spec.preprocess.crop, spare=last, ranges=ranges
        )
    except ValueError as error:
        raise BundleError(f"bundle {bundle.url}: int8: {error}; quantise it anew") from error


def _choose_float_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of what is not quantised."""
    if precision in ("auto", "int8"):
        precision, _ = choose_precision("auto", device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _run_head_in_fp32(network: nn.Module) -> None:
    """Run a bf16 network's last step in fp32.

    Logits rounded to 8 bits tie and flip labels: SqueezeNet on 334 ImageNet photographs differs
    from fp32 in 9 top-1 labels with them and in 6 without. A Linear head costs nothing in fp32; a
    convolution keeps bf16 products, but what averages its outputs over space does so in fp32.
    """
    for head in zoo.find_heads(network).values():
        if isinstance(head, nn.Linear):
            head.float()
            head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        else:
            head.register_forward_hook(lambda _, args, output: output.float())


def _pad_small_head_batches(network: nn.Module) -> None:
    """Have Linear heads see at least four rows, of which the last ones may be of no image.

    Three or fewer take another path through the matrix product, which adds up in another order:
    the last bit of an image's scores would depend on what it is classified with. The rows of no
    image end with the head, so that the outputs of several heads can be added up.
    """
    for head in zoo.find_heads(network).values():
        if isinstance(head, nn.Linear):
            layer: Any = head
            layer.forward = functools.partial(_forward_padded_to_four, head.forward)


def _forward_padded_to_four(
    forward: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    if rows.dim() != 2 or len(rows) >= 4:
        return forward(rows)
    return forward(nn.functional.pad(rows, (0, 0, 0, 4 - len(rows))))[: len(rows)]


_INT8_FLAGS = {"amx_int8", "avx512_vnni", "avx_vnni"}
_ISAS = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX",
)  # fmt: skip
"""Instruction sets to which oneDNN can be limited, in ascending order.
Source: oneDNN developer guide, "CPU Dispatcher Control"."""
_ISA_BY_FLAG = {
    "avx_vnni": "AVX2_VNNI", "avx512_vnni": "AVX512_CORE_VNNI", "avx512_bf16": "AVX512_CORE_BF16",
    "amx_bf16": "AVX512_CORE_AMX", "amx_int8": "AVX512_CORE_AMX",
}  # fmt: skip


def _read_cpu_flags() -> set[str]:
    """The CPU's flags, without those that ONEDNN_MAX_CPU_ISA keeps oneDNN from using."""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            line = next((each for each in info if each.startswith(("flags", "Features"))), "")
        flags.update(line.split())
    except OSError:
        pass
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in _ISAS:
        allowed = _ISAS[: _ISAS.index(limit) + 1]
        flags -= {flag for flag, isa in _ISA_BY_FLAG.items() if isa not in allowed}
    return flags
