"""Checks of a `predict` request, made before Ray is started, and the settings that change results.

Refuses columns that collide with written ones, stores that cannot be read, timeouts that do not fit
together, and outputs that cannot be written or resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imgcls.data import filesystem, object_store
from imgcls.data.manifest import Manifest
from imgcls.errors import (
    ManifestError,
    OutputError,
    RequestError,
    StorageBucketMissing,
    StorageCredentials,
    StorageError,
    StorageForbidden,
)
from imgcls.execution.placement import MAX_STORAGE_WAITS
from imgcls.log import tell
from imgcls.models.bundle import Bundle
from imgcls.runs import layout
from imgcls.runs.schema import PREDICTION_COLUMNS, PROVENANCE_COLUMNS

if TYPE_CHECKING:
    from imgcls.inference.predict import PredictConfig


def resolve_settings(config: PredictConfig, bundle: Bundle) -> dict[str, Any]:
    """What changes results, or how they are cut into files."""
    threshold = bundle.spec.threshold if config.threshold is None else config.threshold
    return {
        "top_k": config.top_k,
        "threshold": threshold,
        "embeddings": config.embeddings,
        "scores": config.scores_type if config.scores else False,
        "limit": config.limit,
        "precision": config.precision,
        "compile": config.compile,
        "batch_size": config.scale.batch_size,
        "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes,
        "decode": bundle.spec.preprocess.decode,
        "chunk_rows": config.chunk_rows,
        "part_rows": config.part_rows,
    }


def require_cpu_decoding(config: PredictConfig) -> PredictConfig:
    """The same request where no GPU decodes: nvJPEG's pixels are not those of `decode: exact`."""
    scale = config.scale
    if scale.layout == "gpu_decode" and scale.cpu_decode_fraction != 1:
        raise RequestError(
            "decode exact: GPUs decode JPEGs with other pixels; set --scale.layout gpu, or "
            "--decode fast"
        )
    return config.model_copy(
        update={"scale": scale.model_copy(update={"cpu_decode_fraction": 1.0})}
    )


def check_columns(manifest: Manifest) -> None:
    """Refuse columns that would replace one that is written, or hide one from some readers.

    DuckDB, Spark, Athena and BigQuery take names that differ only by case for one column.
    """
    place = f"manifest {manifest.source}"
    written = {name.casefold(): name for name in PREDICTION_COLUMNS}
    added = {name.casefold(): name for name in PROVENANCE_COLUMNS}
    seen: dict[str, str] = {}
    for name in manifest.schema.names:
        key = name.casefold()
        if key in written:
            case = "" if name in written.values() else f" (as {written[key]!r}; case is ignored)"
            raise ManifestError(
                f"{place}: column {name!r} is one that labelling writes{case}; rename it in the "
                f"manifest (labelling writes {', '.join(PREDICTION_COLUMNS)})"
            )
        if key in added:
            raise ManifestError(
                f"{place}: column {name!r} is one that `imgcls history compact` writes, for the "
                f"run a row is of; rename it in the manifest, or leave it out (compact writes "
                f"{', '.join(PROVENANCE_COLUMNS)})"
            )
        if key in seen:
            raise ManifestError(
                f"{place}: columns {seen[key]!r} and {name!r} differ only by case, which DuckDB, "
                "Spark and others ignore; rename one"
            )
        seen[key] = name


def check_timeouts(config: PredictConfig, output: str, manifest: Manifest) -> None:
    """Raise RequestError where a worker that waits for a store would be taken to hang."""
    waits = MAX_STORAGE_WAITS * config.storage.retry_timeout_s
    if config.scale.worker_timeout_s > waits:
        return
    places = (
        output,
        filesystem.absolute(config.model),
        *itertools.islice(iter_image_urls(manifest), 1),
    )
    remote = next((place for place in places if not filesystem.is_local(place)), None)
    if remote is not None:
        raise RequestError(
            f"scale.worker_timeout_s {config.scale.worker_timeout_s:g}: for {remote} a worker "
            "may wait "
            f"{MAX_STORAGE_WAITS} x {config.storage.retry_timeout_s:g} s "
            "(storage.retry_timeout_s) "
            "before it has an image done, and would be ended although it does not hang; give more "
            f"than {waits:g}, or a smaller --storage.retry-timeout-s"
        )


def iter_image_urls(manifest: Manifest) -> Iterator[str]:
    """Where the first images of a manifest are."""
    head = next(manifest.batches(), None)
    paths = head.column(manifest.path_column).cast(pa.string()).to_pylist() if head else []
    for path in paths:
        url = manifest.resolve(path)
        if url is not None:
            yield url


def is_on_web(manifest: Manifest) -> bool:
    """Whether the images are on web servers, by the first one."""
    return (
        object_store.get_protocol(next(iter_image_urls(manifest), ""))
        in object_store.HTTP_PROTOCOLS
    )


def read_image_size(url: str) -> int:
    """Bytes of an image; none of one that cannot be had, which is a row like any other."""
    try:
        return filesystem.size(url)
    except StorageError:
        return 0


def check_first_image(manifest: Manifest, max_bytes: int) -> None:
    """Try the first image on a store, before work starts that could only fail.

    Raises RequestError when the credentials are refused, or there is no such bucket.
    """
    url = next(iter_image_urls(manifest), None)
    if url is None or filesystem.is_local(url):
        return
    try:
        filesystem.read_image(url, max_bytes)
    except StorageCredentials as error:
        raise RequestError(f"the first image: {error}") from error
    except StorageBucketMissing as error:
        raise RequestError(f"the first image: {error}; correct the manifest's paths") from error
    except StorageForbidden as error:
        tell("note", f"the first image: {error}")
    except StorageError:
        return  # a row like any other


def check_resumable(output: str, config: PredictConfig) -> None:
    """Raise OutputError where a run can neither be begun nor resumed in a folder."""
    layout.check_output_writable(output)
    if config.overwrite:
        return
    if layout.load_run(output) is None and filesystem.list_names(
        filesystem.join(output, layout.PREDICTIONS_FOLDER)
    ):
        raise OutputError(
            f"output {output}: holds predictions but no {layout.RUN_FILE}, so it is no run that "
            "can be "
            "resumed; give another --output, or start over with --overwrite"
        )
