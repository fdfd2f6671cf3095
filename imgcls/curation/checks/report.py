"""Report of a check: counts per issue, and pictures of the worst images of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import ImageTable, IntArray
from imgcls.curation.config import Issue
from imgcls.data.thumbnails import build_thumbnails
from imgcls.html import render_page

NOTEBOOK_IMAGES = 6
"""Images of an issue that a notebook shows."""

IssueSection = dict[str, Any]
"""One issue on the page: its description, counts, and the worst images."""

ISSUE_DESCRIPTIONS: dict[Issue, str] = {
    "unreadable": "Cannot be read or decoded; a prediction run gives such a row an error status.",
    "wrong-extension": "The file name has the extension of another format than the content.",
    "tiny": "The shorter side has very few pixels.",
    "extreme-aspect": "Much longer than wide, or wider than long: a square crop loses most of it.",
    "odd-size": "Many times more or fewer pixels than the median image.",
    "near-black": "Almost all of the image is black.",
    "near-white": "Almost all of the image is white.",
    "low-information": "Few shades: a plain color, a placeholder, a screenshot.",
    "blurry": "No sharp edge in the image.",
    "greyscale": "Without color, in a data set of color images.",
    "rotated": "Stored rotated, with an EXIF orientation that some readers ignore.",
    "exact-duplicates": "Files with the same bytes.",
    "near-duplicates": "The same picture: recompressed, resized, mirrored, slightly changed.",
    "similar": "Similar embeddings, although the pixels differ.",
    "leakage": "Also in a manifest of --against: a model would be tested on training images.",
    "label-conflict": "Duplicates of one picture with different labels.",
    "label-error": "A probe that was fitted without this image prefers another class to its label.",
    "outlier": "The embedding is far from those of all other images.",
}


def render_check_report(
    images: ImageTable,
    findings: Sequence[Finding],
    summary: Mapping[str, Any],
    sections: Sequence[IssueSection],
) -> str:
    """Render report.html; `sections` are those of `build_section`, one per finding."""
    checked = summary["manifests"][0]
    return render_page(
        "imgcls.curation",
        "check.html.j2",
        {
            "title": f"{checked['manifest']}: {checked['rows']:,} rows checked",
            "against": summary["manifests"][1:],
            "sections": sections,
            "classes": summary.get("classes", []),
            "clean": int(images.is_own.sum()) - len(_find_affected(images, findings)),
        },
    )


def render_check_result(sections: Sequence[IssueSection], rows: int, report: str) -> str:
    """Render the result for a notebook: counts per issue, and the worst images of each."""
    return render_page(
        "imgcls.curation",
        "check_result.html.j2",
        {"sections": sections, "rows": rows, "report": report, "shown": NOTEBOOK_IMAGES},
    )


def _find_affected(images: ImageTable, findings: Sequence[Finding]) -> IntArray:
    """The images of the checked manifest that have any issue."""
    if not findings:
        return np.empty(0, np.int64)
    indices: IntArray = np.unique(np.concatenate([finding.indices for finding in findings]))
    own: IntArray = indices[images.is_own[indices]]
    return own


def build_section(images: ImageTable, finding: Finding, gallery: int) -> IssueSection:
    """Describe a finding, with up to `gallery` of its worst images."""
    shown = finding.sort_worst_first()[:gallery]
    indices = finding.indices[shown]
    paths = [images.path[int(index)].as_py() for index in indices]
    return {
        "issue": finding.issue,
        "description": ISSUE_DESCRIPTIONS[finding.issue],
        "count": len(finding.indices),
        "share": len(finding.indices) / len(images),
        "groups": None if finding.group is None else len(np.unique(finding.group)),
        "items": [
            {
                "image": image,
                "path": path or "(no path)",
                "manifest": images.manifests[images.manifest_index[index]],
                "row": int(images.row[index]),
                "label": images.describe_label(index),
                "detail": finding.details[number],
                "group": None if finding.group is None else int(finding.group[number]),
            }
            for image, path, index, number in zip(
                build_thumbnails(paths, ""), paths, indices.tolist(), shown.tolist(), strict=True
            )
        ],
    }
