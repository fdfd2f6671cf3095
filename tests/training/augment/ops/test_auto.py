"""RandAugment and TrivialAugment: the operations of torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms import v2

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
