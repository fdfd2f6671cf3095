"""The request of `imgcls predict`: its settings, and their checks before Ray starts.

Refuses columns that collide with written ones, stores that cannot be read, timeouts that contradict
each other, and outputs that cannot be written or resumed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from imgcls import log
from imgcls.cluster import autoscaler, session
from imgcls.data import image_files
from imgcls.data.containers import members
from imgcls.data.manifests.label_columns import describe_no_labels
from imgcls.data.manifests.manifest import Manifest, open_manifest
from imgcls.data.manifests.options import read_csv_options
from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.data.storage.http import HttpStore
from imgcls.data.storage.registry import find_store
from imgcls.errors import (
    ImageError,
    ManifestError,
    OutputError,
    RequestError,
    StorageBucketMissing,
    StorageCredentials,
    StorageError,
    StorageForbidden,
)
from imgcls.execution.placement import MAX_STORAGE_WAITS
from imgcls.execution.plan import DEFAULT_CHUNK_ROWS, MAX_CHUNK_ROWS, RunIdentity
from imgcls.inference import registered_runs
from imgcls.inference.commit import count_reference
from imgcls.inference.config import PredictConfig
from imgcls.inference.specs import find_embedding_type
from imgcls.models.bundle import (
    BUNDLE_FILE,
    Bundle,
    load_bundle,
    require_int8,
    resolve_int8_engine,
)
from imgcls.models.openvino_package import check_engine
from imgcls.models.tasks import find_task
from imgcls.publishing.publish import check_target
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run
from imgcls.runs.schema import (
    PREDICTION_COLUMNS,
    PROVENANCE_COLUMNS,
    build_prediction_schema,
)

MAX_CHUNK_SCORES = 4_096_000
"""Maximum number of scores of an automatic chunk of more than 256 rows: 16 MB in a worker."""
SAMPLED_FILES = 16
"""Files at the start of the manifest whose size is read, to estimate the size of a chunk."""


def check_request(config: PredictConfig, output: str) -> tuple[PredictConfig, Manifest, Bundle]:
    """Open manifest and bundle; raises RequestError for a request that cannot succeed."""
    manifest = open_manifest(config.manifest)
    manifest = replace(manifest, _compute_fingerprint=functools.cache(manifest.fingerprint))
    kept = registered_runs.keep_version(config)
    bundle = load_bundle(kept.model, needs_classes=config.has_predictions)
    config, bundle = registered_runs.pin_version(config, bundle)
    bundle = bundle.with_decode(config.decode)
    if bundle.spec.preprocess.decode == "exact":
        config = require_cpu_decoding(config)
    if config.precision == "int8":
        if config.compile == "always":
            raise RequestError(
                "compile always: an int8 network cannot be compiled. Set --compile never, or "
                "another --precision"
            )
        config = config.model_copy(update={"engine": resolve_int8_engine(config.engine, bundle)})
        accuracy = "accuracy" if bundle.spec.task == "single_label" else "correct decisions"
        log.emit("int8", require_int8(bundle).describe_cost(accuracy))
    check_engine(config.engine, compile=config.compile == "always")
    if config.max_ood_share is not None and bundle.spec.ood is None:
        raise RequestError(
            f"max_ood_share: bundle {bundle.url} has no out-of-distribution detector; make "
            "one with `imgcls calibrate --max-ood-rate 0.05`"
        )
    if config.explain:
        from imgcls.models.explain import Explainer

        Explainer(bundle)  # raises BundleError for a network that cannot be explained
    if config.has_predictions and bundle.spec.task == "single_label":
        manifest = _check_one_label(config, manifest, bundle)
    check_output_columns(manifest)
    check_publish_target(config, manifest, bundle)
    check_timeouts(config, output, bundle, manifest)
    check_first_image(manifest, config.max_bytes)
    return config, manifest, bundle


def resolve_settings(config: PredictConfig, bundle: Bundle) -> dict[str, Any]:
    """The settings that change results or their files: part of a run's identity in `_run.json`."""
    threshold = bundle.spec.threshold if config.threshold is None else config.threshold
    has_scores = config.scores or (config.has_predictions and find_task(bundle.spec).needs_scores)
    # absent with predictions, as in runs of versions that always had some
    kind = {} if config.has_predictions else {"has_predictions": False}
    return {
        **kind,
        "top_k": config.top_k,
        "threshold": threshold,
        # true is float32, as in runs of versions with this type alone, which are resumed
        "embeddings": True if config.embeddings == "float32" else config.embeddings,
        "scores": config.scores_type if has_scores else False,
        "limit": config.limit,
        "precision": config.precision,
        # null, as in runs of versions without engines, which are resumed; for int8 by the bundle
        "engine": None if config.engine == "auto" or config.precision == "int8" else config.engine,
        "compile": config.compile,
        "batch_size": config.scale.batch_size,
        "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes,
        "decode": bundle.spec.preprocess.decode,
        "chunk_rows": config.chunk_rows,
        "part_rows": config.part_rows,
        "robots_opt_outs": sorted(config.storage.robots_opt_outs) or None,  # null: as of before
    }


def check_identity(
    config: PredictConfig,
    manifest: Manifest,
    output: str,
    identity: RunIdentity,
    stored: Mapping[str, Any],
) -> None:
    """Raise OutputError when the output holds a run of another manifest, bundle or setting.

    stored: `_run.json`, which an earlier version may have written
    """
    then = stored["identity"]
    if not config.has_predictions:
        identity = _ignore_labels(identity, then)
    if layout.is_committed(output) and not config.retry_errors:
        # a run of an earlier version has no values of settings that were added since
        known = {*then["settings"], "has_predictions"}
        settings = {key: each for key, each in identity.settings.items() if key in known}
        identity = replace(identity, settings=settings)
    planned = then["manifest"] | dict(read_csv_options(stored, manifest.format))
    identity.check_same_run(output, {**then, "manifest": planned})


def _ignore_labels(identity: RunIdentity, stored: Mapping[str, Any]) -> RunIdentity:
    """The identity of embeddings alone, which need no labels, for a run of version 0.1.

    stored: the identity of this run, whose manifest had one label column at most
    """
    then = stored["manifest"]
    if "label_columns" in then:
        return identity
    known = {k: v for k, v in identity.manifest.items() if k != "label_columns"}
    return replace(identity, manifest={**known, "label_column": then["label_column"]})


def require_cpu_decoding(config: PredictConfig) -> PredictConfig:
    """The request without decoding on GPUs: nvJPEG's pixels are not those of `decode: exact`."""
    scale = config.scale
    if scale.layout == "gpu_decode" and scale.cpu_decode_fraction != 1:
        raise RequestError(
            "decode exact: GPUs decode JPEGs to different pixels. Set --scale.layout gpu, or "
            "--decode fast"
        )
    return config.model_copy(
        update={"scale": scale.model_copy(update={"cpu_decode_fraction": 1.0})}
    )


def _check_one_label(config: PredictConfig, manifest: Manifest, bundle: Bundle) -> Manifest:
    """The manifest for a bundle that predicts one label; ManifestError if images have several.

    A column `labels` that no setting names is not read as labels, as in version 0.1.
    """
    labels = manifest.label_columns
    if labels is None:
        return manifest
    given = config.manifest
    is_named = given.label_column or given.label_delimiter or given.label_columns
    if not is_named and labels.names == ("labels",):
        log.emit(
            "note",
            f"manifest {manifest.source}: column 'labels' has lists, which are not read as labels: "
            f"bundle {bundle.url} predicts one per image",
        )
        return replace(manifest, label_columns=None)
    raise ManifestError(
        f"manifest {manifest.source}: {labels.describe()} may have several labels per image, "
        f"but bundle {bundle.url} predicts one. Pass a multilabel bundle, or read no labels: "
        f"{describe_no_labels(labels)}"
    )


def check_output_columns(manifest: Manifest) -> None:
    """Raise ManifestError for columns that collide with output columns, or by case with each other.

    DuckDB, Spark, Athena and BigQuery do not distinguish names that differ only by case.
    """
    source, names = f"manifest {manifest.source}", manifest.schema.names
    _refuse_output_columns(source, names, "predict", PREDICTION_COLUMNS)
    _refuse_output_columns(source, names, "`imgcls history compact`", PROVENANCE_COLUMNS)
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            raise ManifestError(
                f"{source}: columns {seen[key]!r} and {name!r} differ only by case, which DuckDB, "
                f"Spark and others ignore. Rename one, or leave it out with "
                f"--manifest.drop-columns {name}"
            )
        seen[key] = name


def _refuse_output_columns(
    source: str, names: Sequence[str], command: str, written: Sequence[str]
) -> None:
    taken = {name.casefold() for name in written}
    found = [name for name in names if name.casefold() in taken]
    if not found:
        return
    subject, pronoun = f"column {found[0]!r} is an output column", "it"
    if len(found) > 1:
        subject = f"columns {', '.join(map(repr, found))} are output columns"
        pronoun = "them"
    raise ManifestError(
        f"{source}: {subject} of {command} (case is ignored). Rename {pronoun} in the manifest, or "
        f"leave {pronoun} out with --manifest.drop-columns {','.join(found)} (output columns: "
        f"{', '.join(written)})"
    )


def check_publish_target(config: PredictConfig, manifest: Manifest, bundle: Bundle) -> None:
    """Raise RequestError where the table of this run could not be published."""
    if config.publish is None:
        return
    task = find_task(bundle.spec)
    added = build_prediction_schema(
        labeled=manifest.label_column is not None,
        has_predictions=config.has_predictions,
        has_label_sets=bundle.spec.label_sets is not None,
        has_ood=bundle.spec.ood is not None,
        task=task,
        scores=1 if config.scores or task.needs_scores else None,  # tables have lists of any length
        embedding=1 if config.embeddings else None,
    )
    schema = pa.schema([*manifest.schema, *added])
    check_target(config.publish, schema, f"manifest {manifest.source}")


def check_timeouts(config: PredictConfig, output: str, bundle: Bundle, manifest: Manifest) -> None:
    """Raise RequestError when a worker that waits for a store would count as hung."""
    waits = MAX_STORAGE_WAITS * config.storage.retry_timeout_s
    if config.scale.worker_timeout_s > waits:
        return
    first_image = itertools.islice(iter_image_urls(manifest), 1)
    places = (output, bundle.url, *map(members.find_file, first_image))
    remote = next((place for place in places if _is_in_store(place)), None)
    if remote is not None:
        raise RequestError(
            f"scale.worker_timeout_s {config.scale.worker_timeout_s:g}: for "
            f"{hide_credentials(remote)} a worker may wait {MAX_STORAGE_WAITS} x "
            f"{config.storage.retry_timeout_s:g} s (storage.retry_timeout_s) before its first "
            "image is finished, and would be killed although it does not hang. Set "
            f"--scale.worker-timeout-s above {waits:g}, or a smaller --storage.retry-timeout-s"
        )


def _is_in_store(url: str) -> bool:
    """Whether reading a file may take retries: not on a disk, and not from a data: URL."""
    return not filesystem.is_local(url) and not url.startswith("data:")


def iter_image_urls(manifest: Manifest) -> Iterator[str]:
    """The URLs of the images in a manifest's first batch."""
    head = next(manifest.batches(), None)
    paths = head.column(manifest.path_column).cast(pa.string()).to_pylist() if head else []
    for path in paths:
        url = manifest.resolve(path)
        if url is not None:
            yield url


def is_on_web(manifest: Manifest) -> bool:
    """Whether the first image is on a web server."""
    url = next(iter_image_urls(manifest), "")
    return find_store(members.find_file(url)) is HttpStore


def read_image_size(url: str) -> int:
    """Size of an image file in bytes; 0 when it cannot be read, which becomes an error row."""
    try:
        return image_files.get_size(url)
    except (StorageError, ImageError):
        return 0


def check_first_image(manifest: Manifest, max_bytes: int) -> None:
    """Read the first image if it is on a store, before work starts that can only fail.

    Raises RequestError when the credentials are rejected, or the bucket does not exist.
    """
    url = next(iter_image_urls(manifest), None)
    if url is None or filesystem.is_local(members.find_file(url)):
        return
    try:
        image_files.read_image(url, max_bytes)
    except StorageCredentials as error:
        raise RequestError(f"the first image: {error}") from error
    except StorageBucketMissing as error:
        raise RequestError(f"the first image: {error}. Correct the manifest's paths") from error
    except StorageForbidden as error:
        log.emit("note", f"the first image: {error}")
    except (StorageError, ImageError):
        return  # becomes an error row


def check_resumable(output: str, config: PredictConfig) -> None:
    """Raise OutputError when a run can neither be started nor resumed in a folder."""
    layout.check_output_writable(output)
    run = layout.load_run(output)
    if run is None and filesystem.exists(filesystem.join(output, BUNDLE_FILE)):
        raise OutputError(f"output {output}: is the folder of a bundle; pass another --output")
    if config.overwrite:
        return
    names = filesystem.list_names(filesystem.join(output, layout.PREDICTIONS_FOLDER))
    # only tables: other programs add files such as .DS_Store
    if run is None and any(name.endswith(".parquet") for name in names):
        raise OutputError(
            f"output {output}: holds predictions but no {layout.RUN_FILE}, so no run can be "
            "resumed. Pass another --output, or start over with --overwrite"
        )


def estimate_image_bytes(config: PredictConfig, manifest: Manifest, bundle: Bundle) -> int:
    """Mean size of an image on its way to a GPU: its pixels, or its file where that is larger."""
    side = bundle.spec.preprocess.crop
    pixels = 3 * side * side
    if not may_use_gpus(config):
        return pixels
    urls = itertools.islice(iter_image_urls(manifest), SAMPLED_FILES)
    sizes = [size for url in urls if (size := read_image_size(url)) <= config.max_bytes]
    return max(pixels, sum(sizes) // max(1, len(sizes)))


def estimate_row_bytes(config: PredictConfig, bundle: Bundle) -> int:
    """Mean size of a row of the table, about."""
    kind = find_embedding_type(config.embeddings)
    embedding = 0 if kind is None else 4096 if kind == "float16" else 8192
    if not config.has_predictions or not (config.scores or find_task(bundle.spec).needs_scores):
        return 128 + embedding
    score = 2 if config.scores_type == "float16" else 4
    return 128 + score * len(bundle.spec.classes) + embedding


def may_use_gpus(config: PredictConfig) -> bool:
    """Whether the run may use GPUs, of nodes that are there or that may join."""
    may_join = [] if session.is_private_session() else autoscaler.find_max_nodes() or []
    has_gpus = any(node.gpus for node in [*session.list_nodes(), *may_join])
    return has_gpus and config.scale.layout != "cpu"


def limit_chunk_rows(config: PredictConfig, bundle: Bundle) -> int:
    """Maximum number of rows of an automatic chunk, by the memory that one takes.

    A chunk for a GPU passes through the object store as pixels, several at a time. On a CPU a
    worker holds one batch of pixels, and the scores of a chunk.
    """
    if may_use_gpus(config):
        return DEFAULT_CHUNK_ROWS
    return min(MAX_CHUNK_ROWS, MAX_CHUNK_SCORES // bundle.spec.num_outputs)


def open_reference(config: PredictConfig, bundle: Bundle) -> CommittedRun | None:
    """The run to measure drift against; raises RequestError without predictions of the task."""
    if config.reference is None:
        return None
    run = open_run(config.reference)
    run.check_predictions()
    if run.task != bundle.spec.task:
        raise RequestError(
            f"reference {run.url}: was labeled by a {run.task} bundle, but {bundle.url} is a "
            f"{bundle.spec.task} one; pass another --reference"
        )
    if run.merged_runs and "same_classes" not in run.run_record:
        # an earlier version stored only the classes of the newest bundle
        try:
            count_reference(run)
        except ValueError as error:
            raise RequestError(
                f"reference {run.url}: cannot be compared ({error}). It is a history that an "
                "earlier version compacted; compact it again"
            ) from error
    return run
