"""The embedding map: principal components, clusters, and which of a run's images are on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.evaluation import embedding_map
from imgcls.evaluation.charts import plot_embedding_map
from imgcls.evaluation.config import LabelTableConfig
from imgcls.evaluation.embedding_map import cluster_points, compute_map, project
from imgcls.evaluation.label_join import resolve_labels
from imgcls.runs.committed import CommittedRun, open_run
from tests.conftest import write_manifest
from tests.runs.embedded import CLASSES, commit_run, save_with_head


def draw_groups(*sizes: int, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Points around distant centers, and the group of each."""
    rng = np.random.default_rng(0)
    centers = 20 * np.eye(len(sizes), width)
    group = np.repeat(np.arange(len(sizes)), sizes)
    points = centers[group] + rng.normal(size=(len(group), width))
    return points.astype(np.float32), group


def test_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    points, _ = draw_groups(30, 40, 50)
    found, variance = project(points, 3)
    expected = PCA(3, svd_solver="full").fit(points)
    np.testing.assert_allclose(variance, expected.explained_variance_ratio_, rtol=1e-5)
    theirs = expected.transform(points)
    signs = np.sign((theirs * found).sum(0))
    np.testing.assert_allclose(found, theirs * signs, atol=1e-4)
    # equal vectors have no variance
    same, variance = project(np.ones((4, 3), np.float32), 2)
    assert (same == 0).all()
    assert (variance == 0).all()


def test_clusters_are_the_groups_of_points() -> None:
    points, group = draw_groups(30, 40, 50)
    assigned, centers = cluster_points(points, 3, np.random.default_rng(0))
    assert len(centers) == 3
    for number in range(3):
        assert len(np.unique(assigned[group == number])) == 1
    np.testing.assert_allclose(centers[assigned[0]], points[:30].mean(0), atol=1e-4)
    # two different points make two clusters
    assigned, centers = cluster_points(
        np.repeat(points[[0, 119]], 5, axis=0), 4, np.random.default_rng(0)
    )
    assert len(centers) == 2
    assert assigned.tolist() == [assigned[0]] * 5 + [assigned[5]] * 5


@pytest.fixture
def run(tmp_path: Path) -> CommittedRun:
    """40 rows; those of even number are predicted right, the others wrong, with less confidence."""
    bundle = save_with_head(tmp_path / "bundle", CLASSES, head_seed=1)
    commit_run(tmp_path / "run", bundle, 40)
    for file in (tmp_path / "run" / "predictions").iterdir():
        table = pq.read_table(file)
        rows = table["row"].to_numpy()
        vectors = np.zeros((len(rows), table.schema.field("embedding").type.list_size), np.float32)
        vectors[:, 0], vectors[:, 1] = rows % 2, 1 - rows % 2
        vectors += 0.01 * np.random.default_rng(0).normal(size=vectors.shape)
        ok = pc_ok(table)
        names = pa.array(np.where(rows % 2, "red", "blue"), mask=~ok)
        values = {
            "predicted_label": names,
            "label": pa.array(["blue"] * len(rows)),
            "confidence": pa.array(np.where(rows % 2, 0.6, 0.9).astype(np.float32), mask=~ok),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.ravel()), vectors.shape[1], mask=pa.array(~ok)
            ),
        }
        for name, column in values.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, column)
        pq.write_table(table, file)
    return open_run(str(tmp_path / "run"))


def pc_ok(table: pa.Table) -> np.ndarray:
    return np.array([status == "ok" for status in table["status"].to_pylist()])


def test_the_least_accurate_cluster_comes_first(run: CommittedRun) -> None:
    found = compute_map(run, "label", None)
    assert found is not None
    assert len(found.points) == 39, "row 5 failed"
    assert found.explained > 0.9
    first = found.clusters[0]
    assert (first.label, first.purity, first.accuracy) == ("red", 1.0, 0.0)
    assert first.mean_confidence == pytest.approx(0.6)
    assert found.clusters[-1].label == "blue"
    assert found.clusters[-1].accuracy == 1.0
    assert sum(each.rows for each in found.clusters) == 39
    assert first.images.num_rows == 4
    for number, cluster in enumerate(found.clusters):
        assert (found.cluster == number).sum() == cluster.rows
    again = compute_map(run, "label", None)
    assert again is not None
    assert (again.points == found.points).all()


def test_without_labels_there_is_no_accuracy_and_unknown_labels_do_not_count(
    run: CommittedRun, tmp_path: Path
) -> None:
    unlabeled = compute_map(run, None, None)
    assert unlabeled is not None
    assert {each.accuracy for each in unlabeled.clusters} == {None}
    assert unlabeled.clusters[0].mean_confidence == pytest.approx(0.6), "the least confident"
    for file in (tmp_path / "run" / "predictions").iterdir():
        table = pq.read_table(file)
        label = pa.array(["fox"] * table.num_rows, pa.string_view())
        path = table["path"].cast(pa.string_view())
        table = table.set_column(table.schema.get_field_index("label"), "label", label)
        pq.write_table(table.set_column(table.schema.get_field_index("path"), "path", path), file)
    unknown = compute_map(open_run(run.url), "label", None)
    assert unknown is not None
    assert {each.accuracy for each in unknown.clusters} == {None}


def test_joined_labels_take_the_place_of_those_of_the_run(
    run: CommittedRun, tmp_path: Path
) -> None:
    rows = [(f"{row}.jpg", "red") for row in range(40)]
    labels = write_manifest(tmp_path / "labels.csv", rows, ("path", "label"))
    column, joined = resolve_labels(run, LabelTableConfig(path=str(labels)), None, required=True)
    found = compute_map(run, column, joined)
    assert found is not None
    assert (found.clusters[0].label, found.clusters[0].accuracy) == ("blue", 0.0)
    assert found.clusters[-1].accuracy == 1.0


def test_a_large_run_is_sampled_over_its_whole_length(
    run: CommittedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_map, "MAX_ROWS", 10)
    monkeypatch.setattr(embedding_map, "MAX_RANGES", 3)
    table = embedding_map._sample_rows(
        run, ["path", "predicted_label", "embedding"], np.random.default_rng(0)
    )
    assert 8 <= table.num_rows <= 12
    rows = [int(path.removesuffix(".jpg")) for path in table["path"].to_pylist()]
    assert rows == sorted(set(rows))
    assert rows[0] < 8, "of the first part"
    assert rows[-1] >= 32, "of the last"


def test_a_run_without_embeddings_has_no_map(tmp_path: Path, run: CommittedRun) -> None:
    bundle = save_with_head(tmp_path / "other", CLASSES, head_seed=1)
    commit_run(tmp_path / "unlabeled", bundle, 20)  # without a prediction
    assert compute_map(open_run(str(tmp_path / "unlabeled")), "label", None) is None


def test_the_chart_names_the_classes_and_gathers_the_rare_ones() -> None:
    points, _ = draw_groups(30, 40, 50)
    points = points[:, :2]
    chart = plot_embedding_map(points, [f"class {number % 12}" for number in range(120)])
    assert chart.startswith("<svg ")
    assert "other classes" in chart
    assert "class 1" in chart
    few = plot_embedding_map(points, ["cat"] * 60 + ["<dog>"] * 60)
    assert "other classes" not in few
    odd = plot_embedding_map(points, ["$_a_$"] * 60 + ["_background"] * 60)
    assert "$_a_$" in odd
    assert "_background" in odd
    assert "&lt;dog&gt;" in few
