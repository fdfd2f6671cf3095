"""Calibrate a bundle for int8 and measure the cost: `imgcls model quantize`.

Every other image of a manifest is used for calibration: the value ranges of the activations. The
images in between measure how often the label changes, and the accuracy. For multilabel: how often
the set of predicted labels changes, and the share of correct decisions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls import log
from imgcls.data import image_files
from imgcls.data.decoding import decode
from imgcls.data.decoding.decode import Pixels
from imgcls.data.manifests.label_columns import UNKNOWN
from imgcls.data.manifests.manifest import Manifest, normalize_labels, open_manifest
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import BundleError, ImageError, RequestError
from imgcls.evaluation.config import MIN_IMAGES, QuantizeConfig
from imgcls.metrics.columns import encode_classes
from imgcls.metrics.intervals import wilson_interval
from imgcls.models.bundle import (
    Bundle,
    BundleSpec,
    EngineName,
    Int8Calibration,
    check_bundle_output,
    load_bundle,
    load_bundle_weights,
    load_ood_arrays,
    save_bundle,
)
from imgcls.models.classifier import Classifier
from imgcls.models.int8_calibration import record_int8_ranges
from imgcls.models.openvino_int8 import quantize_for_openvino
from imgcls.models.openvino_package import check_engine
from imgcls.models.precision import has_int8_instructions

_REASONS = {
    "torch": "this CPU has VNNI or AMX",
    "openvino": "this CPU has neither VNNI nor AMX, which int8 in torch requires",
}
_BATCH_SIZE = 32
_IO_CONCURRENCY = 16
_MAX_ROWS = 1_000_000
"""Rows of the manifest from which images are drawn, at most."""


@with_config_storage
def quantize_bundle(config: QuantizeConfig) -> Bundle:
    """Calibrate a bundle for int8, evaluate it, and write the new bundle.

    Parameters
    ----------
    config : QuantizeConfig
        Settings of `imgcls model quantize`.

    Returns
    -------
    Bundle
        The new bundle.

    Raises
    ------
    BundleError
        If the network cannot be quantized.
    RequestError
        If too few images can be read, or a package of the engine is not installed.
    OutputError
        If the output has a bundle.
    """
    bundle = load_bundle(config.model)
    check_bundle_output(config.output, overwrite=config.overwrite, source=bundle.url)
    manifest = open_manifest(config.manifest)
    if bundle.spec.task == "single_label" and manifest.label_columns is not None:
        log.emit(
            "note",
            f"{manifest.label_columns.describe()} may have several labels per image, the bundle "
            "predicts one; accuracy is not measured",
        )
    pixels, labels = _read_pixels(manifest, bundle, config.images)
    if len(pixels) < 2 * MIN_IMAGES:
        raise RequestError(
            f"manifest {config.manifest.path}: {len(pixels)} images can be read; int8 needs at "
            f"least {2 * MIN_IMAGES}; 1,000 are recommended"
        )
    evaluated = pixels[1::2]
    prepared = calibrate_bundle(bundle, config.engine, pixels[::2], judged_images=len(evaluated))
    assert prepared.spec.int8 is not None
    int8 = Classifier(prepared, precision="int8", device="cpu")
    calibration = _measure_cost(prepared.spec.int8, bundle, int8, evaluated, labels[1::2])
    spec = bundle.spec.model_copy(update={"int8": calibration})
    made = save_bundle(
        config.output,
        spec,
        load_bundle_weights(bundle),
        int8_model=prepared.unsaved_int8,
        ood_arrays=load_ood_arrays(bundle),
    )
    _log_result(calibration, bundle, int8, evaluated)
    log.show(f"bundle  {made.url}; use it with `imgcls predict --precision int8`")
    return made


def _log_result(
    calibration: Int8Calibration, bundle: Bundle, int8: Classifier, pixels: Sequence[Pixels]
) -> None:
    """Log what int8 costs, how much faster it is, and which settings it makes wrong."""
    assert calibration.agreement is not None
    spec, usual = bundle.spec, Classifier(bundle, device="cpu")
    gain = _time_batch(usual, pixels) / _time_batch(int8, pixels)
    low, high = wilson_interval(round(calibration.agreement * len(pixels)), len(pixels))
    cost = calibration.describe_cost(
        "correct decisions" if spec.task == "multilabel" else "accuracy"
    )
    log.show(f"int8    {cost}; 95% interval of the agreement {low:.1%} to {high:.1%}")
    log.show(
        f"speed   {gain:.2f} times the throughput of {usual.precision} in torch on this machine"
        + ("" if gain > 1 else ": int8 is not faster for this network")
    )
    has_threshold = spec.thresholds or spec.threshold != int8.task.default_threshold
    if spec.label_sets is not None or spec.ood is not None or has_threshold:
        log.emit(
            "note",
            "thresholds, label sets and the OOD maximum were chosen for other scores; predict the "
            "held-out images with --precision int8 and run `imgcls calibrate` again",
        )


def calibrate_bundle(
    bundle: Bundle, wanted: EngineName, pixels: Sequence[Pixels], *, judged_images: int
) -> Bundle:
    """The bundle with data for int8 in one engine; its accuracy is not measured yet.

    pixels: (3, crop, crop) uint8 RGB each
    """
    engine = _choose_engine(wanted)
    model, ranges = None, {}
    if engine == "openvino":
        model = quantize_for_openvino(bundle, _iter_batches(pixels))
    else:
        ranges = record_int8_ranges(bundle, _iter_batches(pixels))
    calibration = Int8Calibration(
        engine=engine,
        model_sha256=None if model is None else hashlib.sha256(model).hexdigest(),
        has_vnni=has_int8_instructions(),
        ranges=ranges,
        calibration_images=len(pixels),
        judged_images=judged_images,
    )
    spec = bundle.spec.model_copy(update={"int8": calibration})
    return replace(bundle, spec=spec, unsaved_int8=model)


def _choose_engine(wanted: EngineName) -> Literal["torch", "openvino"]:
    if wanted != "auto":
        engine = wanted
    else:
        engine = "torch" if has_int8_instructions() else "openvino"
        log.show(f"engine  {engine}: {_REASONS[engine]}")
    check_engine(engine)
    return engine


def _measure_cost(
    calibration: Int8Calibration,
    bundle: Bundle,
    int8: Classifier,
    pixels: Sequence[Pixels],
    labels: NDArray[np.int64],
) -> Int8Calibration:
    """Add the agreement of int8 with fp32 and, with labels, the accuracy of both.

    labels: as `_read_pixels` returns them
    """
    thresholds = bundle.spec.resolve_thresholds()
    exact = _compute_scores(Classifier(bundle, precision="fp32", device="cpu"), pixels)
    rough = _compute_scores(int8, pixels)
    is_same, _ = int8.task.compare_decisions(exact, rough, thresholds)
    found = {"agreement": float(is_same.mean())}
    is_known = labels != UNKNOWN
    if is_known.any():
        for name, scores in (("accuracy", rough), ("accuracy_fp32", exact)):
            made = int8.task.decide(scores, thresholds, 1)
            predicted = made.classes[:, 0] if made.is_predicted is None else made.is_predicted
            found[name] = float(np.mean(predicted[is_known] == labels[is_known]))
    return calibration.model_copy(update=found)


def _read_pixels(
    manifest: Manifest, bundle: Bundle, count: int
) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Pixels of N readable images that are drawn at random, and their labels.

    The labels are (N,) class indices, for multilabel (N, C) POSITIVE or NEGATIVE; UNKNOWN without.
    """
    pixels: list[Pixels] = []
    labels: list[NDArray[np.int64]] = []
    table = _draw_rows(manifest, 4 * count)
    urls = [manifest.resolve(path) for path in table.column(manifest.path_column).to_pylist()]
    rows = _encode_labels(manifest, table, bundle.spec)
    for blob, row in zip(image_files.read_ahead(iter(urls), _IO_CONCURRENCY), rows, strict=True):
        try:
            if not isinstance(blob, bytes):
                continue
            pixels.append(decode.decode_image(blob, bundle.spec.preprocess)[0])
        except ImageError:
            continue
        labels.append(row)
        if len(pixels) == count:
            break
    return pixels, np.array(labels, np.int64)


def _draw_rows(manifest: Manifest, count: int) -> pa.Table:
    """Up to N rows in random order: the rows of many manifests are sorted by class."""
    columns = manifest.find_label_columns()
    names = [manifest.path_column, *(() if columns is None else columns.names)]
    tables: list[pa.Table] = []
    rows = 0
    for batch in manifest.batches():
        tables.append(pa.Table.from_batches([batch]).select(names))
        rows += batch.num_rows
        if rows >= _MAX_ROWS:
            break
    order = np.random.default_rng(0).permutation(rows)[:count]
    return pa.concat_tables(tables).take(order) if tables else manifest.schema.empty_table()


def _encode_labels(manifest: Manifest, table: pa.Table, spec: BundleSpec) -> NDArray[np.int64]:
    """Labels of the rows of a manifest, as `_read_pixels` returns them."""
    if spec.task == "multilabel":
        columns = manifest.find_label_columns()
        if columns is None:
            return np.full((table.num_rows, len(spec.classes)), UNKNOWN)
        targets = columns.encode(table, spec.classes, f"manifest {manifest.source}").targets
        return targets.astype(np.int64)
    if manifest.label_column is None:
        return np.full(table.num_rows, UNKNOWN)
    text = normalize_labels(table.column(manifest.label_column))
    codes = encode_classes(pa.chunked_array([text]), spec.classes)
    return np.where(codes < 0, UNKNOWN, codes)


def _time_batch(classifier: Classifier, pixels: Sequence[Pixels]) -> float:
    """Seconds per batch: the minimum of five runs after a warm-up."""
    batch = next(_iter_batches(pixels))
    classifier.classify(batch)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        classifier.classify(batch)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _iter_batches(pixels: Sequence[Pixels]) -> Iterator[Pixels]:
    for start in range(0, len(pixels), _BATCH_SIZE):
        yield decode.stack_images(pixels[start : start + _BATCH_SIZE])


def _compute_scores(classifier: Classifier, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
    """(N, C) scores; raises BundleError if the network outputs NaN or infinity."""
    scored = [classifier.classify(batch) for batch in _iter_batches(pixels)]
    bad = sum(int((~batch.is_finite).sum()) for batch in scored)
    if bad:
        raise BundleError(
            f"bundle {classifier.bundle.url}: its network outputs NaN or infinity for {bad:,} of "
            f"{len(pixels):,} images in {classifier.precision}; quantize with other images"
        )
    return np.concatenate([batch.scores for batch in scored])
