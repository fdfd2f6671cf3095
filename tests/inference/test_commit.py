"""Quality gates that decide whether a run is committed, and the summary of its end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imgcls.config import build
from imgcls.data.storage import disk
from imgcls.errors import OutputError, RequestError, RunFailed, TooManyErrors
from imgcls.evaluation.evaluate import evaluate
from imgcls.inference.commit import (
    check_drift,
    check_error_rates,
    report_exit,
    store_refusal,
    write_success,
)
from imgcls.inference.config import ErrorStatus, PredictConfig
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.requests import open_reference
from imgcls.inference.status import read_status
from imgcls.metrics import PredictionCounts
from imgcls.models.bundle import load_bundle
from imgcls.runs import layout
from imgcls.runs.committed import open_run
from tests.evaluation.runs import CLASSES, commit, drawn
from tests.evaluation.test_similar import add_embeddings
from tests.runs.embedded import save_with_head


def failed(**status: int) -> PredictionCounts:
    counts = PredictionCounts.empty(CLASSES)
    counts.status.update({"ok": 100 - sum(status.values())} | status)
    return counts


@pytest.mark.parametrize(
    ("status", "limits", "message"),
    [
        ({"missing": 2}, {}, r"2 of 100 rows failed \(2.0%, allowed 1.0%\).* --max-error-rate$"),
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
    status: dict[str, int], limits: dict[ErrorStatus, float], message: str | None
) -> None:
    if message is None:
        check_error_rates("out", failed(**status), 0.01, limits)
        return
    with pytest.raises(TooManyErrors, match=message):
        check_error_rates("out", failed(**status), 0.01, limits)


@pytest.mark.parametrize(
    ("status", "max_errors", "repeated", "message"),
    [
        ({"missing": 5}, 5, {}, None),
        ({"missing": 6}, 5, {}, r"6 of 100 rows failed \(6.0%, allowed 1.0% or 5 rows\)"),
        ({"missing": 40}, 0, {"missing": 40}, None),
        (
            {"missing": 41, "empty": 1},
            0,
            {"missing": 40},
            r"2 of 60 rows failed \(3.3%, allowed 1.0%\), not counting 40 that had failed before",
        ),
        ({"missing": 100}, 0, {"missing": 100}, None),
    ],
)
def test_a_few_failures_and_those_of_before_pass(
    status: dict[str, int], max_errors: int, repeated: dict[str, int], message: str | None
) -> None:
    with pytest.raises(TooManyErrors, match=message) if message else contextlib.nullcontext():
        check_error_rates(
            "out", failed(**status), 0.01, {}, max_errors=max_errors, repeated=repeated
        )


def test_a_status_with_a_limit_of_its_own_has_no_allowance_but_what_failed_before() -> None:
    limits: dict[ErrorStatus, float] = {"throttled": 0.0}
    with pytest.raises(TooManyErrors, match="1 of 100 rows are throttled"):
        check_error_rates("out", failed(throttled=1), 0.01, limits, max_errors=10)
    check_error_rates("out", failed(throttled=1), 0.01, limits, repeated={"throttled": 1})


def test_drift_is_written_and_logged_and_may_stop_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = open_run(str(commit(tmp_path / "then", drawn(3000, 1, failed=0.1))))
    same = PredictionCounts.from_table(drawn(3000, 2), label_column=None, classes=CLASSES)
    check_drift(str(tmp_path / "out"), same, reference, 0.25)
    assert "drift   confidence: PSI 0.0" in capsys.readouterr().out
    dull = PredictionCounts.from_table(
        drawn(3000, 2, sharpness=0), label_column=None, classes=CLASSES
    )
    with pytest.raises(
        TooManyErrors, match=r"confidence has drifted from .* by a PSI of .* --max-psi"
    ):
        check_drift(str(tmp_path / "out"), dull, reference, 0.05)
    table = pq.read_table(tmp_path / "out" / "metrics" / "drift.parquet")
    assert table["of"].to_pylist() == ["predicted_label", "confidence"]


def test_a_run_that_drift_refuses_is_refused_until_it_passes(tmp_path: Path) -> None:
    reference = open_run(str(commit(tmp_path / "then", drawn(3000, 1))))
    output = str(commit(tmp_path / "now", drawn(3000, 2)))
    (tmp_path / "now" / "_SUCCESS").unlink()
    counts = PredictionCounts.from_table(
        drawn(3000, 2, sharpness=0), label_column=None, classes=CLASSES
    )

    def load() -> dict[str, Any]:
        run = layout.load_run(output)
        assert run is not None
        return run

    before = load()
    with pytest.raises(TooManyErrors) as caught, store_refusal(before, output):
        check_drift(output, counts, reference, 0.05)
    assert load() == before | {"refused": str(caught.value)}
    assert read_status(output)["state"] == "refused"
    with store_refusal(load(), output):
        check_drift(output, counts, reference, None)
    assert load() == before


def test_the_summary_is_written_however_a_run_ends(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    run = commit(tmp_path / "out", drawn(50, failed=0.2))

    def summary() -> dict[str, object]:
        found: dict[str, object] = json.loads(file.read_text())
        return found

    with report_exit(str(file), str(run)):
        pass
    assert (summary()["exit_code"], summary()["rows"], summary()["error"]) == (0, 50, None)
    for error, code in ((RunFailed("a"), 1), (OutputError("b"), 2), (TooManyErrors("c"), 3)):
        with pytest.raises(type(error)), report_exit(str(file), str(run)):
            raise error
        assert (summary()["exit_code"], summary()["error"]) == (code, str(error))
        # a wrong request has started nothing; the others report their output
        assert summary()["rows"] == (0 if code == 2 else 50)
    with pytest.raises(KeyboardInterrupt), report_exit(str(file), str(run)):
        raise KeyboardInterrupt
    assert summary()["exit_code"] == 1


def test_the_summary_of_a_refused_run_has_its_rows_and_statuses(tmp_path: Path) -> None:
    run = commit(tmp_path / "out", drawn(50, failed=0.2))
    statuses = json.loads((run / "_SUCCESS").read_text())["status"]
    (run / "_SUCCESS").unlink()
    body = json.loads((run / "_run.json").read_text())
    body["plan"] |= {"part_rows": 50}
    (run / "_run.json").write_text(json.dumps(body | {"refused": "10 of 50 rows failed"}))
    file = tmp_path / "summary.json"

    def refuse() -> None:
        with report_exit(str(file), "elsewhere") as outputs:
            outputs.append(str(run))
            raise TooManyErrors("10 of 50 rows failed")

    with pytest.raises(TooManyErrors):
        refuse()
    assert json.loads(file.read_text()) == {
        "exit_code": 3, "error": "10 of 50 rows failed", "output": str(run),
        "outputs": [str(run)], "state": "refused", "rows": 50, "rows_done": 50,
        "status": statuses, "since": None, "seconds": None, "committed": None,
    }  # fmt: skip


def test_the_summary_adds_up_the_runs_of_one_command(tmp_path: Path) -> None:
    runs = [str(commit(tmp_path / str(n), drawn(50, n, failed=0.2))) for n in range(2)]
    file = tmp_path / "summary.json"
    with report_exit(str(file), "elsewhere") as outputs:
        outputs.extend(runs)
    summary = json.loads(file.read_text())
    assert (summary["rows"], sum(summary["status"].values()), summary["output"]) == (
        100,
        100,
        runs[1],
    )
    assert (summary["state"], summary["committed"]) == ("committed", "2026-01-01T00:00:00")


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_drift_of_embeddings_of_the_same_bundle_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: float
) -> None:
    rng = np.random.default_rng(0)

    def commit_run(name: str, move: float, **changes: Any) -> str:
        vectors = rng.normal(size=(3000, 8)) + move
        table = add_embeddings(drawn(3000, 1), vectors.astype(np.float16), lost=(4,))
        return str(commit(tmp_path / name, table, parts=2, **changes))

    reference = open_run(commit_run("then", 0.0))
    output = commit_run("now", shift)
    Path(output, "predictions", ".DS_Store").write_bytes(b"Bud1")
    counts = PredictionCounts.from_table(drawn(3000, 1), label_column=None, classes=CLASSES)
    check_drift(output, counts, reference, 0.25)
    assert "drift   embedding: squared maximum mean discrepancy" in capsys.readouterr().out
    (row,) = pq.read_table(tmp_path / "now" / "metrics" / "embedding_drift.parquet").to_pylist()
    assert (row["rows"], row["reference_rows"]) == (1000, 1000)
    assert (row["p_value"] < 0.01) == (shift > 0)
    other = commit_run("other", 0.0, bundle_sha256="0" * 64)
    check_drift(other, counts, reference, 0.25)
    assert not (tmp_path / "other" / "metrics" / "embedding_drift.parquet").exists()


def test_a_run_that_lacks_a_part_is_not_committed(tmp_path: Path) -> None:
    table = drawn(50)
    output = commit(tmp_path / "out", table, parts=2)
    (output / "_SUCCESS").unlink()
    run = layout.load_run(str(output))
    assert run is not None
    run |= {"plan": run["plan"] | {"part_rows": 30}}
    run["provenance"]["versions"] = {}
    counts = PredictionCounts.from_table(table, label_column="label", classes=CLASSES)

    def write() -> None:
        write_success(
            str(output),
            run=run,
            counts=counts,
            seconds={"wall": 1.0},
            steady_rate=None,
            precision=[],
            engine=[],
        )

    part = output / "predictions" / "part-00001.parquet"
    part.rename(output / "predictions" / "moved.parquet")
    with pytest.raises(RunFailed, match=r"predictions/part-00001\.parquet is missing"):
        write()
    assert not (output / "_SUCCESS").exists()
    (output / "predictions" / "moved.parquet").rename(part)
    unfinished = [output / name for name in ("_run.json", "metrics/x.parquet", "_since/x.parquet")]
    for path in unfinished:  # of a driver that was killed
        path.parent.mkdir(exist_ok=True)
        Path(disk.temporary_name(str(path))).touch()
    write()
    assert not list(output.rglob("*.tmp"))
    assert open_run(str(output)).rows == 50


def test_a_history_knows_the_classes_of_all_its_nights(tmp_path: Path) -> None:
    older = [*CLASSES[::-1], "no longer one"]
    commit(tmp_path / "all" / "date=2026-11-01", drawn(300, 1, classes=older), classes=older)
    newest = drawn(100, 2)
    commit(tmp_path / "all" / "date=2026-11-02", newest)
    history = compact(CompactConfig(source=str(tmp_path / "all"), output=str(tmp_path / "latest")))
    reference = open_run(history)
    assert reference.classes == (*CLASSES, "no longer one")
    counts = PredictionCounts.from_table(newest, label_column=None, classes=CLASSES)
    check_drift(str(tmp_path / "out"), counts, reference, None)
    rows = pq.read_table(tmp_path / "out" / "metrics" / "drift.parquet").to_pylist()
    assert [row["reference_rows"] for row in rows] == [400, 400]
    table = pq.read_table(f"{history}/predictions")
    right = pc.equal(table["predicted_label"], table["label"]).to_numpy().mean()
    found = evaluate(predictions=history, output=str(tmp_path / "evaluation"))
    accuracy = next(each.value for each in found.metrics if each.name == "accuracy")
    assert accuracy == pytest.approx(right)


def test_a_history_of_an_earlier_version_that_lacks_classes_is_refused(tmp_path: Path) -> None:
    older = [*CLASSES, "no longer one"]
    commit(tmp_path / "all" / "date=2026-11-01", drawn(300, 1, classes=older), classes=older)
    commit(tmp_path / "all" / "date=2026-11-02", drawn(100, 2))
    history = compact(CompactConfig(source=str(tmp_path / "all"), output=str(tmp_path / "latest")))
    record = json.loads(Path(history, layout.RUN_FILE).read_text())
    del record["same_classes"]
    Path(history, layout.RUN_FILE).write_text(json.dumps(record | {"classes": CLASSES}))
    bundle = load_bundle(str(save_with_head(tmp_path / "bundle", CLASSES, 1)))
    settings = {"manifest": "m.csv", "model": bundle.url, "output": "out", "reference": history}
    with pytest.raises(RequestError, match=r"'no longer one'.* compact it again"):
        open_reference(build(PredictConfig, settings), bundle)
