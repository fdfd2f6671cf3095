"""RandAugment and TrivialAugment: the operations of torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from imgcls.training.augment.auto import AutoAugment
from imgcls.training.augment.auto_batch import apply_drawn, draw_operations
from imgcls.training.augment.base import ImageBatch
from tests.training.augment.batches import augmented, noise


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"auto": "trivialaugment"}, v2.TrivialAugmentWide()),
        ({"auto": "randaugment"}, v2.RandAugment(num_ops=2, magnitude=9)),
        (
            {"auto": "randaugment", "num_ops": 3, "magnitude": 20},
            v2.RandAugment(num_ops=3, magnitude=20),
        ),
    ],
)
def test_automatic_operations_are_those_of_torchvision(settings: Any, reference: Any) -> None:
    pixels = noise(6, 12)
    found, _ = augmented(pixels, 12, seed=3, **settings)
    torch.manual_seed(3)
    assert torch.equal(found, torch.stack([reference(image) for image in pixels]))


EXACT = {
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Posterize", "Solarize", "AutoContrast", "Equalize",
}  # fmt: skip
BLENDED = {"Color", "Contrast", "Sharpness"}


@pytest.mark.parametrize("name", sorted(EXACT | BLENDED))
@pytest.mark.parametrize("transform", [v2.TrivialAugmentWide(), v2.RandAugment()])
def test_an_operation_on_a_batch_is_that_of_torchvision_on_each_image(
    transform: Any, name: str
) -> None:
    side = 20
    compute, signed = transform._AUGMENTATION_SPACE[name]
    magnitudes = compute(31, side, side)
    values = [0.0] if magnitudes is None else [float(value) for value in magnitudes]
    values += [-value for value in values] if signed else []
    pixels = noise(len(values), side)
    pixels[::2] = pixels[::2] // 3 + 60  # with few levels, so that contrast can be stretched
    found = apply_drawn(pixels, [(name, value) for value in values])
    for image, value, result in zip(pixels, values, found, strict=True):
        expected = transform._apply_image_or_video_transform(
            image, name, value, interpolation=transform.interpolation, fill=transform._fill
        )
        off = 1 if name in BLENDED else 0
        torch.testing.assert_close(result.int(), expected.int(), atol=off, rtol=0)


def test_every_operation_of_torchvision_has_its_batch() -> None:
    for kind in (v2.TrivialAugmentWide, v2.RandAugment):
        assert set(kind._AUGMENTATION_SPACE) == EXACT | BLENDED


@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment"])
def test_images_of_a_gpu_draw_the_operations_of_a_cpu(policy: Any) -> None:
    made = AutoAugment(auto=policy)
    pixels = noise(40, 12)
    torch.manual_seed(3)
    expected = made.apply(ImageBatch(pixels, torch.zeros(40), 12, 4)).pixels
    torch.manual_seed(3)
    drawn = draw_operations(made._build_transform(), 40, (12, 12))
    found = pixels
    for each in zip(*drawn, strict=True):
        found = apply_drawn(found, each)
    assert len({name for (name, _), *_ in drawn}) > 8
    # a second operation can turn a difference of one level into more, for a few pixels
    assert ((found.int() - expected.int()).abs() > 1).float().mean() < 0.001
