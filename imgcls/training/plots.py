"""Plots of a training: curves, learning-rate range test, trials of a search.

Color-blind safe, with units on every axis, and the same bytes for the same numbers. Drawn without
pyplot's global state. Imported by the driver only: workers do not need matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

_Floats = npt.NDArray[np.float64]

# Okabe and Ito's palette (Color Universal Design, 2008)
TRAIN_COLOR, VAL_COLOR, LR_COLOR = "#0072B2", "#D55E00", "#009E73"
GRAY = "#666666"
DPI = 150

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": ["sans-serif"],
    # the first is part of matplotlib; the others are for viewers of the SVG without it
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 9,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # searchable text instead of outlines
    "svg.hashsalt": "imgcls",  # otherwise ids are random
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def draw_curves(history: pd.DataFrame, best: int) -> dict[str, bytes]:
    """Loss, accuracy and learning rate over the epochs, as `curves.png` and `curves.svg`.

    history: one row per epoch, as in the bundle's history.parquet. Uses the columns epoch, phase
        ("probe" or "train"), train_loss, train_accuracy, val_loss, val_accuracy and lr, and
        val_mean_average_precision instead of the accuracies if it has values; missing columns and
        NaN are not drawn
    best: the epoch whose weights were kept; it is marked
    """
    probe = (history["epoch"] == 0) | (_get_text_column(history, "phase") == "probe")
    lr = _get_column(history, "lr")
    panels = 3 if np.isfinite(lr).any() else 2
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(4.0 * panels, 3.6), dpi=DPI, layout=layout)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_curve(axes[0], history, probe, "loss", best)
        axes[0].set(title="Loss", ylabel="nats per image")
        metric, title, unit = _choose_quality(history)
        _draw_curve(axes[1], history, probe, metric, best)
        axes[1].set(title=title, ylabel=unit)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        low, high = axes[1].get_ylim()
        axes[1].set_ylim(max(low, -0.02), min(high, 1 + 0.03 * (1 - low)))
        if panels == 3:
            axes[2].plot(history["epoch"], lr, color=LR_COLOR, **_marker_style(len(history)))
            axes[2].set(title="Learning rate", ylabel="at the end of the epoch")
            axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            axes[2].set_ylim(bottom=0)
        for axis in axes:
            axis.axvline(best, color=GRAY, linewidth=1, linestyle=":", zorder=1)
            axis.set_xlabel("epoch")
            axis.set_xlim(*_compute_xlim(history["epoch"]))
            few = len(history) <= 10
            places = FixedLocator(history["epoch"]) if few else MaxNLocator(nbins=8, integer=True)
            axis.xaxis.set_major_locator(places)
        return _render(figure, "curves")


def _choose_quality(history: pd.DataFrame) -> tuple[str, str, str]:
    """Metric, title and unit of the second panel."""
    metric = "mean_average_precision"
    if np.isfinite(_get_column(history, f"val_{metric}")).any():
        return metric, "Mean average precision", "mean over classes"
    return "accuracy", "Accuracy", "images classified correctly"


def draw_lr_range(
    lrs: Sequence[float], losses: Sequence[float], suggestion: float
) -> dict[str, bytes]:
    """The loss while the learning rate rises, as `lr_range.png` and `lr_range.svg`.

    lrs, losses: one value per step; losses that are not finite are not drawn
    suggestion:  the learning rate to mark
    """
    x, y = np.asarray(lrs, dtype=float), np.asarray(losses, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    smooth = smooth_curve(y)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.8), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.08))
        axis = figure.subplots()
        axis.plot(x, y, color=TRAIN_COLOR, alpha=0.3, linewidth=1, label="each step")
        axis.plot(x, smooth, color=TRAIN_COLOR, linewidth=2, label="smoothed")
        axis.axvline(
            suggestion,
            color=VAL_COLOR,
            linestyle="--",
            label=f"suggested: {suggestion:.2g}",
            zorder=3,
        )
        axis.set_xscale("log")
        axis.set(
            title="Learning rate range test", xlabel="learning rate", ylabel="loss (nats per image)"
        )
        if len(smooth):
            # the exploding loss at the end would flatten the rest
            low, start = smooth.min(), smooth[0]
            room = max(start - low, 0.1 * abs(start), 1e-3)
            axis.set_ylim(low - 0.15 * room, start + 0.5 * room)
        axis.legend(loc="lower left")
        return _render(figure, "lr_range")


def smooth_curve(values: _Floats) -> _Floats:
    """(N,) Gaussian moving average, sigma 2 % of N; symmetric, so that minima stay in place."""
    if len(values) < 3:
        return values
    places = np.arange(len(values))
    width = max(1.0, 0.02 * len(values))
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / width) ** 2)
    means: _Floats = weights @ values / weights.sum(1)
    return means


def _draw_curve(
    axis: Axes, history: pd.DataFrame, probe: pd.Series, metric: str, best: int
) -> None:
    """Curves of one metric for both splits; the probe is a diamond, the best epoch has a ring."""
    lines = (("train", TRAIN_COLOR, "--"), ("val", VAL_COLOR, "-"))
    for split, color, style in lines:
        values = _get_column(history, f"{split}_{metric}")
        rows = ~probe & np.isfinite(values)
        if rows.any():
            axis.plot(
                history["epoch"][rows],
                values[rows],
                color=color,
                linestyle=style,
                label={"train": "training", "val": "validation"}[split],
                **_marker_style(int(rows.sum())),
            )
        rows = probe & np.isfinite(values)
        if rows.any():
            label = f"probe: {_format_value(values[rows][0], metric)}" if split == "val" else None
            axis.plot(history["epoch"][rows], values[rows], "D", color=color, ms=6, label=label)
    values = _get_column(history, f"val_{metric}")
    rows = (history["epoch"] == best).to_numpy() & np.isfinite(values)
    if rows.any():
        label = f"best: {_format_value(values[rows][0], metric)}, epoch {best}"
        ring: dict[str, Any] = {"markersize": 11, "markeredgewidth": 1.8, "markerfacecolor": "none"}
        axis.plot([best], values[rows][:1], "o", color=GRAY, label=label, **ring)
    drawn = np.concatenate([line.get_ydata() for line in axis.get_lines()] or [np.empty(0)])
    if len(drawn):
        axis.margins(y=0.12)
        if metric == "loss" and drawn.min() > 0 and drawn.max() > 20 * np.median(drawn):
            axis.set_yscale("log")  # otherwise one bad epoch would flatten the others
        axis.legend(loc="best")


def _format_value(value: float, metric: str) -> str:
    return f"{value:.3f}" if metric == "loss" else f"{100 * value:.1f} %"


def _get_column(history: pd.DataFrame, column: str) -> _Floats:
    if column not in history:
        return np.full(len(history), np.nan)
    values: _Floats = history[column].to_numpy(dtype=float, na_value=np.nan)
    return values


def _get_text_column(history: pd.DataFrame, column: str) -> pd.Series:
    return history[column] if column in history else pd.Series("", index=history.index)


def _marker_style(points: int) -> dict[str, Any]:
    """A dot per epoch if there are few; without it a single epoch would be invisible."""
    return {"marker": "o", "markersize": 4} if points <= 30 else {}


def _compute_xlim(epochs: pd.Series) -> tuple[float, float]:
    low, high = float(epochs.min()), float(epochs.max())
    margin = max(0.5 if high - low < 4 else 0.3, 0.03 * (high - low))
    return low - margin, high + margin


def _render(figure: Figure, name: str) -> dict[str, bytes]:
    """The figure as PNG and SVG, without a date or version, which would change the bytes."""
    plain: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }
    files = {}
    for format, metadata in plain.items():
        sink = io.BytesIO()
        figure.savefig(sink, format=format, metadata=metadata)
        files[f"{name}.{format}"] = sink.getvalue()
    return files


def draw_parallel_coordinates(
    results: pd.DataFrame, axes: Mapping[str, bool], by: str
) -> dict[str, bytes]:
    """Parallel coordinates of the trials of a search, as `trials.png` and `trials.svg`.

    results: one row per trial, the best first; with the columns in `axes` and the column `by`
    axes:    column -> whether its axis is logarithmic
    by:      column of the metric; the last axis, and the color
    Source: Inselberg, The plane with parallel coordinates, The Visual Computer 1985.
    """
    names = [*axes, by]
    shown = results[np.isfinite(_get_column(results, by))]
    places = {name: _scale_axis(shown[name], log=axes.get(name, False)) for name in names}
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(max(5.0, 1.9 * len(names)), 4.2), dpi=DPI, layout=layout)
        axis = figure.subplots()
        for rank in range(len(shown) - 1, -1, -1):  # the best last, on top
            share = rank / max(1, len(shown) - 1)
            axis.plot(
                range(len(names)),
                [places[name][0][rank] for name in names],
                color=VAL_COLOR if rank == 0 else _BLUES(0.9 - 0.65 * share),
                linewidth=2.6 if rank == 0 else 1.4,
                marker="o",
                markersize=3.5,
                label="best" if rank == 0 else None,
            )
        for place, name in enumerate(names):
            axis.axvline(place, color=GRAY, linewidth=0.8, zorder=0)
            for at, text in places[name][1]:
                axis.annotate(text, (place, at), (3, 3), textcoords="offset points", fontsize=8)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.2, len(names) - 0.6)
        axis.set_ylim(-0.04, 1.06)
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_title(f"{len(shown)} trials (darker is better)")
        if len(shown):
            axis.legend(loc="upper left", bbox_to_anchor=(0.0, -0.08))
        return _render(figure, "trials")


_BLUES = matplotlib.colormaps["Blues"]


def _scale_axis(column: pd.Series, *, log: bool) -> tuple[_Floats, list[tuple[float, str]]]:
    """Positions of the values on their axis, 0 to 1, and the (position, text) of its labels."""
    values: Any = pd.to_numeric(column, errors="coerce")
    if values.isna().any() or column.map(type).eq(bool).any():
        names = sorted({str(value) for value in column})
        at = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
        return np.array([at[str(value)] for value in column]), [(at[n], n) for n in names]
    scaled = np.log(values.to_numpy(float)) if log else values.to_numpy(float)
    low, high = (scaled.min(), scaled.max()) if len(scaled) else (0.0, 1.0)
    span = high - low or 1.0
    ends = [(0.0, f"{values.min():.3g}"), (1.0, f"{values.max():.3g}")] if len(scaled) else []
    return (scaled - low) / span, ends if high > low else ends[:1]
