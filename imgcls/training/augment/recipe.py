"""Configuration of the augmentation: its presets, and all operations in their order.

To add an augmentation, write an `Operation` with its keys and its tensor function in a module of
this package, and add it to the bases of `Recipe`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from imgcls.config import Section
from imgcls.training.augment.auto import AutoAugment
from imgcls.training.augment.base import ImageBatch, Operation
from imgcls.training.augment.color import ColorJitter
from imgcls.training.augment.crop import CropAndFlip
from imgcls.training.augment.erase import RandomErase
from imgcls.training.augment.mix import Mix

Preset = Literal["none", "light", "standard", "strong"]


class Recipe(
    # applied from the last to the first; keys are listed in the same order
    Mix,
    RandomErase,
    ColorJitter,
    AutoAugment,
    CropAndFlip,
):
    """All augmentations of a training, with every preset and override resolved.

    Without any key, images are only cropped to their center, as in evaluation.
    """

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Each augmentation with its own keys, in the order in which they are applied."""
        classes = [base for base in reversed(Recipe.__bases__) if issubclass(base, Operation)]
        return tuple(
            each.model_validate({name: getattr(self, name) for name in each.model_fields})
            for each in classes
        )

    @property
    def is_active(self) -> bool:
        return True

    @property
    def mixes_targets(self) -> bool:
        return any(operation.mixes_targets for operation in self.operations)

    def describe(self) -> dict[str, object]:
        return {k: v for operation in self.operations for k, v in operation.describe().items()}

    def find_requirements(self) -> dict[str, str]:
        return {
            k: v for operation in self.operations for k, v in operation.find_requirements().items()
        }

    def apply(self, batch: ImageBatch) -> ImageBatch:
        for operation in self.operations:
            if operation.is_active:
                batch = operation.apply(batch)
        return batch

    def __str__(self) -> str:
        """The settings in effect: `crop 50-100 % of the area, hflip 0.5`."""
        parts = [f"{name} {value}".strip() for name, value in self.describe().items()]
        return ", ".join(parts) or "center crop only"


PRESETS: dict[Preset, Recipe] = {
    "none": Recipe(),
    "light": Recipe(crop_scale=(0.75, 1.0), crop_ratio=(0.9, 1.1), hflip=0.5),
    # At least half of the area: the 8 % that are usual in hundreds of epochs of ImageNet are too
    # little for short trainings and for images of 32 pixels.
    "standard": Recipe(
        crop_scale=(0.5, 1.0), hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
    ),
    # TrivialAugment changes colors already. Alphas: torchvision's reference training of 2021; every
    # second image stays unmixed, as in the CIFAR trainings of the CutMix paper.
    "strong": Recipe(
        crop_scale=(0.3, 1.0),
        hflip=0.5,
        auto="trivialaugment",
        erase=0.25,
        mixup=0.2,
        cutmix=1.0,
        mix_prob=0.5,
    ),
}


class _PresetKey(Section):
    shorthand: ClassVar[str | None] = "preset"
    # the command line reads the word none as no value
    preset: Annotated[Preset, BeforeValidator(lambda v: "none" if v is None else v)] = "standard"
    """none, light (crop, flip), standard (also colors) or strong (TrivialAugment, mixing)."""


class AugmentConfig(Recipe, _PresetKey):
    """Augmentation of training images; a key that is not set keeps the preset's value."""

    @model_validator(mode="after")
    def _check_requirements(self) -> AugmentConfig:
        for key, needed in self.build_recipe().find_requirements().items():
            if getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect here; set {needed} too")
        return self

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.build_recipe().operations

    def build_recipe(self) -> Recipe:
        """The preset with the keys that are set."""
        given = {name: value for name, value in self if name != "preset" and value is not None}
        return PRESETS[self.preset].model_copy(update=given)
