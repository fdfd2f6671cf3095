"""What the driver makes of workers that are there, and of none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from imgcls.cluster import autoscaler
from imgcls.errors import RunFailed
from imgcls.training import ray_trainer
from imgcls.training.epoch_metrics import open_driver_channel


class Worker:
    def there(self) -> None: ...


def look_for(seconds: float, team: ray_trainer._WorkerLiveness) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        team.check()


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_while_a_worker_is_there_nothing_is_waited_for_and_without_one_not_for_ever(
    session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(autoscaler, "LOG_WAIT_AFTER_SECONDS", 0)
    monkeypatch.setattr(ray_trainer, "LIVENESS_INTERVAL_S", 0.2)
    kind: Any = ray.remote(num_cpus=0)(Worker)
    worker = kind.remote()
    ray.get(worker.there.remote())
    with open_driver_channel(1, lambda epoch: None) as board:
        ray.get(board.enlist.remote(worker))
        team = ray_trainer._WorkerLiveness(board, "1 x (1 CPU)", wait_seconds=1)
        look_for(2, team)
        assert capsys.readouterr().out == ""
        ray.kill(worker)
        with pytest.raises(
            RunFailed, match=r"for training workers, 1 x \(1 CPU\); the cluster has"
        ):
            look_for(60, team)
        assert "waiting  for training workers, 1 x (1 CPU)" in capsys.readouterr().out
