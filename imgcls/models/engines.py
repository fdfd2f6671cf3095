"""Engines that run the network of a bundle, and the choice between them.

An engine takes uint8 pixels and returns logits and features; what they mean is defined in
`models.task`. PyTorch runs everywhere; OpenVINO, an optional package, runs on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from imgcls.data.decoding.decode import Pixels
from imgcls.errors import BundleError, RequestError
from imgcls.models.bundle import Bundle, EngineName, require_int8
from imgcls.models.openvino_engine import ConversionError, OpenVinoEngine
from imgcls.models.openvino_package import check_engine
from imgcls.models.precision import RunPrecision, has_int8_instructions, has_native_bf16
from imgcls.models.torch_engine import TorchEngine


class Engine(Protocol):
    """A network on one device."""

    @property
    def name(self) -> str:
        """The value of `engine` that chooses it."""

    @property
    def version(self) -> str:
        """Version of the package that runs the network."""

    @property
    def embedding_width(self) -> int:
        """E, the length of the features."""

    def upload(self, batch: Pixels | torch.Tensor) -> torch.Tensor:
        """Copy (N, 3, crop, crop) uint8 to the device."""

    def run(
        self, pixels: torch.Tensor, *, features: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, C) logits and (N, E) features, None unless requested, of uploaded pixels."""


def build_engine(
    wanted: EngineName,
    bundle: Bundle,
    device: torch.device,
    precision: RunPrecision,
    *,
    compile: bool = False,
    batch_size: int | Sequence[int] | None = None,
) -> Engine:
    """The engine for a bundle on a device.

    wanted: "auto" is torch
    compile, batch_size: as for `Classifier`
    Raises RequestError if the engine cannot be used as requested, BundleError if the weights do not
    fit the network, or the engine cannot run it.
    """
    check_engine(wanted, compile=compile)
    if wanted != "openvino":
        return TorchEngine(bundle, device, precision, compile=compile, batch_size=batch_size)
    if precision == "bf16" and not has_native_bf16(device):
        raise RequestError(
            "engine openvino: this CPU has no bfloat16 instructions, without which OpenVINO has no "
            "bf16; use --precision fp32, or --engine torch"
        )
    if precision == "int8" and require_int8(bundle).has_vnni and not has_int8_instructions():
        raise BundleError(
            f"bundle {bundle.url}: its accuracy in int8 was measured on a CPU with VNNI; on this "
            "one sums can overflow. Quantize it again on a CPU of this kind"
        )
    try:
        return OpenVinoEngine(bundle, precision)
    except ConversionError as error:
        raise BundleError(
            f"bundle {bundle.url}: OpenVINO cannot run its network: {error}; use --engine torch"
        ) from error
