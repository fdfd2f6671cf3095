"""Workers in lockstep make the same decisions at the same step, whichever of them had the reason.

Two Ray Train workers run every scene once. Their clocks are simulated, so that no scene sleeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from imgcls.training import control_sync
from imgcls.training.control_sync import SYNC_INTERVAL_S, ControlDecision, ControlSync
from imgcls.training.driver_channel import DriverChannel

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_ray_train: Any = ray.train
CPU = torch.device("cpu")
Decisions = list[ControlDecision | None]

NEVER = 1e9
CONTINUE = ControlDecision(should_stop=False, should_save=False, is_finite=True)


class Clock:
    """A worker's clock, which advances only between steps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def count_steps(channel: Any, rank: int, clock: Clock) -> Decisions:
    """Steps of 2 ms, of the second worker 4 ms."""
    sync = ControlSync(channel, CPU, save_interval_s=NEVER)
    decisions = []
    for _ in range(1000):
        clock.now += 0.002 * (1 + rank)
        decisions.append(sync.step())
    return decisions


def diverge(channel: Any, rank: int, clock: Clock) -> Decisions:
    """The loss of the second worker is not finite."""
    sync = ControlSync(channel, CPU, save_interval_s=NEVER)
    return [sync.step(torch.tensor(rank == 0))]


def save(channel: Any, rank: int, clock: Clock) -> Decisions:
    """The save interval passes; the state is saved; then come more steps."""
    sync = ControlSync(channel, CPU, save_interval_s=0.2)
    decisions = [sync.step()]
    clock.now += 0.3
    for _ in range(10):
        decisions.append(sync.step())
        if decisions[-1] is not None and decisions[-1].should_save:
            sync.mark_saved()
            break
    decisions.append(None)  # separates the decisions after the save
    for _ in range(10):
        decisions.append(sync.step())
    return decisions


def stop(channel: Any, rank: int, clock: Clock) -> Decisions:
    """The first worker learns of the driver's stop request, the second one may not."""
    sync = ControlSync(channel, CPU, save_interval_s=NEVER)
    decisions = [sync.step()]
    if rank == 0:
        ray.get(channel.request_stop.remote())
        assert ray.wait([sync._stop_request], timeout=60)[0]
    for _ in range(500):
        decisions.append(sync.step())
        if decisions[-1] is not None and decisions[-1].should_stop:
            break
        clock.now += 0.01
    return decisions


def lose_channel(channel: Any, rank: int, clock: Clock) -> Decisions:
    """The channel's actor is killed, which is not a stop request."""
    sync = ControlSync(channel, CPU, save_interval_s=NEVER)
    if rank == 0:
        ray.kill(channel)
    assert ray.wait([sync._stop_request], timeout=60)[0]
    return [sync.step()]


SCENES: tuple[Callable[[Any, int, Clock], Decisions], ...] = (
    count_steps, diverge, save, stop, lose_channel,
)  # fmt: skip


def play(config: dict[str, Any]) -> list[list[Decisions]] | None:
    rank = _ray_train.get_context().get_world_rank()
    results: list[list[Decisions]] = []
    for scene, channel in zip(SCENES, config["channels"], strict=True):
        clock: Any = Clock()
        control_sync.time = clock
        dist.barrier()
        both: list[Any] = [None, None]
        dist.all_gather_object(both, scene(channel, rank, clock))
        results.append(both)
    return results


@pytest.fixture(scope="module")
def played(joined: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Decisions]]:
    """The decisions of each of two workers at each step of every scene."""
    remote: Any = ray.remote(num_cpus=0)(DriverChannel)
    silent, stopped, lost = [remote.remote() for _ in range(3)]
    channels = [stopped if s is stop else lost if s is lose_channel else silent for s in SCENES]
    loop: Any = play
    trainer = TorchTrainer(
        loop,
        train_loop_config={"channels": channels},
        scaling_config=_ray_train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=_ray_train.RunConfig(
            storage_path=str(tmp_path_factory.mktemp("control-sync")),
            logging_config=_ray_train.LoggingConfig(log_level="ERROR"),
        ),
    )
    result: Any = trainer.fit()
    return {s.__name__: both for s, both in zip(SCENES, result.return_value, strict=True)}


def test_all_workers_decide_the_same_at_the_same_steps(played: dict[str, list[Decisions]]) -> None:
    for scene, (first, second) in played.items():
        assert first == second, scene
        assert any(decision is not None for decision in first), scene


def test_agreements_are_about_a_second_apart_and_not_at_every_step(
    played: dict[str, list[Decisions]],
) -> None:
    decisions = played["count_steps"][0]
    agreed = [step for step, decision in enumerate(decisions) if decision is not None]
    assert agreed[0] == 0, "the first at once, as the duration of steps is unknown"
    gaps = [b - a for a, b in itertools.pairwise(agreed)]
    assert all(gap <= 2 * before for before, gap in itertools.pairwise(gaps))
    # steps take 4 ms, those of the slower worker
    assert 16 < max(gaps) <= SYNC_INTERVAL_S / 0.004
    assert all(decision == CONTINUE for decision in decisions if decision)


def test_a_loss_that_is_not_finite_on_one_worker_is_known_to_all(
    played: dict[str, list[Decisions]],
) -> None:
    assert played["diverge"][0] == [
        ControlDecision(should_stop=False, should_save=False, is_finite=False)
    ]


def test_the_state_is_due_once_and_then_not_until_the_interval_passes_again(
    played: dict[str, list[Decisions]],
) -> None:
    decisions = played["save"][0]
    cut = decisions.index(None, next(i for i, d in enumerate(decisions) if d and d.should_save))
    saves = [decision.should_save for decision in decisions[:cut] if decision]
    assert saves[-1]
    assert not any(saves[:-1])
    assert not any(decision.should_save for decision in decisions[cut:] if decision)


def test_the_stop_request_reaches_all_workers(played: dict[str, list[Decisions]]) -> None:
    decisions = [decision for decision in played["stop"][0] if decision]
    assert decisions[-1] == ControlDecision(should_stop=True, should_save=False, is_finite=True)
    assert not decisions[0].should_stop


def test_a_lost_channel_is_not_a_stop_request(played: dict[str, list[Decisions]]) -> None:
    assert played["lose_channel"][0] == [CONTINUE]
