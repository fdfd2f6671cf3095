"""The report in a browser, opened from disk, at desktop and phone width."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from imgcls.evaluation import confusion_plot
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions, ReportConfig
from imgcls.evaluation.report import write_report
from tests.browser import opened
from tests.evaluation.runs import CLASSES, commit, draw_images, drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows with images of their own, one of them gone since."""
    folder = tmp_path_factory.mktemp("report") / "nightly <b>run"
    table = drawn(400, 7, failed=0.03, unknown=0.02, sharpness=1.5)
    commit(folder, table, model="models/<i>small")
    draw_images(folder, 400, (320, 200))
    options = EvaluationOptions(slice_by=["camera"])
    write_report(ReportConfig(source=str(folder), evaluation=options))
    return folder


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_opens_from_disk_without_an_error_or_a_request(
    run: Path, width: int, scheme: str, browser: Any
) -> None:
    page = (run / "report.html").as_uri()
    with opened(page, width=width, scheme=scheme, browser=browser) as seen:
        assert seen.page.title() == "<i>small on drawn, January 1, 2026"
        assert "400 images, 5 classes" in seen.page.inner_text("h1 + p")
        assert "nightly <b>run" in seen.page.inner_text("h1 + p")
        assert seen.page.locator("h1 *, h1 + p *").count() == 0
        seen.page.wait_for_load_state("networkidle")
        seen.check_opened_alone(page)
        ink = seen.page.evaluate("getComputedStyle(document.body).color")
        assert (ink == "rgb(230, 234, 240)") == (scheme == "dark")
        seen.screenshot(f"report-{width}")


def test_tables_sort_by_number_both_ways_and_the_gallery_opens(run: Path, browser: Any) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        table = seen.page.locator("#per-class")
        heads = table.locator("thead th")
        names = heads.all_inner_texts()
        recall = next(i for i, name in enumerate(names) if name == "recall")
        heads.nth(recall).locator("button").click()
        rising = cells(table, recall)
        assert rising == sorted(rising)
        assert heads.nth(recall).get_attribute("aria-sort") == "ascending"
        heads.nth(recall).locator("button").click()
        assert cells(table, recall) == rising[::-1]
        heads.nth(0).locator("button").click()
        labels = table.locator("tbody td:first-child").all_inner_texts()
        assert labels == sorted(CLASSES)

        gallery = seen.page.locator("#gallery-mistakes li")
        assert gallery.count() == 24
        assert gallery.locator("visible=true").count() == 12
        seen.page.locator("button[data-for=gallery-mistakes]").click()
        assert gallery.locator("visible=true").count() == 24
        images = seen.page.locator("#gallery-mistakes img")
        assert images.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")


def cells(table: Any, column: int) -> list[float]:
    texts = table.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()
    return [float(text.removesuffix("%")) for text in texts]


def test_an_image_is_enlarged_and_the_arrow_keys_go_through_the_gallery(
    run: Path, browser: Any
) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        zooms = seen.page.locator("#gallery-mistakes .zoom")
        viewer = seen.page.locator("#viewer")
        assert viewer.count() == 0
        zooms.first.click()
        assert viewer.is_visible()
        number = zooms.count()  # every fiftieth image is missing
        assert viewer.locator(".place").inner_text() == f"1 of {number}"
        first = seen.page.locator("#gallery-mistakes li").first
        assert viewer.locator("img").get_attribute("src") == first.locator("img").get_attribute(
            "src"
        )
        assert viewer.locator("dl").inner_text() == first.locator("dl").inner_text()
        assert viewer.locator(".scores li").count() == 3
        seen.page.keyboard.press("ArrowLeft")
        assert viewer.locator(".place").inner_text() == f"{number} of {number}"
        seen.page.keyboard.press("ArrowRight")
        seen.page.keyboard.press("ArrowRight")
        assert viewer.locator(".place").inner_text() == f"2 of {number}"
        seen.screenshot("viewer")
        seen.page.keyboard.press("Escape")
        assert not viewer.is_visible()
        image = zooms.nth(1).element_handle()
        seen.page.wait_for_function("each => each === document.activeElement", arg=image)


def test_the_gallery_is_filtered_by_class_confidence_status_and_slice(
    run: Path, browser: Any
) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        form = seen.page.locator("form[data-for=gallery-uncertain]")
        items = seen.page.locator("#gallery-uncertain li")
        facets = items.evaluate_all("all => all.map(each => JSON.parse(each.dataset.facets))")

        def count(**wanted: str) -> int:
            return sum(all(v in each[k.replace("_", ":")] for k, v in wanted.items())
                       for each in facets)  # fmt: skip

        seen.page.locator("button[data-for=gallery-uncertain]").click()
        for choice in ({"class": "cat"}, {"status": "wrong"}, {"slice_camera": "camera 1"}):
            for name, value in choice.items():
                form.locator(f"select[name='{name.replace('_', ':')}']").select_option(value)
            assert 0 < count(**choice) < 24
            assert items.locator("visible=true").count() == count(**choice)
            assert form.locator("output").inner_text() == f"{count(**choice)} of 24 images"
            form.evaluate("form => { form.reset(); form.dispatchEvent(new Event('change')); }")
        mistakes = seen.page.locator("#gallery-mistakes li")
        form = seen.page.locator("form[data-for=gallery-mistakes]")
        form.locator("select[name=confidence]").select_option("0.95")
        sure = mistakes.evaluate_all("all => all.filter(e => e.dataset.confidence >= 0.95).length")
        assert 0 < sure < 24
        assert form.locator("output").inner_text() == f"{sure} of 24 images"


def test_correct_predictions_are_green_and_wrong_ones_red(run: Path, browser: Any) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        shown = seen.page.locator(".gallery li dl").evaluate_all(
            "all => all.map(e => [...e.querySelectorAll('dd span')].map(s => "
            "[s.textContent, s.className]))"
        )
        assert len(shown) == 3 * 24
        kinds = set()
        for (predicted, kind), (label, label_kind) in shown:
            expected = (
                "unjudged" if label == "unknown" else "truth" if label == predicted else "bad"
            )
            assert kind == expected
            assert label_kind == ("unjudged" if label == "unknown" else "truth")
            kinds.add(kind)
        assert kinds == {"truth", "bad", "unjudged"}


def test_the_confusion_matrix_has_axes_totals_and_shares_for_the_keyboard(
    run: Path, browser: Any
) -> None:
    with opened((run / "report.html").as_uri(), browser=browser) as seen:
        matrix = seen.page.locator("table.matrix")
        assert matrix.locator("th.axis").all_inner_texts() == ["predicted", "label"]
        heads = matrix.locator("thead tr:last-child th").all_inner_texts()
        assert heads == list(CLASSES)
        assert matrix.locator("tbody th[scope=row]").all_inner_texts() == list(CLASSES)
        rows = [
            [int(text.replace(",", "") or 0) for text in row.locator("td").all_inner_texts()]
            for row in matrix.locator("tbody tr").all()
        ]
        assert all(sum(row[:-1]) == row[-1] for row in rows)
        below = matrix.locator("tfoot td").all_inner_texts()[1:]
        assert [int(text) for text in below] == [sum(column) for column in zip(*rows, strict=True)]
        cells = matrix.locator("tbody td")
        assert cells.evaluate_all("all => all.filter(each => each.tabIndex === 0).length") == 1
        cells.first.focus()
        seen.page.keyboard.press("ArrowRight")
        share = f"{rows[0][1] / rows[0][-1]:.1%}"
        readout = seen.page.locator(".readout")
        assert readout.inner_text() == (
            f"{rows[0][1]} of {rows[0][-1]} images labeled {CLASSES[0]} ({share}): predicted "
            f"{CLASSES[1]}"
        )
        seen.page.locator("#percent-confusion").check()
        assert cells.nth(1).inner_text() == share


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_is_accessible(run: Path, width: int, scheme: str, browser: Any) -> None:
    page = (run / "report.html").as_uri()
    with opened(page, width=width, scheme=scheme, browser=browser) as seen:
        seen.check_accessible()


def test_without_scripts_all_images_are_shown_and_no_control_is(
    run: Path, tmp_path: Path, browser: Any
) -> None:
    place = tmp_path / "plain.html"
    text = re.sub(r"<script>.*?</script>", "", (run / "report.html").read_text(), flags=re.DOTALL)
    place.write_text(text)
    with opened(place.as_uri(), width=390, browser=browser) as seen:
        images = seen.page.locator("#gallery-mistakes li")
        assert images.locator("visible=true").count() == images.count() == 24
        assert seen.page.locator(".filters, .more").locator("visible=true").count() == 0
        seen.check_opened_alone(place.as_uri())


def test_it_prints_on_a4(run: Path, browser: Any) -> None:
    with opened((run / "report.html").as_uri(), width=688, scheme="dark", browser=browser) as seen:
        seen.page.emulate_media(media="print")  # 688 px: the width of A4 without its margins
        assert seen.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert seen.page.locator("nav, .filters, .more").locator("visible=true").count() == 0
        images = seen.page.locator("#gallery-mistakes li")
        assert images.locator("visible=true").count() == 24
        wide = "all => all.filter(each => each.scrollWidth > each.parentElement.clientWidth + 1)"
        assert seen.page.locator("table").evaluate_all(f"{wide}.map(each => each.id)") == []
        name = seen.page.locator("#per-class td.text").first
        line = name.bounding_box()
        name.evaluate("cell => { cell.textContent = 'triangles' }")
        assert name.bounding_box() == line, "a word is not broken"


def test_a_missing_gallery_image_is_marked(tmp_path: Path) -> None:
    folder = commit(tmp_path / "out", drawn(30, sharpness=0.0))
    (folder / "images").mkdir()
    (folder / "images" / "000001.jpg").write_bytes(b"no image any more")
    text = Path(write_report(ReportConfig(source=str(folder)))).read_text()
    assert text.count("no image") > 10
    assert "<img" not in text


def test_the_report_of_an_unlabeled_run_leaves_out_label_metrics(
    tmp_path: Path, browser: Any
) -> None:
    blind = drawn(200, failed=0.1).drop_columns(["label", "label_score", "label_rank"])
    folder = commit(tmp_path / "blind", blind, label_column=None)
    place = write_report(
        ReportConfig(source=str(folder), evaluation=EvaluationOptions(slice_by=["camera"]))
    )
    with opened(Path(place).as_uri(), browser=browser) as seen:
        body = seen.page.inner_text("body")
        assert "mean confidence" in body
        assert "Left out: Accuracy and all metrics that need labels" in body
        assert "Confusion matrix" not in body
        assert seen.page.locator("#gallery-uncertain li").count() == 24
        assert "95% interval" not in body.partition("mean confidence")[0]
        assert seen.page.locator("#samples ~ h3").count() == len(CLASSES)
        for number, name in enumerate(seen.page.locator("#samples ~ h3").all_inner_texts(), 1):
            shown = seen.page.locator(f"#gallery-samples-{number} li")
            assert shown.count() == 6
            assert set(shown.locator("dd").all_inner_texts()) <= {
                text for text in shown.locator("dd").all_inner_texts() if text.split()[0] in name
            }
        assert re.search(r"missing\s+\d+\s+", body)
        assert seen.errors == []


@pytest.mark.parametrize("size", [2, 10, 1000])
def test_the_confusion_matrix_stays_readable(tmp_path: Path, size: int, browser: Any) -> None:
    names = [f"class number {i}" for i in range(size)]
    table = drawn(3000, classes=names, sharpness=4.0, scores=size < 1000)
    folder = commit(tmp_path / "out", table, classes=names)
    place = Path(
        write_report(
            ReportConfig(source=str(folder), evaluation=EvaluationOptions(thumbnails=False))
        )
    )
    assert place.stat().st_size < 5_000_000
    with opened(place.as_uri(), browser=browser) as seen:
        shown = seen.page.locator("table.matrix tbody tr").count()
        is_large = size > confusion_plot.MAX_TABLE_CLASSES  # the other classes share a row
        assert shown == (confusion_plot.MAX_TABLE_CLASSES + 1 if is_large else size)
        assert seen.page.locator("img.picture").count() == is_large
        head = seen.page.locator("#per-class th[aria-sort]")
        assert head.all_inner_texts() == ["labeled"]
        assert head.get_attribute("aria-sort") == "descending"
        if size > 2:
            seen.page.locator("input[type=search]").fill("NUMBER 7")
            rows = seen.page.locator("#per-class tbody tr")
            found = sum("NUMBER 7" in name.upper() for name in rows.all_inner_texts())
            assert rows.locator("visible=true").count() == found == (1 if size == 10 else 111)
            output = seen.page.locator("form:has(input[type=search]) output")
            assert output.inner_text() == f"{found} of {rows.count()}"
        if size == 1000:
            assert "The 1000 classes with the most rows" not in seen.page.inner_text("body")
        seen.screenshot(f"confusion-{size}")


# ------------------------------------------------------------------ notebooks


def test_an_evaluation_in_a_notebook_shows_numbers_matrix_curves_and_mistakes(
    run: Path, tmp_path: Path, browser: Any
) -> None:
    found = compute_evaluation(str(run), EvaluationOptions(), need_labels=True)
    accuracy = found.get_metric("accuracy")
    assert repr(found).startswith(f"<Evaluation of {run}: 400 rows, {accuracy}")
    assert len(repr(found)) < 250 + len(str(run))
    place = tmp_path / "cell.html"
    place.write_text(f"<!doctype html><meta charset=utf-8>{found._repr_html_()}")
    with opened(place.as_uri(), browser=browser) as seen:
        text = seen.page.inner_text("body")
        for words in ("macro F1", "Confusion matrix", "Calibration", "Worst mistakes"):
            assert words in text
        assert seen.page.locator("table.matrix tbody tr").count() == len(CLASSES)
        assert seen.page.locator("figure svg").count() == 2
        assert seen.page.locator("li img").count() in (7, 8)  # every fiftieth image is missing
        assert [url for url in seen.requests if not url.startswith("data:")] == [place.as_uri()]
        assert seen.errors == []
        seen.screenshot("notebook")


def test_an_evaluation_without_labels_in_a_notebook_shows_its_confidences(tmp_path: Path) -> None:
    blind = drawn(60).drop_columns(["label", "label_score", "label_rank"])
    folder = commit(tmp_path / "blind", blind, label_column=None)
    found = compute_evaluation(str(folder), EvaluationOptions(), need_labels=False)
    text = found._repr_html_()
    assert "mean confidence" in text
    assert "Histogram of confidence" in text
    assert "Confusion matrix" not in text
