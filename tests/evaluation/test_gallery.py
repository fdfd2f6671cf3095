"""Galleries: filters over images, and the size of the images."""

from __future__ import annotations

from typing import Any

from imgcls.evaluation.gallery import choose_side, describe_shown, list_filters


def item(confidence: float, **facets: list[str]) -> dict[str, Any]:
    return {"confidence": confidence, "facets": facets}


def test_filters_have_the_values_that_not_all_images_have() -> None:
    items = [
        item(0.97, **{"class": ["cat", "dog"], "status": ["wrong", "accepted"]}),
        item(0.91, **{"class": ["cat", "eel"], "status": ["wrong", "accepted"]}),
        item(0.85, **{"class": ["eel"], "status": ["wrong", "accepted"]}),
        item(0.40, **{"class": ["dog", "eel"], "status": ["wrong", "below the threshold"]}),
    ]
    texts = {each["key"]: [o["text"] for o in each["options"]] for each in list_filters(items)}
    assert list(texts) == ["class", "confidence", "status"]
    assert texts["class"] == ["cat (2)", "dog (2)", "eel (3)"]
    assert texts["confidence"] == [
        *("at least 50% (3)", "at least 80% (3)", "at least 90% (2)", "at least 95% (1)"),
    ]
    assert texts["status"] == ["accepted (3)", "below the threshold (1)"]  # all are wrong
    assert list_filters(items[:3]) == []


def test_a_gallery_names_how_many_images_it_shows() -> None:
    assert (
        describe_shown(24, 1234, "mistake", "the worst") == "24 of 1,234 mistakes, the worst first."
    )
    assert describe_shown(3, 3, "mistake", "the worst") == "3 mistakes, the worst first."
    assert describe_shown(1, 1, "mistake", "the worst") == "1 mistake."


def test_many_images_are_smaller() -> None:
    assert [choose_side(number, 132) for number in (10, 90, 91, 190, 191)] == [
        320,
        320,
        224,
        224,
        132,
    ]
