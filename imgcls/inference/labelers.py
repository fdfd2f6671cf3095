"""What gives the embeddings of a run their scores: the head of a bundle, or labeled neighbors."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from imgcls import log
from imgcls.data.manifests.manifest import open_manifest
from imgcls.formatting import format_count, format_lines
from imgcls.inference.config import RelabelConfig
from imgcls.inference.neighbor_labels import KEYS, NeighborLabels, read_label_lists, read_labels
from imgcls.inference.registered_runs import build_model_entries
from imgcls.models.bundle import load_bundle, load_ood_detector
from imgcls.models.embeddings import normalize_embeddings
from imgcls.models.label_sets import LabelSets
from imgcls.models.linear_head import check_same_embeddings, load_linear_head
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.ood import OodDetector
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import ScoreScaling, Task
from imgcls.models.tasks import find_task
from imgcls.runs.committed import CommittedRun, load_source_bundle
from imgcls.runs.embeddings import gather_embeddings

Floats = npt.NDArray[np.float32]
TEMPERATURE = 0.07
"""Of the weights exp(similarity / temperature) of the neighbors."""
_BLOCK_VALUES = 16_000_000
"""Number of similarities in memory at a time: 64 MB."""
_MAX_LISTED = 3


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
    model_entries: entries of `_run.json` about the model
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
    model_entries: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def compute_scores(self, embeddings: Floats, urls: pa.ChunkedArray | None) -> Floats:
        """(N, C) scores of (N, E) embeddings.

        urls: of the N images, as of `resolve_urls`, if `needs_urls`
        """


class HeadLabeler(Labeler):
    """The final layer of a bundle whose network computes the same embeddings."""

    def __init__(self, config: RelabelConfig, run: CommittedRun) -> None:
        """Raises BundleError if the embeddings of the bundle's network are others."""
        assert config.model is not None
        bundle = load_bundle(config.model)
        self.model_entries = build_model_entries(bundle)
        check_same_embeddings(bundle, load_source_bundle(run, config.source_model, "source-model"))
        precisions = run.success_record["precision"]  # several on a mixed cluster
        self._head = load_linear_head(bundle, precisions[0] if len(precisions) == 1 else "fp32")
        self._scaling = ScoreScaling.from_spec(bundle.spec)
        found = bundle.registered
        self.model = bundle.url if found is None else found.pinned_uri
        self.sha256 = bundle.sha256
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

    With any number of labels per image, a neighbor whose label of a class is unknown does not count
    for it. If all are unknown, the score is the share of the class among all labeled images.
    """

    needs_urls = True

    def __init__(self, config: RelabelConfig, run: CommittedRun) -> None:
        """Raises ManifestError for labels that cannot be used, RequestError without embeddings."""
        assert config.labels is not None
        manifest = open_manifest(config.labels, keys=KEYS)
        place = f"labels {manifest.source}"
        is_multilabel = manifest.label_columns is not None
        labels: NeighborLabels
        urls, labels = (read_label_lists if is_multilabel else read_labels)(manifest, place)
        vectors, index, reasons = gather_embeddings(run, urls)
        if reasons:
            _log_left_out(place, run, urls, reasons)
        self.classes = labels.classes
        found = np.flatnonzero(index >= 0)
        labels.select(found).check_classes(place, run.url)
        places, first = np.unique(index[found], return_index=True)
        self._labels = labels.select(found[first])
        self._vectors = torch.from_numpy(normalize_embeddings(vectors[places]))
        self._urls = urls.take(pa.array(found[first])).combine_chunks()
        self._k = min(config.k, len(places) - 1)
        self.model = manifest.source
        identity = [run.bundle_sha256, manifest.describe_identity(), config.k]
        text = json.dumps(identity, sort_keys=True)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.task = MULTILABEL if is_multilabel else SINGLE_LABEL
        default = self.task.default_threshold
        self.threshold = default if config.threshold is None else config.threshold
        self.thresholds = [self.threshold] * len(self.classes)
        log.show(
            f"labels: {format_count(len(places), 'image')} of "
            f"{format_count(len(self.classes), 'class', 'classes')}, {self._k} neighbors per image"
        )

    @torch.inference_mode()
    def compute_scores(self, embeddings: Floats, urls: pa.ChunkedArray | None) -> Floats:
        assert urls is not None
        own = pc.index_in(urls, value_set=self._urls)
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
            scores[block] = self._labels.compute_scores(weights, place)
        found: Floats = scores.numpy()
        return found


def _log_left_out(
    place: str, run: CommittedRun, urls: pa.ChunkedArray, reasons: dict[int, str]
) -> None:
    listed = (f"{urls[row].as_py()}: {reason}" for row, reason in reasons.items())
    log.emit(
        "note",
        f"{place}: {format_count(len(reasons), 'image')} without an embedding in {run.url} left "
        f"out:{format_lines(listed, _MAX_LISTED)}",
    )
