from __future__ import annotations

import json
import pickle
from functools import reduce

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.metrics import PredictionCounts
from imgcls.metrics.counts import CORRECT, MAX_RANK, UNLABELED, WRONG

CLASSES = [f"class {i}" for i in range(7)]
FLOATS = ("log_loss_sum", "log_loss_square_sum", "predicted_confidence", "bin_confidence")


def assert_same(one: PredictionCounts, other: PredictionCounts) -> None:
    """Integers exactly, sums of floats up to rounding."""
    left, right = one.to_dict(), other.to_dict()
    for name in FLOATS:
        np.testing.assert_allclose(left.pop(name), right.pop(name), rtol=1e-9, atol=1e-9)
    assert left == right


def count(table, label_column="label", classes=CLASSES, **options):
    return PredictionCounts.from_table(table, label_column=label_column, classes=classes, **options)


@pytest.fixture(scope="module")
def mixed(make_predictions):
    return make_predictions(3000, CLASSES, seed=3, failed=0.1, unlabeled=0.2, unknown=0.1)


def test_every_row_is_counted_once_by_what_it_is(mixed):
    counts, frame = count(mixed), mixed.to_pandas()
    ok = frame[frame.status == "ok"]
    labeled = ok[ok.label.isin(CLASSES)]
    assert counts.rows == len(frame) == counts.ok + counts.error_rows
    assert counts.status == frame.status.value_counts().to_dict()
    assert counts.ok == len(ok) == counts.labeled + counts.unlabeled + counts.unknown_label
    assert counts.labeled == len(labeled)
    assert counts.unlabeled == ok.label.isna().sum()
    assert counts.unknown_label == (ok.label == "not a class").sum()
    assert counts.correct == (labeled.label == labeled.predicted_label).sum()
    assert counts.accepted == ok.accepted.sum()
    assert counts.accepted_labeled == labeled.accepted.sum()
    right = labeled[labeled.label == labeled.predicted_label]
    assert counts.accepted_correct == right.accepted.sum()


def test_predictions_are_counted_per_class_over_all_ok_rows(mixed):
    counts, frame = count(mixed), mixed.to_pandas()
    by_class = frame[frame.status == "ok"].groupby("predicted_label").confidence
    assert counts.predicted_counts.tolist() == by_class.size().reindex(CLASSES).tolist()
    np.testing.assert_allclose(
        counts.predicted_confidence, by_class.sum().reindex(CLASSES), rtol=1e-5
    )


def test_confidence_bins_hold_every_ok_row_by_its_outcome(mixed):
    counts = count(mixed, num_bins=10)
    assert counts.bin_counts.shape == (3, 10)
    assert counts.bin_counts[CORRECT].sum() == counts.correct
    assert counts.bin_counts[WRONG].sum() == counts.labeled - counts.correct
    assert counts.bin_counts[UNLABELED].sum() == counts.unlabeled + counts.unknown_label
    assert counts.bin_confidence.sum() == pytest.approx(counts.predicted_confidence.sum())


def test_ranks_are_counted_one_by_one_and_deep_ones_together(make_predictions):
    classes = [f"class {i}" for i in range(40)]
    table = make_predictions(4000, classes, seed=1)
    counts = count(table, classes=classes)
    ranks = table["label_rank"].to_numpy()
    expected = [(ranks == rank).sum() for rank in range(1, MAX_RANK + 1)]
    assert counts.rank_counts.tolist() == [*expected, (ranks > MAX_RANK).sum()]
    assert counts.rank_counts[0] == counts.correct


def test_a_score_that_underflowed_to_zero_costs_much_but_not_infinity(make_predictions):
    table = make_predictions(2, CLASSES)
    zero = table.set_column(4, "label_score", pa.array([0.0, 1.0], pa.float32()))
    assert count(zero).log_loss_sum == pytest.approx(-np.log(1e-12))


def test_a_row_without_a_label_score_or_rank_is_left_out_of_their_means(make_predictions):
    table = make_predictions(3, CLASSES)
    table = table.set_column(4, "label_score", pa.array([0.5, None, None], pa.float32()))
    table = table.set_column(5, "label_rank", pa.array([2, 1, None], pa.int32()))
    counts = count(table)
    assert (counts.labeled, counts.log_loss_rows) == (3, 1)
    assert counts.rank_counts[:3].tolist() == [1, 1, 0]


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 60))
def test_any_partition_merged_in_any_order_equals_the_whole(make_predictions, data, seed, rows):
    table = make_predictions(rows, CLASSES, seed=seed, failed=0.2, unlabeled=0.2, unknown=0.2)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    edges = zip([0, *cuts], [*cuts, rows], strict=True)
    parts = [count(table.slice(start, stop - start)) for start, stop in edges]
    while len(parts) > 1:  # any order and any tree of merges
        first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(first + second)
    assert_same(parts[0], count(table))


def test_merging_the_same_two_either_way_gives_the_same_bits(mixed):
    one, two = count(mixed.slice(0, 1000)), count(mixed.slice(1000))
    assert (one + two).to_dict() == (two + one).to_dict()


def test_nothing_is_the_start_of_a_merge(mixed):
    counts = count(mixed)
    empty = PredictionCounts.empty(CLASSES)
    assert (empty + counts).to_dict() == counts.to_dict()
    assert count(mixed.slice(0, 0)).to_dict() == empty.to_dict()
    parts = [count(mixed.slice(0, 10)), count(mixed.slice(10))]
    assert_same(reduce(PredictionCounts.merge, parts, empty), counts)


def test_counts_survive_json_and_pickle_exactly(mixed):
    counts = count(mixed)
    restored = PredictionCounts.from_dict(json.loads(json.dumps(counts.to_dict())))
    pickled = pickle.loads(pickle.dumps(counts))
    for copy in (restored, pickled):
        assert copy.to_dict() == counts.to_dict()
        assert (copy + counts).rows == 2 * counts.rows
    assert restored.bin_counts.dtype == counts.bin_counts.dtype == np.int64
    empty = PredictionCounts.empty(CLASSES)
    assert PredictionCounts.from_dict(empty.to_dict()).to_dict() == empty.to_dict()


def test_size_is_bounded_by_classes_not_rows(make_predictions):
    table = make_predictions(50_000, CLASSES)
    counts = count(table)
    assert len(counts.confusion_count) <= len(CLASSES) ** 2
    assert len(json.dumps(counts.to_dict())) < 4000


def test_a_dict_of_something_else_is_refused_by_its_keys(mixed):
    data = count(mixed).to_dict()
    del data["accepted"]
    with pytest.raises(ValueError, match="accepted"):
        PredictionCounts.from_dict(data)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_counts_alike(mixed, kind):
    other = mixed
    for name in ("label", "predicted_label", "status"):
        plain = mixed[name].cast(pa.string())
        column = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
        other = other.set_column(other.schema.get_field_index(name), name, column)
    assert count(other).to_dict() == count(mixed).to_dict()


def test_chunks_with_dictionaries_of_their_own_count_alike(mixed):
    parts = []
    for start in (0, 1000, 2000):
        part = mixed.slice(start, 1000).combine_chunks()
        for name in ("label", "predicted_label", "status"):
            index = part.schema.get_field_index(name)
            encoded = part[name].cast(pa.string()).combine_chunks().dictionary_encode()
            part = part.set_column(index, name, encoded)
        parts.append(part)
    assert_same(count(pa.concat_tables(parts)), count(mixed))


def test_a_record_batch_counts_like_its_table(mixed):
    (batch,) = mixed.combine_chunks().to_batches()
    assert count(batch).to_dict() == count(mixed).to_dict()


def test_integer_labels_match_classes_by_their_text(make_predictions):
    classes = ["0", "1", "2"]
    table = make_predictions(100, classes, unlabeled=0.1)
    as_integers = table.set_column(0, "label", table["label"].cast(pa.int64()))
    assert count(as_integers, classes=classes).to_dict() == count(table, classes=classes).to_dict()


def test_without_a_label_column_every_ok_row_is_unlabeled(make_predictions):
    table = make_predictions(200, CLASSES, failed=0.1)
    table = table.drop_columns(["label", "label_score", "label_rank"])
    counts = count(table, label_column=None)
    assert (counts.labeled, counts.unlabeled) == (0, counts.ok)
    assert counts.bin_counts[UNLABELED].sum() == counts.ok


def test_a_table_of_failures_alone_is_counted():
    nulls = dict.fromkeys(
        ["label", "predicted_label", "confidence", "accepted", "label_score", "label_rank"],
        pa.nulls(3),
    )
    counts = count(pa.table({**nulls, "status": ["missing", "empty", "missing"]}))
    assert counts.status == {"empty": 1, "missing": 2}
    assert (counts.rows, counts.ok, counts.error_rows) == (3, 0, 3)


def test_whatever_failed_rows_carry_is_not_looked_at(make_predictions):
    table = make_predictions(2, CLASSES)
    table = table.set_column(1, "predicted_label", pa.array(["nonsense", CLASSES[0]]))
    table = table.set_column(2, "confidence", pa.array([float("nan"), 0.5], pa.float32()))
    table = table.set_column(6, "status", pa.array(["missing", "ok"]))
    assert count(table).ok == 1


def replaced(table, name, values):
    index = table.schema.get_field_index(name)
    return table.set_column(index, name, pa.array(values, table.schema.field(index).type))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("predicted_label", ["class 1", None], "1 rows have status ok but no predicted_label"),
        ("confidence", [0.5, None], "1 rows have status ok but no predicted_label or no confid"),
        ("confidence", [0.5, float("nan")], "without NaN"),
        ("predicted_label", ["class 1", "toaster"], "such as 'toaster'.*another model"),
        ("label_rank", [1, 0], "label_rank 0 found"),
        ("label_score", [0.5, -3.0], "must be a softmax score"),
        ("label_score", [0.5, float("nan")], "must be a softmax score"),
        ("status", ["ok", None], "'status' is null in 1 rows"),
    ],
)
def test_a_table_that_no_model_wrote_is_refused(make_predictions, column, values, message):
    table = replaced(make_predictions(2, CLASSES), column, values)
    with pytest.raises(ValueError, match=message):
        count(table)


def test_a_missing_column_is_named(make_predictions):
    table = make_predictions(2, CLASSES).drop_columns(["label_rank"])
    with pytest.raises(ValueError, match=r"no column label_rank \(found: label, "):
        count(table)
    with pytest.raises(ValueError, match="no column truth, label_rank"):
        count(table, label_column="truth")


def test_class_names_must_be_given_and_unique(make_predictions):
    table = make_predictions(2, CLASSES)
    with pytest.raises(ValueError, match="repeated: cat"):
        count(table, classes=["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="no classes"):
        count(table, classes=[])


def test_rows_without_predictions_are_counted_by_their_status(make_predictions):
    statuses = pa.chunked_array([["ok", "missing"], ["ok"]]).dictionary_encode()
    counts = PredictionCounts.empty([]) + PredictionCounts.from_statuses(statuses)
    assert counts.status == {"missing": 1, "ok": 2}
    assert (counts.rows, counts.accepted, counts.classes) == (3, 0, ())


def test_counts_of_other_classes_or_bins_do_not_merge(mixed):
    counts = count(mixed)
    with pytest.raises(ValueError, match="names and order"):
        counts + PredictionCounts.empty(CLASSES[::-1])
    with pytest.raises(ValueError, match="same num_bins"):
        counts + PredictionCounts.empty(CLASSES, num_bins=10)
    with pytest.raises(TypeError):
        counts + 1
