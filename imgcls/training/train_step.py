"""One training step of a worker: gradients, optimizer and moving average of the weights.

The gradient of a step is the mean over the global batch, independent of how its rows are divided
among workers and accumulation parts. Random numbers depend only on the seed, epoch, step and rank.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models.normalize import Normalizer
from imgcls.models.tasks import TASKS
from imgcls.training.augment.augment import Augment
from imgcls.training.config import Strategy, TrainConfig
from imgcls.training.data.batches import Batch
from imgcls.training.data.targets import TargetTable
from imgcls.training.depthwise import use_float32_depthwise
from imgcls.training.optim import strategy
from imgcls.training.optim.lora import add_adapters, merge_adapters
from imgcls.training.optim.loss import TrainingLoss
from imgcls.training.optim.optimizer import (
    ModelEma,
    build_optimizer,
    copy_optimizer_state,
    copy_state_dict,
)
from imgcls.training.sampler import Int64Array
from imgcls.training.validation import average_buffers

# torch 2.14 renamed the argument; 2.11 knows only the old one
_ddp: Any = nn.parallel.DistributedDataParallel
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(_ddp.__init__).parameters
)


@dataclass(frozen=True)
class WorkerContext:
    """Rank and device of a worker, and its precision: fp32, bf16 or fp16."""

    rank: int
    world_size: int
    device: torch.device
    precision: str


class TrainStep:
    """A network in training, with its optimizer and its moving average.

    network:      the network that is trained
    eval_network: the network that is validated and saved: the moving average if there is one
    """

    def __init__(
        self,
        config: TrainConfig,
        strategy_: Strategy,
        preprocess: Preprocess,
        class_weights: list[float] | None,
        targets: TargetTable,
        network: nn.Module,
        context: WorkerContext,
    ) -> None:
        self.config, self.context = config, context
        self._strategy, self._device = strategy_, context.device
        self.targets = targets
        self._normalize = Normalizer(preprocess, context.device)
        self._size = preprocess.crop
        self.augment = Augment(
            config.augment, size=preprocess.crop, num_classes=targets.num_classes
        )
        weights = (
            None if class_weights is None else torch.tensor(class_weights, device=self._device)
        )
        temperature = 1.0 if targets.teacher is None else targets.teacher.temperature
        self.loss = TrainingLoss(config.loss, weights, TASKS[targets.task], temperature)
        network = network.to(context.device).to(memory_format=torch.channels_last)
        self._syncs_norms = config.scale.sync_batchnorm and context.world_size > 1
        if config.scale.sync_batchnorm:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if strategy_ == "lora":
            add_adapters(network, config.lora, seed=config.seed)
        if context.device.type == "cpu" and context.precision == "bf16":
            use_float32_depthwise(network)
        self.network = network
        self.ema: ModelEma | None = None
        if config.optim.ema is not None:
            has_probe = strategy.has_probe(strategy_)
            self.ema = ModelEma(network, config.optim.ema, is_fitted=has_probe)
        self.eval_network = network if self.ema is None else self.ema.network
        groups = strategy.plan_param_groups(network, strategy_, config.finetune)
        self.optimizer = build_optimizer(
            network, groups, config.optim, batch_size=config.images_per_step
        )
        self._scaler = torch.amp.GradScaler(
            context.device.type, enabled=context.precision == "fp16"
        )
        self._trainable: set[str] | None = None
        self._norms = [
            module
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._frozen_norms: list[nn.Module] = []

    def set_trainable(self, epoch: int) -> None:
        """Freeze and unfreeze parameters for an epoch; frozen ones get no gradients."""
        trainable = strategy.find_trainable(
            self.network, self._strategy, self.config.finetune, epoch
        )
        if trainable == self._trainable:
            return
        self._trainable = trainable
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in trainable)
        self._frozen_norms = strategy.find_frozen_norms(
            self.network, self._strategy, self.config.finetune, trainable
        )
        # running statistics are averaged before each evaluation instead of copied at each step
        self._parallel: nn.Module = (
            _ddp(self.network, **{_SYNC_BUFFERS: False})
            if self.context.world_size > 1
            else self.network
        )
        self._forward: Any = self._parallel
        if self.config.scale.compile:
            self._forward = torch.compile(self._parallel)

    def step(self, batch: Batch, global_batch_size: int, step: int) -> torch.Tensor:
        """Update the weights once.

        global_batch_size: number of rows of the batch over all workers
        step:              number of the step since the start of the training
        Returns (2,) float64: summed loss and number of correct predictions of this worker's rows;
        for multilabel, the sum of each row's share of correct classes.
        """
        totals = self._accumulate_gradients(batch, global_batch_size)
        clip = self.config.optim.clip_norm
        if clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(step)
        return totals

    def normalize_inputs(self, pixels: Pixels | torch.Tensor) -> torch.Tensor:
        """Network inputs on the device, from (N, 3, crop, crop) uint8."""
        return self._normalize(pixels)

    def targets_to_device(self, codes: Int64Array) -> torch.Tensor:
        """The targets of label codes, on the device; not of images with a teacher's scores."""
        return self._to_device(self.targets.encode(codes))

    def pixels_to_device(self, pixels: Pixels) -> torch.Tensor:
        """uint8, on the device."""
        return self._to_device(torch.from_numpy(pixels))

    def predict_logits(self, pixels: Pixels) -> torch.Tensor:
        """(N, C) float32 logits of `eval_network`, which must be in evaluation mode."""
        with self.autocast():
            logits: torch.Tensor = self.eval_network(self.normalize_inputs(pixels))
        return logits.float()

    def autocast(self) -> torch.autocast:
        """The autocast context of the worker's precision."""
        dtype = torch.float16 if self.context.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, dtype, enabled=self.context.precision != "fp32")

    def seed_rng(self, epoch: int, step: int) -> None:
        """Seed torch's random numbers from the config's seed, the epoch, the step and the rank."""
        state = np.random.SeedSequence((self.config.seed, epoch, step, self.context.rank))
        seed = int(state.generate_state(1)[0])
        # torch.manual_seed also records a stack trace for each kind of device that is absent
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def average_running_stats(self) -> None:
        """Set the running statistics to their mean over all workers."""
        average_buffers(self.network, self.context.world_size)
        if self.ema is not None:
            average_buffers(self.ema.network, self.context.world_size)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the complete state, in main memory."""
        return {
            "network": copy_state_dict(self.network),
            "average": None if self.ema is None else copy_state_dict(self.ema.network),
            "optimizer": copy_optimizer_state(self.optimizer),
            "scaler": self._scaler.state_dict(),
        }

    def get_weights(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Weights of the evaluated network in a state, with its adapters merged."""
        weights: dict[str, torch.Tensor] = state["average"] or state["network"]
        return merge_adapters(weights, self.config.lora) if self._strategy == "lora" else weights

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.ema is not None:
            self.ema.network.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _accumulate_gradients(self, batch: Batch, global_batch_size: int) -> torch.Tensor:
        """Backpropagate a batch in `scale.accumulate` parts; returns the totals of `step`."""
        pixels, labels, weight = self._prepare_batch(batch)
        targets = labels
        if len(labels):
            pixels, targets = self.augment(pixels, labels)
        parts = self.config.scale.accumulate
        if not self._syncs_norms:  # else each part is a collective, also where it has no rows
            parts = min(parts, len(targets))
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        pairs = zip(pixels.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for part, (images, part_targets) in enumerate(pairs):
            with self._no_sync_if(part < parts - 1):
                # without rows, torch's SyncBatchNorm sends its inputs' dtype; with rows, float32
                with self.autocast() if len(images) else contextlib.nullcontext():
                    outputs = self._forward(self.normalize_inputs(images))
                loss, logits = self.loss(outputs, part_targets)
                # DDP averages the gradients of workers; this makes it the mean over the batch
                scale = weight * self.context.world_size / global_batch_size
                self._scaler.scale(loss * scale).backward()
            correct = self.loss.count_correct(logits.detach(), part_targets)
            totals += weight * torch.stack([loss.detach().double(), correct.double()])
        return totals

    def _prepare_batch(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A batch on the device, and the weight of its loss.

        A worker whose images all failed takes part with blank images of weight 0, because the
        other workers wait for its gradients; with synchronized norms without any image, because
        they wait for its batch statistics, too, to which blank images would add.
        """
        self.network.train()
        has_images = len(batch.labels) > 0
        # blank images must not change running statistics; only the norms are set to evaluation
        # mode, because auxiliary heads must still produce the gradients that others wait for
        for norm in self._frozen_norms if has_images or self._syncs_norms else self._norms:
            norm.eval()
        if has_images or self._syncs_norms:
            targets = self._to_device(self.targets.encode_for_training(batch.labels))
            return self.pixels_to_device(batch.pixels), targets, 1.0
        shape = (2, 3, self._size, self._size)
        blank = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        return blank, self.targets.build_blank(2).to(self._device), 0.0

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def _no_sync_if(self, accumulates: bool) -> contextlib.AbstractContextManager[None]:
        """DDP's no_sync, in which gradients are added up on this worker, or no context."""
        if accumulates and self.context.world_size > 1:
            wrapped: Any = self._parallel
            no_sync: contextlib.AbstractContextManager[None] = wrapped.no_sync()
            return no_sync
        return contextlib.nullcontext()
