"""Similar images of a multilabel run are listed with all of their predicted labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imgcls.evaluation import similar
from imgcls.runs.committed import open_run
from tests.evaluation.multilabel_runs import (
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)


def test_predicted_labels_are_joined(tmp_path: Path) -> None:
    targets = draw_targets(20)
    table = build_run_table(targets, draw_scores(targets), embedding=True)
    run = open_run(str(commit_multilabel(tmp_path / "out", table)))
    query = np.array(table["embedding"][7].as_py(), np.float32)
    query /= np.linalg.norm(query)
    similarity, file, position = similar.find_nearest(run, query[None], 3)
    found = similar._build_table(["cat.jpg"], run, similarity, file, position)
    assert found["row"][0].as_py() == 7
    assert "confidence" not in found.schema.names
    lines = similar._format_table(found, "path").splitlines()
    for line, labels in zip(lines[1:], found["predicted_labels"].to_pylist(), strict=True):
        assert line.endswith(f".jpg  {', '.join(labels)}".rstrip())
