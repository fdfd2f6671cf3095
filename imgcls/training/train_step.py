"""One worker's network and everything that moves it: a step's gradient, the optimiser, the average.

Promises that the gradient of a step is the mean over the global batch, however its rows are shared
out among workers and parts, and that what is random in it depends on its seed alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from imgcls.data.decode import Pixels
from imgcls.data.preprocess import Preprocess
from imgcls.models.normalize import Normalizer
from imgcls.training.augment.augment import Augment
from imgcls.training.config import TrainConfig
from imgcls.training.data.batches import Batch
from imgcls.training.optim import strategy
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
    """Where a worker runs, and at which precision: fp32, bf16 or fp16."""

    rank: int
    world_size: int
    device: torch.device
    precision: str


class TrainStep:
    """A network in training.

    network: the one that moves
    judged:  the one that is validated and kept: the average where there is one
    """

    def __init__(
        self,
        config: TrainConfig,
        strategy_: strategy.Strategy,
        preprocess: Preprocess,
        class_weights: list[float] | None,
        num_classes: int,
        network: nn.Module,
        place: WorkerContext,
    ) -> None:
        self.config, self.place = config, place
        self._strategy, self._device = strategy_, place.device
        self._normalise = Normalizer(preprocess, place.device)
        self._size = preprocess.crop
        self.augment = Augment(config.augment, size=preprocess.crop, num_classes=num_classes)
        weights = (
            None if class_weights is None else torch.tensor(class_weights, device=self._device)
        )
        self.loss = TrainingLoss(config.loss, weights)
        network = network.to(place.device).to(memory_format=torch.channels_last)
        if config.scale.sync_batchnorm:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network
        self.average: ModelEma | None = None
        if config.optim.ema is not None:
            self.average = ModelEma(network, copy.deepcopy(network), config.optim.ema)
        self.judged = network if self.average is None else self.average.network
        groups = strategy.plan_param_groups(network, strategy_, config.finetune)
        self.optimizer = build_optimizer(
            network, groups, config.optim, batch_size=config.batch_size
        )
        self._scaler = torch.amp.GradScaler(place.device.type, enabled=place.precision == "fp16")
        self._moving: set[str] | None = None
        self._norms = [
            module
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._held: list[nn.Module] = []

    def set_trainable(self, epoch: int) -> None:
        """Let the parameters move whose turn it is; gradients of others are not computed."""
        moving = strategy.find_trainable(self.network, self._strategy, self.config.finetune, epoch)
        if moving == self._moving:
            return
        self._moving = moving
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in moving)
        self._held = strategy.find_frozen_norms(
            self.network, self._strategy, self.config.finetune, moving
        )
        # running statistics are averaged before each evaluation instead of copied at each step
        self._parallel: nn.Module = (
            _ddp(self.network, **{_SYNC_BUFFERS: False})
            if self.place.world_size > 1
            else self.network
        )
        self._forward: Any = self._parallel
        if self.config.scale.compile:
            self._forward = torch.compile(self._parallel)

    def step(self, batch: Batch, global_rows: int, at: int) -> torch.Tensor:
        """One move of the weights.

        global_rows: rows of the batch over all workers
        at:          number of the step since the beginning
        Returns (2,) float64: summed loss and correct predictions of this worker's rows.
        """
        told = self._accumulate_gradients(batch, global_rows)
        clip = self.config.optim.clip_norm
        if clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(at)
        return told

    def normalize_inputs(self, pixels: Pixels | torch.Tensor) -> torch.Tensor:
        """(N, 3, crop, crop) uint8 to what the network takes, on its device."""
        return self._normalise(pixels)

    def labels_to_device(self, labels: Int64Array) -> torch.Tensor:
        return self._to_device(torch.from_numpy(labels))

    def pixels_to_device(self, pixels: Pixels) -> torch.Tensor:
        """uint8, on the device."""
        return self._to_device(torch.from_numpy(pixels))

    def predict_logits(self, pixels: Pixels) -> torch.Tensor:
        """(N, C) float32 of the judged network, which must be in evaluation mode."""
        with self.autocast():
            logits: torch.Tensor = self.judged(self.normalize_inputs(pixels))
        return logits.float()

    def autocast(self) -> torch.autocast:
        kind = torch.float16 if self.place.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, kind, enabled=self.place.precision != "fp32")

    def seed_rng(self, epoch: int, step: int) -> None:
        """Make what is random from here on depend on nothing that came before."""
        state = np.random.SeedSequence((self.config.seed, epoch, step, self.place.rank))
        seed = int(state.generate_state(1)[0])
        # not torch.manual_seed, which notes where it was called from for devices that are not there
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def average_running_stats(self) -> None:
        """Give all workers the mean of their running statistics."""
        average_buffers(self.network, self.place.world_size)
        if self.average is not None:
            average_buffers(self.average.network, self.place.world_size)

    def state_dict(self) -> dict[str, Any]:
        """A copy in main memory of all that a resumed run needs."""
        return {
            "network": copy_state_dict(self.network),
            "average": None if self.average is None else copy_state_dict(self.average.network),
            "optimizer": copy_optimizer_state(self.optimizer),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _accumulate_gradients(self, batch: Batch, global_rows: int) -> torch.Tensor:
        pixels, labels, share = self._prepare_batch(batch)
        pixels, targets = self.augment(pixels, labels)
        parts = min(self.config.scale.accumulate, len(targets))
        told = torch.zeros(2, dtype=torch.float64, device=self._device)
        pairs = zip(pixels.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for part, (images, wanted) in enumerate(pairs):
            with self._no_sync_if(part < parts - 1):
                with self.autocast():
                    outputs = self._forward(self.normalize_inputs(images))
                loss, logits = self.loss(outputs, wanted)
                # workers' gradients are averaged, whereas the mean over the batch is what is meant
                scale = share * self.place.world_size / global_rows
                self._scaler.scale(loss * scale).backward()
            classes = wanted.argmax(1) if wanted.dim() == 2 else wanted
            correct = (logits.detach().argmax(1) == classes).sum()
            told += share * torch.stack([loss.detach().double(), correct.double()])
        return told

    def _prepare_batch(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A batch on the device, and its share in the gradient.

        A worker whose images all failed takes part with nothing, or the others would wait for it.
        """
        self.network.train()
        # blanks must not enter the running statistics; auxiliary heads still get their gradients,
        # which the other workers wait for
        for norm in self._held if len(batch.labels) else self._norms:
            norm.eval()
        if len(batch.labels):
            return self.pixels_to_device(batch.pixels), self.labels_to_device(batch.labels), 1.0
        shape = (2, 3, self._size, self._size)
        blank = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        return blank, torch.zeros(2, dtype=torch.int64, device=self._device), 0.0

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def _no_sync_if(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Within it, gradients stay with this worker, to be added to."""
        if wanted and self.place.world_size > 1:
            no_sync: Any = self._parallel.no_sync
            return no_sync()
        return contextlib.nullcontext()
