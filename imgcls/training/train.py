"""`train`: labelled images in, a bundle out.

Checks all that can be checked before anything starts, and whose output it is: an unfinished run of
the same request goes on, a finished one is left as it is, any other is refused. The work itself is
in `job`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pandas as pd
from torch import nn

from imgcls.cluster import interrupts, session
from imgcls.config import requested
from imgcls.data import filesystem
from imgcls.data.storage_settings import use_settings
from imgcls.errors import (
    BundleError,
    OutputError,
    RequestError,
    StorageError,
    StorageUnavailable,
)
from imgcls.models.bundle import BUNDLE_FILE, read_description
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import list_differences
from imgcls.training import network as networks
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import TrainConfig
from imgcls.training.data.examples import DataConfig, Examples, read_examples
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.job import TrainResult, TrialContext, run_training
from imgcls.training.loggers import base
from imgcls.training.network import ModelConfig
from imgcls.training.optim.loss import compute_class_weights
from imgcls.training.optim.optimizer import OptimConfig
from imgcls.training.optim.strategy import choose_default_lr, has_probe, resolve_strategy
from imgcls.training.publish import HISTORY_FILE
from imgcls.training.sampler import steps_per_epoch
from imgcls.training.scaling import TrainScaleConfig
from imgcls.training.setup import TrainSetup

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "TrainResult",
    "TrainScaleConfig",
    "train",
]


def train(
    config: TrainConfig | None = None, /, *, shared: TrialContext | None = None, **settings: Any
) -> TrainResult:
    """Train a network and write its bundle; prints what was decided and a line per epoch.

    config:   the whole request, or else
    settings: its keys, as in `train(data="photos/", output="bundle", model="resnet18", epochs=3)`,
        nested or dotted (`**{"optim.lr": 1e-3}`)
    shared:   of a trial, what it has in common with the others of a search
    Raises a RequestError before anything starts, TooManyErrors when too many images cannot be
    decoded, RunFailed when workers fail beyond replacing or the loss ceases to be finite. The same
    command goes on from the last saved state.
    """
    config = requested(TrainConfig, config, settings, 'train(data="photos/", output="bundle")')
    with use_settings(config.storage):
        return _train(config, shared)


def _train(config: TrainConfig, shared: TrialContext | None) -> TrainResult:
    config = config.model_copy(update={"output": filesystem.absolute(config.output)})
    task = resolve_setup(config)
    config = task.config
    layout.check_output_writable(config.output)
    finished = _find_finished(task)
    if finished is not None:
        return finished
    lease = Lease.acquire(config.output)
    try:
        checkpoints = _claim_output(task)
        session.connect()
        interruption = interrupts.Interruption() if shared is None else shared.interruption
        with interruption.handle_signals(), session.unwrap_ray_errors():
            return run_training(task, checkpoints, lease, interruption, shared)
    finally:
        lease.release()


def resolve_setup(config: TrainConfig) -> TrainSetup:
    """Everything that the request comes to; raises a RequestError for whatever is wrong with it."""
    examples = read_examples(config.data)
    strategy = resolve_strategy(config.strategy, pretrained=config.model.weights is not None)
    rows = examples.count(held=False)
    if config.batch_size > rows:
        print(f"note: batch_size is lowered from {config.batch_size} to the {rows} training images")
        config = config.model_copy(update={"batch_size": rows})
    share = _min_rows_per_part(config, rows)
    weights = compute_class_weights(
        config.loss, examples.classes, examples.count_per_class(held=False)
    )
    architecture, preprocess = networks.resolve_model(config.model)
    if config.optim.lr is None:
        optim = config.optim.model_copy(update={"lr": choose_default_lr(strategy, architecture)})
        config = config.model_copy(update={"optim": optim})
    network = networks.build_initial_network(
        architecture, config.model.weights, len(examples.classes), seed=config.seed
    )
    networks.set_regularization(network, config.model)
    networks.check_can_train(network, preprocess, share)
    shares = networks.compute_head_coefficients(network, preprocess) if has_probe(strategy) else ()
    base.check_loggers(config.track, config.output)
    return TrainSetup(
        config=config,
        strategy=strategy,
        examples=examples,
        architecture=architecture,
        preprocess=preprocess,
        network=network,
        class_weights=weights,
        head_coefficients=shares,
        identity=_compute_identity(config, examples, network),
    )


def _min_rows_per_part(config: TrainConfig, rows: int) -> int:
    """Rows that a worker has at least in each part of a step, after checking that there are any."""
    workers, parts = config.scale.max_workers, config.scale.accumulate
    what = f"scale.num_workers {workers}" + (
        f" times scale.accumulate {parts}" if parts > 1 else ""
    )
    if rows < workers * parts:
        raise RequestError(
            f"data.train: {rows} training images are fewer than {what}; lower them, or add images"
        )
    if config.batch_size < workers * parts:
        raise RequestError(
            f"batch_size {config.batch_size}: leaves some of {what} without an image; give at "
            f"least {workers * parts}"
        )
    share = rows // steps_per_epoch(rows, config.batch_size, workers) // workers
    return max(1, share // parts)


def _compute_identity(
    config: TrainConfig, examples: Examples, network: nn.Module
) -> dict[str, Any]:
    """What makes two runs the same run; workers may differ, data and settings may not."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return {
        "settings": config.identity(),
        "data": {key: source.fingerprint for key, source in examples.sources.items()},
        "initial_weights": digest.hexdigest(),
    }


def _find_finished(task: TrainSetup) -> TrainResult | None:
    """The result of this very training when its bundle is there already."""
    config = task.config
    url = config.output
    if (
        config.find_lr
        or config.overwrite
        or not filesystem.exists(filesystem.join(url, BUNDLE_FILE))
    ):
        return None
    refused = OutputError(
        f"output {url}: already holds a bundle; say --overwrite, or give another --output"
    )
    try:
        made = read_description(url).spec.provenance
        if made.get("run") != task.identity:
            raise refused
        table = pd.read_parquet(filesystem.open_read(filesystem.join(url, HISTORY_FILE)))
    except StorageUnavailable:
        raise
    except (BundleError, StorageError) as error:
        raise refused from error
    history = [EpochMetrics(**row) for row in table.to_dict("records")]
    best = history[0]
    for epoch in history[1:]:
        best = epoch if epoch.is_better_than(best, config.best_by) else best
    filesystem.remove(Checkpoints(url).folder)
    print(f"{url} holds the bundle of this very training; say --overwrite to train again")
    failed = made["data"]["train_failed"] + made["data"]["val_failed"]
    return TrainResult(url, history, best, failed)


def _claim_output(task: TrainSetup) -> Checkpoints:
    """The output's unfinished run if it is this one, else a new one.

    Raises OutputError when another is unfinished and may not be replaced.
    """
    checkpoints = Checkpoints(task.config.output)
    if task.config.find_lr:
        return checkpoints
    then = checkpoints.read_identity()
    if then is not None and then != task.identity:
        # what has not learnt anything yet may be replaced, as the errors of bad images advise
        if checkpoints.list_states() and not task.config.overwrite:
            lines = "\n".join(f"  {line}" for line in list_differences(then, task.identity))
            raise OutputError(
                f"output {task.config.output}: holds another, unfinished training:\n{lines}\n"
                "repeat its command to go on, say --overwrite to start anew, or give another "
                "--output"
            )
        then = None
    if then is None:
        checkpoints.start_run(task.identity)
    return checkpoints
