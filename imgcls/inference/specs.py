"""What the workers of jobs over images need to know; imports no torch, as the driver does not."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.image_files import MAX_IMAGE_BYTES
from imgcls.execution.messages import RunSpec
from imgcls.models.bundle import Bundle, BundleSpec, EngineName
from imgcls.models.tasks import find_task
from imgcls.runs.schema import EmbeddingType, build_prediction_schema


@dataclass(frozen=True, kw_only=True)
class ImageSpec(RunSpec):
    """A run over the images of a manifest.

    root: where relative paths start
    """

    path_column: str
    root: str
    batch_size: int
    max_pixels: int
    max_bytes: int = MAX_IMAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class PredictSpec(ImageSpec):
    """A run that labels the images with a bundle.

    thresholds: by class, in the bundle's order
    embeddings: type of the written embeddings; None for none
    has_predictions: false for embeddings alone
    is_engine_automatic: whether torch runs a network that the engine cannot run
    """

    bundle_url: str
    bundle_sha256: str
    label_column: str | None
    top_k: int
    thresholds: tuple[float, ...]
    scores: bool
    scores_type: str = "float32"
    embeddings: EmbeddingType | None
    has_predictions: bool = True
    decode: DecodeMode
    precision: str
    engine: EngineName = "torch"
    is_engine_automatic: bool = False
    compile: bool


def find_embedding_type(setting: bool | EmbeddingType) -> EmbeddingType | None:
    """The type of the written embeddings; True is float32, False is None."""
    return ("float32" if setting else None) if isinstance(setting, bool) else setting


def find_embedding_width(bundle: Bundle) -> int:
    """Number of values of an embedding of a bundle's network."""
    from imgcls.models import zoo  # and torch, which no other step of the driver needs

    network = zoo.build_network(bundle.spec.architecture, bundle.spec.num_outputs)
    return zoo.get_embedding_width(network)


def build_run_schema(
    spec: PredictSpec, bundle: BundleSpec, embedding_width: int | None
) -> pa.Schema:
    """The columns that a run adds to its manifest; the width is not read without embeddings."""
    return build_prediction_schema(
        labeled=spec.label_column is not None,
        has_predictions=spec.has_predictions,
        has_label_sets=bundle.label_sets is not None,
        has_ood=bundle.ood is not None,
        task=find_task(bundle),
        scores=len(bundle.classes) if spec.scores else None,
        scores_type=spec.scores_type,
        embedding=embedding_width if spec.embeddings else None,
        embedding_type=spec.embeddings or "float32",
    )
