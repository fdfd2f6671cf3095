"""The table of issues."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imgcls.curation.checks.findings import Finding, build_issue_table
from tests.curation.pictures import Row, images_of, jpeg, picture


def test_the_table_is_sorted_by_score_and_keeps_groups_together(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), "x" if i else None) for i in range(5)]
    images = images_of(tmp_path, rows)
    findings = [
        Finding(
            "near-duplicates",
            np.array([0, 1, 2, 3]),
            np.array([0.2, 0.9, 0.3, 0.1], np.float32),
            ["a", "b", "c", "d"],
            np.array([0, 1, 0, 1]),
        )
    ]
    table = build_issue_table(images, findings)
    assert table.column("row").to_pylist() == [1, 3, 0, 2]
    assert table.column("group").to_pylist() == [1, 1, 0, 0]
    assert table.column("label").to_pylist() == ["x", "x", None, "x"]
    assert table.column("detail").to_pylist() == ["b", "d", "a", "c"]
