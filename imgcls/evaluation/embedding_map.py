"""Embedding map: a sample of a run's embeddings in two dimensions, and its clusters.

Both show groups of similar images that classes do not: a camera, a background, a kind of mistake.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifests.manifest import normalize_labels
from imgcls.evaluation.label_join import JOINED_COLUMN, JoinedLabels
from imgcls.evaluation.row_lookup import read_part_rows
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs.committed import CommittedRun, cast_views

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
MAX_ROWS = 2_000
"""Images on the map."""
MAX_RANGES = 40
"""Pieces of the run that the sample is drawn from, so that a large run is not read whole."""
MAX_CLUSTERS = 12
_CLUSTER_DIMENSIONS = 32
_SHOWN_IMAGES = 4
_TOP_K = ("topk_labels", "topk_scores")
_ITERATIONS = 50


@dataclass(frozen=True)
class Cluster:
    """A group of similar images.

    rows:     number of images of the sample
    share:    fraction of the sample
    label:    most frequent prediction, and `purity`, its share
    accuracy: of the labeled rows; None without any
    images:   the rows next to the center: path, label, predicted_label, confidence, label_score
    """

    rows: int
    share: float
    label: str
    purity: float
    accuracy: float | None
    mean_confidence: float
    images: pa.Table


@dataclass(frozen=True)
class EmbeddingMap:
    """A sample of M images.

    points:    (M, 2) float32 principal components
    predicted: (M,) class names
    cluster:   (M,) index in `clusters`
    clusters:  those with the lowest accuracy or confidence first
    explained: fraction of the variance that the two components explain
    """

    points: Floats
    predicted: list[str]
    cluster: Indices
    clusters: list[Cluster]
    explained: float


def compute_map(
    run: CommittedRun, label_column: str | None, joined: JoinedLabels | None, *, seed: int = 0
) -> EmbeddingMap | None:
    """The map of a run; None without embeddings of at least three images with a prediction.

    The class of an image of a multilabel run is that with the highest score.
    label_column, joined: labels, as `label_join.resolve_labels` returns them; None for multilabel
    """
    if "embedding" not in run.schema.names or run.merged_runs:
        return None
    is_multilabel = run.task == "multilabel"
    predictions = _TOP_K if is_multilabel else ("predicted_label", "confidence")
    names = [run.path_column, *predictions, "embedding"]
    if joined is not None:
        names += [*joined.required_columns, "status"]
    elif label_column is not None:
        names += [label_column, "label_score"]
    table = _sample_rows(run, list(dict.fromkeys(names)), np.random.default_rng(seed))
    if is_multilabel:
        table = _add_best_class(table)
    table = table.filter(table["predicted_label"].is_valid())
    if joined is not None:
        table, label_column = joined.rejoin(table), JOINED_COLUMN
    if table.num_rows < 3:
        return None
    vectors = np.stack(table["embedding"].combine_chunks().to_numpy(zero_copy_only=False))
    components, variance = project(normalize_embeddings(vectors), _CLUSTER_DIMENSIONS)
    predicted = table["predicted_label"].cast(pa.string()).to_pylist()
    count = min(MAX_CLUSTERS, max(2, 2 * len(set(predicted))), len(components) - 1)
    assigned, centers = cluster_points(components, count, np.random.default_rng(seed))
    rows = _select_shown(run, table, label_column)
    clusters = [
        _describe_cluster(rows, run.classes, components, np.flatnonzero(assigned == number), center)
        for number, center in enumerate(centers)
    ]
    order = sorted(range(len(clusters)), key=lambda number: _rank(clusters[number]))
    return EmbeddingMap(
        points=components[:, :2],
        predicted=predicted,
        cluster=np.argsort(order)[assigned],
        clusters=[clusters[number] for number in order],
        explained=float(variance[:2].sum()),
    )


def project(vectors: Floats, dimensions: int) -> tuple[Floats, Floats]:
    """Principal components of (N, E) vectors: (N, D) float32, D at most `dimensions` and E.

    Returns also the fraction of the variance that each component explains. The sign of a component
    is that which makes its largest weight positive. Source: Hotelling (1933).
    """
    centered = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    values, axes = np.linalg.eigh(centered.T @ centered)
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]
    kept = axes[:, :dimensions]
    kept = kept * np.sign(np.take_along_axis(kept, np.abs(kept).argmax(0)[None], axis=0))
    total = values.sum() or 1.0
    return (centered @ kept).astype(np.float32), (values[:dimensions] / total).astype(np.float32)


def cluster_points(points: Floats, count: int, rng: np.random.Generator) -> tuple[Indices, Floats]:
    """k-means of (N, D) points: (N,) cluster of each, and the (K, D) centers of the K not empty.

    Source: Lloyd (1982), with the start of Arthur & Vassilvitskii, SODA 2007 (k-means++).
    """
    centers = points[[rng.integers(len(points))]]
    while len(centers) < count:
        nearest = _square_distances(points, centers).min(1).astype(np.float64)
        if not nearest.sum():  # fewer different points than clusters
            break
        chosen = rng.choice(len(points), p=nearest / nearest.sum())
        centers = np.concatenate([centers, points[[chosen]]])
    assigned = np.full(len(points), -1)
    for _ in range(_ITERATIONS):
        found = _square_distances(points, centers).argmin(1)
        if (found == assigned).all():
            break
        assigned = found
        used, assigned = np.unique(assigned, return_inverse=True)
        centers = np.stack([points[assigned == number].mean(0) for number in range(len(used))])
    return assigned.astype(np.int64), centers


def _square_distances(points: Floats, centers: Floats) -> Floats:
    """(N, K) squared distances."""
    distances: Floats = ((points[:, None, :] - centers[None]) ** 2).sum(2)
    return distances


def _sample_rows(run: CommittedRun, names: list[str], rng: np.random.Generator) -> pa.Table:
    """At most MAX_ROWS rows with a prediction and an embedding, in row order."""
    ranges = run.split_row_groups(max(1, run.rows // MAX_RANGES))
    places = np.unique(np.linspace(0, len(ranges) - 1, MAX_RANGES).round().astype(int))
    chosen = [ranges[place] for place in places] if ranges else []
    total = sum(each.rows for each in chosen)
    positions: dict[int, list[Indices]] = defaultdict(list)
    for each in chosen:
        wanted = min(each.rows, max(1, round(MAX_ROWS * each.rows / total)))
        position = each.first_row + np.sort(rng.choice(each.rows, wanted, replace=False))
        positions[each.file].append(position)
    tables = [cast_views(run.schema.empty_table().select(names))]
    for file, parts in positions.items():
        tables.append(read_part_rows(run.files[file], names, np.concatenate(parts)))
    table = pa.concat_tables(tables).unify_dictionaries()
    return table.filter(table["embedding"].is_valid())


def _add_best_class(table: pa.Table) -> pa.Table:
    """Add the class with the highest score and its score, as a run with one label per image has."""
    for name, listed in zip(("predicted_label", "confidence"), _TOP_K, strict=True):
        lists = table[listed].combine_chunks()
        kept = pc.fill_null(pc.list_value_length(lists), 0).to_numpy() > 0
        best = pc.list_element(lists.filter(pa.array(kept)), 0)
        place = pa.array(np.cumsum(kept) - 1, mask=~kept)
        table = table.append_column(name, best.take(place))
    return table


def _select_shown(run: CommittedRun, table: pa.Table, label_column: str | None) -> pa.Table:
    label = score = None
    if label_column is not None:
        label, score = normalize_labels(table[label_column]), table["label_score"]
    return pa.table(
        {
            "path": table[run.path_column].cast(pa.string()),
            "label": pa.nulls(table.num_rows, pa.string())
            if label is None
            else label.cast(pa.string()),
            "predicted_label": normalize_labels(table["predicted_label"]).cast(pa.string()),
            "confidence": table["confidence"],
            "label_score": pa.nulls(table.num_rows, pa.float32()) if score is None else score,
        }
    )


def _describe_cluster(
    rows: pa.Table,
    classes: Sequence[str],
    components: Floats,
    members: Indices,
    center: Floats,
) -> Cluster:
    own = rows.take(pa.array(members))
    distance = _square_distances(components[members], center[None])[:, 0]
    nearest = np.argsort(distance, kind="stable")[:_SHOWN_IMAGES]
    (label, count), *_ = Counter(own["predicted_label"].to_pylist()).most_common(1)
    # as in the metrics, labels that are no class of the model do not count
    known = own.filter(pc.is_in(own["label"], value_set=normalize_labels(pa.array(classes))))
    accuracy: Any = pc.mean(pc.equal(known["label"], known["predicted_label"]).cast(pa.float64()))
    return Cluster(
        rows=len(members),
        share=len(members) / rows.num_rows,
        label=label,
        purity=count / len(members),
        accuracy=accuracy.as_py(),
        mean_confidence=pc.mean(own["confidence"]).as_py(),
        images=own.take(pa.array(nearest)),
    )


def _rank(cluster: Cluster) -> tuple[float, float]:
    accuracy = 1.0 if cluster.accuracy is None else cluster.accuracy
    return (accuracy, cluster.mean_confidence)
