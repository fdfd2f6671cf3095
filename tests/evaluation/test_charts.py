"""The charts of the reports, as a browser draws them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from imgcls.evaluation.charts import plot_coverage, plot_reliability
from tests.browser import opened

COVERED = """() => [...document.querySelectorAll("svg")].map(svg => {
    const data = [...svg.querySelectorAll("g[clip-path], path[clip-path]")]
        .map(part => part.getBoundingClientRect());
    const inside = (text, part) => text.left < part.right && text.right > part.left
        && text.top < part.bottom && text.bottom > part.top;
    return [...svg.querySelectorAll("text")]
        .filter(text => data.some(part => inside(text.getBoundingClientRect(), part)))
        .map(text => text.textContent);
})"""
"""The texts that cover data, for each chart of a page."""


def test_a_legend_covers_no_data(tmp_path: Path) -> None:
    # all predictions are right, those of low confidence too: bars up to where the legend was
    bins = [
        {
            "bin_lower": number / 15,
            "bin_upper": (number + 1) / 15,
            "count": 10,
            "accuracy": 1.0,
            "mean_confidence": (number + 0.5) / 15,
        }
        for number in range(15)
    ]
    # and few accepted ones are wrong, the most confident first
    curve = [
        {"coverage": share, "accuracy": share, "lower": share, "upper": 1.0, "judged": 100}
        for share in (0.1, 0.5, 1.0)
    ]
    page = tmp_path / "charts.html"
    charts = (
        plot_reliability(pa.Table.from_pylist(bins)),
        plot_coverage(pa.Table.from_pylist(curve)),
    )
    page.write_text("<meta charset='utf-8'>" + "".join(f"<div>{chart}</div>" for chart in charts))
    with opened(page.as_uri()) as watched:
        assert watched.page.locator("svg text", has_text="calibrated").count() == 1
        assert watched.page.evaluate(COVERED) == [[], []]
