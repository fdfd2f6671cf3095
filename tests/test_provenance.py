"""A record that is ready for JSON, and two of them compared value by value."""

from __future__ import annotations

import json

import pytest

from imgcls.provenance import PACKAGES, differences, provenance


def test_a_record_names_what_ran_and_is_ready_for_json() -> None:
    config = {"seed": 1, "data": {"train": "m.csv"}}
    record = json.loads(json.dumps(provenance(config)))
    assert record["config"] == config
    assert set(record["versions"]) == set(PACKAGES)
    assert {"created", "git_commit", "host", "python"} <= set(record)


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({}, {}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 then, 2 now"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 3, "d": 2}}}, ["a.b.c: 1 then, 3 now"]),
        ({"a": 1}, {"b": "x"}, ["a: 1 then, None now", "b: None then, 'x' now"]),
        ({"a": {"b": 1}}, {"a": None}, ["a: {'b': 1} then, None now"]),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a: [1, 2] then, [2, 1] now"]),
    ],
)
def test_what_differs_is_told_by_its_dotted_key(
    then: dict[str, object], now: dict[str, object], lines: list[str]
) -> None:
    assert differences(then, now) == lines
