"""A bundle that can be run in int8, and what that costs: `imgcls model quantise`.

The network is shown every other image of a manifest, to see what values its convolutions meet; the
images in between tell how often its label changes, and what becomes of its accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from imgcls.config import Section
from imgcls.data import decode, filesystem
from imgcls.data.decode import Pixels
from imgcls.data.manifest import Manifest, ManifestConfig, normalize_labels, open_manifest
from imgcls.data.storage_settings import StorageConfig, with_config_storage
from imgcls.errors import BundleError, ImageError, RequestError, StorageError
from imgcls.metrics.columns import encode_classes
from imgcls.metrics.intervals import wilson_interval
from imgcls.models.bundle import (
    Bundle,
    Int8Calibration,
    check_bundle_output,
    load_bundle,
    load_bundle_weights,
    save_bundle,
)
from imgcls.models.classifier import Classifier, record_int8_ranges

_BATCH_SIZE = 32
_IO_CONCURRENCY = 16
MIN_IMAGES = 16


class QuantizeConfig(Section):
    """Make a bundle that can be run in int8 on CPUs, and tell what that costs."""

    model: str
    """The bundle."""
    manifest: ManifestConfig
    """Images like those that it will label; with labels, accuracy is told too."""
    output: str
    """The new bundle."""
    images: int = Field(default=1024, ge=2 * MIN_IMAGES)
    """So many from the start of the manifest: half of them to calibrate, the others to judge."""
    overwrite: bool = False
    """Replace a bundle that is there."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def quantize_bundle(config: QuantizeConfig) -> Bundle:
    """See what the network meets, judge it in int8, and write the new bundle.

    Raises BundleError when the network cannot be quantised, RequestError when too few images can be
    read, OutputError when a bundle is there already.
    """
    bundle = load_bundle(config.model)
    check_bundle_output(config.output, overwrite=config.overwrite, source=config.model)
    pixels, codes = _read_pixels(open_manifest(config.manifest), bundle, config.images)
    if len(pixels) < 2 * MIN_IMAGES:
        raise RequestError(
            f"manifest {config.manifest.path}: {len(pixels)} images can be read; int8 needs at "
            f"least {2 * MIN_IMAGES}, better a thousand"
        )
    judged, label = pixels[1::2], codes[1::2]
    told = Int8Calibration(
        ranges=record_int8_ranges(bundle, _iter_batches(pixels[::2])),
        calibration_images=len(pixels[::2]),
        judged_images=len(judged),
        agreement=0.0,
    )
    prepared = replace(bundle, spec=bundle.spec.model_copy(update={"int8": told}))
    exact = _predict_labels(Classifier(bundle, precision="fp32", device="cpu"), judged)
    rough_network = Classifier(prepared, precision="int8", device="cpu")
    rough = _predict_labels(rough_network, judged)
    found = {"agreement": float((exact == rough).mean())}
    known = label >= 0
    if known.any():
        found["accuracy"] = float((rough == label)[known].mean())
        found["accuracy_fp32"] = float((exact == label)[known].mean())
    told = told.model_copy(update=found)
    spec = bundle.spec.model_copy(update={"int8": told})
    made = save_bundle(config.output, spec, load_bundle_weights(bundle))
    low, high = wilson_interval(int((exact == rough).sum()), len(judged))
    print(f"int8    {told.describe_cost()}; the first lies between {low:.1%} and {high:.1%} (95 %)")
    usual = Classifier(bundle, device="cpu")
    gain = _time_batch(usual, judged) / _time_batch(rough_network, judged)
    print(
        f"speed   {gain:.2f} times the forward passes of {usual.precision} on this machine"
        + ("" if gain > 1 else ": not worth it for this network")
    )
    print(f"bundle  {made.url}; label with it by `--precision int8`")
    return made


def _read_pixels(
    manifest: Manifest, bundle: Bundle, count: int
) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Pixels of the first images that can be read, and the class of each, -1 without a label."""
    pixels: list[Pixels] = []
    codes: list[int] = []
    for batch in manifest.batches():
        table = pa.Table.from_batches([batch]).slice(0, 4 * count)
        urls = [manifest.resolve(path) for path in table.column(manifest.path_column).to_pylist()]
        known = np.full(len(urls), -1)
        if manifest.label_column is not None:
            text = normalize_labels(table.column(manifest.label_column))
            known = encode_classes(pa.chunked_array([text]), bundle.spec.classes)
        for blob, code in zip(
            filesystem.read_ahead(iter(urls), _IO_CONCURRENCY), known, strict=True
        ):
            try:
                if isinstance(blob, StorageError):
                    continue
                pixels.append(decode.decode_image(blob, bundle.spec.preprocess)[0])
            except ImageError:
                continue
            codes.append(int(code))
            if len(pixels) == count:
                return pixels, np.array(codes)
    return pixels, np.array(codes, np.int64)


def _time_batch(classifier: Classifier, pixels: Sequence[Pixels]) -> float:
    """What a batch takes: the least of five, the first of all left out."""
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


def _predict_labels(classifier: Classifier, pixels: Sequence[Pixels]) -> NDArray[np.int64]:
    """(N,) class indices; raises BundleError where the network gives NaN or infinity."""
    scored = [classifier.classify(batch) for batch in _iter_batches(pixels)]
    bad = sum(int((~batch.is_finite).sum()) for batch in scored)
    if bad:
        raise BundleError(
            f"bundle {classifier.bundle.url}: its network gives NaN or infinity for {bad:,} of "
            f"{len(pixels):,} images in {classifier.precision}; it cannot be quantized by them"
        )
    return np.concatenate([batch.scores.argmax(1) for batch in scored])
