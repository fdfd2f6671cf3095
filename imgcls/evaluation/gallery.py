"""Galleries of the reports: images with their predictions and labels, and filters over them.

An item is one image: a dictionary that the macro `gallery` of the templates shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from imgcls.formatting import format_count
from imgcls.metrics.formatting import format_percent

CONFIDENCE_STEPS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Minimum confidences to choose from."""
SIDES = ((320, 90), (224, 190))
"""Largest width and height of the images of a page, and up to how many images."""
SLICE_PREFIX = "slice:"
MIN_FILTERED = 4

Item = dict[str, Any]


def choose_side(images: int, smallest: int) -> int:
    """Width and height of the images of a page, so that all of them need about 3 MB at most."""
    return next((side for side, most in SIDES if images <= most), smallest)


def build_item(
    row: Mapping[str, Any],
    image: str | None,
    overlays: Sequence[Mapping[str, str]],
    *,
    classes: Collection[str],
    has_labels: bool,
) -> Item:
    """The item of a row with one label.

    row: as `row_lookup.lookup_rows` returns it
    classes: of the model; a prediction for another label is neither correct nor wrong
    has_labels: whether any row of the run has a label
    """
    predicted, label = row["predicted_label"], row["label"]
    kind, outcome = "unjudged", "unknown label" if label is not None else "no label"
    if label in classes:
        kind, outcome = ("truth", "correct") if label == predicted else ("bad", "wrong")
    shown = "" if label is None else f", label {label}"
    return {
        "image": image,
        "alt": f"{row['path']}, predicted {predicted}{shown}",
        "path": row["path"],
        "overlays": overlays,
        "cell": None,
        "predicted_name": "predicted",
        "predicted": [{"name": predicted, "kind": kind, "score": _format_score(row["confidence"])}],
        "has_label": has_labels,
        "label_name": "label",
        "without_label": "no label",
        "labels": None
        if label is None
        else [
            {
                "name": label,
                "kind": "truth" if label in classes else "unjudged",
                "score": _format_score(row["label_score"]) if label != predicted else "",
            }
        ],
        "confidence": row["confidence"],
        "scores": list_scores(row),
        "facets": {
            "class": list(dict.fromkeys(name for name in (predicted, label) if name is not None)),
            "status": [outcome, *list_acceptance(row)],
            **list_slices(row),
        },
    }


def list_scores(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The classes with the highest scores, if the row has them."""
    names, scores = row.get("topk_labels"), row.get("topk_scores")
    if not names or not scores:
        return []
    return [(name, round(score, 4)) for name, score in zip(names, scores, strict=True)]


def list_acceptance(row: Mapping[str, Any]) -> list[str]:
    """Whether the prediction reaches the threshold of the model, if known."""
    accepted = row.get("accepted")
    return [] if accepted is None else ["accepted" if accepted else "below the threshold"]


def list_slices(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The values of a row in the columns that the run is sliced by."""
    return {f"{SLICE_PREFIX}{name}": [value] for name, value in row.get("slices") or ()}


def list_filters(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The filters of a gallery: each with a key, a name and the values that not all items have.

    None for fewer than `MIN_FILTERED` items.
    """
    if len(items) < MIN_FILTERED:
        return []
    found = []
    for key in dict.fromkeys(key for item in items for key in item["facets"]):
        number = Counter(value for item in items for value in item["facets"].get(key, ()))
        options = [
            {"value": value, "text": f"{value} ({count})"}
            for value, count in sorted(number.items())
            if count < len(items)
        ]
        if options:
            found.append({"key": key, "name": key.removeprefix(SLICE_PREFIX), "options": options})
    steps = [
        {"value": step, "text": f"at least {format_percent(step, 0)} ({count})"}
        for step in CONFIDENCE_STEPS
        for count in [sum((item["confidence"] or 0) >= step for item in items)]
        if 0 < count < len(items)
    ]
    if steps:
        # after the class, if there is a choice of classes
        place = 1 if found and found[0]["key"] == "class" else 0
        found.insert(place, {"key": "confidence", "name": "confidence", "options": steps})
    return found


def describe_shown(shown: int, all_rows: int, what: str, order: str) -> str:
    """Which images a gallery shows: "24 of 1,234 misclassified images, the most ... first."."""
    if shown >= all_rows:
        return format_count(all_rows, what) + (f", {order} first." if shown > 1 else ".")
    return f"{shown:,} of {format_count(all_rows, what)}, {order} first."


def _format_score(score: float | None) -> str:
    return "" if score is None else format_percent(score, 1)
