"""Workers in lockstep come to the same decisions at the same beat, whichever of them knew first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from imgcls.training.control_sync import SYNC_INTERVAL_S, ControlDecision, ControlSync
from imgcls.training.epoch_metrics import DriverChannel

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_train: Any = ray.train
CPU = torch.device("cpu")
Beats = list[ControlDecision | None]

NEVER = 1e9


def counting(board: Any, rank: int) -> Beats:
    """Steps of 2 ms, of the second worker 4 ms, for two seconds of the first."""
    pulse = ControlSync(board, CPU, save_seconds=NEVER)
    beats = []
    for _ in range(1000):
        time.sleep(0.002 * (1 + rank))
        beats.append(pulse.step())
    return beats


def diverging(board: Any, rank: int) -> Beats:
    """The loss of the second worker is no number."""
    pulse = ControlSync(board, CPU, save_seconds=NEVER)
    return [pulse.step(torch.tensor(rank == 0))]


def saving(board: Any, rank: int) -> Beats:
    """The first worker saves when it is time, and tells its pulse; the other does as agreed."""
    pulse = ControlSync(board, CPU, save_seconds=0.2)
    beats = [pulse.step()]
    time.sleep(0.3)
    for _ in range(10):
        beats.append(pulse.step())
        if beats[-1] is not None and beats[-1].should_save:
            pulse.mark_saved()
            break
    beats.append(None)  # what is agreed right after it
    for _ in range(10):
        beats.append(pulse.step())
    return beats


def stopping(board: Any, rank: int) -> Beats:
    """The wish to stop is told while they work."""
    pulse = ControlSync(board, CPU, save_seconds=NEVER)
    beats = [pulse.step()]
    if rank == 0:
        ray.get(board.stop.remote())
        time.sleep(0.3)
    for _ in range(500):
        beats.append(pulse.step())
        if beats[-1] is not None and beats[-1].should_stop:
            break
        time.sleep(0.01)
    return beats


def abandoned(board: Any, rank: int) -> Beats:
    """The board is killed, which nobody wished for."""
    pulse = ControlSync(board, CPU, save_seconds=NEVER)
    if rank == 0:
        ray.kill(board)
    time.sleep(0.5)
    return [pulse.step()]


SCENES: tuple[Callable[[Any, int], Beats], ...] = (
    counting, diverging, saving, stopping, abandoned,
)  # fmt: skip


def play(config: dict[str, Any]) -> list[list[Beats]] | None:
    rank = _train.get_context().get_world_rank()
    found: list[list[Beats]] = []
    for scene, board in zip(SCENES, config["boards"], strict=True):
        dist.barrier()
        both: list[Any] = [None, None]
        dist.all_gather_object(both, scene(board, rank))
        found.append(both)
    return found


@pytest.fixture(scope="module")
def played(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Beats]]:
    """What each of two workers was told at each beat of every scene."""
    remote: Any = ray.remote(num_cpus=0)(DriverChannel)
    boards = [remote.remote() for _ in SCENES]
    loop: Any = play
    trainer = TorchTrainer(
        loop,
        train_loop_config={"boards": boards},
        scaling_config=_train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=_train.RunConfig(
            storage_path=str(tmp_path_factory.mktemp("pulse")),
            logging_config=_train.LoggingConfig(log_level="ERROR"),
        ),
    )
    result: Any = trainer.fit()
    return {s.__name__: both for s, both in zip(SCENES, result.return_value, strict=True)}


def test_all_workers_agree_at_the_same_beats(played: dict[str, list[Beats]]) -> None:
    for scene, (first, second) in played.items():
        assert first == second, scene
        assert any(beat is not None for beat in first), scene


def test_agreements_are_made_about_once_a_second_and_not_at_every_step(
    played: dict[str, list[Beats]],
) -> None:
    beats = played["counting"][0]
    agreed = [place for place, beat in enumerate(beats) if beat is not None]
    assert agreed[0] == 0, "the first at once, as nothing is known of the speed yet"
    gaps = [b - a for a, b in itertools.pairwise(agreed)]
    assert all(gap <= 2 * before for before, gap in itertools.pairwise(gaps))
    # steps take 4 ms at least, that of the slower worker
    assert 16 < max(gaps) <= SYNC_INTERVAL_S / 0.004
    assert all(
        beat == ControlDecision(should_stop=False, should_save=False, is_finite=True)
        for beat in beats
        if beat
    )


def test_a_loss_that_is_no_number_on_one_worker_is_heard_by_all(
    played: dict[str, list[Beats]],
) -> None:
    assert played["diverging"][0] == [
        ControlDecision(should_stop=False, should_save=False, is_finite=False)
    ]


def test_it_is_time_to_save_once_and_then_not_for_a_while(played: dict[str, list[Beats]]) -> None:
    beats = played["saving"][0]
    cut = beats.index(None, next(i for i, beat in enumerate(beats) if beat and beat.should_save))
    saves = [beat.should_save for beat in beats[:cut] if beat]
    assert saves[-1]
    assert not any(saves[:-1])
    assert not any(beat.should_save for beat in beats[cut:] if beat)


def test_the_wish_to_stop_reaches_all_workers(played: dict[str, list[Beats]]) -> None:
    beats = [beat for beat in played["stopping"][0] if beat]
    assert beats[-1] == ControlDecision(should_stop=True, should_save=False, is_finite=True)
    assert not beats[0].should_stop


def test_a_board_that_is_gone_is_no_wish_to_stop(played: dict[str, list[Beats]]) -> None:
    assert played["abandoned"][0] == [
        ControlDecision(should_stop=False, should_save=False, is_finite=True)
    ]
