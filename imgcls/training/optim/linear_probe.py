"""Linear probe: logistic regression of a new head on frozen features.

Multinomial for one label per image, one class against the rest for multilabel.

Each worker computes the features of its rows once. The fit is L-BFGS over the rows of all workers
(losses and gradients are summed), so that all workers get the same head. Features are standardized,
and the L2 penalty is chosen by the validation loss. Source of the protocol: Kornblith et al., CVPR
2019, "Do Better ImageNet Models Transfer Better?", appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from imgcls.models import zoo
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import Task
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.crop import center_crop
from imgcls.training.augment.recipe import AugmentConfig
from imgcls.training.data.batches import Batch
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.network import spatial_mean
from imgcls.training.sampler import Int64Array
from imgcls.training.train_step import TrainStep
from imgcls.training.validation import EvalMetrics, ReduceFn, all_reduce, create_accumulator
from imgcls.training.validation_predictions import PredictionRecorder

L2_CHOICES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001)
MAX_ITERATIONS = 100
MAX_SEARCH_ROWS = 100_000
"""Number of training rows, about, that the choice of the L2 penalty uses."""
_BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class ProbeFeatures:
    """Features of one worker's rows of a split.

    inputs: (N, E) float32; for a network with several heads, the concatenated inputs of all heads
    targets: (N,) int64 or (N, C) float32, as `TargetTable.decide` returns them
    blended: (N, C) float32 with a teacher, as `TargetTable.blend` returns them: the fit uses them
        instead of `targets`
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    blended: torch.Tensor | None = None

    @property
    def task(self) -> Task:
        """The task that the targets are for."""
        return SINGLE_LABEL if self.targets.dim() == 1 else MULTILABEL


@dataclass(frozen=True)
class LinearHead:
    """A fitted head.

    weight:         (C, E) float32
    bias:           (C,) float32
    l2:             L2 penalty of the fit
    val_loss:       mean over the validation rows, in nats
    val_loss_error: standard error of val_loss
    """

    weight: torch.Tensor
    bias: torch.Tensor
    l2: float
    val_loss: float
    val_loss_error: float


@torch.no_grad()
def extract_features(train_step: TrainStep, batches: Iterator[Batch], views: int) -> ProbeFeatures:
    """Inputs of the heads, averaged over space, for a worker's rows of a split.

    views: number of features per image: of the center crop, of the mirrored one, then of lightly
        augmented ones
    """
    network = train_step.network.eval()
    size = train_step.augment.size
    light = Augment(AugmentConfig(preset="light"), size=size, num_classes=1)
    heads = zoo.find_heads(network)
    head_inputs: dict[str, torch.Tensor] = {}
    width = sum(zoo.get_input_width(head) for head in heads.values())
    features = [torch.zeros(0, width, device=train_step.context.device)]
    codes = [np.zeros(0, np.int64)]
    hooks = [
        head.register_forward_pre_hook(
            lambda _, args, name=name: head_inputs.update({name: args[0]})
        )
        for name, head in heads.items()
    ]
    try:
        for index, batch in enumerate(batches):
            if not len(batch.labels):
                continue
            pixels = train_step.pixels_to_device(batch.pixels)
            labels = torch.from_numpy(batch.labels)
            center = center_crop(pixels, size)
            for view in range(views):
                train_step.seed_rng(0, index * views + view)
                view_pixels = (
                    (center, center.flip(3))[view] if view < 2 else light(pixels, labels)[0]
                )
                with train_step.autocast():
                    network(train_step.normalize_inputs(view_pixels))
                features.append(
                    torch.cat([spatial_mean(head_inputs[n].float()) for n in heads], dim=1)
                )
                codes.append(batch.labels)
    finally:
        for hook in hooks:
            hook.remove()
    return _build_features(train_step, torch.cat(features), np.concatenate(codes))


def _build_features(
    train_step: TrainStep, inputs: torch.Tensor, codes: Int64Array
) -> ProbeFeatures:
    table, device = train_step.targets, inputs.device
    decided = table.decide(codes).to(device)
    if table.teacher is None:
        return ProbeFeatures(inputs, decided)
    return ProbeFeatures(inputs, decided, table.blend(codes).to(device))


def count_non_finite(split: ProbeFeatures, reduce: ReduceFn = all_reduce) -> int:
    """Number of rows of all workers with features whose squares are NaN or infinite.

    Every worker must call it.
    """
    return int(reduce((~split.inputs.square().sum(1).isfinite()).sum()))


def fit_head(
    train: ProbeFeatures,
    val: ProbeFeatures,
    num_classes: int,
    *,
    l2: float | None,
    weights: torch.Tensor | None,
    reduce: ReduceFn = all_reduce,
) -> LinearHead:
    """Fit heads over a range of L2 penalties; return the one chosen by the validation loss.

    The choice is the strongest penalty whose loss is within one standard error of the best (Hastie
    et al., Elements of Statistical Learning, 7.10); for multilabel it is the best itself, because a
    stronger one moves all scores below the threshold (micro F1 57.7 instead of 60.8 % on tiles of
    CIFAR-10, mAP 70.9 and 70.7 %). Penalties are tried from the strongest to the
    weakest, each starting from the previous head, on at most MAX_SEARCH_ROWS rows; with more rows,
    the chosen penalty is fitted to all of them. Every worker must call it; all get the same head.

    l2:      the only penalty to fit; None for L2_CHOICES
    weights: (C,) float32 per class, or None
    reduce:  sums a tensor over all workers, in place
    """
    fit = _HeadFit(train, val, num_classes, weights, reduce)
    if l2 is not None:
        return fit.run(l2)
    step = -(-fit.rows // MAX_SEARCH_ROWS)
    search = fit if step == 1 else fit.thin_out(step)
    heads = [search.run(penalty) for penalty in L2_CHOICES]
    best = min(heads, key=lambda head: head.val_loss)
    margin = best.val_loss_error if train.task is SINGLE_LABEL else 0.0
    chosen = next(head for head in heads if head.val_loss <= best.val_loss + margin)
    return chosen if step == 1 else fit.run(chosen.l2, chosen)


class _HeadFit:
    """Fits of a head to the same rows, each of which starts from the one before."""

    def __init__(
        self,
        train: ProbeFeatures,
        val: ProbeFeatures,
        num_classes: int,
        weights: torch.Tensor | None,
        reduce: ReduceFn,
    ) -> None:
        self._train, self._val = train, val
        self._class_weights, self._reduce = weights, reduce
        device, width = train.inputs.device, train.inputs.shape[1]
        self.rows = int(reduce(torch.tensor(len(train.targets), device=device)))
        self._mean = reduce(train.inputs.sum(0)) / self.rows
        # in blocks: all squares at once would take as much memory as the features
        blocks = train.inputs.split(_BLOCK_ROWS)
        squares = sum(((block - self._mean).square().sum(0) for block in blocks), self._mean * 0)
        self._deviation = (reduce(squares) / self.rows).sqrt() + 1e-6
        self._inputs = (train.inputs - self._mean).div_(self._deviation)
        self._weight = torch.zeros(num_classes, width, device=device, requires_grad=True)
        self._bias = torch.zeros(num_classes, device=device, requires_grad=True)

    def thin_out(self, step: int) -> _HeadFit:
        """The same fit with every `step`-th row of each worker."""
        train = self._train
        blended = None if train.blended is None else train.blended[::step]
        thinned = ProbeFeatures(train.inputs[::step], train.targets[::step], blended)
        return _HeadFit(thinned, self._val, len(self._bias), self._class_weights, self._reduce)

    def run(self, penalty: float, start: LinearHead | None = None) -> LinearHead:
        """Fit with an L2 penalty, from the last fit or from another head."""
        if start is not None:
            with torch.no_grad():
                self._weight.copy_(start.weight * self._deviation)
                self._bias.copy_(start.bias + start.weight @ self._mean)
        self._minimize(penalty)
        # fold the standardization into the head
        scaled = (self._weight / self._deviation).detach()
        shifted = (self._bias - scaled @ self._mean).detach()
        losses = self._val.task.compute_row_losses(
            self._val.inputs @ scaled.T + shifted, self._val.targets
        ).double()
        sums = torch.stack([losses.new_tensor(len(losses)), losses.sum(), losses.square().sum()])
        count, total, squares = self._reduce(sums).tolist()
        mean_loss = total / count
        error = math.sqrt(max(0.0, squares / count - mean_loss**2) / count)
        return LinearHead(scaled.clone(), shifted.clone(), penalty, mean_loss, error)

    def _minimize(self, penalty: float) -> None:
        weight, bias, train = self._weight, self._bias, self._train
        targets = train.targets if train.blended is None else train.blended
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = self._inputs @ weight.T + bias
            loss = train.task.compute_loss(logits, targets, weights=self._class_weights)
            loss = loss / self.rows
            loss.backward()
            assert weight.grad is not None
            assert bias.grad is not None
            # one all-reduce, not three
            sums = torch.cat([loss.detach().view(1), weight.grad.flatten(), bias.grad])
            sizes = (1, weight.numel(), bias.numel())
            loss_sum, weight_grad, bias.grad = self._reduce(sums).split(sizes)
            weight.grad = weight_grad.view_as(weight)
            total: torch.Tensor = loss_sum + penalty / 2 * weight.detach().square().sum()
            weight.grad.add_(weight.detach(), alpha=penalty)
            return total

        optimizer.step(closure)


def evaluate_head(
    head: LinearHead,
    split: ProbeFeatures,
    num_classes: int,
    reduce: ReduceFn = all_reduce,
    recorder: PredictionRecorder | None = None,
) -> EvalMetrics:
    """Metrics of a head on the features of all workers.

    recorder: gets the logits and targets of this worker, in their order
    """
    accumulator = create_accumulator(split.task.name, num_classes, split.inputs.device)
    # the accumulator of multilabel needs several times the memory of the logits
    size = max(1, len(split.targets)) if split.task is SINGLE_LABEL else _BLOCK_ROWS
    for inputs, targets in zip(split.inputs.split(size), split.targets.split(size), strict=True):
        logits = inputs @ head.weight.T + head.bias
        accumulator.update(logits, targets)
        if recorder is not None:
            recorder.update(logits, targets)
    return accumulator.compute(reduce)


def describe_probe(
    train: EvalMetrics,
    val: EvalMetrics,
    *,
    views: int,
    failed: tuple[int, int],
    feature_seconds: float,
    seconds: float,
) -> EpochMetrics:
    """The metrics of a probe as those of epoch 0.

    views:           features per training image, each of which `train` counts as a row
    failed:          numbers of training and of validation images that could not be decoded
    feature_seconds: time in which the features were made
    seconds:         duration of the probe
    """
    return EpochMetrics(
        epoch=0,
        phase="probe",
        train_loss=train.loss,
        train_accuracy=train.accuracy,
        val_loss=val.loss,
        val_accuracy=val.accuracy,
        val_balanced_accuracy=val.balanced_accuracy,
        val_mean_average_precision=val.mean_average_precision,
        lr=math.nan,
        images_per_second=train.rows / feature_seconds,
        seconds=seconds,
        train_rows=train.rows // views,
        val_rows=val.rows,
        train_failed=failed[0],
        val_failed=failed[1],
    )


def install_head(
    network: nn.Module, head: LinearHead, coefficients: Sequence[float] = (1.0,)
) -> None:
    """Copy a fitted head into a network; into a convolution as a 1x1 filter.

    coefficients: see `network.compute_head_coefficients`; the fitted head is divided among the
        heads of the network so that the logits are those of the fit
    """
    layers = zoo.find_heads(network).values()
    weights = head.weight.split([zoo.get_input_width(layer) for layer in layers], dim=1)
    with torch.no_grad():
        for layer, weight, coefficient in zip(layers, weights, coefficients, strict=True):
            layer.weight.copy_(weight.reshape(layer.weight.shape) / coefficient)
            if layer.bias is not None:
                layer.bias.copy_(head.bias / sum(coefficients))
