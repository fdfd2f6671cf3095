"""Random erasing: one rectangle of one color, as often as requested."""

from __future__ import annotations

from tests.training.augment.batches import augmented, noise


def test_erasing_covers_one_rectangle_of_one_color() -> None:
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


def test_erasing_is_as_frequent_as_requested() -> None:
    pixels = noise(400, 8)
    found, _ = augmented(pixels, 8, erase=0.25)
    assert 70 <= (found != pixels).flatten(1).any(1).sum() <= 130
