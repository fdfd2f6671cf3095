"""The page of a check: what was found, how often, and pictures of the worst of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imgcls.curation.checks.findings import Finding, Issue
from imgcls.curation.checks.image_table import ImageTable, IntArray
from imgcls.data.thumbnails import build_thumbnails
from imgcls.html import render_page

ISSUE_DESCRIPTIONS: dict[Issue, str] = {
    "unreadable": "Could not be read or decoded; a labelling run gives them a status of their own.",
    "wrong-extension": "The name says another format than the bytes.",
    "tiny": "So few pixels that little can be seen.",
    "extreme-aspect": "Much longer than wide, or wider than long: a square crop loses most of it.",
    "odd-size": "Many times larger or smaller than most.",
    "near-black": "Almost nothing but black.",
    "near-white": "Almost nothing but white.",
    "low-information": "Few shades: a plain colour, a placeholder, a screenshot.",
    "blurry": "No sharp edge anywhere.",
    "greyscale": "Without colour, in a set of colour images.",
    "rotated": "Stored turned, with a note (EXIF) how to turn it that some readers pass over.",
    "exact-duplicates": "The same bytes more than once.",
    "near-duplicates": "The same picture: saved again, resized, mirrored, slightly cropped or lit.",
    "similar": "Alike to the model, although their pixels differ.",
    "leakage": "Also in a manifest that this one is held against: what is learnt would be tested.",
    "label-conflict": "Copies of one picture with different labels.",
    "label-error": "A probe that has not seen this label holds another class to be likelier.",
    "outlier": "Unlike everything else, to the model.",
}


def render_check_report(
    images: ImageTable, findings: Sequence[Finding], summary: Mapping[str, Any], gallery: int
) -> str:
    """The page, with up to `gallery` images of each issue."""
    sections = [_build_section(images, finding, gallery) for finding in findings]
    checked = summary["manifests"][0]
    return render_page(
        "imgcls.curation",
        "check.html.j2",
        {
            "title": f"{checked['manifest']}: {checked['rows']:,} rows checked",
            "against": summary["manifests"][1:],
            "sections": sections,
            "clean": int(images.is_own.sum()) - len(_find_affected(images, findings)),
        },
    )


def _find_affected(images: ImageTable, findings: Sequence[Finding]) -> IntArray:
    """The checked images that have any issue."""
    if not findings:
        return np.empty(0, np.int64)
    at = np.unique(np.concatenate([finding.indices for finding in findings]))
    return at[images.is_own[at]]


def _build_section(images: ImageTable, finding: Finding, gallery: int) -> dict[str, Any]:
    shown = finding.sort_worst_first()[:gallery]
    at = finding.indices[shown]
    paths = [images.path[int(place)].as_py() for place in at]
    return {
        "issue": finding.issue,
        "meaning": ISSUE_DESCRIPTIONS[finding.issue],
        "count": len(finding.indices),
        "share": len(finding.indices) / len(images),
        "groups": None if finding.group is None else len(np.unique(finding.group)),
        "items": [
            {
                "image": image,
                "path": path or "(no path)",
                "manifest": images.manifests[images.manifest_index[place]],
                "row": int(images.row[place]),
                "label": images.classes[images.label[place]] if images.label[place] >= 0 else None,
                "detail": finding.details[number],
                "group": None if finding.group is None else int(finding.group[number]),
            }
            for image, path, place, number in zip(
                build_thumbnails(paths, ""), paths, at.tolist(), shown.tolist(), strict=True
            )
        ],
    }
