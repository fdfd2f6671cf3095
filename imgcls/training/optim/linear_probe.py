"""The linear probe: a new head on frozen features, fitted to the end in seconds.

Features are computed once and stay with the worker that computed them; the fit is L-BFGS over all
workers' rows (losses and gradients added up), so that every worker comes to the same head.
Multinomial logistic regression with an L2 penalty, on standardised features; the penalty is chosen
by the validation loss. Source of the protocol: Kornblith et al., CVPR 2019, "Do Better ImageNet
Models Transfer Better?", appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from imgcls.models import zoo
from imgcls.training.augment.augment import Augment, AugmentConfig
from imgcls.training.augment.ops.crop import center_crop
from imgcls.training.data.batches import Batch
from imgcls.training.network import spatial_mean
from imgcls.training.train_step import TrainStep
from imgcls.training.validation import EvalAccumulator, EvalMetrics

L2_CHOICES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001)
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class ProbeFeatures:
    """One worker's share of a split. inputs: (N, E) float32; labels: (N,) int64.

    Of a network with several heads, the inputs of all of them, concatenated.
    """

    inputs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class LinearHead:
    """A fitted head.

    weight: (C, E) float32; bias: (C,) float32; l2: its penalty
    val_loss, val_error: mean over the validation rows, in nats, and its standard error
    """

    weight: torch.Tensor
    bias: torch.Tensor
    l2: float
    val_loss: float
    val_loss_error: float


@torch.no_grad()
def extract_features(learner: TrainStep, batches: Iterator[Batch], views: int) -> ProbeFeatures:
    """Inputs of the heads, averaged over space, for a worker's share of a split.

    views: features per image: as labelling sees it, mirrored, then gently augmented ones
    """
    network = learner.network.eval()
    size = learner.augment.size
    gentle = Augment(AugmentConfig(preset="light"), size=size, num_classes=1)
    heads = zoo.find_heads(network)
    caught: dict[str, torch.Tensor] = {}
    width = sum(zoo.get_input_width(head) for head in heads.values())
    found = [torch.zeros(0, width, device=learner.place.device)]
    labels = [torch.zeros(0, dtype=torch.int64, device=learner.place.device)]
    hooks = [
        head.register_forward_pre_hook(lambda _, args, name=name: caught.update({name: args[0]}))
        for name, head in heads.items()
    ]
    try:
        for place, batch in enumerate(batches):
            if not len(batch.labels):
                continue
            pixels, wanted = (
                learner.pixels_to_device(batch.pixels),
                learner.labels_to_device(batch.labels),
            )
            middle = center_crop(pixels, size)
            for view in range(views):
                learner.seed_rng(0, place * views + view)
                seen = (middle, middle.flip(3))[view] if view < 2 else gentle(pixels, wanted)[0]
                with learner.autocast():
                    network(learner.normalize_inputs(seen))
                found.append(torch.cat([spatial_mean(caught[n].float()) for n in heads], dim=1))
                labels.append(wanted)
    finally:
        for hook in hooks:
            hook.remove()
    return ProbeFeatures(torch.cat(found), torch.cat(labels))


def count_non_finite(split: ProbeFeatures) -> int:
    """Rows of all workers whose features, or their squares, are NaN or infinite.

    Every worker must call it.
    """
    return int(_all_reduce((~split.inputs.square().sum(1).isfinite()).sum()))


def fit_head(
    train: ProbeFeatures,
    val: ProbeFeatures,
    num_classes: int,
    *,
    l2: float | None,
    weights: torch.Tensor | None,
) -> LinearHead:
    """The head with the strongest penalty that is no worse than the best within its error.

    Penalties are tried from the strongest down, each from the last one's head. The rule of one
    standard error of the validation loss: Hastie et al., Elements of Statistical Learning, 7.10.

    l2:      the only penalty to try; several if None
    weights: (C,) float32 per class, or None
    Every worker must call it, and gets the same.
    """
    device = train.inputs.device
    rows = _all_reduce(torch.tensor(float(len(train.labels)), device=device))
    mean = _all_reduce(train.inputs.sum(0)) / rows
    deviation = (_all_reduce((train.inputs - mean).square().sum(0)) / rows).sqrt() + 1e-6
    inputs = (train.inputs - mean) / deviation
    width = inputs.shape[1]
    weight = torch.zeros(num_classes, width, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    heads: list[LinearHead] = []
    for penalty in L2_CHOICES if l2 is None else (l2,):
        _minimize(weight, bias, inputs, train.labels, rows, penalty, weights)
        # the standardising becomes part of the head
        scaled = (weight / deviation).detach()
        shifted = (bias - scaled @ mean).detach()
        losses = F.cross_entropy(
            val.inputs @ scaled.T + shifted, val.labels, reduction="none"
        ).double()
        told = torch.stack([losses.new_tensor(len(losses)), losses.sum(), losses.square().sum()])
        count, total, squares = _all_reduce(told).tolist()
        mean_loss = total / count
        error = math.sqrt(max(0.0, squares / count - mean_loss**2) / count)
        heads.append(LinearHead(scaled.clone(), shifted.clone(), penalty, mean_loss, error))
    best = min(heads, key=lambda head: head.val_loss)
    return next(head for head in heads if head.val_loss <= best.val_loss + best.val_loss_error)


def evaluate_head(head: LinearHead, split: ProbeFeatures, num_classes: int) -> EvalMetrics:
    """What a head makes of all workers' features."""
    tally = EvalAccumulator(num_classes, split.inputs.device)
    tally.update(split.inputs @ head.weight.T + head.bias, split.labels)
    return tally.compute()


def install_head(network: nn.Module, head: LinearHead, shares: Sequence[float] = (1.0,)) -> None:
    """Put a fitted head into a network; a convolution gets it as a 1x1 filter.

    shares: of each head's outputs in the logits (see `network.head_shares`); the fitted head is
        split among them so that the logits are those it was fitted for
    """
    layers = zoo.find_heads(network).values()
    weights = head.weight.split([zoo.get_input_width(layer) for layer in layers], dim=1)
    with torch.no_grad():
        for layer, weight, share in zip(layers, weights, shares, strict=True):
            layer.weight.copy_(weight.reshape(layer.weight.shape) / share)
            if layer.bias is not None:
                layer.bias.copy_(head.bias / sum(shares))


def _minimize(
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    penalty: float,
    weights: torch.Tensor | None,
) -> None:
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight.T + bias
        loss = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / rows
        loss.backward()
        total = loss.detach()
        assert weight.grad is not None
        assert bias.grad is not None
        for part in (total, weight.grad, bias.grad):
            dist.all_reduce(part)
        total = total + penalty / 2 * weight.detach().square().sum()
        weight.grad.add_(weight.detach(), alpha=penalty)
        return total

    optimizer.step(closure)


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Over all workers."""
    dist.all_reduce(tensor)
    return tensor
