"""The network before training: build it, load its weights and check its input size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from imgcls import log
from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import Architecture
from imgcls.training.config import ModelConfig

_MIN_CROP_PCT = 0.965
"""Of torchvision's training recipe of 2021. The 0.875 of the recipe before it removes image borders
that random crops of half the area and more have shown in training.
"""
_NORM_WINDOWS, _MAX_NORM_MOMENTUM = 20, 0.1


def resolve_model_snapshot(config: ModelConfig) -> ModelConfig:
    """The configuration by the names of a library, for a network in a folder or on the Hub.

    Raises BundleError for a folder without a network.
    """
    name, weights, options = zoo.resolve_snapshot(
        config.name, config.weights, config.options, config.image_size
    )
    return config.model_copy(update={"name": name, "weights": weights, "options": options})


def resolve_model(config: ModelConfig) -> tuple[Architecture, Preprocess]:
    """The architecture and the preprocessing of the bundle.

    Raises BundleError when the network is unknown.
    """
    architecture = zoo.adapt_for_training(zoo.resolve_architecture(config.name, config.options))
    if config.image_size is not None:
        architecture = zoo.set_image_size(architecture, config.image_size)
    if config.weights is not None:
        architecture = zoo.add_pretrained_options(architecture, config.weights, config.image_size)
    preprocess = zoo.get_default_preprocess(architecture, config.weights)
    crop = config.image_size or preprocess.crop
    kept = config.crop_pct or max(_MIN_CROP_PCT, preprocess.crop / preprocess.resize)
    changes: dict[str, Any] = {
        "crop": crop,
        "resize": round(crop / kept),
        "decode": config.decode,
    }
    if config.resize_mode is not None:
        changes["mode"] = config.resize_mode
    return architecture, preprocess.model_copy(update=changes)


def build_initial_network(
    architecture: Architecture, weights: str | None, num_classes: int, *, seed: int
) -> nn.Module:
    """The network before the first step: loaded weights, and random ones from the seed.

    Raises BundleError when an option is unknown or the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = zoo.build_network(architecture, num_classes)
    if weights is not None:
        state = zoo.load_weights(weights, architecture)
        matched = zoo.match_weights(network, state)
        left = zoo.apply_weights(network, matched.state, replace_head=True)
        absent = [key for key in left if key not in matched.state]
        notes = matched.describe_changes()
        if absent:
            notes.append(f"the weights have no head ({', '.join(absent)}); a new one is trained")
        for note in notes:
            log.emit("note", f"model.weights {weights}: {note}")
    return network


def compute_head_coefficients(network: nn.Module, preprocess: Preprocess) -> tuple[float, ...]:
    """The coefficients of the heads' outputs in the logits, which a linear probe needs.

    1 for a network with one head, 0.5 each for two heads that are averaged. They are measured on
    the network with random heads, so that they hold for any code in its forward method. Auxiliary
    heads that contribute to the logits (as in VOLO) are set to zero, and fine-tuned from there.
    Raises BundleError when the logits are not a weighted sum of the heads' outputs.
    """
    coefficients = _fit_head_coefficients(network, preprocess)
    if coefficients is None:
        auxiliary = zoo.list_head_names(network) - zoo.find_heads(network).keys()
        with torch.no_grad():
            for name in auxiliary:
                for parameter in network.get_submodule(name).parameters():
                    parameter.zero_()
        coefficients = _fit_head_coefficients(network, preprocess) if auxiliary else None
    if coefficients is None:
        raise BundleError(
            f"strategy: a linear probe cannot be fitted to {type(network).__name__}, whose logits "
            "are not a weighted sum of its heads' outputs. Pass --strategy finetune."
        )
    return coefficients


@torch.no_grad()
def _fit_head_coefficients(network: nn.Module, preprocess: Preprocess) -> tuple[float, ...] | None:
    """The coefficients, measured on two random images; None when the logits are not such a sum.

    Each head's coefficient is measured with all other heads set to zero: in one least squares for
    all of them, the outputs of heads whose inputs hardly vary are nearly collinear (eight heads of
    EfficientViM: 0.1249 instead of 0.125, and logits 7 % off).
    """
    heads = zoo.find_heads(network)
    saved = {name: copy.deepcopy(layer.state_dict()) for name, layer in heads.items()}
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name, layer in heads.items()
    ]
    network.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, preprocess.crop, preprocess.crop, generator=generator)
    coefficients = dict.fromkeys(heads, 0.0)
    try:
        for active in [{name} for name in heads] + ([set(heads)] if len(heads) > 1 else []):
            for name, layer in heads.items():
                for parameter in layer.parameters():
                    values = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(values if name in active else torch.zeros_like(values))
            expected = network(images).double()
            parts = {name: spatial_mean(output).double() for name, output in outputs.items()}
            if parts.keys() != heads.keys() or any(
                p.shape != expected.shape for p in parts.values()
            ):
                return None
            if len(active) == 1:
                name = next(iter(active))
                coefficients[name] = float(
                    (parts[name] * expected).sum() / parts[name].square().sum()
                )
            found = sum((coefficients[name] * parts[name] for name in active), expected * 0)
            if not (found - expected).abs().max() <= 1e-4 * expected.abs().max():
                return None
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in heads.items():
            layer.load_state_dict(saved[name])
    return None if min(map(abs, coefficients.values())) < 1e-6 else tuple(coefficients.values())


def spatial_mean(features: torch.Tensor) -> torch.Tensor:
    """Features (N, E), averaged over space if they are (N, E, H, W)."""
    return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


def set_regularization(network: nn.Module, config: ModelConfig) -> None:
    """Set dropout and stochastic depth, which are active only in training.

    Raises BundleError when the architecture has no stochastic depth.
    """
    if config.dropout is not None:
        _set_dropout(network, config.dropout)
    if config.stochastic_depth is not None:
        blocks = [m for m in network.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
        if not blocks:
            raise BundleError(
                f"model.stochastic_depth: {config.name} has none (EfficientNet, ConvNeXt, Swin and "
                "MaxViT do). Remove the setting."
            )
        for depth, block in enumerate(blocks):
            block.p = config.stochastic_depth * depth / max(1, len(blocks) - 1)


def _set_dropout(network: nn.Module, rate: float) -> None:
    """Set the dropout layers next to the heads; a head without such a layer gets one."""
    heads = zoo.find_heads(network)
    for name, head in heads.items():
        parent = network.get_submodule(name.rpartition(".")[0])
        children = [m for m in parent.children() if m is head or m not in heads.values()]
        if parent is network:
            # not its first layers, such as the dropout of a transformer's tokens
            children = children[: children.index(head)]
            last = [index for index, m in enumerate(children) if any(True for _ in m.parameters())]
            children = children[last[-1] + 1 :] if last else children
        layers = [m for m in children if isinstance(m, nn.Dropout)]
        for layer in layers:
            layer.p = rate
        if not layers:
            head.register_forward_pre_hook(
                lambda module, args: (F.dropout(args[0], rate, module.training), *args[1:])
            )


def limit_norm_windows(network: nn.Module, steps: int) -> None:
    """Average running statistics over at most a twentieth of a training, or over ten steps.

    With momentum m, batch normalization averages over about the last 1 / m forward passes: 100 in
    MobileNetV3. In a training from scratch with a few hundred of them, those are statistics of
    other weights: the network learns its training images, and in evaluation predicts one class for
    all images. No momentum is raised above 0.1, torch's default.

    steps: forward passes of the whole training
    """
    least = min(_MAX_NORM_MOMENTUM, _NORM_WINDOWS / steps)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, least)


def check_can_train(network: nn.Module, preprocess: Preprocess, rows: int) -> None:
    """Check that the network accepts the shapes of a training step.

    rows: minimum number of images of a worker in a part of a step
    Raises BundleError when the network cannot process images of this size, or so few of them.
    """
    # A network that takes two images takes more: batch normalization refuses one value per channel.
    # On the meta device, torch would load its compiler for this, which takes a second.
    images = torch.zeros(min(rows, 2), 3, preprocess.crop, preprocess.crop)
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.func.functional_call(network.train(), buffers, images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BundleError(
            f"the network cannot train on {rows} images of {preprocess.crop}x{preprocess.crop} "
            f"per worker: {' '.join(str(error).split())[:200]}. Set model.image_size (or its "
            "counterpart in model.options), or raise batch_size."
        ) from error
