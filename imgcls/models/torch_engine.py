"""PyTorch engine: the network of a bundle on a CPU or a GPU, at any precision.

On CPUs convolutions are fused or quantized; on GPUs forward passes are captured as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from imgcls import log
from imgcls.data.decoding.decode import Pixels
from imgcls.errors import BundleError, one_line
from imgcls.models import fuse_cpu, fuse_cuda, int8, zoo
from imgcls.models.bundle import Bundle, load_bundle_weights, require_int8
from imgcls.models.cuda_graph import CaptureError, CudaGraphRunner
from imgcls.models.fold_batchnorm import fold_batch_norms
from imgcls.models.graph_sizes import SizedForward
from imgcls.models.head import HeadNetwork
from imgcls.models.normalize import Normalizer
from imgcls.models.precision import RunPrecision, choose_float_dtype

USUAL_BATCH_SIZES = (1, 32)
"""Sizes for which fused layers are compared with the separate steps on a GPU, if none are given."""


class TorchEngine:
    """The network of a bundle in PyTorch.

    compile, batch_size: as for `Classifier`
    Raises BundleError if the weights do not fit the network.
    """

    name = "torch"
    version = str(torch.__version__)

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        precision: RunPrecision,
        *,
        compile: bool = False,
        batch_size: int | Sequence[int] | None = None,
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._dtype = choose_float_dtype(precision, device)
        if device.type == "cuda" and precision == "fp32":
            # by default cuDNN rounds the factors of a convolution to 10 bits
            torch.backends.cudnn.allow_tf32 = False
        crop = bundle.spec.preprocess.crop
        sizes = [batch_size] if isinstance(batch_size, int) else batch_size
        network = load_network(bundle, device, self._dtype)
        _, last = zoo.find_head(network)
        if precision == "int8":
            network = _quantize_from_bundle(network, bundle, last)
        elif not compile and device.type == "cuda":
            network = fuse_cuda.fuse_on_cuda(
                network, crop, keep=last, batch_sizes=sizes or USUAL_BATCH_SIZES
            )
        elif not compile:
            network = fuse_cpu.fuse_convolutions(network, crop, keep=last)
        self._network = HeadNetwork(network, in_fp32=self._dtype != torch.float32)
        self._normalize = Normalizer(bundle.spec.preprocess, device)
        self._compute_logits: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(network) if compile and precision != "int8" else network
        )
        if device.type == "cuda" and sizes is not None:
            self._compute_logits = self._capture_cuda_graphs(sizes)

    @property
    def embedding_width(self) -> int:
        """E, the length of the features."""
        return self._network.embedding_width

    def upload(self, batch: Pixels | torch.Tensor) -> torch.Tensor:
        """Copy (N, 3, crop, crop) uint8 to the device."""
        return self._normalize.upload(batch)

    def run(
        self, pixels: torch.Tensor, *, features: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, C) logits and (N, E) features, None unless requested; may return before a GPU ends.

        pixels: (N, 3, crop, crop) uint8 on the device
        """
        inputs = self._normalize(pixels).to(self._dtype)
        return self._network(inputs) if features else (self._compute_logits(inputs), None)

    @torch.inference_mode()
    def _capture_cuda_graphs(self, sizes: Iterable[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network as a CUDA graph per batch size, or as it is if it cannot be captured."""
        crop = self._bundle.spec.preprocess.crop
        graphs = {}
        try:
            for size in sizes:
                example = torch.empty((size, 3, crop, crop), dtype=self._dtype, device=self._device)
                example = example.to(memory_format=torch.channels_last)
                graphs[size] = CudaGraphRunner(self._compute_logits, example)
            return SizedForward(graphs)
        except CaptureError as error:
            log.emit("note", f"{self._bundle.url} runs without a CUDA graph: {error}")
            return self._compute_logits


class SkipRandomWeights(TorchFunctionMode):
    """Within the block, the parameters of new layers are not initialized, but hold any values.

    For networks whose parameters are all loaded afterwards, which `load_state_dict` checks. Random
    numbers take 0.1 CPU seconds for a ResNet-18 and 0.45 for a ViT-B/16.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the parameter that a random generator was to fill; call any other function."""
        named = kwargs or {}
        filled = args[0] if args else named.get("tensor")
        if func in _RANDOM_FILLS and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **named)


_RANDOM_FILLS = (
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.erfinv_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
)
"""Functions that initialize weights; `erfinv_` makes a normal distribution of a uniform one."""


def load_network(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The bundle's network in eval mode, its batch norms folded, channels last."""
    network = fold_batch_norms(load_plain_network(bundle))
    return network.to(device, dtype).to(memory_format=torch.channels_last)


def load_plain_network(bundle: Bundle) -> nn.Module:
    """The bundle's network in eval mode, in float32 on the CPU, as its library builds it."""
    with SkipRandomWeights():
        network = zoo.build_network(bundle.spec.architecture, bundle.spec.num_outputs)
    try:
        network.load_state_dict(load_bundle_weights(bundle))
    except RuntimeError as error:
        raise BundleError(
            f"bundle {bundle.url}: the weights do not fit: {one_line(error)}"
        ) from error
    return network.eval()


def _quantize_from_bundle(network: nn.Module, bundle: Bundle, last: nn.Module) -> nn.Module:
    ranges = require_int8(bundle).ranges
    try:
        return int8.quantize_network(network, bundle.spec.preprocess.crop, keep=last, ranges=ranges)
    except ValueError as error:
        raise BundleError(f"bundle {bundle.url}: int8: {error}; quantize it again") from error
