"""How training varies its images from step to step: the settings, what they come to, the doing.

Owns the presets and the order of the steps; each step itself is in `augment_steps`. Promises that
every image of a batch is varied on its own, and that nothing is drawn but from torch's global CPU
generator: after the same `torch.manual_seed`, the same batch comes back byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torchvision.transforms import v2

from imgcls.config import Section
from imgcls.training.augment import ops as steps

Preset = Literal["none", "light", "standard", "strong"]
AutoPolicy = Literal["off", "randaugment", "trivialaugment"]
Bounds = tuple[float, float]
AreaFraction = Annotated[float, Field(gt=0.0, le=1.0)]
AspectRatio = Annotated[float, Field(ge=0.1, le=10.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Strength = Annotated[float, Field(ge=0.0, le=1.0)]
Alpha = Annotated[float, Field(ge=0.0, le=10.0)]


@dataclass(frozen=True)
class Recipe:
    """What is done to a batch: a preset with the overrides applied, nothing left open.

    As it stands, it changes nothing: the centre is cut out, as in evaluation.
    """

    crop_scale: Bounds | None = None  # None: the centre instead of a random part
    crop_ratio: Bounds = (3 / 4, 4 / 3)
    hflip: float = 0.0
    vflip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    auto: AutoPolicy = "off"
    num_ops: int = 2
    magnitude: int = 9
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0

    @property
    def has_mixing(self) -> bool:
        """Whether images are mixed with others, so that targets are shares of classes."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def has_jitter(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    def __str__(self) -> str:
        """What differs from doing nothing, in the words of the settings."""
        told: dict[str, Any] = {}
        if self.crop_scale is not None:
            low, high = (100 * share for share in self.crop_scale)
            told["crop"] = f"{low:.3g}-{high:.3g} % of the area"
        for name in ("hflip", "vflip", "brightness", "contrast", "saturation", "hue"):
            told[name] = getattr(self, name) or None
        if self.auto == "randaugment":
            told["randaugment"] = f"{self.num_ops} of magnitude {self.magnitude}"
        elif self.auto == "trivialaugment":
            told["trivialaugment"] = ""
        told["erase"] = self.erase or None
        if self.has_mixing:
            told |= {"mixup": self.mixup or None, "cutmix": self.cutmix or None}
            told["mix_prob"] = self.mix_prob
        parts = [f"{name} {value}".strip() for name, value in told.items() if value is not None]
        return ", ".join(parts) or "nothing (centre crop)"


PRESETS: dict[Preset, Recipe] = {
    "none": Recipe(),
    "light": Recipe(crop_scale=(0.75, 1.0), crop_ratio=(0.9, 1.1), hflip=0.5),
    # Half the area at least: short trainings, and images of 32 pixels, do not bear the 8 % that
    # are usual in hundreds of epochs of ImageNet.
    "standard": Recipe(
        crop_scale=(0.5, 1.0), hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
    ),
    # TrivialAugment moves colours already. alphas: torchvision's reference training of 2021; every
    # second image stays whole, as in the CIFAR trainings of the CutMix paper.
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


class AugmentConfig(Section):
    """How training images are varied; what is not given is as the preset has it."""

    shorthand: ClassVar[str | None] = "preset"
    # the command line reads the word none as no value, and YAML reads the word off as false
    preset: Annotated[Preset, BeforeValidator(lambda v: "none" if v is None else v)] = "standard"
    """none, light (crop, flip), standard (colours too) or strong (TrivialAugment, mixing)."""
    crop_scale: tuple[AreaFraction, AreaFraction] | None = None
    """Smallest and largest share of the area that a random crop keeps, e.g. [0.5, 1]."""
    crop_ratio: tuple[AspectRatio, AspectRatio] | None = None
    """Narrowest and widest shape (width / height) of a random crop, e.g. [0.75, 1.33]."""
    hflip: Probability | None = None
    """Probability of mirroring left and right; 0 where a mirror image is another class (text)."""
    vflip: Probability | None = None
    """Probability of turning upside down; 0.5 suits what has no top (aerial, microscope)."""
    brightness: Strength | None = None
    """Brightness is multiplied by up to 1 ± this."""
    contrast: Strength | None = None
    """Contrast is multiplied by up to 1 ± this."""
    saturation: Strength | None = None
    """Saturation is multiplied by up to 1 ± this."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    """Colours are turned by up to ± this share of the colour wheel."""
    auto: Annotated[AutoPolicy | None, BeforeValidator(lambda v: "off" if v is False else v)] = None
    """Operations drawn from torchvision's list for each image: randaugment, trivialaugment, off."""
    num_ops: Annotated[int, Field(ge=1, le=10)] | None = None
    """Operations per image with auto randaugment."""
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = None
    """Strength of the operations with auto randaugment, of 30."""
    erase: Probability | None = None
    """Probability of painting over a random rectangle with one colour."""
    mixup: Alpha | None = None
    """Blend two images and their labels, in shares from Beta(this, this); 0 is off."""
    cutmix: Alpha | None = None
    """Paste a rectangle of another image, its share from Beta(this, this); 0 is off."""
    mix_prob: Probability | None = None
    """Share of images that are mixed; where mixup and cutmix are both on, half of them by each."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_ratio"):
            bounds = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{name} {list(bounds)}: give the smaller number first")
        recipe = self.build_recipe()
        needed = {
            "crop_ratio": (recipe.crop_scale is not None, "crop_scale"),
            "num_ops": (recipe.auto == "randaugment", "auto randaugment"),
            "magnitude": (recipe.auto == "randaugment", "auto randaugment"),
            "mix_prob": (recipe.mixup > 0 or recipe.cutmix > 0, "mixup or cutmix"),
        }
        for name, (met, remedy) in needed.items():
            if getattr(self, name) is not None and not met:
                raise ValueError(f"{name} has no effect here; give {remedy} too")
        return self

    def build_recipe(self) -> Recipe:
        """The preset with what was given laid over it."""
        given = {name: value for name, value in self if name != "preset" and value is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)


class Augment:
    """Varies batches by a recipe; holds no state that changes."""

    def __init__(self, config: AugmentConfig, *, size: int, num_classes: int) -> None:
        """size: side of the square that the network sees, in pixels"""
        self.recipe = config.build_recipe()
        self.size = size
        self.num_classes = num_classes
        self._auto_policy = _build_auto_policy(self.recipe)

    def __call__(
        self, pixels: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Vary each image in its own way, on the device that holds them.

        pixels: (N, 3, S, S) uint8 with S >= size
        labels: (N,) int64, on the same device
        Returns (N, 3, size, size) uint8, and the labels, or (N, num_classes) float32 shares of the
        classes where the recipe mixes images.
        """
        with _single_thread() if pixels.device.type == "cpu" else contextlib.nullcontext():
            pixels = self._apply_ops(pixels)
            if not self.recipe.has_mixing:
                return pixels, labels
            recipe = self.recipe
            pixels, share = steps.mix_images(pixels, recipe.mixup, recipe.cutmix, recipe.mix_prob)
            return pixels, steps.mix_targets(labels, share, self.num_classes)

    def _apply_ops(self, pixels: torch.Tensor) -> torch.Tensor:
        """All that is done to an image without the help of others."""
        recipe = self.recipe
        pixels = self._crop_and_flip(pixels)
        if self._auto_policy is not None:
            pixels = torch.stack([self._auto_policy(image) for image in pixels])
        if recipe.has_jitter:
            pixels = steps.jitter_color(
                pixels, recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue
            )
        return steps.erase_rectangles(pixels, recipe.erase) if recipe.erase > 0 else pixels

    def _crop_and_flip(self, pixels: torch.Tensor) -> torch.Tensor:
        recipe, count, side = self.recipe, len(pixels), pixels.shape[-1]
        if recipe.crop_scale is None and recipe.hflip == recipe.vflip == 0:
            return center_crop(pixels, self.size)
        if recipe.crop_scale is None:
            boxes = steps.build_center_boxes(count, side, self.size)
        else:
            area = steps.draw_uniform(count, recipe.crop_scale)
            boxes = steps.draw_boxes(area, recipe.crop_ratio, side)
        flips = torch.rand(2, count) < torch.tensor([[recipe.hflip], [recipe.vflip]])
        return steps.crop_and_flip(pixels, boxes, flips, self.size)


def center_crop(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(..., S, S) to (..., size, size): the middle, as torchvision's CenterCrop cuts it."""
    at = steps.compute_center_offset(pixels.shape[-1], size)
    return pixels[..., at : at + size, at : at + size]


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    """Keep the work within on the calling thread.

    It is hundreds of small operations: on a machine with more to do, waiting for a second thread at
    the end of each took fifty times as long as doing without it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _build_auto_policy(recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torchvision's transform of one uint8 image; it draws from torch's global generator alone."""
    if recipe.auto == "off":
        return None
    if recipe.auto == "randaugment":
        return v2.RandAugment(num_ops=recipe.num_ops, magnitude=recipe.magnitude)
    return v2.TrivialAugmentWide()
