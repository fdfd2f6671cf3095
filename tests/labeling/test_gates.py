"""Gates that let a run pass or not, and how its end is told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imgcls.errors import OutputError, RunFailed, TooManyErrors
from imgcls.labeling.gates import ErrorStatus, check_drift, check_errors, told_in_json
from imgcls.metrics import PredictionCounts
from imgcls.runs import open_run
from tests.evaluation.runs import CLASSES, commit, drawn


def failed(**status: int) -> PredictionCounts:
    counts = PredictionCounts.empty(CLASSES)
    counts.status.update({"ok": 100 - sum(status.values())} | status)
    return counts


@pytest.mark.parametrize(
    ("status", "limits", "told"),
    [
        ({"missing": 2}, {}, r"2 of 100 rows failed \(2.00%, allowed 1.00%\).* --max-error-rate$"),
        ({"missing": 2}, {"missing": 0.05}, None),
        ({"missing": 6}, {"missing": 0.05}, r"6 of 100 rows are missing .*max-error-rates.missing"),
        ({"missing": 4, "throttled": 1}, {"missing": 0.05}, None),
        (
            {"missing": 4, "throttled": 1},
            {"missing": 0.05, "throttled": 0.0},
            "1 of 100 rows are th",
        ),
        ({"missing": 4, "empty": 2}, {"missing": 0.05}, r"2 of 100 rows failed"),
        ({}, {}, None),
    ],
)
def test_each_status_may_have_its_own_limit(
    status: dict[str, int], limits: dict[ErrorStatus, float], told: str | None
) -> None:
    if told is None:
        check_errors("out", failed(**status), 0.01, limits)
        return
    with pytest.raises(TooManyErrors, match=told):
        check_errors("out", failed(**status), 0.01, limits)


def test_drift_is_written_told_and_may_stop_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = open_run(str(commit(tmp_path / "then", drawn(3000, 1, failed=0.1))))
    same = PredictionCounts.of(drawn(3000, 2), label_column=None, classes=CLASSES)
    check_drift(str(tmp_path / "out"), same, reference, 0.25)
    assert "drift   confidence: PSI 0.0" in capsys.readouterr().out
    dull = PredictionCounts.of(drawn(3000, 2, sharpness=0), label_column=None, classes=CLASSES)
    with pytest.raises(TooManyErrors, match=r"confidence has moved by a PSI of .* --max-psi"):
        check_drift(str(tmp_path / "out"), dull, reference, 0.05)
    table = pq.read_table(tmp_path / "out" / "metrics" / "drift.parquet")
    assert table["of"].to_pylist() == ["predicted_label", "confidence"]


def test_however_a_run_ends_is_told(tmp_path: Path) -> None:
    file = tmp_path / "told.json"
    run = commit(tmp_path / "out", drawn(50, failed=0.2))

    def told() -> dict[str, object]:
        found: dict[str, object] = json.loads(file.read_text())
        return found

    with told_in_json(str(file), str(run)):
        pass
    assert (told()["exit_code"], told()["rows"], told()["error"]) == (0, 50, None)
    for error, code in ((RunFailed("a"), 1), (OutputError("b"), 2), (TooManyErrors("c"), 3)):
        with pytest.raises(type(error)), told_in_json(str(file), str(run)):
            raise error
        assert (told()["exit_code"], told()["error"]) == (code, str(error))
    with pytest.raises(KeyboardInterrupt), told_in_json(str(file), str(run)):
        raise KeyboardInterrupt
    assert told()["exit_code"] == 1
