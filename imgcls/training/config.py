"""The request: every setting of a training, each section from beside its code."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from imgcls.config import Section
from imgcls.data.storage_settings import StorageConfig
from imgcls.training.augment.augment import AugmentConfig
from imgcls.training.data.examples import DataConfig
from imgcls.training.epoch_metrics import SelectionMetric
from imgcls.training.loggers.base import TrackConfig
from imgcls.training.network import ModelConfig
from imgcls.training.optim.loss import LossConfig
from imgcls.training.optim.optimizer import OptimConfig
from imgcls.training.optim.strategy import FinetuneConfig, ProbeConfig, Strategy
from imgcls.training.scaling import TrainScaleConfig

TrainPrecision = Literal["auto", "fp32", "bf16", "fp16"]

NON_IDENTITY_KEYS = (
    "output",
    "overwrite",
    "scale",
    "track",
    "checkpoint_minutes",
    "find_lr",
    "storage",
)
"""Settings that a resumed run may change: they do not decide what is learnt."""


class EarlyStoppingConfig(Section):
    """When further epochs are not worth their time."""

    patience: PositiveInt | None = None
    """Epochs without an improvement (see best_by) after which it ends; none trains them all."""
    min_delta: NonNegativeFloat = 0.0
    """By how much it must improve, at least."""


class TrainConfig(Section):
    """Fine-tune a network on labelled images and write its bundle."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    strategy: Strategy | None = None
    """How to begin; if none, probe_then_finetune from model.weights, and scratch without them."""
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    scale: TrainScaleConfig = TrainScaleConfig()
    storage: StorageConfig = StorageConfig()
    track: TrackConfig = TrackConfig()
    output: str
    """The bundle folder to write; on a cluster, one that all machines reach."""
    overwrite: bool = False
    """Replace the bundle, or the unfinished other run, that is there."""
    epochs: PositiveInt = 10
    """Passes over the training images; the weights of the best one are kept."""
    best_by: SelectionMetric = "val_loss"
    """What makes an epoch the best; of a few hundred images the accuracy says little."""
    batch_size: PositiveInt = 64
    """Images per step, over all workers together."""
    precision: TrainPrecision = "auto"
    """Of the arithmetic (weights stay fp32): auto takes bf16 where the hardware multiplies it."""
    seed: NonNegativeInt = 0
    """Same seed, workers and hardware: same weights."""
    checkpoint_minutes: PositiveFloat = 10.0
    """A state is saved after every epoch, and within epochs that are longer than this."""
    find_lr: bool = False
    """Train nothing: try learning rates on some batches and draw the loss (Smith 2017)."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is learnt."""
        settings = self.model_dump(mode="json")
        return {key: value for key, value in settings.items() if key not in NON_IDENTITY_KEYS}
