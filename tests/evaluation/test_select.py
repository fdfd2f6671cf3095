"""The most uncertain rows are selected, none of them labeled, excluded or a near-duplicate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imgcls.errors import ConfigError, OutputError, RequestError
from imgcls.evaluation.diversity import ClassCap, choose_first, choose_spread
from imgcls.evaluation.select import Selection, select
from imgcls.evaluation.uncertainty import compute_margin
from imgcls.inference.history import CompactConfig, compact
from imgcls.runs.committed import iter_tables, open_run
from tests.conftest import draw
from tests.evaluation.multilabel_runs import (
    THRESHOLDS,
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)
from tests.evaluation.runs import CLASSES, commit, drawn

ROWS = 400


def with_embeddings(table: pa.Table, vectors: npt.NDArray[np.float32]) -> pa.Table:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    failed = np.array(table["status"].to_pylist()) != "ok"
    places = pa.array(np.arange(len(flat)), mask=failed)
    return table.append_column("embedding", flat.take(places))


def unit(rows: int, width: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def run(tmp_path: Path, table: pa.Table, **options: Any) -> Path:
    return commit(tmp_path / "run", table, label_column=None, **options)


def choose(tmp_path: Path, folder: Path, **settings: Any) -> Selection:
    return select(run=str(folder), output=str(tmp_path / "next"), **settings)


def margins(table: pa.Table) -> npt.NDArray[np.float64]:
    pairs = [each or [np.nan, np.nan] for each in table["topk_scores"].to_pylist()]
    return np.array([1 - (each[0] - each[1]) for each in pairs])


@pytest.mark.parametrize("parts", [1, 3])
def test_the_rows_with_the_smallest_margin_are_selected(tmp_path: Path, parts: int) -> None:
    table = with_embeddings(drawn(ROWS, failed=0.1), unit(ROWS))
    folder = run(tmp_path, table, parts=parts)
    found = choose(tmp_path, folder, count=20, max_similarity=1.0)
    value = margins(table)
    expected = np.argsort(-np.nan_to_num(value, nan=-1), kind="stable")[:20]
    assert found.rows["row"].to_pylist() == expected.tolist()
    np.testing.assert_allclose(found.rows["selection_value"], value[expected])
    assert found.rows["selection_rank"].to_pylist() == list(range(1, 21))
    assert set(found.rows["status"].to_pylist()) == {"ok"}
    manifest = pq.read_table(tmp_path / "next" / "manifest.parquet")
    assert manifest.schema.names == ["path", "label", "camera"]
    assert manifest["path"][0].as_py() == f"{folder}/images/{expected[0]:06d}.jpg"
    assert pq.read_table(tmp_path / "next" / "selection.parquet").equals(found.rows)
    summary = json.loads((tmp_path / "next" / "summary.json").read_text())
    assert (summary["rows"], summary["candidates"], summary["run_rows"]) == (20, 200, ROWS)


def test_the_entropy_is_that_of_all_scores(tmp_path: Path) -> None:
    table = with_embeddings(drawn(ROWS, scores=True), unit(ROWS))
    found = choose(tmp_path, run(tmp_path, table), by="entropy", count=10, max_similarity=1.0)
    scores = np.array(table["scores"].to_pylist(), np.float64)
    entropy = -(scores * np.log(np.where(scores > 0, scores, 1))).sum(1)
    assert found.rows["row"].to_pylist() == np.argsort(-entropy, kind="stable")[:10].tolist()


def test_multilabel_rows_are_near_the_threshold_of_a_class(tmp_path: Path) -> None:
    targets = draw_targets(ROWS)
    scores = draw_scores(targets)
    table = with_embeddings(build_run_table(targets, scores, labels=None), unit(ROWS))
    folder = commit_multilabel(tmp_path / "run", table, labels=None)
    found = choose(tmp_path, folder, count=10, max_similarity=1.0)
    distance = np.abs(scores.astype(np.float32) - 0.5).min(1)  # the bundle is not there
    assert found.rows["row"].to_pylist() == np.argsort(distance, kind="stable")[:10].tolist()
    assert "scores" not in found.rows.schema.names
    assert THRESHOLDS[0] == 0.5


def test_labeled_and_excluded_rows_are_left_out(tmp_path: Path) -> None:
    table = with_embeddings(drawn(ROWS, unlabeled=0.5), unit(ROWS))
    folder = commit(tmp_path / "run", table)
    first = choose(tmp_path, folder, count=30, max_similarity=1.0)
    assert first.rows["label"].null_count == 30
    excluded = tmp_path / "excluded.parquet"
    urls = [f"file://{path}" for path in first.rows["path"].to_pylist()]
    pq.write_table(pa.table({"path": urls}), excluded)
    second = select(
        run=str(folder), output=str(tmp_path / "more"), count=30, max_similarity=1.0,
        exclude=str(excluded),
    )  # fmt: skip
    assert not set(first.rows["path"].to_pylist()) & set(second.rows["path"].to_pylist())
    every = choose(
        tmp_path, folder, count=30, max_similarity=1.0, include_labeled=True, overwrite=True
    )
    assert every.rows["label"].null_count < 30


def test_a_class_has_at_most_its_cap(tmp_path: Path) -> None:
    table = with_embeddings(drawn(ROWS), unit(ROWS))
    for diverse in (False, True):
        found = choose(
            tmp_path, run(tmp_path / str(diverse), table), count=30, per_class_cap=4,
            max_similarity=1.0, diverse=diverse, overwrite=True,
        )  # fmt: skip
        counts = found.rows["predicted_label"].value_counts().to_pylist()
        assert max(each["counts"] for each in counts) == 4


def test_of_equal_images_one_is_selected(tmp_path: Path) -> None:
    vectors = np.repeat(unit(ROWS // 4), 4, axis=0)
    folder = run(tmp_path, with_embeddings(drawn(ROWS), vectors))
    found = choose(tmp_path, folder, count=50, candidates=ROWS)
    groups = [row // 4 for row in found.rows["row"].to_pylist()]
    assert len(set(groups)) == len(groups) == 50
    diverse = choose(tmp_path, folder, count=50, candidates=ROWS, diverse=True, overwrite=True)
    groups = [row // 4 for row in diverse.rows["row"].to_pylist()]
    assert len(set(groups)) == len(groups) == 50


def test_without_embeddings_equal_images_are_found_by_their_pixels(tmp_path: Path) -> None:
    table = drawn(60)
    folder = run(tmp_path, table)
    (folder / "images").mkdir()
    for row in range(60):
        picture = draw("red", (64, 64), seed=row // 3)
        picture.resize((64 + row % 3, 64)).save(folder / "images" / f"{row:06d}.jpg", quality=95)
    found = choose(tmp_path, folder, count=15, candidates=60)
    groups = [row // 3 for row in found.rows["row"].to_pylist()]
    assert len(set(groups)) == len(groups) == 15


def test_without_embeddings_images_are_read_until_enough_are_selected(tmp_path: Path) -> None:
    table = drawn(60)
    rank = np.argsort(np.argsort(-margins(table), kind="stable"))
    names = pa.array(np.where(rank < 30, "ant", "bee"))
    table = table.set_column(
        table.schema.get_field_index("predicted_label"), "predicted_label", names
    )
    folder = run(tmp_path, table)
    (folder / "images").mkdir()
    for row in range(60):
        draw("red", (64, 64), seed=row).save(folder / "images" / f"{row:06d}.jpg", quality=95)
    found = choose(tmp_path, folder, count=10, candidates=60, per_class_cap=5)
    assert found.rows["predicted_label"].to_pylist() == ["ant"] * 5 + ["bee"] * 5


def test_two_models_disagree_most_on_the_selected_rows(tmp_path: Path) -> None:
    one, other = (drawn(ROWS, seed, scores=True) for seed in (1, 2))
    folder = run(tmp_path, with_embeddings(one, unit(ROWS)), parts=3)
    second = commit(tmp_path / "other", other, label_column=None)
    found = choose(
        tmp_path, folder, by="disagreement", other_run=str(second), count=10, max_similarity=1.0
    )
    left, right = (np.array(each["scores"].to_pylist(), np.float64) for each in (one, other))
    distance = np.abs(left - right).sum(1) / 2
    assert found.rows["row"].to_pylist() == np.argsort(-distance, kind="stable")[:10].tolist()


def test_class_names_in_another_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    composed, decomposed = (["ant", "bee", f"c{letter}t"] for letter in ("\u00e4", "a\u0308"))
    folder = commit(tmp_path / "one", drawn(30, 1, classes=composed), classes=composed)
    other = commit(tmp_path / "other", drawn(30, 2, classes=decomposed), classes=decomposed)
    settings = {"by": "disagreement", "include_labeled": True, "count": 5, "max_similarity": 1.0}
    assert choose(tmp_path, folder, other_run=str(other), **settings).rows.num_rows == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "entropy"}, "has no column scores, which --by entropy needs; predict again with"),
        ({"by": "ood"}, "has no column ood_score"),
        ({"by": "disagreement"}, "pass --other-run"),
        ({"other_run": "x"}, "has no effect without --by disagreement"),
        ({"diverse": True}, "has no embeddings, which --diverse needs"),
    ],
)
def test_a_request_that_the_run_cannot_fulfill_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = run(tmp_path, drawn(20, scores=False))
    with pytest.raises(RequestError, match=message):
        choose(tmp_path, folder, **settings)
    assert not (tmp_path / "next").exists()


def test_a_history_is_no_run_of_which_disagreement_selects_rows(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    commit(labels / "date=2026-11-01", drawn(30, 1, scores=True), label_column=None)
    night = commit(labels / "date=2026-11-02", drawn(40, 2, scores=True), label_column=None)
    history = compact(CompactConfig(source=str(labels), output=str(tmp_path / "latest")))
    with pytest.raises(RequestError, match="is a history of several runs, which --by disagreement"):
        choose(tmp_path, Path(history), by="disagreement", other_run=str(night), on="path")


def test_scores_of_a_history_are_used_if_all_its_bundles_had_the_same_classes(
    tmp_path: Path,
) -> None:
    for name, classes in (("same", CLASSES), ("reversed", CLASSES[::-1])):
        folder = tmp_path / name
        commit(folder / "date=2026-11-01", drawn(30, 1, classes=classes), classes=classes)
        commit(folder / "date=2026-11-02", drawn(30, 2))
        history = compact(CompactConfig(source=str(folder), output=str(tmp_path / f"{name}-all")))
        assert open_run(history).has_scores == (name == "same")
    record = Path(history, "_run.json")
    record.write_text(record.read_text().replace('"same_classes": false', '"other": 0'))
    assert not open_run(history).has_scores


def test_rows_of_a_history_with_one_score_have_no_margin(tmp_path: Path) -> None:
    first, second = drawn(20, 1, scores=False), drawn(20, 2, scores=False)
    for name in ("topk_labels", "topk_scores"):
        shorter = pc.list_slice(first[name].combine_chunks(), 0, 1)
        first = first.set_column(first.schema.get_field_index(name), name, shorter)
    commit(tmp_path / "all" / "date=2026-11-01", first)
    commit(tmp_path / "all" / "date=2026-11-02", second)
    history = compact(CompactConfig(source=str(tmp_path / "all"), output=str(tmp_path / "latest")))
    table = pa.concat_tables(iter_tables(open_run(history), ["topk_scores"]))
    found = compute_margin(table, [])
    lengths = pc.list_value_length(table["topk_scores"]).to_numpy()
    assert sorted(lengths) == [1] * 20 + [3] * 20
    assert np.isnan(found[lengths == 1]).all()
    assert found[lengths == 3].tolist() == pytest.approx(margins(second).tolist())


def test_scores_of_different_numbers_of_classes_have_no_entropy(tmp_path: Path) -> None:
    table = with_embeddings(drawn(20, scores=True), unit(20))
    index = table.schema.get_field_index("scores")
    lists = table["scores"].cast(pa.list_(pa.float32()))
    folder = run(tmp_path, table.set_column(index, "scores", lists))
    with pytest.raises(RequestError, match="which --by entropy needs"):
        choose(tmp_path, folder, by="entropy")
    assert choose(tmp_path, folder, by="margin", count=3).rows.num_rows == 3


def test_wrong_numbers_and_a_second_selection_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path, with_embeddings(drawn(20), unit(20)))
    with pytest.raises(ConfigError, match="candidates 3: is smaller than count 5"):
        choose(tmp_path, folder, count=5, candidates=3)
    choose(tmp_path, folder, count=5)
    with pytest.raises(OutputError, match="already has a selection"):
        choose(tmp_path, folder, count=5)
    with pytest.raises(OutputError, match="is the folder of a run, whose files would be"):
        select(run=str(folder), output=str(folder), count=5)
    labeled = commit(tmp_path / "labeled", drawn(20))
    with pytest.raises(RequestError, match=r"every row is labeled \(--include-labeled takes"):
        select(run=str(labeled), output=str(tmp_path / "none"), count=5)


# ------------------------------------------------------------------ the choice itself


def cluster(sizes: list[int]) -> npt.NDArray[np.float32]:
    """Vectors in tight groups around orthogonal directions, one group after the other."""
    centers = np.repeat(np.eye(len(sizes), 8, dtype=np.float32), sizes, axis=0)
    noise = np.random.default_rng(0).normal(scale=0.002, size=centers.shape)
    vectors = (centers + noise).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def test_chosen_rows_are_spread_over_the_groups_of_similar_images() -> None:
    sizes = [60, 30, 20, 10]
    group = np.repeat(np.arange(4), sizes)
    chosen = choose_spread(cluster(sizes), 4, 1.0, ClassCap([""] * 120, None))
    assert chosen[0] == 0  # the most uncertain row
    assert set(group[chosen].tolist()) == {0, 1, 2, 3}  # the first 4 rows are all of group 0
    again = choose_spread(cluster(sizes), 4, 1.0, ClassCap([""] * 120, None))
    assert again.tolist() == chosen.tolist()


def test_more_uncertain_rows_are_chosen_more_often_than_others_as_far_away() -> None:
    vectors = unit(2000, 64)  # all about as far from each other
    chosen = choose_spread(vectors, 200, 1.0, ClassCap([""] * 2000, None))
    assert len(set(chosen.tolist())) == 200
    assert 0.62 < (chosen < 1000).mean() < 0.88  # 0.75 expected, of equal weights 0.5


def test_equal_rows_are_chosen_only_where_they_may_be() -> None:
    vectors = np.repeat(unit(3), 2, axis=0)
    assert len(choose_spread(vectors, 6, 0.98, ClassCap([""] * 6, None))) == 3
    every = choose_spread(vectors, 6, 1.0, ClassCap([""] * 6, None))
    assert sorted(every.tolist()) == [0, 1, 2, 3, 4, 5]
    capped = choose_spread(vectors, 6, 1.0, ClassCap(["a", "b"] * 3, 1))
    assert sorted(row % 2 for row in capped.tolist()) == [0, 1]
    assert choose_spread(vectors[:0], 6, 1.0, ClassCap([], None)).tolist() == []


def test_diverse_rows_are_of_the_most_uncertain_ones(tmp_path: Path) -> None:
    table = with_embeddings(drawn(ROWS), unit(ROWS))
    folder = run(tmp_path, table)
    found = choose(tmp_path, folder, count=20, diverse=True)
    most = np.argsort(-margins(table), kind="stable")[:100]
    assert set(found.rows["row"].to_pylist()) < set(most.tolist())
    assert found.rows["row"].to_pylist() != most[:20].tolist()
    assert found.candidates == 100


def test_the_first_rows_are_taken_but_for_those_equal_to_earlier_ones() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 1, 3]]
    assert choose_first(vectors, 3, 0.9, ClassCap([""] * 6, None)).tolist() == [0, 2, 3]
    capped = choose_first(vectors, 9, 0.9, ClassCap(["a", "a", "a", "b", "b", "b"], 1))
    assert capped.tolist() == [0, 3]
    blank = np.zeros((3, 4), np.float32)  # images that cannot be read are equal to none
    assert choose_first(blank, 3, 0.9, ClassCap([""] * 3, None)).tolist() == [0, 1, 2]


def test_tasks_have_the_prediction_of_the_bundle_that_made_the_run(tmp_path: Path) -> None:
    folder = run(tmp_path, with_embeddings(drawn(ROWS), unit(ROWS)), model="models/first")
    found = choose(tmp_path, folder, count=5, format="label-studio")
    tasks = json.loads((tmp_path / "next" / "label_studio.json").read_text())
    assert [task["data"]["path"] for task in tasks] == found.rows["path"].to_pylist()
    for task, row in zip(tasks, found.rows.to_pylist(), strict=True):
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == f"first@{'b' * 12}"
        assert prediction["score"] == pytest.approx(row["confidence"], abs=1e-6)
        assert prediction["result"][0]["value"]["choices"] == [row["predicted_label"]]


def test_tasks_of_a_multilabel_run_have_all_predicted_labels(tmp_path: Path) -> None:
    targets = draw_targets(ROWS)
    table = with_embeddings(build_run_table(targets, draw_scores(targets), labels=None), unit(ROWS))
    folder = commit_multilabel(tmp_path / "run", table, labels=None)
    found = choose(tmp_path, folder, count=40, format="label-studio", max_similarity=1.0)
    tasks = json.loads((tmp_path / "next" / "label_studio.json").read_text())
    for task, row in zip(tasks, found.rows.to_pylist(), strict=True):
        names = row["predicted_labels"]
        assert bool(names) == ("predictions" in task)
        if names:
            assert task["predictions"][0]["result"][0]["value"]["choices"] == names
    assert any(len(row["predicted_labels"]) > 1 for row in found.rows.to_pylist())


def test_nothing_is_written_where_the_tool_cannot_take_an_image(tmp_path: Path) -> None:
    table = with_embeddings(drawn(ROWS), unit(ROWS))
    places = table.schema.get_field_index("path")
    paths = pa.array([f"tar:///a.tar#{number}.jpg" for number in range(ROWS)])
    folder = run(tmp_path, table.set_column(places, "path", paths))
    with pytest.raises(RequestError, match="image within a file"):
        choose(tmp_path, folder, count=5, format="cvat")
    assert not (tmp_path / "next").exists()
    with pytest.raises(ConfigError, match="image_root: has no effect"):
        choose(tmp_path, folder, count=5, image_root="/photos")
