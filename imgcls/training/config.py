"""Configuration of `imgcls train`.

It is checked without torch and Ray, so that a wrong key is refused at once.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from imgcls.config import Section, UnitFloat
from imgcls.data.decoding.preprocess import DecodeMode, ResizeMode
from imgcls.data.image_files import MAX_IMAGE_BYTES
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.training.augment.recipe import AugmentConfig
from imgcls.training.epoch_metrics import SelectionMetric

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


DEFAULT_EPOCHS, DEFAULT_BATCH_SIZE = 10, 64


class ModelConfig(Section):
    """Network architecture, initial weights and preprocessing."""

    shorthand: ClassVar[str | None] = "name"

    name: str = "resnet18"
    """small_cnn, a name of torchvision (`imgcls model list`), timm:NAME, open_clip:NAME, or
    hf://OWNER/NAME or a folder in the form of timm or transformers, or a bundle."""
    weights: str | None = None
    """A .safetensors or .pth file, pretrained, or e.g. IMAGENET1K_V1. Default: random."""
    options: dict[str, Any] = {}
    """Keyword arguments of the network's constructor, e.g. {dropout: 0.3}."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Dropout probability before the head. Default: that of the architecture."""
    stochastic_depth: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Stochastic depth (Huang 2016): probability of skipping the last block; earlier ones less."""
    image_size: PositiveInt | None = None
    """Side of the square network input, in pixels, for any network. Default: as the weights."""
    resize_mode: ResizeMode | None = None
    """How images that are not square are resized: crop, pad or squash. Default: as the weights."""
    crop_pct: Annotated[float, Field(gt=0.5, le=1.0)] | None = None
    """Fraction of the shorter side in the center crop of predictions. Default: at least 0.965."""
    decode: DecodeMode = "exact"
    """JPEG decoding: exact at full size, or fast at 1/2, 1/4 or 1/8 of the size of large ones."""


Strategy = Literal["scratch", "probe", "finetune", "probe_then_finetune", "lora"]


class ProbeConfig(Section):
    """Linear probe: the head on features that are computed once."""

    views: PositiveInt = 2
    """Features per training image: center crop, mirrored, random crops. 1 if augment.hflip is 0."""
    l2: NonNegativeFloat | None = None
    """L2 regularization strength of the linear probe. Default: chosen by the validation loss."""


class FinetuneConfig(Section):
    """Fine-tuning: all layers, lower ones with smaller learning rates."""

    backbone_lr_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Learning rate of the layers below the head, as a fraction of optim.lr."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate from each layer below the head to the next lower; 1: equal."""
    batchnorm: Literal["frozen", "train"] = "frozen"
    """Batch normalization: frozen keeps the pretrained statistics, train uses each batch's."""
    unfreeze_every: PositiveInt | None = None
    """Epochs after which the next lower layer is unfrozen, from the head down (default: at once)"""


class LoraConfig(Section):
    """Strategy lora: low-rank adapters (Hu et al. 2022), which are merged into the weights."""

    rank: PositiveInt = 8
    """Rank of an adapter: a layer of N inputs and M outputs gets rank * (N + M) parameters."""
    alpha: PositiveFloat = 16.0
    """Scale of the adapters; their output is multiplied by alpha / rank."""


class LossConfig(Section):
    """Training loss."""

    class_weights: Literal["none", "balanced"] | dict[str, NonNegativeFloat] = "none"
    """none, balanced (inverse to the images of a class), or {class: weight}; others have 1. For
    multilabel they weight the positives, balanced by negatives / positives."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the target that is distributed over all classes."""
    focal_gamma: NonNegativeFloat = 0.0
    """Gamma of the focal loss (Lin et al. 2017), which reduces the loss of easy rows; 0: off."""
    negative_gamma: NonNegativeFloat | None = None
    """Gamma of the negatives, multilabel only (asymmetric loss, Ridnik et al. 2021), such as 4.
    Default: focal_gamma."""
    negative_margin: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Score below which a negative has no loss, multilabel only (asymmetric loss), such as 0.05."""


TeacherMode = Literal["soft", "hard"]


class TeacherConfig(Section):
    """Distillation and self-training: also train on images that a teacher has labeled."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """Committed run of `imgcls predict --scores`, whose images are added to the training images. Or
    a bundle, also as models:/NAME@ALIAS or models:/NAME/VERSION in the MLflow model registry; the
    images of teacher.manifest are predicted with it first."""
    manifest: ManifestConfig | None = None
    """Images to predict with the bundle, with or without labels. Default: those of data.train."""
    mode: TeacherMode = "soft"
    """soft: the teacher's scores are the targets (distillation, Hinton et al. 2015). hard: the
    predicted label of an accepted row is its label (self-training)."""
    temperature: PositiveFloat | None = None
    """Temperature that softens the scores of teacher and student (default: 2). Only for soft
    targets with one label per image."""
    weight: UnitFloat | None = None
    """Weight of the teacher's scores in the loss of an image that also has a label (default: 0.9).
    Only for soft targets."""
    min_confidence: UnitFloat = 0.0
    """Minimum confidence of a row of the teacher. Only for one label per image."""
    exclude: ManifestConfig | None = None
    """Manifest of test images, which the student is not trained on; see leaks."""
    leaks: Literal["refuse", "drop"] = "refuse"
    """Images of the teacher that are also in data.val or teacher.exclude, by path or content:
    refuse the training, or drop these rows."""


OptimizerName = Literal["adamw", "sgd"]


ScheduleName = Literal["cosine", "one_cycle", "step", "constant"]


class OptimConfig(Section):
    """Optimizer, learning-rate schedule and moving average."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov & Hutter 2019), or sgd with Nesterov momentum, which needs a higher lr."""
    lr: PositiveFloat | None = None
    """Peak learning rate, of the head if rates differ. Default: 3e-4 from weights and 1e-3 with
    adapters; from scratch 3e-3 for small_cnn and 1e-3 for others."""
    scale_lr_from: PositiveInt | None = None
    """Linear scaling rule: the batch_size that optim.lr is for; the rate scales with batch_size."""
    schedule: ScheduleName = "cosine"
    """After the warmup: cosine to 0, one_cycle (Smith 2018), step (by step_factor), or constant."""
    warmup: UnitFloat = 0.1
    """Fraction of all steps in which the learning rate rises to optim.lr."""
    step_every: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Schedule step: fraction of all steps between two reductions."""
    step_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Schedule step: factor of the learning rate at each reduction."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of weight matrices; biases and normalization layers have none."""
    clip_norm: PositiveFloat | None = None
    """Maximum norm of the gradient over all parameters; a larger one is scaled down."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.99
    """Decay per step of the weights' moving average, which is validated and saved; null: off."""

    def compute_peak_lr(self, batch_size: int) -> float:
        """Peak learning rate for a batch size."""
        if self.lr is None:
            raise ValueError("optim.lr is not set; see strategy.choose_default_lr")
        return self.lr * (batch_size / self.scale_lr_from if self.scale_lr_from else 1)


class TrainScaleConfig(Section):
    """Training workers and their resources."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training workers, which share each batch; [min, max] adapts to the cluster."""
    use_gpu: bool | None = None
    """Use one GPU per worker. Default: if the cluster has enough GPUs for all workers."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that each worker reserves; may be a fraction."""
    accumulate: PositiveInt = 1
    """Gradient accumulation: parts into which a worker splits its share of a batch."""
    sync_batchnorm: bool = False
    """Synchronize batch statistics over all workers; only on GPUs."""
    compile: bool = False
    """Compile the network with torch.compile; worth its time only on long runs."""
    deterministic: bool = True
    """Repeat results exactly on GPUs; false: use the fastest convolutions, whose results vary."""
    max_failures: NonNegativeInt = 8
    """Maximum number of times that lost workers are replaced before the run fails."""
    resource_timeout_s: PositiveFloat = 1800.0
    """Maximum wait for nodes or workers, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> TrainScaleConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers {list(self.bounds)}: put the smaller number first")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        count = self.num_workers
        return (count, count) if isinstance(count, int) else count

    @property
    def min_workers(self) -> int:
        return self.bounds[0]

    @property
    def max_workers(self) -> int:
        return self.bounds[1]


class TrackConfig(Section):
    """Experiment tracking, in addition to TensorBoard."""

    mlflow: str | None = None
    """Tracking URI of MLflow, e.g. http://mlflow:5000 or sqlite:///mlflow.db."""
    wandb: str | None = None
    """Project of Weights & Biases, as PROJECT or ENTITY/PROJECT."""
    experiment: str = "imgcls"
    """MLflow experiment of the run."""
    register_as: str | None = None
    """Name of a model in the MLflow model registry of track.mlflow: the bundle becomes its next
    version."""
    run: str | None = None
    """Name of the run in MLflow and Weights & Biases (default: name of the output folder)."""

    @field_validator("mlflow")
    @classmethod
    def _check_mlflow(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password:
            raise ValueError(
                "contains a password, and settings are written into the bundle; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return uri

    @field_validator("register_as")
    @classmethod
    def _check_register(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or set(name) & set("/:@")):
            raise ValueError(f"{name!r} is not a model name; pass one without the characters / : @")
        return name

    @model_validator(mode="after")
    def _check_registry(self) -> TrackConfig:
        if self.register_as is not None and self.mlflow is None:
            raise ValueError("register_as: requires a registry; set track.mlflow to its URI")
        return self

    @field_validator("wandb")
    @classmethod
    def _check_wandb(cls, project: str | None) -> str | None:
        if project is not None and (project.count("/") > 1 or not all(project.split("/"))):
            raise ValueError(f"{project!r} is not a project; pass PROJECT or ENTITY/PROJECT")
        return project

    def resolve_run_name(self, output: str) -> str:
        """`run`, or the name of the output folder."""
        return self.run or output.rstrip("/").rpartition("/")[2]


class DataConfig(Section):
    """Training and validation data."""

    shorthand: ClassVar[str | None] = "train"

    train: ManifestConfig
    """Labeled training images."""
    val: ManifestConfig | None = None
    """Labeled validation images (default: a part of data.train is held out)."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of each class to hold out if data.val is not set; chosen by a hash of the path."""
    max_error_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Maximum share of undecodable images. They are left out; above this share training fails."""
    sampling: Literal["natural", "balanced"] = "natural"
    """natural: every image once per epoch; balanced: equally many per class, rare ones repeated."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes; a larger one is left out and counted as an error."""
    cache: bool | None = None
    """Decode once and keep in memory (default: if all images fit into Ray's object store)."""
    embeddings: str | None = None
    """Committed run whose embeddings are used instead of the images, which are not read: a head is
    fitted to them, as by strategy probe, and the network is that of the run."""
    embeddings_model: str | None = None
    """Bundle that made data.embeddings. Default: the one that the run names."""
    classes: list[str] | None = None
    """Class names in the order of the outputs (default: the sorted labels of data.train)."""

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: list[str] | None) -> list[str] | None:
        if classes is not None:  # the same normalization as for labels
            classes = [unicodedata.normalize("NFC", name) for name in classes]
        if classes is not None and len(set(classes)) < len(classes):
            duplicate = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"class {duplicate!r} is listed twice; remove one of the two")
        return classes


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
    task: Literal["auto", "single_label", "multilabel"] = "auto"
    """multilabel: any number of classes per image. auto: as the label columns of data.train are."""
    model: ModelConfig = ModelConfig()
    strategy: Strategy | None = None
    """Training strategy. Default: probe_then_finetune with model.weights, scratch without."""
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    lora: LoraConfig = LoraConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig | None = None
    optim: OptimConfig = OptimConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    scale: TrainScaleConfig = TrainScaleConfig()
    storage: StorageConfig = StorageConfig()
    track: TrackConfig = TrackConfig()
    output: str
    """Bundle folder to write; on a cluster, one that all nodes can reach."""
    overwrite: bool = False
    """Replace an existing bundle or another unfinished run in output."""
    epochs: PositiveInt | None = None
    """Passes over the training images; the weights of the best epoch are kept. Default: 10; for
    fine-tuning after a probe, 4 to 10 by the number of images."""
    best_by: SelectionMetric = "val_loss"
    """Metric that selects the best epoch; accuracy is coarse on a few hundred images."""
    batch_size: PositiveInt | None = None
    """Images per step, over all workers. Default: 64; for fine-tuning, 8 to 64 by the number of
    images."""
    precision: TrainPrecision = "auto"
    """Precision of the arithmetic (weights stay fp32); auto: bf16 if the hardware supports it."""
    seed: NonNegativeInt = 0
    """Random seed; it repeats the weights on equal hardware, if scale.deterministic is true."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Minutes between saved states within an epoch; one is also saved after every epoch."""
    find_lr: bool = False
    """Only run an LR range test (Smith 2017): plot the loss over rising learning rates."""

    @property
    def num_epochs(self) -> int:
        """`epochs`, or 10 before a training has chosen it."""
        return self.epochs or DEFAULT_EPOCHS

    @property
    def images_per_step(self) -> int:
        """`batch_size`, or 64 before a training has chosen it."""
        return self.batch_size or DEFAULT_BATCH_SIZE

    def identity(self) -> dict[str, Any]:
        """The settings that affect the trained weights."""
        settings = self.dump_settings()
        return {key: value for key, value in settings.items() if key not in NON_IDENTITY_KEYS}

    def dump_settings(self) -> dict[str, Any]:
        """All settings as JSON values, without those that version 0.1 lacks and that are unset."""
        settings = self.model_dump(mode="json")
        _remove_new_defaults(settings)
        return settings


def _remove_new_defaults(settings: dict[str, Any]) -> None:
    """Remove settings that version 0.1 lacks where they have no effect.

    Its trainings are resumed, and a bundle of the same training has the same bytes.
    """
    if settings["task"] == "auto":
        del settings["task"]
    if settings["track"]["register_as"] is None:
        del settings["track"]["register_as"]
    if settings["teacher"] is None:
        del settings["teacher"]
    for manifest in (settings["data"]["train"], settings["data"]["val"]):
        if manifest is not None:
            for name in ("label_delimiter", "label_columns"):
                if not manifest[name]:
                    del manifest[name]
    loss = settings["loss"]
    if loss["negative_gamma"] is None and not loss["negative_margin"]:
        del loss["negative_gamma"], loss["negative_margin"]
