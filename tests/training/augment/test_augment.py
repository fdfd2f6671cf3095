import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from imgcls.config import Section, dump, load
from imgcls.errors import ConfigError
from imgcls.training.augment import ops as steps
from imgcls.training.augment.augment import PRESETS, Augment, AugmentConfig, Recipe, center_crop
from imgcls.training.augment.preview import choose_sample_rows, draw_preview

VARYING = ["light", "standard", "strong"]


class Job(Section):
    augment: AugmentConfig = AugmentConfig()


def noise(count: int, side: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(low, high, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def augmented(
    pixels: torch.Tensor, size: int, seed: int = 0, classes: int = 4, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose labels are 0, 1, 2 and so on, around and around."""
    torch.manual_seed(seed)
    labels = torch.arange(len(pixels)) % classes
    config = AugmentConfig.model_validate({"preset": "none", **settings})
    return Augment(config, size=size, num_classes=classes)(pixels, labels)


# ------------------------------------------------------------------------- settings


def test_a_bare_word_is_the_preset() -> None:
    config = load(Job, ["--augment", "strong"], prog="imgcls train")
    assert config.augment.build_recipe() == PRESETS["strong"]
    assert Job().augment.build_recipe() == PRESETS["standard"]


def test_no_augmentation_can_be_asked_for_where_none_means_no_value(tmp_path: Path) -> None:
    config = load(Job, ["--augment.preset", "none"], prog="imgcls train")
    assert config.augment.build_recipe() == Recipe()
    file = tmp_path / "job.yaml"
    file.write_text("augment: {preset: strong, auto: off}")  # off is YAML for false
    config = load(Job, ["--config", str(file)], prog="imgcls train")
    assert config.augment.build_recipe() == dataclasses.replace(PRESETS["strong"], auto="off")


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
    assert set(OVERRIDES) == {field.name for field in dataclasses.fields(Recipe)}
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
        config = load(Job, argv, prog="imgcls train").augment
        assert config.build_recipe() == dataclasses.replace(PRESETS[preset], **given)
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
def test_a_setting_out_of_its_range_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{key}"):
        load(Job, [f"--augment.{key}", value], prog="imgcls train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_scale": (0.9, 0.5)}, r"crop_scale \[0.9, 0.5\]: give the smaller number first"),
        ({"crop_ratio": (1.5, 0.5)}, r"crop_ratio \[1.5, 0.5\]: give the smaller number first"),
        ({"preset": "none", "crop_ratio": (1.0, 1.0)}, "crop_ratio has no effect.* crop_scale too"),
        ({"preset": "strong", "magnitude": 5}, "magnitude has no effect.* auto randaugment too"),
        ({"num_ops": 1}, "num_ops has no effect.* auto randaugment too"),
        ({"mix_prob": 0.5}, "mix_prob has no effect.* mixup or cutmix too"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig.model_validate(settings)


def test_a_recipe_is_told_in_the_words_of_the_settings() -> None:
    assert str(PRESETS["none"]) == "nothing (centre crop)"
    assert str(PRESETS["light"]) == "crop 75-100 % of the area, hflip 0.5"
    assert str(PRESETS["strong"]) == (
        "crop 30-100 % of the area, hflip 0.5, trivialaugment, erase 0.25, mixup 0.2, cutmix 1.0, "
        "mix_prob 0.5"
    )
    assert str(Recipe(auto="randaugment")) == "randaugment 2 of magnitude 9"


# ------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("side", [32, 35, 36, 37, 38])
def test_none_is_the_centre_crop_bit_for_bit(side: int) -> None:
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
    assert torch.equal(pixels, before), "the caller's images are left alone"


@pytest.mark.parametrize("preset", VARYING)
def test_what_comes_out_is_what_the_network_takes(preset: str) -> None:
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
def test_every_image_of_a_batch_has_a_draw_of_its_own(settings: Any) -> None:
    pixels = noise(1, 16).expand(8, -1, -1, -1)
    found, _ = augmented(pixels, 16, **settings)
    different = len({image.numpy().tobytes() for image in found})
    assert different >= (5 if "auto" in settings else 8)  # operations may be drawn twice


@pytest.mark.parametrize("preset", VARYING)
def test_a_device_is_never_asked_for_a_value(preset: str) -> None:
    """Meta tensors hold no values, so that what would wait for a GPU fails."""
    config = AugmentConfig.model_validate({"preset": preset, "auto": "off", "hue": 0.1})
    pixels, labels = noise(6, 20).to("meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    found, targets = Augment(config, size=16, num_classes=4)(pixels, labels)
    assert (found.shape, found.device.type) == ((6, 3, 16, 16), "meta")
    assert targets.device.type == "meta"


def test_a_cpu_works_on_one_thread_and_leaves_the_others_to_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    cut = steps.crop_and_flip
    monkeypatch.setattr(
        steps, "crop_and_flip", lambda *a: found.append(torch.get_num_threads()) or cut(*a)
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
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = AugmentConfig.model_validate({"preset": preset, "auto": "off"})
    augment = Augment(config, size=16, num_classes=4)
    pixels, labels = noise(8, 20), torch.arange(8) % 4
    torch.manual_seed(0)
    expected, expected_targets = augment(pixels, labels)
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, targets = augment(pixels.cuda(), labels.cuda())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu().int(), expected.int(), atol=3, rtol=0)
    torch.testing.assert_close(targets.cpu(), expected_targets)


# ------------------------------------------------------------------------- geometry


def boxes_of(count: int, side: int, scale: Any = (0.05, 1.0), ratio: Any = (0.5, 2.0)) -> Any:
    torch.manual_seed(0)
    area = steps.draw_uniform(count, scale)
    return area, steps.draw_boxes(area, ratio, side)


def test_boxes_lie_within_the_image_and_have_the_area_and_shape_asked_for() -> None:
    area, boxes = boxes_of(2000, 64, scale=(0.05, 0.4))
    top, left, height, width = boxes.unbind(1)
    assert boxes.min() >= 0
    assert (top + height).max() == 64, "the last row and column are reached"
    assert (left + width).max() == 64
    assert top.min() == left.min() == 0
    # each side is off by half a pixel at most
    found = height * width
    off = (height + width) / 2 + 1
    assert ((found - area * 64 * 64).abs() <= off).all()
    ratio = width / height
    assert (ratio <= 2 * (1 + 1 / height)).all()
    assert (ratio >= 0.5 * (1 - 1 / height)).all()
    small = ratio[area < 0.3].log()
    assert small.mean().abs() < 0.1, "as many wide ones as tall ones"


def test_a_box_of_the_whole_area_is_the_whole_image_whatever_its_shape() -> None:
    _, boxes = boxes_of(50, 31, scale=(1.0, 1.0))
    assert (boxes == torch.tensor([0, 0, 31, 31])).all()


@pytest.mark.parametrize(("side", "size"), [(32, 32), (40, 32), (20, 32), (90, 24)])
@pytest.mark.parametrize("how", [steps._crop_on_cpu, steps._crop_on_gpu])
def test_crops_are_those_of_torchvision(side: int, size: int, how: Any) -> None:
    """The GPU's way sums in float32 what the CPU's sums in integers: one level of 255 apart."""
    pixels = noise(24, side)
    _, boxes = boxes_of(24, side, scale=(0.2, 1.0))
    flips = torch.rand(2, 24) < 0.5
    found = how(pixels, boxes, flips, size)
    for image, box, (mirrored, turned), out in zip(pixels, boxes, flips.T, found, strict=True):
        expected = TF.resized_crop(image, *box.tolist(), [size, size], antialias=True)
        expected = TF.horizontal_flip(expected) if mirrored else expected
        expected = TF.vertical_flip(expected) if turned else expected
        torch.testing.assert_close(out.int(), expected.int(), atol=1, rtol=0)


@pytest.mark.parametrize("how", [steps._crop_on_cpu, steps._crop_on_gpu])
def test_flips_move_pixels_and_change_none(how: Any) -> None:
    pixels = noise(4, 19)
    boxes = steps.build_center_boxes(4, 19, 16)
    flips = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]) > 0
    plain, mirrored, turned, both = how(pixels, boxes, flips, 16)
    middle = TF.center_crop(pixels, [16, 16])
    assert torch.equal(plain, middle[0])
    assert torch.equal(mirrored, middle[1].flip(-1))
    assert torch.equal(turned, middle[2].flip(-2))
    assert torch.equal(both, middle[3].flip(-1, -2))


@pytest.mark.parametrize(("setting", "axis"), [("hflip", -1), ("vflip", -2)])
def test_flips_are_as_frequent_as_asked_for(setting: str, axis: int) -> None:
    pixels = noise(400, 4)
    found, _ = augmented(pixels, 4, **{setting: 1.0})
    assert torch.equal(found, pixels.flip(axis))
    found, _ = augmented(pixels, 4, **{setting: 0.25})
    flipped = (found == pixels.flip(axis)).flatten(1).all(1)
    assert 70 <= flipped.sum() <= 130
    assert torch.equal(found[~flipped], pixels[~flipped])


def test_crops_keep_the_share_of_the_area_that_was_asked_for() -> None:
    # red tells the column and green the row, so that a crop shows where it was
    ramp = torch.arange(64, dtype=torch.uint8) * 4
    red, green = ramp.expand(64, 64), ramp[:, None].expand(64, 64)
    pixels = torch.stack([red, green, red]).expand(200, -1, -1, -1)
    found, _ = augmented(pixels, 64, crop_scale=(0.4, 0.6), crop_ratio=(0.5, 2.0))
    seen = found[:, :2].flatten(2).float()
    extent = (seen.amax(2) - seen.amin(2)) / 4 + 1
    area, shape = extent.prod(1) / 64**2, extent[:, 0] / extent[:, 1]
    assert 0.38 < area.min() < 0.42
    assert 0.58 < area.max() < 0.62
    assert 0.45 < shape.min() < 0.6
    assert 1.7 < shape.max() < 2.1


# ------------------------------------------------------------------------- colours


def coloured_noise(count: int, side: int) -> torch.Tensor:
    """Less red than green, so that the channels must not be mistaken for each other."""
    tint = torch.tensor([0, 60, 20], dtype=torch.uint8)[:, None, None]
    return noise(count, side, 80, 110) + tint


@pytest.mark.parametrize(
    ("setting", "reference"),
    [
        ("brightness", TF.adjust_brightness),
        ("contrast", TF.adjust_contrast),
        ("saturation", TF.adjust_saturation),
    ],
)
@pytest.mark.parametrize("end", [0, 1])
def test_colours_change_as_in_torchvision(
    monkeypatch: pytest.MonkeyPatch, setting: str, reference: Any, end: int
) -> None:
    """At either end of the range that is drawn from; two levels, since torchvision rounds down."""
    monkeypatch.setattr(
        steps, "draw_uniform", lambda n, bounds: torch.full((n,), float(bounds[end]))
    )
    pixels = coloured_noise(3, 8)
    found, _ = augmented(pixels, 8, **{setting: 0.3})
    expected = reference(pixels, (0.7, 1.3)[end])
    torch.testing.assert_close(found.int(), expected.int(), atol=2, rtol=0)


def test_colours_change_together_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "draw_uniform", lambda n, bounds: torch.full((n,), float(bounds[0])))
    pixels = coloured_noise(3, 8)
    found, _ = augmented(pixels, 8, brightness=0.3, contrast=0.4, saturation=0.5)
    expected = TF.adjust_saturation(pixels / 255, 0.5)
    expected = TF.adjust_brightness(TF.adjust_contrast(expected, 0.6), 0.7)
    torch.testing.assert_close(found.float(), 255 * expected, atol=1, rtol=0)


def test_factors_are_drawn_from_the_whole_range() -> None:
    pixels = torch.full((300, 3, 2, 2), 100, dtype=torch.uint8)
    found, _ = augmented(pixels, 2, brightness=0.5)
    assert 50 <= found.min() < 55
    assert 145 < found.max() <= 150
    assert 95 < found.float().mean() < 105


def test_a_hue_keeps_the_luma_and_half_a_turn_is_the_complement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "draw_uniform", lambda n, bounds: torch.full((n,), float(bounds[1])))
    pixels = coloured_noise(3, 8)
    found, _ = augmented(pixels, 8, hue=0.5)
    luma = TF.rgb_to_grayscale(pixels.float(), num_output_channels=3)
    torch.testing.assert_close(found.float(), 2 * luma - pixels.float(), atol=1, rtol=0)


def test_four_quarter_turns_of_the_hue_are_none_and_grey_stays_grey() -> None:
    quarter = steps.build_color_matrix(torch.ones(1), torch.tensor([0.25]))[0]
    torch.testing.assert_close(quarter.matrix_power(4), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(quarter @ torch.ones(3), torch.ones(3), atol=1e-4, rtol=0)
    paler = steps.build_color_matrix(torch.tensor([0.5]), torch.zeros(1))[0]
    both = steps.build_color_matrix(torch.tensor([0.5]), torch.tensor([0.25]))[0]
    torch.testing.assert_close(both, paler @ quarter)
    grey = torch.full((8, 3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(augmented(grey, 4, hue=0.5, saturation=1.0)[0], grey)


def test_colours_that_leave_the_range_are_clipped_and_do_not_wrap() -> None:
    pixels = torch.tensor([0, 250], dtype=torch.uint8).repeat(3, 8, 1)[None].expand(64, -1, -1, -1)
    found, _ = augmented(pixels[..., :2, :], 2, brightness=1.0, contrast=1.0)
    dark, light = found[..., 0].int(), found[..., 1].int()
    assert (dark <= light).all()


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


# ------------------------------------------------------------------------- erasing


def test_erasing_paints_one_rectangle_of_one_colour() -> None:
    pixels = noise(60, 20)
    found, _ = augmented(pixels, 20, erase=1.0)
    areas = []
    for before, after in zip(pixels, found, strict=True):
        rows, columns = (before != after).any(0).nonzero().unbind(1)
        box = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == box[:, :1, :1]).all()
        areas.append(box[0].numel() / 400)
    assert 0.01 < min(areas) < 0.08
    assert 0.25 < max(areas) < 0.37


def test_erasing_is_as_frequent_as_asked_for() -> None:
    pixels = noise(400, 8)
    found, _ = augmented(pixels, 8, erase=0.25)
    assert 70 <= (found != pixels).flatten(1).any(1).sum() <= 130


# ------------------------------------------------------------------------- mixing

MIXING = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0, "mix_prob": 0.7}]


@pytest.mark.parametrize("settings", MIXING, ids=str)
def test_targets_are_the_shares_of_the_classes_in_the_pixels(settings: Any) -> None:
    brightness = torch.tensor([0, 80, 160, 240])  # of each class
    pixels = brightness[torch.arange(40) % 4].to(torch.uint8)[:, None, None, None]
    found, targets = augmented(pixels.expand(-1, 3, 12, 12), 12, **settings)
    assert (targets.shape, targets.dtype) == ((40, 4), torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    assert targets.min() >= 0
    in_pixels = found.float().mean((1, 2, 3))
    torch.testing.assert_close(in_pixels, targets @ brightness.float(), atol=0.51, rtol=0)
    assert targets.max(1).values.min() < 0.7, "some are mixed in earnest"


def test_mixup_blends_each_image_with_the_one_before() -> None:
    pixels = noise(12, 6)
    torch.manual_seed(0)
    found, share = steps.mix_images(pixels, 1.0, 0.0, 1.0)
    weight = share[:, None, None, None]
    expected = weight * pixels + (1 - weight) * pixels.roll(1, 0)
    torch.testing.assert_close(found.float(), expected, atol=0.51, rtol=0)
    assert len(share.unique()) == 12
    assert share.min() >= 0.5


def test_cutmix_pastes_a_square_of_the_image_before() -> None:
    own, other = torch.full((2, 3, 10, 10), 1, dtype=torch.uint8)
    pixels = torch.stack([own, other + 1] * 10)
    torch.manual_seed(0)
    found, share = steps.mix_images(pixels, 0.0, 1.0, 1.0)
    for before, after, rest in zip(pixels, found, share, strict=True):
        rows, columns = (before != after)[0].nonzero().unbind(1)
        side = int(rows.max() - rows.min()) + 1
        assert side == columns.max() - columns.min() + 1
        assert len(rows) == side**2, "the whole square is another's"
        assert rest == pytest.approx(1 - side**2 / 100)


def test_images_are_mixed_as_often_as_asked_for_half_of_them_by_each() -> None:
    pixels = torch.tensor([0, 200], dtype=torch.uint8).repeat(300)[:, None, None, None]
    found, targets = augmented(
        pixels.expand(-1, 3, 8, 8), 8, mixup=1.0, cutmix=1.0, mix_prob=0.5, classes=2
    )
    mixed = targets.max(1).values < 1
    pasted = (found.flatten(1).amax(1) == 200) & (found.flatten(1).amin(1) == 0)
    assert 260 <= mixed.sum() <= 340
    assert 110 <= pasted.sum() <= 190
    assert (mixed | ~pasted).all()


@pytest.mark.parametrize("settings", MIXING[:2], ids=str)
def test_a_batch_of_one_is_mixed_with_itself(settings: Any) -> None:
    pixels = noise(1, 8)
    found, targets = augmented(pixels, 8, **settings)
    assert torch.equal(found, pixels)
    torch.testing.assert_close(targets, torch.tensor([[1.0, 0, 0, 0]]))


def test_labels_stay_labels_where_nothing_is_mixed() -> None:
    _, targets = augmented(noise(5, 8), 8, mixup=0.2, mix_prob=0.0)
    assert targets.tolist() == [0, 1, 2, 3, 0]


# ------------------------------------------------------------------------- the picture


def sheet(preset: str, side: int = 20, size: int = 16, **settings: Any) -> Image.Image:
    config = AugmentConfig.model_validate({"preset": preset})
    augment = Augment(config, size=size, num_classes=3)
    pixels, labels = noise(3, side).numpy(), np.array([0, 1, 2])
    names = ["cat", "dog", "a name so long that no caption can hold it"]
    return Image.open(io.BytesIO(draw_preview(pixels, labels, names, augment, **settings)))


def contains(picture: Image.Image, tile: np.ndarray) -> bool:
    """Whether the tile stands somewhere in the picture, pixel for pixel."""
    pixels = np.asarray(picture)
    height, width, _ = tile.shape
    corners = np.argwhere((pixels == tile[0, 0]).all(-1))
    return any(np.array_equal(pixels[y : y + height, x : x + width], tile) for y, x in corners)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_grid_shows_every_image_as_it_is_evaluated(preset: str) -> None:
    picture = sheet(preset)
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    for image in center_crop(noise(3, 20), 16):
        tile = image.permute(1, 2, 0).numpy().repeat(9, 0).repeat(9, 1)
        assert contains(picture, tile)


def test_the_grid_shows_what_a_worker_would_see() -> None:
    torch.manual_seed(4)
    config = AugmentConfig(preset="light")
    found, _ = Augment(config, size=16, num_classes=3)(noise(3, 20), torch.arange(3))
    picture = sheet("light", seed=4)
    for image in found:
        assert contains(picture, image.permute(1, 2, 0).numpy().repeat(9, 0).repeat(9, 1))


def test_the_grid_grows_with_its_columns_and_shrinks_large_images() -> None:
    narrow, wide = sheet("standard", columns=2), sheet("standard", columns=5)
    assert wide.width - narrow.width == 3 * (16 * 9 + 6)
    assert sheet("light", side=300, size=256, columns=2).width == narrow.width


def test_the_grid_makes_room_for_the_targets_of_mixed_images() -> None:
    assert sheet("strong").height > sheet("standard").height


def test_the_grid_depends_on_its_seed_and_leaves_the_callers_randomness_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = sheet("strong"), sheet("strong"), sheet("strong", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_sample_has_as_many_classes_as_possible() -> None:
    assert choose_sample_rows(np.array([0, 0, 0, 1, 1, 2]), 4).tolist() == [0, 1, 3, 5]
    assert choose_sample_rows(np.array([5, 3, 5]), 8).tolist() == [1, 0, 2]
    many = choose_sample_rows(np.arange(1000) // 10, 8)
    assert len(many) == 8
    assert (many[0], many[-1]) == (0, 990)
