"""How a network is trained: from scratch, its head alone, all of it, or one after the other.

Owns what a strategy means for learning rates and for which layers move when. The head alone is
trained by `probe`; everything else is `loop`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from imgcls.config import Section
from imgcls.errors import RequestError
from imgcls.models.bundle import Architecture
from imgcls.training.optim.param_groups import ParamGroup, build_param_groups, split_layers

Strategy = Literal["scratch", "probe", "finetune", "probe_then_finetune"]


class ProbeConfig(Section):
    """The head alone, on features that are computed once."""

    views: PositiveInt = 2
    """Features per training image: as it is, mirrored (where augment.hflip allows), then crops."""
    l2: NonNegativeFloat | None = None
    """Pull of the head's weights towards 0; chosen by the validation loss if none."""


class FinetuneConfig(Section):
    """All layers, the lower ones more carefully."""

    backbone_lr_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Learning rate of the layers below the head, as a share of optim.lr."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer below the head moves by this factor less than the one above it; 1 is none."""
    batchnorm: Literal["frozen", "train"] = "frozen"
    """Batch normalization: frozen keeps the statistics of the weights, train uses each batch's."""
    unfreeze_every: PositiveInt | None = None
    """Epochs after which one more layer, from the head down, begins to move; at once if none."""


def resolve_strategy(strategy: Strategy | None, *, pretrained: bool) -> Strategy:
    """The strategy that is meant: the head and then all from weights, else from scratch.

    Raises RequestError when a strategy needs weights and there are none.
    """
    if strategy is None:
        return "probe_then_finetune" if pretrained else "scratch"
    if strategy != "scratch" and not pretrained:
        raise RequestError(
            f"strategy {strategy}: needs weights to start from; give --model.weights FILE (or "
            "`torchvision`), or --strategy scratch"
        )
    return strategy


def choose_default_lr(strategy: Strategy, architecture: Architecture) -> float:
    """The highest learning rate of a batch of 64 under AdamW.

    The small CNN, all normalised, bears more than most do; 1e-3 leaves it short of what it can.
    """
    if strategy != "scratch":
        return 3e-4
    return 3e-3 if architecture.name == "small_cnn" else 1e-3


def has_probe(strategy: Strategy) -> bool:
    return strategy in ("probe", "probe_then_finetune")


def plan_param_groups(
    network: nn.Module, strategy: Strategy, config: FinetuneConfig
) -> list[ParamGroup]:
    """Which parameters share a learning rate under a strategy."""
    if strategy == "scratch":
        return build_param_groups(network)
    return build_param_groups(
        network, backbone_scale=config.backbone_lr_scale, layer_decay=config.layer_decay
    )


def find_frozen_norms(
    network: nn.Module, strategy: Strategy, config: FinetuneConfig, moving: Collection[str]
) -> list[nn.Module]:
    """The batch normalization layers that keep their statistics while others train.

    All of them where training starts from weights, unless `batchnorm` is train: normalizing by the
    few images of a batch is another function than the one that the weights and the probe were
    fitted with. EfficientNet-Lite0 after a probe of 200 photographs is right on all of them with
    the statistics of its weights and on 73 % with those of batches of 50. Else the layers whose own
    parameters do not move.

    moving: names of the parameters that move
    """
    norms = {
        n: m for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    if strategy != "scratch" and config.batchnorm == "frozen":
        return list(norms.values())
    return [
        module
        for name, module in norms.items()
        if not any(parameter.rpartition(".")[0] == name for parameter in moving)
        and any(True for _ in module.parameters())
    ]


def find_trainable(
    network: nn.Module, strategy: Strategy, config: FinetuneConfig, epoch: int
) -> set[str]:
    """Names of the parameters that move in an epoch, counted from 1."""
    cut = split_layers(network)
    if strategy == "scratch" or config.unfreeze_every is None:
        return {name for layer in cut for name in layer}
    # after a probe, an epoch of the head alone would teach it nothing
    free = 1 + (epoch - 1) // config.unfreeze_every + has_probe(strategy)
    return {name for layer in cut[-free:] for name in layer}
