"""Charts of the report as SVG that uses the colors of the page.

Drawn with matplotlib in placeholder colors, which are replaced by CSS variables, so that one
drawing works on a light page, a dark page and paper.
"""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from imgcls.metrics.calibration import bin_edges
from imgcls.metrics.counts import CORRECT, UNLABELED, WRONG, PredictionCounts

# Placeholder colors that no palette uses, and the CSS variable that replaces each.
_INK, _FAINT, _GOOD, _BAD, _OTHER = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
    _OTHER: "var(--accent)",
}

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "grid.color": _FAINT,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "imgcls",
    "text.color": _INK,
    "text.parse_math": False,  # a class may have a dollar sign
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SIZE = (5.2, 3.6)
_SMALL_SIZE = (2.6, 1.9)
_PALETTE = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2"),
    *("#edc948", "#e15759", "#9c755f", "#ff9da7", "#bab0ac"),
)
"""Colors of classes, which are visible on light and dark pages."""
_MAX_NAME = 24


def plot_reliability(
    calibration: pa.Table, x: str = "confidence", y: str = "accuracy", bins: str = "rows"
) -> str:
    """Reliability diagram: accuracy per confidence bin, with the diagonal of a calibrated model.

    calibration: table of `tables.build_calibration`, of a labeled run
    x, y, bins: names of the axes and of what the bins count
    """
    rows = [row for row in calibration.to_pylist() if row["count"] and row["accuracy"] is not None]
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new_figure()
        width = calibration["bin_upper"][0].as_py()
        middle = np.array([(row["bin_lower"] + row["bin_upper"]) / 2 for row in rows])
        accuracy = np.array([row["accuracy"] for row in rows])
        confidence = np.array([row["mean_confidence"] for row in rows])
        count = np.array([row["count"] for row in rows])
        axis.bar(middle, accuracy, 0.92 * width, color=_OTHER, alpha=0.35, label=y)
        axis.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle="--", label="calibrated")
        axis.scatter(
            confidence,
            accuracy,
            s=12 + 90 * np.sqrt(count / count.max()),
            color=_OTHER,
            zorder=3,
            label=f"bins, larger with more {bins}",
        )
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x, ylabel=y)
        _format_percent_axes(axis.xaxis, axis.yaxis)
        _add_legend(axis)
        return _render_svg(figure, f"Reliability diagram: {y} by {x}")


def plot_precision_recall(recall: Sequence[float], precision: Sequence[float]) -> str:
    """Precision-recall curve of one class, small, without labels of the axes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SMALL_SIZE, layout=ConstrainedLayoutEngine())
        axis = figure.subplots()
        # the precision of the first point holds for every lower recall
        x, y = [0.0, *recall], [*precision[:1], *precision]
        axis.fill_between(x, y, color=_OTHER, alpha=0.15, linewidth=0)
        axis.plot(x, y, color=_OTHER, linewidth=1.5)
        ticks = (0, 0.5, 1)
        axis.set(xlim=(0, 1.02), ylim=(0, 1.04), xticks=ticks, yticks=ticks)
        _format_percent_axes(axis.xaxis, axis.yaxis)
        return _render_svg(figure, "Precision by recall")


def plot_coverage(curve: pa.Table) -> str:
    """Accuracy of the most confident predictions over their share, with its interval.

    curve: table of `selective.build_coverage_curve`, of a labeled run
    """
    known = [row for row in curve.to_pylist() if row["accuracy"] is not None and row["judged"] >= 5]
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new_figure()
        x = [row["coverage"] for row in known]
        axis.fill_between(
            x,
            [row["lower"] for row in known],
            [row["upper"] for row in known],
            color=_OTHER,
            alpha=0.2,
            linewidth=0,
            label="95% interval",
        )
        axis.plot(x, [row["accuracy"] for row in known], color=_OTHER, label="accuracy of accepted")
        lowest = min((row["lower"] for row in known), default=0.0)
        axis.set(
            xlim=(0, 1),
            ylim=(max(0.0, lowest - 0.03), 1.005),
            xlabel="coverage (share accepted, most confident first)",
            ylabel="accuracy",
        )
        _format_percent_axes(axis.xaxis, axis.yaxis)
        _add_legend(axis)
        return _render_svg(figure, "Accuracy of the accepted predictions by coverage")


def plot_confidence_histogram(counts: PredictionCounts) -> str:
    """Histogram of confidence by outcome: correct, wrong, without a label."""
    edges = bin_edges(counts.num_bins)
    parts = [
        (CORRECT, _GOOD, "correct"),
        (WRONG, _BAD, "wrong"),
        (UNLABELED, _OTHER, "without a label"),
    ]
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new_figure()
        below = np.zeros(counts.num_bins)
        for outcome, color, label in parts:
            rows = counts.bin_counts[outcome]
            if rows.sum():
                axis.bar(
                    edges[:-1],
                    rows,
                    np.diff(edges) * 0.92,
                    bottom=below,
                    align="edge",
                    color=color,
                    label=label,
                )
                below = below + rows
        axis.set(xlim=(0, 1), xlabel="confidence", ylabel="predictions")
        _format_percent_axes(axis.xaxis)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if below.any():
            _add_legend(axis)
        return _render_svg(figure, "Histogram of confidence")


def plot_embedding_map(points: NDArray[np.float32], groups: Sequence[str]) -> str:
    """Scatter plot of points in two dimensions, colored by group.

    points: (N, 2)
    groups: (N,) names; the most frequent have colors of their own, the others share one
    """
    common = [name for name, _ in Counter(groups).most_common(len(_PALETTE))]
    names = np.array(groups, object)
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new_figure()
        shown = {
            _shorten(name): axis.scatter(*points[names == name].T, s=6, color=color)
            for name, color in zip(common, _PALETTE, strict=False)
        }
        others = ~np.isin(names, common)
        if others.any():
            shown["other classes"] = axis.scatter(*points[others].T, s=6, color=_FAINT)
        axis.set(xticks=[], yticks=[], xlabel="component 1", ylabel="component 2")
        # matplotlib leaves out labels of the points that begin with an underscore
        handles, labels = list(shown.values()), list(shown)
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "markerscale": 2}
        axis.legend(handles, labels, **place)
        return _render_svg(figure, "Embeddings in two principal components")


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..."


def plot_training_curves(history: Any, best: int) -> list[str]:
    """Loss and accuracy by epoch, of multilabel the mean average precision; ticks at whole epochs.

    history: data frame of a bundle's history.parquet
    best:    epoch that is marked
    """
    metric = "mean_average_precision"
    if f"val_{metric}" not in history or not history[f"val_{metric}"].notna().any():
        metric = "accuracy"
    epochs = history["epoch"]
    charts = []
    for what in ("loss", metric):
        with matplotlib.rc_context(_STYLE):
            figure, axis = _new_figure()
            for split, word, color in (("train", "training", _OTHER), ("val", "validation", _BAD)):
                name = f"{split}_{what}"
                if name in history and history[name].notna().any():
                    style = {"marker": "o", "markersize": 3} if len(history) <= 30 else {}
                    axis.plot(epochs, history[name], color=color, label=word, **style)
            mark = {"color": _INK, "linewidth": 1, "linestyle": ":"}
            axis.axvline(best, label=f"best: epoch {best}", **mark)
            axis.set(xlabel="epoch", ylabel=what.replace("_", " "))
            # half an epoch at each side: no tick before the first epoch
            axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
            few = len(history) <= 10
            axis.xaxis.set_major_locator(
                FixedLocator(epochs) if few else MaxNLocator(nbins=8, integer=True)
            )
            axis.legend(loc="best")
            if what != "loss":
                _format_percent_axes(axis.yaxis)
            charts.append(_render_svg(figure, f"{what.replace('_', ' ').capitalize()} by epoch"))
    return charts


def _new_figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    return figure, figure.subplots()


def _add_legend(axis: Any) -> None:
    """Add a legend above the plot, where it covers no data."""
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2)


def _format_percent_axes(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol="%"))


def _render_svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element without a fixed size; label: its text alternative."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    # several charts are in one page: ids that nothing refers to would occur twice
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", text)
    # text without a color is black by default in SVG
    return text.replace(
        "<svg ", f'<svg fill="var(--ink)" role="img" aria-label="{html.escape(label)}" ', 1
    )
