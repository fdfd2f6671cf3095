"""Settings, presets and properties that hold for every augmentation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from imgcls.config import Section, dump, load
from imgcls.errors import ConfigError
from imgcls.training.augment import crop
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.recipe import PRESETS, AugmentConfig, Recipe
from tests.training.augment.batches import augmented, noise

VARYING = ["light", "standard", "strong"]


class Job(Section):
    augment: AugmentConfig = AugmentConfig()


# ------------------------------------------------------------------------- settings


def test_a_bare_word_is_the_preset() -> None:
    config = load(Job, ["--augment", "strong"])
    assert config.augment.build_recipe() == PRESETS["strong"]
    assert Job().augment.build_recipe() == PRESETS["standard"]


def test_the_preset_none_can_be_set_although_none_means_no_value(tmp_path: Path) -> None:
    config = load(Job, ["--augment.preset", "none"])
    assert config.augment.build_recipe() == Recipe()
    file = tmp_path / "job.yaml"
    file.write_text("augment: {preset: strong, auto: off}")  # off is YAML for false
    config = load(Job, ["--config", str(file)])
    assert config.augment.build_recipe() == PRESETS["strong"].model_copy(update={"auto": "off"})


OVERRIDES: dict[str, Any] = {
    "crop_scale": (0.6, 0.7),
    "crop_ratio": (0.8, 1.2),
    "hflip": 0.25,
    "vflip": 0.125,
    "brightness": 0.35,
    "contrast": 0.45,
    "saturation": 0.55,
    "hue": 0.15,
    "auto": "randaugment",
    "num_ops": 3,
    "magnitude": 11,
    "erase": 0.65,
    "mixup": 0.75,
    "cutmix": 0.85,
    "mix_prob": 0.95,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_overrides_its_preset_and_only_itself(preset: Any) -> None:
    assert set(OVERRIDES) == set(Recipe.model_fields)
    companions: dict[str, dict[str, Any]] = {
        "crop_ratio": {"crop_scale": (0.1, 1.0)},
        "num_ops": {"auto": "randaugment"},
        "magnitude": {"auto": "randaugment"},
        "mix_prob": {"mixup": 0.1},
    }
    for name, value in OVERRIDES.items():
        given = {name: value, **companions.get(name, {})}
        argv = ["--augment", preset] if preset != "none" else ["--augment.preset", preset]
        for key, one in given.items():
            text = str(list(one)) if isinstance(one, tuple) else str(one)
            argv += [f"--augment.{key.replace('_', '-')}", text]
        config = load(Job, argv).augment
        assert config.build_recipe() == PRESETS[preset].model_copy(update=given)
        assert AugmentConfig.model_validate_json(config.model_dump_json()) == config
        assert config.preset in dump(Job(augment=config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preset", "heavy"),
        ("crop_scale", "[0, 1]"),
        ("crop_scale", "[0.5, 1.1]"),
        ("crop_scale", "0.5"),
        ("crop_ratio", "[0, 1]"),
        ("crop_ratio", "[1, 11]"),
        ("hflip", "1.5"),
        ("vflip", "-0.1"),
        ("brightness", "1.1"),
        ("contrast", "-1"),
        ("saturation", "2"),
        ("hue", "0.6"),
        ("auto", "autoaugment"),
        ("num_ops", "0"),
        ("magnitude", "31"),
        ("erase", "1.01"),
        ("mixup", "-0.2"),
        ("cutmix", "11"),
        ("mix_prob", "2"),
    ],
)
def test_a_setting_out_of_range_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{key}"):
        load(Job, [f"--augment.{key}", value])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_scale": (0.9, 0.5)}, r"crop_scale \[0.9, 0.5\]: pass the smaller number first"),
        ({"crop_ratio": (1.5, 0.5)}, r"crop_ratio \[1.5, 0.5\]: pass the smaller number first"),
        (
            {"preset": "none", "crop_ratio": (1.0, 1.0)},
            "crop_ratio has no effect.* set crop_scale too",
        ),
        ({"preset": "strong", "magnitude": 5}, "magnitude has no effect.* auto randaugment too"),
        ({"num_ops": 1}, "num_ops has no effect.* auto randaugment too"),
        ({"mix_prob": 0.5}, "mix_prob has no effect.* mixup or cutmix too"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig.model_validate(settings)


def test_a_recipe_is_described_by_its_settings() -> None:
    assert str(PRESETS["none"]) == "center crop only"
    assert str(PRESETS["light"]) == "crop 75-100 % of the area, hflip 0.5"
    assert str(PRESETS["strong"]) == (
        "crop 30-100 % of the area, hflip 0.5, trivialaugment, erase 0.25, mixup 0.2, cutmix 1.0, "
        "mix_prob 0.5"
    )
    assert str(Recipe(auto="randaugment")) == "randaugment 2 operations of magnitude 9"


# ------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("side", [32, 35, 36, 37, 38])
def test_none_is_the_center_crop_bit_for_bit(side: int) -> None:
    pixels = noise(3, side)
    found, targets = augmented(pixels, 32)
    assert torch.equal(found, TF.center_crop(pixels, [32, 32]))
    assert targets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("preset", VARYING)
def test_the_seed_alone_decides(preset: str) -> None:
    pixels = noise(16, 20)
    before = pixels.clone()
    random.seed(1)
    np.random.seed(1)
    found, targets = augmented(pixels, 16, seed=5, preset=preset)
    random.seed(2)
    np.random.seed(2)
    again, same_targets = augmented(pixels, 16, seed=5, preset=preset)
    assert torch.equal(found, again)
    assert torch.equal(targets, same_targets)
    assert not torch.equal(found, augmented(pixels, 16, seed=6, preset=preset)[0])
    assert torch.equal(pixels, before), "the caller's images must not change"


@pytest.mark.parametrize("preset", VARYING)
def test_the_output_is_the_input_of_the_network(preset: str) -> None:
    found, targets = augmented(noise(5, 20), 16, preset=preset)
    assert (found.shape, found.dtype) == ((5, 3, 16, 16), torch.uint8)
    if preset == "strong":
        assert (targets.shape, targets.dtype) == ((5, 4), torch.float32)
    else:
        assert (targets.tolist(), targets.dtype) == ([0, 1, 2, 3, 0], torch.int64)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_scale": (0.2, 0.8)},
        {"brightness": 0.8},
        {"contrast": 0.8},
        {"saturation": 0.8},
        {"hue": 0.4},
        {"auto": "randaugment"},
        {"auto": "trivialaugment"},
        {"erase": 1.0},
    ],
    ids=str,
)
def test_every_image_of_a_batch_has_its_own_random_draw(settings: Any) -> None:
    pixels = noise(1, 16).expand(8, -1, -1, -1)
    found, _ = augmented(pixels, 16, **settings)
    different = len({image.numpy().tobytes() for image in found})
    assert different >= (5 if "auto" in settings else 8)  # operations may be drawn twice


@pytest.mark.parametrize("preset", VARYING)
def test_no_value_is_ever_copied_from_the_device(preset: str) -> None:
    """Meta tensors have no values: an operation that would synchronize with a GPU fails."""
    config = AugmentConfig.model_validate({"preset": preset, "hue": 0.1})
    pixels, labels = noise(6, 20).to("meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    found, targets = Augment(config, size=16, num_classes=4)(pixels, labels)
    assert (found.shape, found.device.type) == ((6, 3, 16, 16), "meta")
    assert targets.device.type == "meta"


def test_a_cpu_augments_on_one_thread_and_restores_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    cut = crop.crop_and_flip
    monkeypatch.setattr(
        crop, "crop_and_flip", lambda *a: found.append(torch.get_num_threads()) or cut(*a)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        augmented(noise(2, 8), 8, preset="standard")
        found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == [1, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("preset", VARYING)
def test_a_gpu_gives_what_a_cpu_gives(preset: str) -> None:
    config = AugmentConfig.model_validate({"preset": preset, "auto": "off"})
    augment = Augment(config, size=16, num_classes=4)
    pixels, labels = noise(8, 20), torch.arange(8) % 4
    torch.manual_seed(0)
    expected, expected_targets = augment(pixels, labels)
    # a copy from pageable memory waits for the device
    pixels_there, labels_there = pixels.cuda(), labels.cuda()
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, targets = augment(pixels_there, labels_there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu().int(), expected.int(), atol=3, rtol=0)
    torch.testing.assert_close(targets.cpu(), expected_targets)
