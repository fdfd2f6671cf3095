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

from imgcls.cluster import session
from imgcls.config import requested
from imgcls.data import filesystem, object_store
from imgcls.errors import (
    BundleError,
    OutputError,
    RequestError,
    StorageError,
    StorageUnavailable,
)
from imgcls.models.bundle import DESCRIPTION, read_description
from imgcls.provenance import differences
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from imgcls.training import network as networks
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import TrainConfig
from imgcls.training.data.examples import DataConfig, Examples, read_examples
from imgcls.training.epoch_metrics import Epoch
from imgcls.training.job import Shared, TrainResult, run
from imgcls.training.loggers import base
from imgcls.training.network import ModelConfig
from imgcls.training.optim.loss import class_weights
from imgcls.training.optim.optimizer import OptimConfig
from imgcls.training.optim.strategy import default_lr, has_probe, settle
from imgcls.training.publish import HISTORY
from imgcls.training.sampler import steps_per_epoch
from imgcls.training.scaling import ScaleConfig
from imgcls.training.setup import Task

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ScaleConfig",
    "TrainConfig",
    "TrainResult",
    "train",
]


def train(
    config: TrainConfig | None = None, /, *, shared: Shared | None = None, **settings: Any
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
    object_store.use(config.storage)
    config = config.model_copy(update={"output": filesystem.absolute(config.output)})
    task = settled(config)
    config = task.config
    layout.check_writable(config.output)
    finished = _finished(task)
    if finished is not None:
        return finished
    lease = Lease.acquire(config.output)
    try:
        checkpoints = _claim(task)
        session.connect()
        interruption = session.Interruption() if shared is None else shared.interruption
        with interruption.watched(), session.unwrapped():
            return run(task, checkpoints, lease, interruption, shared)
    finally:
        lease.release()


def settled(config: TrainConfig) -> Task:
    """Everything that the request comes to; raises a RequestError for whatever is wrong with it."""
    examples = read_examples(config.data)
    strategy = settle(config.strategy, pretrained=config.model.weights is not None)
    rows = examples.count(held=False)
    if config.batch_size > rows:
        print(f"note: batch_size is lowered from {config.batch_size} to the {rows} training images")
        config = config.model_copy(update={"batch_size": rows})
    share = _smallest_share(config, rows)
    weights = class_weights(config.loss, examples.classes, examples.per_class(held=False))
    architecture, preprocess = networks.describe(config.model)
    if config.optim.lr is None:
        optim = config.optim.model_copy(update={"lr": default_lr(strategy, architecture)})
        config = config.model_copy(update={"optim": optim})
    network = networks.start(
        architecture, config.model.weights, len(examples.classes), seed=config.seed
    )
    networks.regularise(network, config.model)
    networks.try_on(network, preprocess, share)
    shares = networks.head_shares(network, preprocess) if has_probe(strategy) else ()
    base.check(config.track, config.output)
    return Task(
        config=config,
        strategy=strategy,
        examples=examples,
        architecture=architecture,
        preprocess=preprocess,
        network=network,
        class_weights=weights,
        head_shares=shares,
        identity=_identity(config, examples, network),
    )


def _smallest_share(config: TrainConfig, rows: int) -> int:
    """Rows that a worker has at least in each part of a step, after checking that there are any."""
    workers, parts = config.scale.largest, config.scale.accumulate
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


def _identity(config: TrainConfig, examples: Examples, network: nn.Module) -> dict[str, Any]:
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


def _finished(task: Task) -> TrainResult | None:
    """The result of this very training when its bundle is there already."""
    config = task.config
    url = config.output
    if (
        config.find_lr
        or config.overwrite
        or not filesystem.exists(filesystem.join(url, DESCRIPTION))
    ):
        return None
    refused = OutputError(
        f"output {url}: already holds a bundle; say --overwrite, or give another --output"
    )
    try:
        made = read_description(url).spec.provenance
        if made.get("run") != task.identity:
            raise refused
        table = pd.read_parquet(filesystem.open_read(filesystem.join(url, HISTORY)))
    except StorageUnavailable:
        raise
    except (BundleError, StorageError) as error:
        raise refused from error
    history = [Epoch(**row) for row in table.to_dict("records")]
    best = history[0]
    for epoch in history[1:]:
        best = epoch if epoch.better_than(best, config.best_by) else best
    filesystem.remove(Checkpoints(url).folder)
    print(f"{url} holds the bundle of this very training; say --overwrite to train again")
    failed = made["data"]["train_failed"] + made["data"]["val_failed"]
    return TrainResult(url, history, best, failed)


def _claim(task: Task) -> Checkpoints:
    """The output's unfinished run if it is this one, else a new one.

    Raises OutputError when another is unfinished and may not be replaced.
    """
    checkpoints = Checkpoints(task.config.output)
    if task.config.find_lr:
        return checkpoints
    then = checkpoints.identity()
    if then is not None and then != task.identity:
        # what has not learnt anything yet may be replaced, as the errors of bad images advise
        if checkpoints.saved() and not task.config.overwrite:
            lines = "\n".join(f"  {line}" for line in differences(then, task.identity))
            raise OutputError(
                f"output {task.config.output}: holds another, unfinished training:\n{lines}\n"
                "repeat its command to go on, say --overwrite to start anew, or give another "
                "--output"
            )
        then = None
    if then is None:
        checkpoints.begin(task.identity)
    return checkpoints
