"""The network to train: built, filled with weights and tried on before any worker starts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from imgcls.config import Section
from imgcls.data.preprocess import Decode, Preprocess, ResizeMode
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import Architecture

_CROP_PCT = 0.965
"""As torchvision's training recipe of 2021 has it: the 0.875 of the one before cuts off what
random crops of half an image's area and more have shown in training.
"""


class ModelConfig(Section):
    """Which network, and what it starts from."""

    shorthand: ClassVar[str | None] = "name"

    name: str = "resnet18"
    """small_cnn, any torchvision classifier (`imgcls model list`), or timm's as timm:NAME."""
    weights: str | None = None
    """A .safetensors or .pth file, torchvision, timm, or e.g. IMAGENET1K_V1; random if none."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor, e.g. {dropout: 0.3}."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of features dropped before the head in training; as the architecture has it if none."""
    stochastic_depth: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of images that skip the last block in training, earlier ones less (Huang 2016)."""
    image_size: PositiveInt | None = None
    """Side of the square that the network sees, in pixels; what it was made for if none."""
    resize_mode: ResizeMode | None = None
    """crop, pad or squash what is not square; as the network's weights were made if none."""
    crop_pct: Annotated[float, Field(gt=0.5, le=1.0)] | None = None
    """Share of the shorter side that labelling sees, from the centre; at least 0.965 if none."""
    decode: Decode = "exact"
    """exact: decode JPEGs whole. fast: decode large JPEGs at 1/2, 1/4 or 1/8 of their size."""


def describe(config: ModelConfig) -> tuple[Architecture, Preprocess]:
    """The architecture and the preprocessing that the bundle will carry.

    Raises BundleError when there is no such network.
    """
    architecture = zoo.trainable(zoo.architecture(config.name, config.options))
    if config.weights is not None:
        architecture = zoo.pretrained_options(architecture, config.weights)
    preprocess = zoo.default_preprocess(architecture, config.weights)
    crop = config.image_size or preprocess.crop
    kept = config.crop_pct or max(_CROP_PCT, preprocess.crop / preprocess.resize)
    changes: dict[str, Any] = {
        "crop": crop,
        "resize": round(crop / kept),
        "decode": config.decode,
    }
    if config.resize_mode is not None:
        changes["mode"] = config.resize_mode
    return architecture, preprocess.model_copy(update=changes)


def start(
    architecture: Architecture, weights: str | None, num_classes: int, *, seed: int
) -> nn.Module:
    """The network as it is before the first step: weights where given, the rest from the seed.

    Raises BundleError when an option is unknown or the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = zoo.build(architecture, num_classes)
    if weights is not None:
        zoo.fit_weights(network, zoo.load_weights(weights, architecture), replace_head=True)
    return network


def regularise(network: nn.Module, config: ModelConfig) -> None:
    """Set what drops features and blocks in training; in evaluation it does nothing.

    Raises BundleError when the architecture has no stochastic depth.
    """
    if config.dropout is not None:
        _set_dropout(network, config.dropout)
    if config.stochastic_depth is not None:
        blocks = [m for m in network.modules() if isinstance(m, StochasticDepth)]
        if not blocks:
            raise BundleError(
                f"model.stochastic_depth: {config.name} has none (EfficientNet, ConvNeXt, Swin and "
                "MaxViT do); leave it out"
            )
        for depth, block in enumerate(blocks):
            block.p = config.stochastic_depth * depth / max(1, len(blocks) - 1)


def _set_dropout(network: nn.Module, share: float) -> None:
    """Of the dropout layers beside the head; a head without any gets one before it."""
    name, head = zoo.head(network)
    parent = network.get_submodule(name.rpartition(".")[0])
    layers = [m for m in parent.children() if isinstance(m, nn.Dropout)]
    for layer in layers:
        layer.p = share
    if not layers:
        head.register_forward_pre_hook(
            lambda module, args: (F.dropout(args[0], share, module.training), *args[1:])
        )


def try_on(network: nn.Module, preprocess: Preprocess, rows: int) -> None:
    """Run a training step's shapes through the network, without computing anything.

    rows: the smallest number of images that a worker has in a step
    Raises BundleError when the network cannot take images of this size, or so few of them.
    """
    shapes = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*network.named_parameters(), *network.named_buffers())
    }
    images = torch.zeros(rows, 3, preprocess.crop, preprocess.crop, device="meta")
    try:
        torch.func.functional_call(network.train(), shapes, images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BundleError(
            f"the network cannot train on {rows} images of {preprocess.crop}x{preprocess.crop} "
            f"per worker: {' '.join(str(error).split())[:200]}; set model.image_size (or its "
            "counterpart in model.options), or raise batch_size"
        ) from error
