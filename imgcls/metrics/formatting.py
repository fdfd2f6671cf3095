"""Metrics as text: values with their units, intervals, and the headline numbers of a run."""

from __future__ import annotations

import pyarrow as pa

from imgcls.metrics.intervals import Interval
from imgcls.metrics.registry import (
    HEADLINES,
    STATUS_PREFIX,
    find_headline,
    find_unit,
    get_pattern,
)


def format_percent(value: float, decimals: int = 2) -> str:
    """Format a metric as a percentage.

    Parameters
    ----------
    value : float
        Fraction.
    decimals : int, default 2
        Decimal places.

    Returns
    -------
    str

    Examples
    --------
    >>> format_percent(0.97224), format_percent(0.5, 0)
    ('97.22%', '50%')
    """
    return f"{value:.{decimals}%}"


def format_value(name: str, value: float) -> str:
    """Value of a metric in its unit.

    Parameters
    ----------
    name : str
        Name of the metric, which determines the unit.
    value : float
        Its value.

    Returns
    -------
    str

    Examples
    --------
    >>> format_value("accuracy", 0.97224), format_value("rows", 1234), format_value("log_loss", 0.1)
    ('97.22%', '1,234', '0.1000')
    """
    unit = find_unit(name)
    if unit == "rows":
        return f"{value:,.0f}"
    return format_percent(value) if unit == "fraction" else f"{value:.4f}"


def format_interval(name: str, interval: Interval | None) -> str:
    """Interval of a metric, in the unit of the metric.

    Parameters
    ----------
    name : str
        Name of the metric.
    interval : tuple of float or None
        Lower and upper end.

    Returns
    -------
    str
        Empty without an interval.

    Examples
    --------
    >>> format_interval("accuracy", (0.97, 0.974))
    '97.00 to 97.40'
    """
    if interval is None:
        return ""
    low, high = (format_value(name, end).removesuffix("%") for end in interval)
    return f"{low} to {high}"


def format_summary(table: pa.Table) -> str:
    """Headline numbers of a summary as text for a terminal.

    Parameters
    ----------
    table : pyarrow.Table
        Summary as `tables.build_summary_table` returns it.

    Returns
    -------
    str
        The rows by status and label, if the summary has them, then a line for each headline number
        with its 95% interval. No trailing newline; empty without a headline number.

    Examples
    --------
    >>> table = pa.table(
    ...     {
    ...         "metric": ["rows", "ok", "status_missing", "labelled", "accuracy"],
    ...         "value": [1234.0, 1200.0, 34.0, 1200.0, 0.97224],
    ...         "lower": [None, None, None, None, 0.9612],
    ...         "upper": [None, None, None, None, 0.9812],
    ...     }
    ... )
    >>> print(format_summary(table))
    rows      1,234   (1,200 ok, 34 missing)
    labeled   1,200
    accuracy  97.22%  (96.12 to 98.12)
    """
    rows = {row["metric"]: row for row in table.to_pylist()}
    lines = _format_rows(rows)
    for name in list_headlines(list(rows)):
        row = rows[name]
        interval = None if row["lower"] is None else (row["lower"], row["upper"])
        lines.append(
            (
                find_headline(name) or name,
                format_value(name, row["value"]),
                format_interval(name, interval),
            )
        )
    label, value = (max((len(line[i]) for line in lines), default=0) for i in (0, 1))
    return "\n".join(
        f"{line[0]:<{label}}  {line[1]:<{value}}  {line[2] and f'({line[2]})'}".rstrip()
        for line in lines
    )


def list_headlines(names: list[str]) -> list[str]:
    """Headline metrics among `names`, in order of display.

    Parameters
    ----------
    names : list of str
        Names of the metrics of a run.

    Returns
    -------
    list of str
        Mean confidence is included only for a run without labels, and micro F1 only for a
        multi-label run: for others it equals the accuracy.

    Examples
    --------
    >>> list_headlines(["rows", "error_rate", "accuracy", "mean_confidence"])
    ['accuracy', 'error_rate']
    """
    found = [name for name in names if find_headline(name) is not None]
    if "accuracy" in found:
        found = [name for name in found if name not in ("mean_confidence", "f1_micro")]
    order = list(HEADLINES)
    return sorted(found, key=lambda name: order.index(get_pattern(name)))


def _format_rows(rows: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    """Rows by status, and ok rows by label, as lines of name, value and details."""
    values = {name: f"{row['value']:,.0f}" for name, row in rows.items()}
    status = [
        f"{values[name]} {name.removeprefix(STATUS_PREFIX)}"
        for name in rows
        if name == "ok" or name.startswith(STATUS_PREFIX)
    ]
    lines = [("rows", values["rows"], ", ".join(status))] if "rows" in rows else []
    words = {"unlabelled": "without a label", "unknown_label": "with an unknown label"}
    other = [f"{values[name]} {word}" for name, word in words.items() if name in rows]
    if "labelled" in rows:
        lines.append(("labeled", values["labelled"], ", ".join(other)))
    return lines
