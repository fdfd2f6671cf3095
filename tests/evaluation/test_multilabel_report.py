"""The report of a multilabel run: what it shows, and that it opens from disk in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions, ReportConfig
from imgcls.evaluation.report import write_report
from tests.browser import opened
from tests.evaluation.multilabel_runs import CLASSES as NAMES
from tests.evaluation.multilabel_runs import (
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)
from tests.evaluation.runs import draw_images

CLASSES = ("<b>ant</b>", "bee & wasp", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows with images, some of them missing, embeddings and out-of-distribution scores."""
    folder = tmp_path_factory.mktemp("report") / "nightly <b>run"
    targets = draw_targets(300)
    table = build_run_table(
        targets, draw_scores(targets), classes=CLASSES, failed=0.05, ood=True, embedding=True
    )
    commit_multilabel(folder, table, classes=CLASSES)
    draw_images(folder, 300, (64, 48))
    options = EvaluationOptions(slice_by=["camera"])
    write_report(ReportConfig(source=str(folder), evaluation=options))
    return folder


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_opens_from_disk_without_an_error_or_a_request(
    run: Path, width: int, scheme: str, browser: Any
) -> None:
    page = (run / "report.html").as_uri()
    with opened(page, width=width, scheme=scheme, browser=browser) as seen:
        assert seen.page.title() == "bundle on drawn, January 1, 2026"
        assert "nightly <b>run" in seen.page.inner_text("h1 + p")
        assert seen.page.locator("h1 *, h1 + p *, td b, summary b").count() == 0
        seen.check_opened_alone(page)
        seen.screenshot(f"multilabel-{width}")


def test_every_section_is_linked_and_shown(run: Path, browser: Any) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        links = seen.page.locator("nav a")
        assert links.all_inner_texts() == [
            *("Mistakes", "Other metrics", "Classes", "Precision and recall", "Co-occurrence"),
            *("Calibration", "Slices", "Possible label errors", "Unlike the training data"),
            *("Similar images", "Errors", "All metrics", "How it was made"),
        ]
        for link in links.all():
            assert seen.page.locator(str(link.get_attribute("href"))).count() == 1
        headline = seen.page.locator(".headline").inner_text()
        assert "mean average precision" in headline
        assert re.search(r"95% interval [\d.]+% to [\d.]+%, n = \d+ labeled images", headline)
        assert sorted(seen.page.locator("#per-class tbody td:first-child").all_inner_texts()) == (
            sorted(CLASSES)
        )
        assert seen.page.locator(".curves figure svg").count() == len(CLASSES)
        assert seen.page.locator("table.dense").count() == 2
        assert seen.page.locator("details.class").count() == len(CLASSES)
        assert seen.page.locator("details.class[open]").count() == 3
        body = seen.page.inner_text("body")
        assert "false positives" in body
        assert "missing" in seen.page.locator("#errors + .scroll").inner_text()
        names = seen.page.locator("#gallery-without-1 li").first.inner_text()
        assert "labels" in names
        assert "predicted" in names


def test_it_is_accessible(run: Path, browser: Any) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        seen.check_accessible()


def test_many_classes_have_pictures_of_their_pairs(tmp_path: Path) -> None:
    classes = [f"class {i:02d}" for i in range(36)]
    targets = draw_targets(400, classes=36)
    table = build_run_table(targets, draw_scores(targets), classes=classes)
    run = commit_multilabel(tmp_path / "out", table, classes=classes)
    options = EvaluationOptions(thumbnails=False)
    text = Path(write_report(ReportConfig(source=str(run), evaluation=options))).read_text()
    assert text.count('<img class="picture"') == 2
    assert "the 30 most frequent of 36 classes" in text
    assert text.count("<figure><svg") == 24
    assert "AP " in text


def test_a_run_without_labels_shows_predictions(tmp_path: Path) -> None:
    targets = draw_targets(50)
    table = build_run_table(targets, draw_scores(targets), labels=None, ood=True)
    run = commit_multilabel(tmp_path / "out", table, labels=None)
    text = Path(write_report(ReportConfig(source=str(run)))).read_text()
    assert "Left out: All metrics that need labels" in text
    assert "Co-occurrence" not in text
    assert "not labeled" not in text
    strangest = text.partition('id="gallery-strangest"')[2].partition("</ul>")[0]
    assert strangest.count("<li") == strangest.count("<dt>predicted</dt>") == 24
    assert "no image" in text
    assert 'id="gallery-samples-1"' in text


def test_the_notebook_shows_curves_and_mistakes(run: Path) -> None:
    found = compute_evaluation(str(run), EvaluationOptions(), need_labels=True)
    text = found._repr_html_()
    assert text.count("<svg") == len(CLASSES) + 1
    assert text.count("<li") == 8
    assert "&lt;b&gt;ant&lt;/b&gt;" in text
    assert "<b>ant</b>" not in text


def test_predictions_of_unknown_cells_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    targets = np.where(np.arange(100)[:, None] % 2, draw_targets(100), -1).astype(np.int8)
    targets[:, 0] = np.arange(100) % 4 == 0
    table = build_run_table(targets, draw_scores(targets), labels="columns")
    columns = LabelColumns(per_class=NAMES)
    run = commit_multilabel(tmp_path / "out", table, labels=columns)
    found = compute_evaluation(str(run), EvaluationOptions(thumbnails=False), need_labels=True)
    unknown = {name for row in found.mistakes["unknown_labels"].to_pylist() for name in row}
    assert unknown
    assert unknown <= set(NAMES[1:])
    assert 'class="unjudged"' in found.render(in_notebook=False)
    assert pa.types.is_list(found.mistakes.schema.field("unknown_labels").type)
