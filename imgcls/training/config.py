"""Configuration of `imgcls train`; each section is defined in the module that uses it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

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
"""Keys that may change when a run is resumed, because they do not affect the weights."""


class EarlyStoppingConfig(Section):
    """Early stopping."""

    patience: PositiveInt | None = None
    """Epochs without an improvement of best_by after which the training stops. Default: off."""
    min_delta: NonNegativeFloat = 0.0
    """Minimum change of the metric that counts as an improvement."""


class TrainConfig(Section):
    """Train a network on labeled images and write its bundle."""

    positional: ClassVar[tuple[str, ...]] = ("data",)

    data: DataConfig
    model: ModelConfig = ModelConfig()
    strategy: Strategy | None = None
    """Training strategy. Default: probe_then_finetune with model.weights, scratch without."""
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
    """Bundle folder to write; on a cluster, one that all nodes can reach."""
    overwrite: bool = False
    """Replace an existing bundle or another unfinished run in output."""
    epochs: PositiveInt = 10
    """Passes over the training images; the weights of the best epoch are kept."""
    best_by: SelectionMetric = "val_loss"
    """Metric that selects the best epoch; accuracy is coarse on a few hundred images."""
    batch_size: PositiveInt = 64
    """Images per step, over all workers."""
    precision: TrainPrecision = "auto"
    """Precision of the arithmetic (weights stay fp32); auto: bf16 if the hardware supports it."""
    seed: NonNegativeInt = 0
    """Random seed; it repeats the weights on equal hardware, if scale.deterministic is true."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Minutes between saved states within an epoch; one is also saved after every epoch."""
    find_lr: bool = False
    """Only run an LR range test (Smith 2017): plot the loss over rising learning rates."""

    def identity(self) -> dict[str, Any]:
        """The settings that affect the trained weights."""
        settings = self.model_dump(mode="json")
        return {key: value for key, value in settings.items() if key not in NON_IDENTITY_KEYS}
