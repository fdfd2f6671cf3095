"""How a run was made, in words."""

from __future__ import annotations

from pathlib import Path

from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.how_made import describe_making, list_settings, spell_date, spell_time


def test_a_run_is_described_in_sentences(run: Path) -> None:
    options = EvaluationOptions(thumbnails=False)
    made = dict(describe_making(compute_evaluation(str(run), options, need_labels=True)))
    assert list(made) == ["Model", "Data", "Labels", "Prediction", "Metrics", "Software"]
    assert made["Model"] == f"The bundle bundle and 5 classes. Its SHA-256 is {'b' * 64}."
    assert made["Data"].startswith("3,000 rows of the manifest drawn.csv (fingerprint ffff")
    assert made["Labels"].startswith("The column label of the manifest: ")
    assert made["Prediction"].startswith("Committed on January 1, 2026 at 00:00 UTC after 1 s")
    assert made["Software"] == "imgcls 0."


def test_times_are_in_words_and_in_utc() -> None:
    assert spell_date("2026-11-29T23:10:00+00:00") == "November 29, 2026"
    assert spell_time("2026-11-29T23:10:00-05:00") == "November 30, 2026 at 04:10 UTC"


def test_settings_without_a_value_are_left_out() -> None:
    config = {"a": {"b": 1, "c": None, "d": {}}, "e": [], "f": ["x", "y"], "g": False, "h": ""}
    assert list_settings(config) == [("a.b", "1"), ("f", "x, y"), ("g", "false")]
    ((_, text),) = list_settings({"a": "x" * 1000})
    assert len(text) == 300
