"""Out-of-distribution (OOD) scores: how unlike the training data an image is, by its embedding.

Higher scores are less like the training data. Two methods. knn: cosine distance to the k-th nearest
of the reference embeddings, which the bundle keeps (Sun et al., ICML 2022, "Out-of-distribution
detection with deep nearest neighbors"). energy: minus the log-sum-exp of the logits (Liu et al.,
NeurIPS 2020, "Energy-based out-of-distribution detection"); for multilabel joint_energy: minus the
sum of log(1 + exp(logit)) over the classes (Wang et al., NeurIPS 2021, "Can multi-label
classification networks know what they don't know?").
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from imgcls.config import Section, UnitFloat
from imgcls.models.embeddings import normalize_embeddings

Floats = NDArray[np.float32]
OodMethod = Literal["knn", "energy"]
DetectorMethod = Literal["knn", "energy", "joint_energy"]
"""joint_energy is the energy of multilabel."""
_BLOCK_VALUES = 8_000_000


class OodSpec(Section):
    """Description of a bundle's OOD detector."""

    method: DetectorMethod = "knn"
    """knn: distance to the reference embeddings; energy, joint_energy: of the logits."""
    max_score: FiniteFloat
    """Maximum score of an image that is not out of distribution."""
    max_rate: UnitFloat
    """Share of images like the held-out ones that exceed it."""
    neighbors: Annotated[int, Field(ge=1)] = 1
    """k of knn."""
    arrays_sha256: str
    """Hash of the file with the detector's arrays."""


@dataclass(frozen=True, eq=False)
class OodScores:
    """OOD scores of N images.

    values: (N,) float32; infinite for an embedding that is not finite
    is_ood: (N,) bool, whether a score exceeds the maximum
    """

    values: Floats
    is_ood: NDArray[np.bool_]

    def split(self) -> list[OodScores]:
        """Those of each image."""
        return [
            OodScores(self.values[i : i + 1], self.is_ood[i : i + 1])
            for i in range(len(self.values))
        ]

    def build_columns(self) -> dict[str, pa.Array]:
        """The prediction columns."""
        return {"ood_score": pa.array(self.values), "is_ood": pa.array(self.is_ood)}


class OodDetector:
    """Computes OOD scores from embeddings.

    method:    see `OodSpec`
    arrays:    knn: `references` (M, E) float16 of length 1; energy and joint_energy: `weight`
        (C, E) and `bias` (C,) of the final layer
    neighbors: k of knn, at most M
    max_score: maximum score of an image that is not out of distribution
    """

    def __init__(
        self,
        method: DetectorMethod,
        arrays: Mapping[str, NDArray[np.floating]],
        neighbors: int,
        max_score: float = np.inf,
    ) -> None:
        self.method, self.neighbors, self.max_score = method, neighbors, max_score
        self.arrays = dict(arrays)
        if method == "knn":
            self._weight = arrays["references"].astype(np.float32).T.copy()
        else:
            self._weight = arrays["weight"].astype(np.float32).T.copy()
            self._bias = arrays["bias"].astype(np.float32)

    @classmethod
    def load(cls, spec: OodSpec, data: bytes) -> OodDetector:
        """The detector of a description and the content of its file.

        Raises ValueError or KeyError if they do not fit.
        """
        from safetensors.numpy import load

        arrays = load(data)
        if spec.method == "knn" and not 1 <= spec.neighbors <= len(arrays["references"]):
            raise ValueError(f"has fewer than {spec.neighbors} reference embeddings")
        return cls(spec.method, arrays, spec.neighbors, spec.max_score)

    def serialize(self) -> bytes:
        """The content of its file."""
        from safetensors.numpy import save

        return save({name: np.ascontiguousarray(each) for name, each in self.arrays.items()})

    def describe(self, max_score: float, max_rate: float) -> OodSpec:
        """Its description with a maximum score."""
        return OodSpec(
            method=self.method,
            max_score=max_score,
            max_rate=max_rate,
            neighbors=self.neighbors,
            arrays_sha256=hashlib.sha256(self.serialize()).hexdigest(),
        )

    def compute_scores(self, embeddings: NDArray[np.floating]) -> Floats:
        """(N,) float32 scores of (N, E) embeddings; infinite for one that is not finite."""
        found = np.empty(len(embeddings), np.float32)
        block = max(1, _BLOCK_VALUES // self._weight.shape[1])
        for start in range(0, len(embeddings), block):
            part = slice(start, start + block)
            vectors = embeddings[part].astype(np.float32)  # the length of float16 overflows at 256
            values = self._score(vectors)
            with np.errstate(over="ignore", invalid="ignore"):
                has_length = np.isfinite(np.linalg.norm(vectors, axis=1))
            found[part] = np.where(has_length & np.isfinite(values), values, np.inf)
        return found

    def _score(self, embeddings: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            if self.method != "knn":
                logits = embeddings @ self._weight + self._bias
                if self.method == "joint_energy":
                    joint: Floats = -np.logaddexp(np.float32(0), logits).sum(axis=1)
                    return joint
                energy: Floats = -np.logaddexp.reduce(logits, axis=1)
                return energy
            similarity = normalize_embeddings(embeddings) @ self._weight
        place = similarity.shape[1] - self.neighbors
        nearest: Floats = 1 - np.partition(similarity, place, axis=1)[:, place]
        return nearest

    def classify(self, embeddings: NDArray[np.floating]) -> OodScores:
        """Scores of (N, E) embeddings, and which exceed the maximum."""
        values = self.compute_scores(embeddings)
        return OodScores(values, values > np.float32(self.max_score))
