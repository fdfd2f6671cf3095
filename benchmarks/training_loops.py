"""The loops that training is measured against: bare PyTorch, and torchvision's reference.

Each runs in processes of its own, one per worker, under DistributedDataParallel where there are
several. They share one step, which does what a step of ours does and nothing else.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks.machine import CORES
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models import zoo
from imgcls.models.normalize import Normalizer
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.crop import center_crop
from imgcls.training.augment.recipe import AugmentConfig

GPUS = torch.cuda.device_count()
CROP, MIRROR = (0.08, 1.0), 0.5
"""Of torchvision's RandomResizedCrop and RandomHorizontalFlip."""
WARM_STEPS = 2


@dataclass(frozen=True)
class Task:
    """What all three train, and on what.

    folder: `train` and `val` with a folder per class, pixels.npy (N, 3, S, S) uint8, labels.npy
    """

    model: str
    folder: Path
    classes: int
    images: int
    epochs: int
    batch_size: int
    precision: str
    preprocess: Preprocess

    @property
    def counted(self) -> int:
        """Images of all epochs but the first."""
        return self.images * (self.epochs - 1)


def in_processes(loop: Callable[..., list[float]], task: Task, workers: int, *more: Any) -> Any:
    """What a loop returns that runs in a fresh process per worker."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as meeting:
        # `spawn` of torch: ends all when one fails
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            in_process, (loop, task, workers, meeting, queue, more), nprocs=workers
        )
    return queue.get()


def in_process(
    rank: int,
    loop: Callable[..., list[float]],
    task: Task,
    workers: int,
    meeting: str,
    queue: Any,
    more: tuple[Any, ...],
) -> None:
    torch.set_num_threads(max(1, CORES // workers))
    torch.manual_seed(rank)
    torch.backends.cudnn.benchmark = True
    dist.init_process_group(
        "nccl" if GPUS else "gloo",
        init_method=f"file://{meeting}/store",
        rank=rank,
        world_size=workers,
    )
    rates = loop(task, Learner(task, rank, workers), *more)
    if rank == 0:
        queue.put(rates)
    dist.destroy_process_group()


class Learner:
    """A network and its step, without any framework."""

    def __init__(self, task: Task, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self.device = torch.device("cuda", rank) if GPUS else torch.device("cpu")
        if GPUS:
            torch.cuda.set_device(self.device)
        network = zoo.build_network(
            zoo.adapt_for_training(zoo.resolve_architecture(task.model)), task.classes
        )
        network = network.train().to(self.device).to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        self._network: torch.nn.Module = network
        if workers > 1:
            parallel = torch.nn.parallel.DistributedDataParallel
            with warnings.catch_warnings():
                # its new name is not known to the oldest torch that is supported
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                self._network = parallel(network, broadcast_buffers=False)
        self._bf16 = task.precision == "bf16"

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            logits = self._network(inputs)
        F.cross_entropy(logits.float(), labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def moved(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.pin_memory().to(self.device, non_blocking=True) if GPUS else batch

    def now(self) -> float:
        """Seconds of a clock, once all workers have done all that they were given."""
        if GPUS:
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()


def bare_loop(task: Task, learner: Learner) -> list[float]:
    """images/s with our augmentation, and without any, an epoch of each in turn."""
    pixels = torch.from_numpy(np.load(task.folder / "pixels.npy"))
    labels = torch.from_numpy(np.load(task.folder / "labels.npy"))
    size = task.preprocess.crop
    middle = center_crop(pixels, size).contiguous()
    normalise = Normalizer(task.preprocess, learner.device)
    config = AugmentConfig(preset="none", crop_scale=CROP, hflip=MIRROR)
    augment = Augment(config, size=size, num_classes=task.classes)

    def with_ours(rows: torch.Tensor) -> None:
        learner.step(*prepared(*augment(*moved(pixels, rows))))

    def without(rows: torch.Tensor) -> None:
        learner.step(*prepared(*moved(middle, rows)))

    def moved(source: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return learner.moved(source[rows]), learner.moved(labels[rows])

    def prepared(batch: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return normalise(batch), wanted

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(task.images))
        for rows in order.tensor_split(-(-task.images // task.batch_size)):
            yield rows[learner.rank :: learner.workers]

    ways = (with_ours, without)
    spent = dict.fromkeys(ways, 0.0)
    for way in ways:
        run(way, itertools.islice(itertools.chain(batches(0), batches(1)), WARM_STEPS))
    for epoch in range(2, task.epochs + 1):
        for way in ways:
            start = learner.now()
            run(way, batches(epoch))
            spent[way] += learner.now() - start
    return [task.counted / spent[way] for way in ways]


def run(way: Callable[[torch.Tensor], None], batches: Iterable[torch.Tensor]) -> None:
    for rows in batches:
        way(rows)


def reference_loop(task: Task, learner: Learner, loaders: int) -> list[float]:
    """images/s of torchvision's references/classification (train.py and presets.py).

    Its defaults: transforms of the first version on Pillow images.
    """
    from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
    from torchvision import datasets, transforms

    preprocess = task.preprocess
    dataset = datasets.ImageFolder(
        str(task.folder / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(preprocess.crop, scale=CROP, antialias=True),
                transforms.RandomHorizontalFlip(MIRROR),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float),
                transforms.Normalize(preprocess.mean, preprocess.std),
            ]
        ),
    )
    shared = learner.workers > 1
    sampler: Any = (
        DistributedSampler(dataset, learner.workers, learner.rank)
        if shared
        else RandomSampler(dataset)
    )
    loader = DataLoader(
        dataset,
        batch_size=task.batch_size // learner.workers,
        sampler=sampler,
        num_workers=loaders,
        pin_memory=GPUS > 0,
        persistent_workers=True,
    )
    spent = 0.0
    for epoch in range(1, task.epochs + 1):
        if shared:
            sampler.set_epoch(epoch)
        start = learner.now()
        for inputs, labels in loader:
            inputs = inputs.to(learner.device, non_blocking=True)
            inputs = inputs.to(memory_format=torch.channels_last)
            learner.step(inputs, labels.to(learner.device, non_blocking=True))
        if epoch > 1:
            spent += learner.now() - start
    return [task.counted / spent]
