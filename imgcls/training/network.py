"""The network to train: built, filled with weights and tried on before any worker starts."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn

from imgcls.config import Section
from imgcls.data.preprocess import Preprocess, ResizeMode
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import Architecture


class ModelConfig(Section):
    """Which network, and what it starts from."""

    name: str = "resnet18"
    """small_cnn, or any torchvision classifier; see `imgcls model list`."""
    weights: str | None = None
    """A .safetensors or .pth file, `torchvision`, or a name like IMAGENET1K_V1; random if none."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor, e.g. {dropout: 0.3}."""
    image_size: PositiveInt | None = None
    """Side of the square that the network sees, in pixels; what it was made for if none."""
    resize_mode: ResizeMode | None = None
    """crop, pad or squash what is not square; as the network's weights were made if none."""


def describe(config: ModelConfig) -> tuple[Architecture, Preprocess]:
    """The architecture and the preprocessing that the bundle will carry.

    Raises BundleError when there is no such network.
    """
    architecture = zoo.architecture(config.name, config.options)
    if config.weights is not None:
        architecture = zoo.pretrained_options(architecture, config.weights)
    preprocess = zoo.default_preprocess(architecture, config.weights)
    changes: dict[str, Any] = {}
    if config.image_size is not None:
        # the margin that the centre crop cuts off stays in proportion
        margin = preprocess.resize / preprocess.crop
        changes |= {"crop": config.image_size, "resize": round(config.image_size * margin)}
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
