"""Validation predictions have the right values, and each row once with any number of workers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgcls.data.manifests.label_columns import UNKNOWN
from imgcls.training import validation_predictions
from imgcls.training.data.batches import DecodeFailure
from imgcls.training.data.examples import Examples
from imgcls.training.data.targets import TargetTable
from imgcls.training.validation import shard_batches
from imgcls.training.validation_predictions import (
    PredictionRecorder,
    build_validation_predictions,
    render_parquet,
)
from tests.training.team import Team

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat"]
LOST = DecodeFailure("/lost.png", 1, True, "no such file", row=7, status="missing")


def record_by_hand() -> PredictionRecorder:
    """Rows 5, 2 and 9 with scores of 0.7, 0.2, 0.1 and others; row 7 is missing."""
    recorder = PredictionRecorder("single_label", CLASSES, 4)
    recorder.add_rows(np.array([5, 2]), [LOST])
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    recorder.update(scores.log(), torch.tensor([0, 1]))
    recorder.add_rows(np.array([9]))
    recorder.update(torch.zeros(1, 3), torch.tensor([2]))
    return recorder


def test_the_recorded_rows_have_the_values_computed_by_hand() -> None:
    rows = {row["row"]: row for row in record_by_hand().build_table().to_pylist()}
    assert set(rows) == {5, 2, 9, 7}
    wrong = rows[2]
    assert (wrong["predicted_label"], wrong["status"], wrong["error"]) == ("cat", "ok", None)
    assert wrong["confidence"] == pytest.approx(0.6)
    assert wrong["topk_labels"] == ["cat", "bee", "ant"]
    assert wrong["topk_scores"] == pytest.approx([0.6, 0.3, 0.1])
    assert (wrong["label_score"], wrong["label_rank"]) == (pytest.approx(0.3), 2)
    assert (rows[5]["predicted_label"], rows[5]["label_rank"]) == ("ant", 1)
    assert rows[9]["predicted_label"] == "ant", "of equal scores the first class, as the arg max"
    assert (rows[7]["predicted_label"], rows[7]["status"]) == (None, "missing")
    assert rows[7]["error"] == "no such file"


ROWS = 101


def gather(rank: int, workers: int) -> bytes | None:
    """Predictions of drawn logits, in several batches that are joined before they are columns."""
    generator = torch.Generator().manual_seed(0)
    # multiples of 1/2, so that many rows have equal logits, as in bfloat16
    logits = (2 * torch.randn(ROWS, 3, generator=generator)).round() / 2
    labels = torch.randint(0, 3, (ROWS,), generator=generator)
    recorder = PredictionRecorder("single_label", CLASSES, ROWS)
    for part in shard_batches(ROWS, 10, rank=rank, workers=workers):
        good = part[part % 10 != 3]
        failed = [
            DecodeFailure("/x.png", 0, True, "damaged", row=int(row), status="unreadable")
            for row in part[part % 10 == 3]
        ]
        recorder.add_rows(good, failed)
        if len(good):
            recorder.update(logits[good], labels[good])
    found = recorder.gather(rank, workers, CPU)
    if rank == 0:
        assert found is not None
        table = pq.read_table(pa.BufferReader(found))
        expected = np.array(CLASSES)[logits.argmax(1).numpy()]
        for row, name in zip(table["row"], table["predicted_label"], strict=True):
            number = row.as_py()
            assert name.as_py() == (None if number % 10 == 3 else expected[number])
    return found


def test_several_workers_gather_each_row_once(alone: None, team: Team) -> None:
    data = gather(0, 1)
    assert data is not None
    whole = pq.read_table(pa.BufferReader(data))
    assert whole["row"].to_pylist() == list(range(ROWS))
    for workers in (2, 3):
        first, *others = team.call(workers, gather)
        assert others == [None] * (workers - 1)
        assert pq.read_table(pa.BufferReader(first)).equals(whole)


def test_logits_are_turned_into_columns_before_they_fill_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = record_by_hand().build_table()
    monkeypatch.setattr(validation_predictions, "_MAX_PENDING_SCORES", 6)
    recorder = record_by_hand()
    assert (len(recorder._tables), len(recorder._pending)) == (1, 1)
    assert recorder.build_table().combine_chunks().equals(whole.combine_chunks())


def build_examples(targets: TargetTable, labels: list[int], classes: list[str]) -> Examples:
    """Rows 0 to 9 of a manifest; 2, 5, 7, 8 and 9 are held out."""
    held = [row in (2, 5, 7, 8, 9) for row in range(10)]
    rows = pa.table(
        {
            "row": pa.array(range(10), pa.int64()),
            "url": [f"/{row}.png" for row in range(10)],
            "label": pa.array(labels, pa.int64()),
            "held": held,
        }
    )
    return Examples(classes, rows, {}, targets)


def test_the_table_of_the_bundle_has_a_row_per_validation_image_in_its_order() -> None:
    examples = build_examples(TargetTable(3), [row % 3 for row in range(10)], CLASSES)
    data = render_parquet(record_by_hand().build_table())
    failure = DecodeFailure("/8.png", 2, True, "damaged", row=8, status="truncated")
    table = build_validation_predictions(examples, data, [failure])
    assert table is not None
    assert table.column_names == [
        *("path", "label", "row", "predicted_label", "confidence", "accepted", "topk_labels"),
        *("topk_scores", "label_score", "label_rank", "width", "height", "status", "error"),
    ]
    assert table["path"].to_pylist() == ["/2.png", "/5.png", "/7.png", "/8.png", "/9.png"]
    assert table["label"].to_pylist() == ["cat", "cat", "bee", "cat", "ant"]
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["predicted_label"].to_pylist() == ["cat", "ant", None, None, "ant"]
    assert table["accepted"].to_pylist() == [True, True, False, False, True]
    assert table["status"].to_pylist() == ["ok", "ok", "missing", "truncated", "ok"]
    assert table["error"].to_pylist() == [None, None, "no such file", "damaged", None]


def record_label_sets(num_rows: int) -> bytes:
    recorder = PredictionRecorder("multilabel", CLASSES, num_rows)
    recorder.add_rows(np.array([2, 5, 7, 8, 9]))
    scores = torch.tensor([[0.75, 0.5, 0.25]]).repeat(5, 1)
    recorder.update(scores.logit(), torch.zeros(5, 3))
    return render_parquet(recorder.build_table())


def test_multilabel_predicts_every_class_with_a_score_of_at_least_one_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = np.array([[1, 0, 0], [0, 1, 1]], np.int8)
    examples = build_examples(TargetTable(3, sets), [row % 2 for row in range(10)], CLASSES)
    table = build_validation_predictions(examples, record_label_sets(5), [])
    assert table is not None
    assert table["label"].to_pylist() == [["ant"], ["bee", "cat"], ["bee", "cat"], ["ant"],
                                          ["bee", "cat"]]  # fmt: skip
    assert table["predicted_labels"].to_pylist() == [["ant", "bee"]] * 5
    assert table["scores"].type == pa.list_(pa.float16(), 3)
    assert table["scores"][0].as_py() == [0.75, 0.5, 0.25]
    monkeypatch.setattr(validation_predictions, "MAX_STORED_SCORES", 14)
    smaller = build_validation_predictions(examples, record_label_sets(5), [])
    assert smaller is not None
    assert smaller.equals(table.drop_columns(["scores"]))


def test_a_class_with_the_name_of_a_column_of_predictions_leaves_the_table_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = np.array([[1, 0, UNKNOWN]], np.int8)  # so each class has a column
    examples = build_examples(TargetTable(3, sets), [0] * 10, ["ant", "error", "cat"])
    assert build_validation_predictions(examples, record_label_sets(5), []) is None
