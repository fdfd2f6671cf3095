"""`train`: labelled images in, a bundle out.

Reads top-down: check all that can be checked, say what was decided, decode once, run the workers,
publish the best weights. What a worker does is in `loop`, how images come to it in `ingest`.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import ray
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from imgcls import cluster
from imgcls.cluster import Interruption
from imgcls.config import Section
from imgcls.data import storage
from imgcls.data.preprocess import Preprocess
from imgcls.errors import OutputError, RequestError, StorageError, TooManyErrors
from imgcls.models.bundle import DESCRIPTION, Architecture, BundleSpec
from imgcls.models.classifier import Precision
from imgcls.provenance import provenance
from imgcls.training import network as networks
from imgcls.training.deal import steps_per_epoch
from imgcls.training.examples import DataConfig, Examples, read_examples
from imgcls.training.fit import trained
from imgcls.training.ingest import Decoded, decode_images, image_bytes, store_bytes
from imgcls.training.loop import Work
from imgcls.training.network import ModelConfig
from imgcls.training.optim import OptimConfig
from imgcls.training.progress import Epoch
from imgcls.training.publish import publish
from imgcls.training.waiting import awaited, started
from imgcls.training.workers import ScaleConfig, Workers, check_store, plan_workers


class TrainConfig(Section):
    """Fine-tune a network on labelled images and write its bundle."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    scale: ScaleConfig = ScaleConfig()
    output: str
    """The bundle folder to write; on a cluster, one that all machines reach."""
    overwrite: bool = False
    """Replace the bundle that is there."""
    epochs: PositiveInt = 10
    """Passes over the training images; the weights of the best one are kept."""
    batch_size: PositiveInt = 64
    """Images per step, over all workers together."""
    precision: Precision = "auto"
    """Of the arithmetic (weights stay fp32): auto takes bf16 where the hardware multiplies it."""
    seed: NonNegativeInt = 0
    """Same seed, workers and hardware: same weights."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    bundle:  URL of the bundle folder, which holds the weights of the epoch `best`
    history: every epoch, in order
    failed:  images that could not be decoded and were left out
    """

    bundle: str
    history: list[Epoch]
    best: Epoch
    failed: int


def train(config: TrainConfig) -> TrainResult:
    """Train a network and write its bundle; prints what was decided and a line per epoch.

    Raises a RequestError before anything starts, TooManyErrors when too many images cannot be
    decoded, RunFailed when a worker fails or the loss ceases to be finite.
    """
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    examples = read_examples(config.data)
    share = _smallest_share(config, examples.count(held=False))
    architecture, preprocess = networks.describe(config.model)
    network = networks.start(
        architecture, config.model.weights, len(examples.classes), seed=config.seed
    )
    networks.try_on(network, preprocess, share)
    _check_output(config)
    cluster.connect()
    with cluster.Interruption().watched() as interruption:
        return _train(config, examples, architecture, preprocess, network, interruption)


def _train(
    config: TrainConfig,
    examples: Examples,
    architecture: Architecture,
    preprocess: Preprocess,
    network: nn.Module,
    interruption: Interruption,
) -> TrainResult:
    """The part with Ray: decode, train, publish."""
    nodes = cluster.nodes()
    workers = plan_workers(nodes, config.scale)
    check_store(examples.rows.num_rows * image_bytes(preprocess), store_bytes())
    _announce(config, examples, network, preprocess, workers)
    cpus = sum(node.cpus for node in nodes)
    decoded = awaited(
        started(lambda: _decode(config, examples, preprocess, cpus=cpus)), interruption
    )
    work = Work(
        architecture=architecture,
        num_classes=len(examples.classes),
        weights=ray.put(network.state_dict()),
        preprocess=preprocess,
        decoded=decoded,
        optim=config.optim,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        precision=config.precision,
    )
    with trained(work, workers, config.output, interruption) as outcome:
        best = best_of(outcome.history)
        spec = BundleSpec(
            architecture=architecture,
            classes=examples.classes,
            preprocess=preprocess,
            provenance=provenance(config.model_dump(mode="json"))
            | {
                "seed": config.seed,
                "data": _data_provenance(examples, decoded),
                "precision": outcome.precision,
            },
            metrics=_metrics(best),
        )
        publish(config.output, spec, outcome.checkpoint, outcome.history)
    accuracy = f"{100 * best.val_accuracy:.1f} %"
    print(f"best: epoch {best.epoch}, val acc {accuracy} -> {config.output}", flush=True)
    return TrainResult(config.output, outcome.history, best, len(decoded.failures))


def best_of(history: list[Epoch]) -> Epoch:
    """The first epoch that none is better than, as the workers chose it."""
    best = history[0]
    for epoch in history[1:]:
        best = epoch if epoch.better_than(best) else best
    return best


def _smallest_share(config: TrainConfig, rows: int) -> int:
    """Rows that a worker has at least in each step, after checking that there are any."""
    workers = config.scale.num_workers
    if config.batch_size < workers:
        raise RequestError(
            f"batch_size {config.batch_size}: leaves some of scale.num_workers {workers} without "
            f"an image; give at least {workers}"
        )
    if config.batch_size > rows:
        raise RequestError(
            f"batch_size {config.batch_size}: is larger than the training set of {rows} images; "
            f"give at most {rows}"
        )
    return rows // steps_per_epoch(rows, config.batch_size, workers) // workers


def _check_output(config: TrainConfig) -> None:
    try:
        if storage.exists(storage.join(config.output, DESCRIPTION)) and not config.overwrite:
            raise OutputError(
                f"output {config.output}: already holds a bundle; say --overwrite, or give another "
                "--output"
            )
        storage.check_writable(config.output)
    except StorageError as error:
        raise OutputError(
            f"output {config.output}: cannot be written ({error}); give another --output"
        ) from error


def _announce(
    config: TrainConfig,
    examples: Examples,
    network: nn.Module,
    preprocess: Preprocess,
    workers: Workers,
) -> None:
    rows, held = examples.count(held=False), examples.count(held=True)
    origin = "held out of it" if config.data.val is None else f"from {config.data.val.path}"
    steps = steps_per_epoch(rows, config.batch_size, workers.count)
    parameters = sum(p.numel() for p in network.parameters())
    weights = f"weights {config.model.weights}" if config.model.weights else "random weights"
    print(
        f"data: {rows:,} training images of {len(examples.classes)} classes from "
        f"{config.data.train.path}, {held:,} to validate {origin}\n"
        f"model: {config.model.name}, {parameters:,} parameters, {weights}, "
        f"{preprocess.crop}x{preprocess.crop} input ({preprocess.mode})\n"
        f"workers: {workers}, {steps:,} steps of {rows // steps} to {-(-rows // steps)} images "
        "per epoch",
        flush=True,
    )


def _decode(
    config: TrainConfig, examples: Examples, preprocess: Preprocess, *, cpus: float
) -> Decoded:
    """Decode all images and see whether what is left can be trained on."""
    start = time.perf_counter()
    decoded = decode_images(examples.rows, preprocess, cpus=cpus)
    rows, failures = examples.rows.num_rows, decoded.failures
    print(
        f"decoded: {rows - len(failures):,} images, {len(failures):,} failed, "
        f"{(rows * image_bytes(preprocess)) / 1e6:,.0f} MB, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    listed = "".join(f"\n  {failure.url}: {failure.error}" for failure in failures[:3])
    if len(failures) > config.data.max_error_rate * rows:
        raise TooManyErrors(
            f"{len(failures):,} of {rows:,} images cannot be decoded, more than "
            f"data.max_error_rate {config.data.max_error_rate:g} allows:{listed}\nmend or remove "
            "them, or raise data.max_error_rate"
        )
    if failures:
        print(f"left out:{listed}" + ("\n  ..." if len(failures) > 3 else ""), flush=True)
    _check_remains(examples, decoded, config.scale.num_workers)
    return decoded


def _check_remains(examples: Examples, decoded: Decoded, workers: int) -> None:
    lost = Counter((failure.held, failure.label) for failure in decoded.failures)
    columns = zip(
        examples.rows.column("held").to_pylist(),
        examples.rows.column("label").to_pylist(),
        strict=True,
    )
    left = Counter(columns) - lost
    for code, name in enumerate(examples.classes):
        if not left[False, code]:
            raise TooManyErrors(
                f"class {name!r}: none of its training images can be decoded; mend them or remove "
                "the class"
            )
    rows: Counter[bool] = Counter()
    for (held, _), count in left.items():
        rows[held] += count
    if not rows[True]:
        raise TooManyErrors("none of the validation images can be decoded; mend them")
    if rows[False] < workers:
        raise TooManyErrors(
            f"only {rows[False]} training images can be decoded, fewer than scale.num_workers "
            f"{workers}; mend the others"
        )


def _data_provenance(examples: Examples, decoded: Decoded) -> dict[str, Any]:
    return {
        "manifests": {key: asdict(source) for key, source in examples.sources.items()},
        "train_rows": examples.count(held=False),
        "val_rows": examples.count(held=True),
        "train_failed": sum(not failure.held for failure in decoded.failures),
        "val_failed": sum(failure.held for failure in decoded.failures),
    }


def _metrics(best: Epoch) -> dict[str, float]:
    names = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "epoch")
    return {name: float(getattr(best, name)) for name in names}
