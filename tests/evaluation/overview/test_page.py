"""The pages of the overview in a browser, opened from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imgcls.cli import main
from imgcls.evaluation.overview.overview import list_runs
from imgcls.runs import layout
from tests.browser import opened
from tests.conftest import copied
from tests.evaluation.overview.outputs import change_json
from tests.evaluation.runs import commit, drawn


@pytest.fixture(scope="module")
def page(made: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(made[0], tmp_path_factory.mktemp("page") / "out")
    hostile = commit(folder / "<img src=x onerror=alert(1)>", drawn(20), model="a<b>&'\"")
    change_json(hostile / layout.RUN_FILE, refused="<script>document.title='owned'</script>")
    (hostile / layout.SUCCESS_FILE).unlink()
    assert main(["runs", str(folder), "--html", str(folder / "runs.html")]) == 0
    return folder / "runs.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_of_all_runs_opens_alone_and_shows_names_as_text(
    page: Path, width: int, scheme: str, browser: Any
) -> None:
    with opened(page.as_uri(), width=width, scheme=scheme, browser=browser) as seen:
        assert seen.page.title() == "out: all runs"
        seen.check_opened_alone(page.as_uri())
        assert seen.page.locator("td img, td script, td b").count() == 0
        assert "<img src=x onerror=alert(1)>" in seen.page.inner_text("table")
        ink = seen.page.evaluate("getComputedStyle(document.body).color")
        assert (ink == "rgb(230, 234, 240)") == (scheme == "dark")
        seen.screenshot(f"runs-{width}")
        seen.check_accessible()


def test_the_table_sorts_by_any_column_and_links_the_reports(page: Path, browser: Any) -> None:
    with opened(page.as_uri(), browser=browser) as seen:
        heads = seen.page.locator("table.runs thead th")
        place = heads.all_inner_texts().index("value")
        heads.nth(place).locator("button").click()
        column = seen.page.locator(f"table.runs tbody td:nth-child({place + 1})").all_inner_texts()
        values = [float(text.removesuffix("%")) for text in column if text]
        assert values == sorted(values)
        assert len(values) == 5
        assert not any(column[5:])  # outputs without a metric are last
        link = seen.page.locator("td a", has_text="labels/date=2026-01-02")
        assert link.get_attribute("href") == "./labels/date%3D2026-01-02/report.html"


def test_a_notebook_shows_the_table(made: tuple[Path, Any], tmp_path: Path, browser: Any) -> None:
    place = tmp_path / "cell.html"
    text = list_runs(made[0])._repr_html_()
    place.write_text(f"<!doctype html><meta charset=utf-8>{text}")
    with opened(place.as_uri(), browser=browser) as seen:
        assert seen.page.locator("table.runs tbody tr").count() == 6
        assert seen.errors == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_of_a_lineage_opens_alone(
    made: tuple[Path, Any], tmp_path: Path, width: int, scheme: str, browser: Any
) -> None:
    place = tmp_path / "lineage.html"
    options = ["--lineage", "labels/date=2026-01-02", "--html", str(place)]
    assert main(["runs", str(made[0]), *options]) == 0
    with opened(place.as_uri(), width=width, scheme=scheme, browser=browser) as seen:
        seen.check_opened_alone(place.as_uri())
        assert "training data manifest" in " ".join(seen.page.inner_text(".tree").split())
        seen.screenshot(f"lineage-{width}")
        seen.check_accessible()
