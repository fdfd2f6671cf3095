"""Printed metrics: short, aligned, with one form of percentages."""

from __future__ import annotations

import pyarrow as pa
import pytest

from imgcls.metrics.formatting import format_interval, format_summary, format_value


def test_a_formatted_summary_has_the_headline_numbers_for_a_terminal():
    table = pa.table(
        {
            "metric": [
                "rows",
                "ok",
                "status_missing",
                "labelled",
                "accuracy",
                "f1_micro",
                "log_loss",
            ],
            "value": [1234567.0, 1234564.0, 3.0, 1234564.0, 0.97224, 0.97224, 0.12345],
            "lower": [None, None, None, None, 0.9612, 0.9612, 0.1],
            "upper": [None, None, None, None, 0.9812, 0.9812, 0.14999],
        }
    )
    assert format_summary(table).splitlines() == [
        "rows             1,234,567  (1,234,564 ok, 3 missing)",
        "labeled          1,234,564",
        "accuracy         97.22%     (96.12 to 98.12)",
        "log loss (nats)  0.1235     (0.1000 to 0.1500)",
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.97224, "97.22%"),
        ("rows", 1234567, "1,234,567"),
        ("status_missing", 3, "3"),
        ("log_loss", 0.12345, "0.1235"),
        ("matthews_correlation", -0.5, "-0.5000"),
        ("not in the registry", 0.5, "50.00%"),
    ],
)
def test_values_have_the_unit_of_the_metric(name: str, value: float, text: str) -> None:
    assert format_value(name, value) == text
    assert format_interval(name, (value, value)) == f"{text} to {text}".replace("%", "")
    assert format_interval(name, None) == ""
