"""Class activation maps in the report of a run, with the model that made it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imgcls.errors import RequestError
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions, ReportConfig
from imgcls.evaluation.explained import list_overlays
from imgcls.evaluation.report import write_report
from imgcls.models.bundle import load_bundle
from tests.browser import opened
from tests.conftest import COLORS, draw
from tests.evaluation.multilabel_runs import (
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)
from tests.evaluation.runs import commit, draw_images, drawn


@pytest.fixture(scope="module")
def explained(color_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows with images."""
    folder = tmp_path_factory.mktemp("explained") / "run"
    table = drawn(60, 3, classes=list(COLORS), sharpness=1.0)
    bundle = load_bundle(str(color_bundle))
    commit(
        folder, table, classes=list(COLORS), bundle_sha256=bundle.sha256, model=str(color_bundle)
    )
    draw_images(folder, 60, (320, 200))
    return folder


def test_mistakes_have_maps_of_the_prediction_and_of_the_label(explained: Path) -> None:
    found = compute_evaluation(str(explained), EvaluationOptions(explain=5), need_labels=True)
    rows = found.mistakes.slice(0, 5).to_pylist()
    assert set(found.overlays) == {
        (row["path"], row["row"], row[name])
        for row in rows
        for name in ("predicted_label", "label")
    }
    page = found.render(in_notebook=False)
    assert page.count("<summary>Why</summary>") == 5
    alt = f"{rows[0]['path']}, image regions that contribute to the score of {rows[0]['label']}"
    assert f'alt="{alt}"' in page
    assert "<summary>Why</summary>" in found.render(in_notebook=True)


def test_more_mistakes_than_the_gallery_has_are_explained(explained: Path) -> None:
    options = EvaluationOptions(explain=5, gallery=2)
    found = compute_evaluation(str(explained), options, need_labels=True)
    assert len({row for _, row, _ in found.overlays}) == 5
    assert found.render(in_notebook=False).count("<summary>Why</summary>") == 5
    assert found.uncertain.num_rows == 2


@pytest.mark.parametrize("limit", [{"max_pixels": 1000}, {"max_bytes": 100}])
def test_the_limits_of_the_run_hold(explained: Path, limit: dict[str, int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(explained, folder)
    record = json.loads((folder / "_run.json").read_text())
    record["identity"]["settings"] |= limit
    (folder / "_run.json").write_text(json.dumps(record))
    options = EvaluationOptions(explain=5)
    assert not compute_evaluation(str(folder), options, need_labels=True).overlays


def test_an_image_that_is_gone_has_no_map(explained: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(explain=3)
    before = compute_evaluation(str(explained), options, need_labels=True)
    gone = before.mistakes.to_pylist()[1]
    image = (explained / gone["path"]).rename(tmp_path / "gone.jpg")
    after = compute_evaluation(str(explained), options, need_labels=True)
    image.rename(explained / gone["path"])
    assert set(after.overlays) == {each for each in before.overlays if each[1] != gone["row"]}


def test_without_the_option_the_report_has_no_maps_and_no_model_is_read(explained: Path) -> None:
    options = EvaluationOptions(explain_model="nowhere")
    found = compute_evaluation(str(explained), options, need_labels=True)
    assert not found.overlays
    assert "Why</summary>" not in found.render(in_notebook=False)


def test_another_bundle_is_refused_before_anything_is_written(
    explained: Path, multilabel_bundle: Path
) -> None:
    options = EvaluationOptions(explain=5, explain_model=str(multilabel_bundle))
    with pytest.raises(RequestError, match="was made by another bundle"):
        write_report(ReportConfig(source=str(explained), evaluation=options))
    assert not (explained / "report.html").exists()


def test_false_positives_and_negatives_of_a_multilabel_run_have_the_map_of_their_class(
    multilabel_bundle: Path, tmp_path: Path
) -> None:
    targets = draw_targets(40, classes=3)
    table = build_run_table(targets, draw_scores(targets), classes=list(COLORS))
    bundle = load_bundle(str(multilabel_bundle))
    commit_multilabel(
        tmp_path / "run",
        table,
        classes=list(COLORS),
        bundle_sha256=bundle.sha256,
        model=str(multilabel_bundle),
    )
    draw_images(tmp_path / "run", 40, (64, 48))
    draw("red", (64, 48)).save(tmp_path / "run" / "images" / "000000.jpg")
    options = EvaluationOptions(explain=6)
    found = compute_evaluation(str(tmp_path / "run"), options, need_labels=True)
    assert set(found.overlays) == set(rank_cells(found.mistakes)[:6])
    assert found.render(in_notebook=False).count("<summary>Why</summary>") == 6

    options = EvaluationOptions(explain=12, gallery=4, thumbnails=False)
    small = compute_evaluation(str(tmp_path / "run"), options, need_labels=True)
    wide = EvaluationOptions(gallery=1000, thumbnails=False)
    whole = compute_evaluation(str(tmp_path / "run"), wide, need_labels=True)
    assert set(small.overlays) == set(rank_cells(whole.mistakes)[:12])
    assert small.render(in_notebook=False).count("<summary>Why</summary>") == 12


def test_rows_of_a_history_with_one_number_have_their_own_overlays() -> None:
    rows = [
        {"path": f"/{night}.jpg", "row": 0, "predicted_label": "cat", "label": "dog"}
        for night in ("first", "second")
    ]
    overlays = {(row["path"], 0, "cat"): f"of {row['path']}" for row in rows}
    found = [[each["image"] for each in list_overlays(overlays, row)] for row in rows]
    assert found == [["of /first.jpg"], ["of /second.jpg"]]


def rank_cells(mistakes: pa.Table) -> list[tuple[str, int, str]]:
    """Path, row and class of mistakes, the most confident first."""
    cells = mistakes.to_pylist()
    cells.sort(key=lambda cell: cell["score"] if cell["given"] else 1 - cell["score"])
    return [(cell["path"], cell["row"], cell["label"]) for cell in cells]


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), pytest.param(390, "dark", marks=pytest.mark.slow)]
)
def test_the_maps_open_without_scripts(
    explained: Path, tmp_path: Path, width: int, scheme: str, browser: Any
) -> None:
    report = tmp_path / "report.html"
    options = EvaluationOptions(explain=4)
    write_report(ReportConfig(source=str(explained), output=str(report), evaluation=options))
    report.write_text(re.sub(r"<script>.*?</script>", "", report.read_text(), flags=re.DOTALL))
    with opened(report.as_uri(), width=width, scheme=scheme, browser=browser) as seen:
        first = seen.page.locator("#gallery-mistakes details").first
        assert not first.locator("img").first.is_visible()
        first.locator("summary").click()
        assert first.locator("img").first.is_visible()
        assert first.locator("img").first.evaluate("i => i.complete && i.naturalWidth > 0")
        seen.check_opened_alone(report.as_uri())
        seen.page.locator("#gallery-mistakes").scroll_into_view_if_needed()
        seen.screenshot(f"explained-{width}")
