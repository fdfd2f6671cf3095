"""Single-label classification: scores, decisions, columns and losses from logits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models.acceptance import NEVER_ACCEPT
from imgcls.models.bundle import Architecture, BundleSpec, VectorScaling
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import ScoreScaling, rank_on_device, select_top_k
from imgcls.models.tasks import TASKS, find_task

Scores = npt.NDArray[np.float32]
LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.0, 0.0], [1e4, -1e4, 0.0]])


def spec(**changes: object) -> BundleSpec:
    fields = {"architecture": Architecture(name="small_cnn"), "classes": ["a", "b", "c"]}
    return BundleSpec.model_validate({**fields, "preprocess": Preprocess(), **changes})


def test_a_bundle_has_the_task_of_its_description() -> None:
    assert find_task(spec()) is SINGLE_LABEL
    assert find_task(spec(task="multilabel", format_version=2)) is MULTILABEL
    assert TASKS == {"single_label": SINGLE_LABEL, "multilabel": MULTILABEL}


def test_columns_need_no_torch() -> None:
    code = (
        "import sys; from imgcls.runs.schema import build_prediction_schema;"
        "build_prediction_schema(labeled=True, scores=3); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_scores_are_the_softmax_over_the_temperature(temperature: float) -> None:
    found = SINGLE_LABEL.compute_scores(LOGITS, ScoreScaling(temperature))
    assert torch.equal(found, torch.softmax(LOGITS / temperature, dim=1))
    assert torch.equal(SINGLE_LABEL.activate(LOGITS, ScoreScaling(temperature)), found)


def test_vector_scaling_applies_to_the_log_of_the_scores() -> None:
    vectors = VectorScaling(scale=[1.0, 2.0, 0.5], bias=[0.0, 1.0, -1.0])
    scaling = ScoreScaling.from_spec(spec(temperature=2.0, vector_scaling=vectors))
    logs = torch.log_softmax(LOGITS / 2, dim=1)
    expected = torch.softmax(logs * torch.tensor(vectors.scale) + torch.tensor(vectors.bias), 1)
    assert torch.equal(SINGLE_LABEL.activate(LOGITS, scaling), expected)
    numbers = np.array(vectors.scale, np.float32), np.array(vectors.bias, np.float32)
    confidence, predicted = SINGLE_LABEL.compute_confidences(logs.numpy(), *numbers)
    np.testing.assert_allclose(confidence, expected.max(1).values, rtol=1e-6)
    assert predicted.tolist() == expected.argmax(1).tolist()


def test_a_scaling_on_top_of_another_is_one_scaling() -> None:
    for changes in ({}, {"vector_scaling": VectorScaling(scale=[1, 2, 3], bias=[0, 1, 2])}):
        before = spec(temperature=1.5, **changes)
        after = SINGLE_LABEL.add_scaling(before, np.array([0.7], np.float32), None)
        logs = SINGLE_LABEL.activate(LOGITS[:2], ScoreScaling.from_spec(before)).log()
        torch.testing.assert_close(
            SINGLE_LABEL.activate(LOGITS[:2], ScoreScaling.from_spec(after)),
            torch.softmax(0.7 * logs, dim=1),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_a_logit_that_is_not_finite_has_no_score(value: float) -> None:
    logits = LOGITS.clone()
    logits[1, 2] = value
    scores = SINGLE_LABEL.compute_scores(logits, ScoreScaling())
    assert scores[1].isnan().all()
    assert scores[[0, 2]].isfinite().all()


@given(
    scores=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=4, max_size=4), max_size=6
    ),
    k=st.integers(1, 7),
)
def test_the_top_are_the_best_first_and_ties_go_to_the_first_class(
    scores: list[list[float]], k: int
) -> None:
    table: Scores = np.array(scores, np.float32).reshape(-1, 4)
    order, values = select_top_k(table, k)
    expected = [[i for _, i in sorted((-s, i) for i, s in enumerate(row))][:k] for row in scores]
    assert order.tolist() == expected
    assert order.shape == values.shape == (len(table), min(k, 4))
    assert values.tolist() == [
        [row[i] for i in best] for row, best in zip(table.tolist(), expected, strict=True)
    ]
    on_device = rank_on_device(torch.from_numpy(table), k).numpy()
    assert (on_device.tolist(), on_device.dtype) == (expected, np.int64)


def test_a_prediction_is_accepted_from_the_threshold_of_its_class_on() -> None:
    scores = np.array([[0.6, 0.4, 0], [0.4, 0.6, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    thresholds = [0.6, 0.61, NEVER_ACCEPT]
    assert SINGLE_LABEL.decide(scores, thresholds, 2).accepted.tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_the_columns_are_those_of_the_schema() -> None:
    scores = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], np.float32)
    columns = SINGLE_LABEL.build_columns(
        scores, ["a", "b", "c"], [0.5, 0.5, 0.7], top_k=2, codes=np.array([2, -1]),
        scores_type="float16",
    )  # fmt: skip
    fields = SINGLE_LABEL.build_fields(has_labels=True, classes=3, scores_type="float16")
    table = pa.table([columns[field.name] for field in fields], schema=pa.schema(fields))
    assert list(columns) == table.column_names
    assert table.drop_columns("scores").to_pylist() == [
        {
            "predicted_label": "a",
            "confidence": 0.5,
            "accepted": True,
            "topk_labels": ["a", "b"],
            "topk_scores": [0.5, 0.25],
            "label_score": 0.25,
            "label_rank": 3,
        },
        {
            "predicted_label": "c",
            "confidence": pytest.approx(0.6),
            "accepted": False,
            "topk_labels": ["c", "a"],
            "topk_scores": pytest.approx([0.6, 0.2]),
            "label_score": None,
            "label_rank": None,
        },
    ]
    empty = SINGLE_LABEL.build_columns(scores[:0], ["a", "b", "c"], [0, 0, 0], top_k=2)
    assert {len(column) for column in empty.values()} == {0}


def test_the_loss_is_a_sum_of_cross_entropies() -> None:
    labels = torch.tensor([0, 2, 0])
    expected = torch.nn.functional.cross_entropy(LOGITS, labels, reduction="sum")
    assert torch.equal(SINGLE_LABEL.compute_loss(LOGITS, labels), expected)
