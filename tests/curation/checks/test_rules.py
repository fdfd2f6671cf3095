"""Rules for single images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from imgcls.curation.checks import rules
from imgcls.curation.config import RulesConfig
from tests.curation.pictures import Row, images_of, indices_by_issue, jpeg, picture
from tests.data.pictures import drawn, encoded


def test_each_rule_finds_its_issue(tmp_path: Path) -> None:
    good = drawn(320, 240)
    rows: list[Row] = [(f"good{i}.jpg", jpeg(picture(i)), None) for i in range(20)]
    bad = {
        "unreadable": ("cut.jpg", jpeg(good)[:3000]),
        "wrong-extension": ("png.jpg", encoded(good, "PNG")),
        "tiny": ("tiny.png", encoded(good.resize((12, 9)), "PNG")),
        "extreme-aspect": ("long.jpg", jpeg(drawn(900, 100))),
        "odd-size": ("huge.jpg", jpeg(drawn(2400, 1800))),
        "near-black": ("black.jpg", jpeg(Image.new("RGB", (320, 240), (4, 4, 6)))),
        "near-white": ("white.jpg", jpeg(Image.new("RGB", (320, 240), (252, 252, 252)))),
        "low-information": ("plain.jpg", jpeg(Image.new("RGB", (320, 240), (90, 140, 60)))),
        "blurry": ("blurry.jpg", jpeg(good.filter(ImageFilter.GaussianBlur(12)))),
        "greyscale": ("grey.jpg", jpeg(good.convert("L"))),
        "rotated": ("turned.jpg", encoded(drawn(240, 320), "JPEG", orientation=6)),
    }
    rows += [(name, data, None) for name, data in bad.values()]
    images = images_of(tmp_path, rows)
    found = indices_by_issue(rules.apply_rules(images, RulesConfig()))
    places = {issue: 20 + number for number, issue in enumerate(bad)}
    assert found.pop("odd-size") == [places["tiny"], places["odd-size"]]
    assert found.pop("tiny") == [places["tiny"]]
    assert found == {
        issue: [place] for issue, place in places.items() if issue not in ("odd-size", "tiny")
    }


def test_grayscale_is_no_issue_where_it_is_common(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i).convert("L")), None) for i in range(10)]
    found = indices_by_issue(rules.apply_rules(images_of(tmp_path, rows), RulesConfig()))
    assert "greyscale" not in found


def test_a_key_of_a_bucket_may_contain_any_character(tmp_path: Path) -> None:
    images = images_of(tmp_path, [("s3://b/cat #1?.png", jpeg(picture(0)), None)])
    assert indices_by_issue(rules.apply_rules(images, RulesConfig()))["wrong-extension"] == [0]


@pytest.mark.parametrize(("small", "tiny"), [(1, [0]), (6, [])])
def test_tiny_images_are_no_issue_where_most_are_tiny(
    tmp_path: Path, small: int, tiny: list[int]
) -> None:
    pictures = [
        picture(i).resize((8, 8) if i < small else (64, 48), Image.Resampling.BILINEAR)
        for i in range(7)
    ]
    files = [(f"{i}.png", encoded(each, "PNG"), None) for i, each in enumerate(pictures)]
    (found,) = (
        each
        for each in rules.apply_rules(images_of(tmp_path, files), RulesConfig())
        if each.issue == "tiny"
    )
    assert found.indices.tolist() == tiny
