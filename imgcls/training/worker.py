"""A training worker's process: its device, its cores, its network, and what it tells Ray Train."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from imgcls.models import zoo
from imgcls.models.precision import choose_precision
from imgcls.training import network as networks
from imgcls.training.config import TrainPrecision
from imgcls.training.train_step import WorkerContext
from imgcls.training.trainer import Trainer, TrainLoopResult, TrainLoopSpec

# Ray Train's own names differ between what runs (V2) and what is type-checked (V1)
_ray_train: Any = ray.train

PEER_LOSS_MARKERS = ("gloo", "nccl", "connection", "socket", "barrier")
"""In a failure of a worker whose peer is gone; the peer's is the one to look at."""


def train_loop_per_worker(config: dict[str, Any]) -> TrainLoopResult:
    """The training function that Ray Train calls in every worker."""
    work, board = config["work"], config["board"]
    reason = ray.get(board.failure.remote())
    if reason is not None:
        # a failure that would only be repeated: Ray Train restarts workers whatever it was
        return TrainLoopResult((), "", problem=reason, kind="failed")
    board.enlist.remote(ray.get_runtime_context().current_actor)
    try:
        return _run_trainer(work, board)
    except Exception as error:
        if not is_peer_loss(error):
            lines = str(error).strip().splitlines() or [""]
            line = f"{type(error).__name__}: {lines[-1].strip()[:300]}"
            rank = _ray_train.get_context().get_world_rank()
            ray.get(board.fail.remote(f"training worker {rank} failed: {line}"))
        raise


def is_peer_loss(error: BaseException) -> bool:
    """Whether a failure says no more than that another worker, or a machine, is gone."""
    if isinstance(error, ray.exceptions.RayError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return any(sign in text for sign in PEER_LOSS_MARKERS)


def _run_trainer(work: TrainLoopSpec, board: Any) -> TrainLoopResult:
    context = _ray_train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    _set_num_threads(context.get_local_world_size())
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    precision, reason = _resolve_precision(work.config.precision, device)
    network = zoo.build_network(work.architecture, work.num_classes)
    network.load_state_dict(ray.get(work.initial_weights))
    networks.set_regularization(network, work.config.model)
    trainer = Trainer(work, WorkerContext(rank, workers, device, precision), network, board)
    if rank == 0:
        board.post.remote(f"training: {workers} on {device.type}, {precision} ({reason})")
    return trainer.run(lambda epoch: _ray_train.report(asdict(epoch)))


def _resolve_precision(wanted: TrainPrecision, device: torch.device) -> tuple[str, str]:
    if wanted == "fp16":
        return "fp16", "as requested"
    return choose_precision(wanted, device)


def _set_num_threads(workers_here: int) -> None:
    """Share the machine's cores among its workers; Ray's default of one thread would idle them."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
