"""What gives the embeddings of a run their scores: the head of a bundle, or labeled neighbors."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from imgcls import log
from imgcls.data.manifests.manifest import (
    Manifest,
    normalize_labels,
    open_manifest,
    resolve_paths,
)
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError, RequestError
from imgcls.formatting import format_count
from imgcls.inference.config import RelabelConfig
from imgcls.models.bundle import load_bundle, load_ood_detector
from imgcls.models.embeddings import normalize_embeddings
from imgcls.models.label_sets import LabelSets
from imgcls.models.linear_head import check_same_embeddings, load_linear_head
from imgcls.models.ood import OodDetector
from imgcls.models.task import SINGLE_LABEL, ScoreScaling, Task, find_task
from imgcls.runs.committed import CommittedRun, load_source_bundle
from imgcls.runs.embeddings import gather_embeddings, normalize_urls

Floats = npt.NDArray[np.float32]
TEMPERATURE = 0.07
"""Of the weights exp(similarity / temperature) of the neighbors."""
_BLOCK_VALUES = 16_000_000
"""Number of similarities in memory at a time: 64 MB."""
_MAX_LISTED = 3
_KEYS = KeyNames("labels")


class Labeler(ABC):
    """Scores of embeddings.

    model:      what the run was labeled with, for its provenance
    sha256:     identifies the model
    classes:    in the order of the scores
    threshold:  minimum confidence of an accepted prediction, of the classes without their own
    thresholds: by class
    label_sets: conformal label sets of a bundle that has them
    ood_detector: out-of-distribution detector of a bundle that has one
    needs_urls: whether `compute_scores` needs the URLs of the images
    """

    model: str
    sha256: str
    classes: list[str]
    threshold: float
    thresholds: list[float]
    task: Task
    label_sets: LabelSets | None = None
    ood_detector: OodDetector | None = None
    needs_urls: bool = False

    @abstractmethod
    def compute_scores(self, embeddings: Floats, urls: pa.ChunkedArray | None) -> Floats:
        """(N, C) scores of (N, E) embeddings.

        urls: of the N images, if `needs_urls`
        """


class HeadLabeler(Labeler):
    """The final layer of a bundle whose network computes the same embeddings."""

    def __init__(self, config: RelabelConfig, run: CommittedRun) -> None:
        """Raises BundleError if the embeddings of the bundle's network are others."""
        assert config.model is not None
        bundle = load_bundle(config.model)
        check_same_embeddings(bundle, load_source_bundle(run, config.source_model, "source-model"))
        precisions = run.success_record["precision"]  # several on a mixed cluster
        self._head = load_linear_head(bundle, precisions[0] if len(precisions) == 1 else "fp32")
        self._scaling = ScoreScaling.from_spec(bundle.spec)
        self.model, self.sha256 = bundle.url, bundle.sha256
        self.classes, self.task = bundle.spec.classes, find_task(bundle.spec)
        default = bundle.spec.threshold
        self.threshold = default if config.threshold is None else config.threshold
        self.thresholds = bundle.spec.resolve_thresholds(config.threshold)
        self.label_sets = bundle.spec.label_sets
        self.ood_detector = load_ood_detector(bundle)

    @torch.inference_mode()
    def compute_scores(self, embeddings: Floats, urls: pa.ChunkedArray | None) -> Floats:
        features = torch.from_numpy(embeddings).float()
        logits = F.linear(features, self._head.weight, self._head.bias)
        found: Floats = self.task.compute_scores(logits, self._scaling).numpy()
        return found


class NeighborLabeler(Labeler):
    """The k nearest labeled images, by the cosine similarity of the embeddings.

    The score of a class is the share of its neighbors, weighted by exp(similarity / 0.07). An image
    is no neighbor of itself. Source: Wu et al., CVPR 2018, "Unsupervised feature learning via
    non-parametric instance discrimination".
    """

    needs_urls = True

    def __init__(self, config: RelabelConfig, run: CommittedRun) -> None:
        """Raises ManifestError for labels that cannot be used, RequestError without embeddings."""
        assert config.labels is not None
        manifest = open_manifest(config.labels, keys=_KEYS)
        place = f"labels {manifest.source}"
        urls, labels = _read_labels(manifest, place)
        vectors, index, reasons = gather_embeddings(run, urls)
        if reasons:
            _log_left_out(place, run, urls, reasons)
        self.classes = sorted(set(labels.to_pylist()))
        codes = np.searchsorted(np.array(self.classes, object), labels.to_numpy(False))
        is_found = index >= 0
        _check_classes(place, run, self.classes, codes[is_found])
        places, first = np.unique(index[is_found], return_index=True)
        self._codes = torch.from_numpy(codes[is_found][first].astype(np.int64))
        self._vectors = torch.from_numpy(normalize_embeddings(vectors[places]))
        known = normalize_urls(urls).take(pa.array(np.flatnonzero(is_found)[first]))
        self._urls = known.combine_chunks()
        self._k = min(config.k, len(places) - 1)
        self.model = manifest.source
        identity = [run.bundle_sha256, manifest.describe_identity(), config.k]
        text = json.dumps(identity, sort_keys=True)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.task = SINGLE_LABEL
        self.threshold = config.threshold or 0.0
        self.thresholds = [self.threshold] * len(self.classes)
        log.show(
            f"labels: {format_count(len(places), 'image')} of "
            f"{format_count(len(self.classes), 'class', 'classes')}, {self._k} neighbors per image"
        )

    @torch.inference_mode()
    def compute_scores(self, embeddings: Floats, urls: pa.ChunkedArray | None) -> Floats:
        assert urls is not None
        own = pc.index_in(normalize_urls(urls), value_set=self._urls)
        own = own.combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        scores = torch.zeros((len(embeddings), len(self.classes)))
        vectors = torch.from_numpy(normalize_embeddings(embeddings))
        size = max(1, _BLOCK_VALUES // len(self._vectors))
        for start in range(0, len(vectors), size):
            block = slice(start, start + size)
            similarity = vectors[block] @ self._vectors.T
            (known,) = np.nonzero(own[block] >= 0)
            similarity[known, own[block][known]] = -torch.inf
            nearest, place = similarity.topk(self._k, dim=1)
            weights = (nearest / TEMPERATURE).softmax(dim=1)
            scores[block].scatter_add_(1, self._codes[place], weights)
        found: Floats = scores.numpy()
        return found


def _read_labels(manifest: Manifest, place: str) -> tuple[pa.ChunkedArray, pa.Array]:
    """URL and label of the labeled rows of `labels`; raises ManifestError without any."""
    if manifest.label_column is None:
        raise ManifestError(
            f"{place}: no label column (found: {', '.join(manifest.schema.names)}); set "
            "--labels.label-column, or pass a folder with one subfolder per class"
        )
    urls: list[pa.Array] = []
    labels: list[pa.Array] = []
    for batch in manifest.batches():
        label = normalize_labels(batch.column(manifest.label_column), _KEYS).cast(pa.string())
        has_label = label.is_valid()
        paths = pa.chunked_array([batch.column(manifest.path_column).filter(has_label)])
        urls += resolve_paths(paths, manifest.root).cast(pa.large_string()).chunks
        labels.append(label.filter(has_label))
    if not sum(map(len, labels)):
        raise ManifestError(f"{place}: has no row with a label")
    found = pa.concat_arrays(labels)
    _check_one_label(place, pa.chunked_array(urls), found)
    return pa.chunked_array(urls), found


def _check_one_label(place: str, urls: pa.ChunkedArray, labels: pa.Array) -> None:
    """Raise ManifestError for an image with two labels."""
    by_url: dict[str, set[str]] = defaultdict(set)
    for url, label in zip(normalize_urls(urls).to_pylist(), labels.to_pylist(), strict=True):
        if url is None:
            continue
        by_url[url].add(label)
        if len(by_url[url]) > 1:
            names = " and ".join(map(repr, sorted(by_url[url])))
            raise ManifestError(f"{place}: {url} has labels {names}; correct one of the rows")


def _check_classes(
    place: str, run: CommittedRun, classes: Sequence[str], codes: npt.NDArray[np.int64]
) -> None:
    present = np.bincount(codes, minlength=len(classes)) > 0
    if not present.all():
        raise RequestError(
            f"{place}: no image of class {classes[int(present.argmin())]!r} has an embedding in "
            f"{run.url}; add images of it to the run, or remove the class"
        )
    if len(classes) < 2:
        raise RequestError(f"{place}: has only one class ({classes[0]!r}); pass two or more")


def _log_left_out(
    place: str, run: CommittedRun, urls: pa.ChunkedArray, reasons: dict[int, str]
) -> None:
    first = list(reasons.items())[:_MAX_LISTED]
    listed = "".join(f"\n  {urls[row].as_py()}: {reason}" for row, reason in first)
    more = "\n  ..." if len(reasons) > _MAX_LISTED else ""
    log.emit(
        "note",
        f"{place}: {format_count(len(reasons), 'image')} without an embedding in {run.url} left "
        f"out:{listed}{more}",
    )
