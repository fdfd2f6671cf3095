"""The channel between workers and driver: order and completeness of posts, stop, failures."""

from __future__ import annotations

import threading

import pytest
import ray

from imgcls.data.storage.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.training.driver_channel import THREAD_NAME, open_driver_channel
from imgcls.training.epoch_metrics import EpochMetrics


def epoch(number: int) -> EpochMetrics:
    return EpochMetrics(number, 0.4, 0.9, 1.0, 0.5, 1e-3, 1234.4, 4.13, 100, 10, 0.5)


def test_lines_and_epochs_reach_the_driver_in_order_and_all_of_them(
    joined: None, capsys: pytest.CaptureFixture[str]
) -> None:
    received: list[EpochMetrics] = []
    with open_driver_channel(3, received.append) as channel:
        for post in ("training: 2 workers on cpu", epoch(1), epoch(2), epoch(3), "last line"):
            ray.get(channel.post.remote(post))
    assert received == [epoch(1), epoch(2), epoch(3)]
    assert capsys.readouterr().out.splitlines() == [
        "training: 2 workers on cpu",
        *(epoch(number).format_line(3) for number in (1, 2, 3)),
        "last line",
    ]


def test_epochs_are_handled_with_the_storage_settings_of_the_job(joined: None) -> None:
    found: list[StorageConfig] = []
    settings = StorageConfig(endpoint_url="http://store:9000")
    with (
        use_settings(settings),
        open_driver_channel(3, lambda epoch: found.append(current_settings())) as channel,
    ):
        ray.get(channel.post.remote(epoch(1)))
    assert [each.endpoint_url for each in found] == ["http://store:9000"]


def test_workers_are_notified_of_the_stop_request_and_not_before(joined: None) -> None:
    with open_driver_channel(3, lambda epoch: None) as channel:
        stop = channel.wait_for_stop.remote()
        ray.get(channel.get_failure.remote())  # a later call returns, so the first one waits
        assert ray.wait([stop], timeout=0)[0] == []
        channel.request_stop.remote()
        assert ray.wait([stop], timeout=60)[0] == [stop]


def test_the_first_failure_is_the_one_that_is_kept(joined: None) -> None:
    with open_driver_channel(3, lambda epoch: None) as channel:
        assert ray.get(channel.get_failure.remote()) is None
        ray.get(channel.report_failure.remote("out of memory"))
        ray.get(channel.report_failure.remote("connection closed by peer"))
        assert ray.get(channel.get_failure.remote()) == "out of memory"


def test_a_lost_channel_does_not_block_the_driver(joined: None) -> None:
    with open_driver_channel(3, lambda epoch: None) as channel:
        ray.kill(channel)
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
