"""Make the out-of-distribution detector of a bundle, from the embeddings of runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgcls import log
from imgcls.errors import BundleError, RequestError
from imgcls.evaluation.config import CalibrateConfig
from imgcls.models.bundle import Bundle
from imgcls.models.embeddings import normalize_embeddings
from imgcls.models.label_sets import choose_set_threshold
from imgcls.models.linear_head import check_same_embeddings, load_linear_head
from imgcls.models.ood import OodDetector, OodSpec
from imgcls.runs.committed import CommittedRun, load_source_bundle, open_run
from imgcls.runs.embeddings import sample_embeddings

Floats = NDArray[np.float32]

MAX_REFERENCES = 2_048
"""Reference embeddings in a bundle: more would slow small networks down."""
MAX_HELD_OUT = 100_000
NEIGHBORS = 10
_MIN_PER_NEIGHBOR = 10
"""Reference embeddings for each neighbor, at least: of fewer, fewer neighbors are used."""


class MadeDetector(NamedTuple):
    """A detector, its description, and the number of rows that gave its maximum score."""

    detector: OodDetector
    spec: OodSpec
    rows: int


def check_runs(config: CalibrateConfig, bundle: Bundle, run: CommittedRun) -> None:
    """Raise RequestError for runs without embeddings or of another network, or one run twice."""
    run.check_embeddings()
    if config.ood_method == "energy" and config.ood_reference is not None:
        raise RequestError("ood_reference: has no effect with --ood-method energy; leave it out")
    if config.ood_reference is None:
        return
    source = open_run(config.ood_reference)
    _check_reference(source, bundle)
    if source.manifest_fingerprint == run.manifest_fingerprint:
        raise RequestError(
            f"ood_reference {source.url}: has the held-out images, each of which would be its own "
            "neighbor; pass a run of the training images, or leave it out"
        )


def make_detector(config: CalibrateConfig, bundle: Bundle, run: CommittedRun) -> MadeDetector:
    """The detector that flags a share of images like those of the run.

    Without `ood_reference`, every other row of the run is a reference, and the rest choose the
    maximum score.
    The runs are checked by `check_runs`. Raises RequestError for too few rows.
    """
    assert config.max_ood_rate is not None
    held_out = sample_embeddings(run.files, MAX_HELD_OUT)
    if config.ood_method == "energy":
        detector = _make_energy_detector(bundle)
    elif config.ood_reference is None:
        detector, held_out = _make_knn_detector(held_out[::2]), held_out[1::2]
    else:
        source = open_run(config.ood_reference)
        detector = _make_knn_detector(sample_embeddings(source.files, MAX_REFERENCES))
    values = detector.compute_scores(held_out)
    found = choose_set_threshold(values, 1 - config.max_ood_rate)
    if found is None or not np.isfinite(found):
        needed = int(np.ceil(round(1 / config.max_ood_rate - 1, 9)))
        raise RequestError(
            f"max_ood_rate {config.max_ood_rate:g}: needs {needed:,} held-out rows besides the "
            f"reference, found {len(values):,}; hold out more images, or pass --ood-reference"
        )
    return MadeDetector(detector, detector.describe(found, config.max_ood_rate), len(values))


def _make_knn_detector(references: Floats) -> OodDetector:
    if not len(references):
        raise RequestError("ood_reference: no image of the run has an embedding")
    chosen = references[:: -(-len(references) // MAX_REFERENCES)]
    neighbors = min(NEIGHBORS, max(1, len(chosen) // _MIN_PER_NEIGHBOR))
    unit = normalize_embeddings(chosen).astype(np.float16)
    return OodDetector("knn", {"references": unit}, neighbors)


def _make_energy_detector(bundle: Bundle) -> OodDetector:
    head = load_linear_head(bundle)
    arrays = {
        "weight": head.weight.detach().numpy(),
        "bias": np.zeros(len(head.weight), np.float32)
        if head.bias is None
        else head.bias.detach().numpy(),
    }
    is_multilabel = bundle.spec.task == "multilabel"
    return OodDetector("joint_energy" if is_multilabel else "energy", arrays, 1)


def _check_reference(source: CommittedRun, bundle: Bundle) -> None:
    source.check_embeddings()
    if source.bundle_sha256 == bundle.sha256:
        return
    try:
        check_same_embeddings(bundle, load_source_bundle(source, None, "model"))
    except BundleError as error:
        raise RequestError(
            f"ood_reference {source.url}: {error}; predict the training images with this bundle"
        ) from error


def log_detector(made: MadeDetector) -> None:
    """Show what the detector was made of."""
    spec = made.spec
    how = f"{spec.method.replace('_', ' ')} of the logits"
    if spec.method == "knn":
        references = len(made.detector.arrays["references"])
        how = f"distance to neighbor {spec.neighbors} of {references:,} embeddings"
    log.show(
        f"ood        {how}; score above {spec.max_score:.4g} for {spec.max_rate:.2%} of "
        f"{made.rows:,} held-out rows"
    )
