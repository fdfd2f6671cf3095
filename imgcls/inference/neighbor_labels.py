"""Labels of the images that others are compared with: one per image, or any number of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from imgcls.data.manifests.image_urls import read_urls
from imgcls.data.manifests.label_columns import POSITIVE, UNKNOWN, build_name_lists
from imgcls.data.manifests.manifest import Manifest, normalize_labels
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError, RequestError

KEYS = KeyNames("labels")
Ints = npt.NDArray[np.int64]


class NeighborLabels(ABC):
    """Labels of L images.

    classes: in the order of the scores
    """

    classes: list[str]

    @abstractmethod
    def select(self, rows: Ints) -> NeighborLabels:
        """The labels of some of the images."""

    @abstractmethod
    def check_classes(self, place: str, run: str) -> None:
        """Raise RequestError for a class without an image.

        place: the labels, and run: where the embeddings of these images are, for messages
        """

    @abstractmethod
    def compute_scores(self, weights: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
        """(N, C) scores of images by their k neighbors.

        weights:   (N, k), of which the sum is 1 in each row
        neighbors: (N, k) indices of labeled images
        """


class SingleLabels(NeighborLabels):
    """One label per image; the score of a class is its share of the weights."""

    def __init__(self, classes: list[str], codes: Ints) -> None:
        self.classes, self._codes = classes, torch.from_numpy(codes)

    def select(self, rows: Ints) -> SingleLabels:
        """The labels of some of the images."""
        return SingleLabels(self.classes, self._codes.numpy()[rows])

    def check_classes(self, place: str, run: str) -> None:
        """Raise RequestError for a class without an image, or a single class."""
        counts = np.bincount(self._codes.numpy(), minlength=len(self.classes))
        _check_counts(place, run, self.classes, counts)
        if len(self.classes) < 2:
            raise RequestError(
                f"{place}: has only one class ({self.classes[0]!r}); pass two or more"
            )

    def compute_scores(self, weights: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
        """Sum of the weights of the neighbors of each class."""
        scores = torch.zeros((len(weights), len(self.classes)))
        return scores.scatter_add_(1, self._codes[neighbors], weights)


class LabelLists(NeighborLabels):
    """Any number of labels per image, some of which may be unknown.

    The score of a class is its share of the weights of the neighbors whose label is known; without
    any, the share of the class among all images with a known label.
    """

    def __init__(self, classes: list[str], targets: npt.NDArray[np.int8]) -> None:
        self.classes, self._targets = classes, targets
        known = targets != UNKNOWN
        positive = targets == POSITIVE
        self._positive = torch.from_numpy(positive.astype(np.float32))
        self._known = None if known.all() else torch.from_numpy(known.astype(np.float32))
        shares = positive.sum(0) / np.maximum(known.sum(0), 1)
        self._shares = torch.from_numpy(shares.astype(np.float32))

    def select(self, rows: Ints) -> LabelLists:
        """The labels of some of the images."""
        return LabelLists(self.classes, self._targets[rows])

    def check_classes(self, place: str, run: str) -> None:
        """Raise RequestError for a class without an image."""
        _check_counts(place, run, self.classes, (self._targets == POSITIVE).sum(0))

    def compute_scores(self, weights: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
        """Share of the weights of the neighbors with a known label."""
        every = torch.zeros((len(weights), len(self._targets)))
        every.scatter_(1, neighbors, weights)
        scores = every @ self._positive
        if self._known is not None:
            total = every @ self._known
            # weights that underflow to 0 are no evidence either
            scores = torch.where(total > 0, scores / total, self._shares)
        return scores.clamp_(0, 1)


def _check_counts(place: str, run: str, classes: list[str], counts: Ints) -> None:
    if not (counts > 0).all():
        raise RequestError(
            f"{place}: no image of class {classes[int(counts.argmin())]!r} has an embedding in "
            f"{run}; add images of it to the run, or remove the class"
        )


def read_labels(manifest: Manifest, place: str) -> tuple[pa.ChunkedArray, SingleLabels]:
    """URLs as of `read_urls` and labels of the labeled rows; raises ManifestError without any.

    place: the manifest, for messages
    """
    if manifest.label_column is None:
        raise ManifestError(
            f"{place}: no label column (found: {', '.join(manifest.schema.names)}); set "
            "--labels.label-column, or pass a folder with one subfolder per class"
        )
    urls: list[pa.Array] = []
    labels: list[pa.Array] = []
    for batch in manifest.batches():
        label = normalize_labels(batch.column(manifest.label_column), KEYS).cast(pa.string())
        has_label = label.is_valid()
        urls.append(read_urls(manifest, batch).filter(has_label))
        labels.append(label.filter(has_label))
    if not sum(map(len, labels)):
        raise ManifestError(f"{place}: has no row with a label")
    found = pa.concat_arrays(labels)
    _check_one_label(place, pa.chunked_array(urls), found)
    classes = sorted(set(found.to_pylist()))
    codes = np.searchsorted(np.array(classes, object), found.to_numpy(False))
    return pa.chunked_array(urls), SingleLabels(classes, codes.astype(np.int64))


def read_label_lists(manifest: Manifest, place: str) -> tuple[pa.ChunkedArray, LabelLists]:
    """URLs as of `read_urls` and labels of the rows with a known label.

    place: the manifest, for messages
    Raises ManifestError if there is no such row.
    """
    columns = manifest.label_columns
    assert columns is not None
    names: Counter[str] = Counter(dict.fromkeys(columns.classes, 0))
    for batch in manifest.batches():
        names.update(columns.count_names(batch, place))
    classes = sorted(names)
    urls: list[pa.Array] = []
    targets: list[npt.NDArray[np.int8]] = []
    for batch in manifest.batches():
        found = columns.encode(batch, classes, place).targets
        has_label = (found != UNKNOWN).any(1)
        urls.append(read_urls(manifest, batch).filter(pa.array(has_label)))
        targets.append(found[has_label])
    if not classes or not sum(map(len, targets)):
        raise ManifestError(f"{place}: has no row with a label")
    every = np.concatenate(targets)
    _check_one_label_set(place, pa.chunked_array(urls), every, classes)
    return pa.chunked_array(urls), LabelLists(classes, every)


def _check_one_label_set(
    place: str, urls: pa.ChunkedArray, targets: npt.NDArray[np.int8], classes: list[str]
) -> None:
    """Raise ManifestError for an image in several rows with different labels."""
    codes = urls.combine_chunks().dictionary_encode().indices
    codes = codes.cast(pa.int64()).fill_null(-1).to_numpy()
    repeated = np.flatnonzero((codes >= 0) & (np.bincount(codes + 1)[codes + 1] > 1))
    names = _join_names(targets[repeated], classes)
    _check_one_label(place, urls.take(pa.array(repeated)), names)


def _join_names(targets: npt.NDArray[np.int8], classes: list[str]) -> pa.Array:
    """The labels of each image as text, with a question mark after those that are unknown."""

    def iter_texts() -> Iterator[str]:
        unknown = build_name_lists((targets == UNKNOWN).astype(np.int8), classes)
        positive = build_name_lists((targets == POSITIVE).astype(np.int8), classes)
        for names, others in zip(positive.to_pylist(), unknown.to_pylist(), strict=True):
            yield ", ".join([*names, *(f"{name}?" for name in others)])

    return pa.array(iter_texts(), pa.string())


def _check_one_label(place: str, urls: pa.ChunkedArray, labels: pa.Array) -> None:
    """Raise ManifestError for an image with two labels, or lists of labels."""
    by_url: dict[str, set[str]] = defaultdict(set)
    for url, label in zip(urls.to_pylist(), labels.to_pylist(), strict=True):
        if url is None:
            continue
        by_url[url].add(label)
        if len(by_url[url]) > 1:
            names = " and ".join(map(repr, sorted(by_url[url])))
            raise ManifestError(f"{place}: {url} has labels {names}; correct one of the rows")
