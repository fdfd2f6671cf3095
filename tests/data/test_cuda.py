"""The stages of a batch wait for each other: on fake streams, which know who waited for whom."""

from __future__ import annotations

import logging
import os
import threading

import pytest
import torch

from imgcls.data import cuda as stages
from imgcls.data.cuda import AsyncDownload, CudaTimer, DecodeStage, PinnedUploader
from tests.fake_cuda import DeviceTensor, FakeCuda
from tests.fake_cuda import cuda as cuda

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_idle_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeStage, "_idle", {})


def test_a_forward_pass_waits_for_the_upload(cuda: FakeCuda) -> None:
    copy = PinnedUploader(GPU)(torch.zeros(2))
    cuda.launch(torch.zeros(2), copy)  # fails without the wait, or with memory that may be reused
    (upload,) = cuda.streams
    assert cuda.default_stream().waited[upload] == 1


def test_a_download_is_complete_when_it_is_read_also_of_another_device(cuda: FakeCuda) -> None:
    found = AsyncDownload(torch.ones(3).as_subclass(DeviceTensor))
    with pytest.raises(AssertionError, match="did not wait"):
        cuda.check_read(found._host, cuda.host)
    cuda.check_read(found.get(), cuda.host)
    assert found.get().tolist() == [1, 1, 1]


def test_a_timer_marks_the_stream_of_its_own_device(cuda: FakeCuda) -> None:
    timer = CudaTimer(torch.device("cuda", 1))
    cuda.launch(torch.zeros(1), index=1)
    cuda.launch(torch.zeros(1), index=1)
    cuda.launch(torch.zeros(1), index=0)
    timer.stop()
    assert timer.elapsed_seconds() == 0.002


def test_decoded_pixels_are_handed_over_to_the_stream_that_was_current(cuda: FakeCuda) -> None:
    with DecodeStage(GPU) as stage:
        decoding = cuda.current_stream(GPU)
        pixels = cuda.launch(torch.zeros(3))
        with pytest.raises(AssertionError, match="may run"):
            cuda.check_idle(decoding)
        stage.wait_for_kernels()
        cuda.check_idle(decoding)
        stage.hand_over([pixels])
    assert cuda.current_stream(GPU) is cuda.default_stream()
    cuda.launch(torch.zeros(3), pixels)


def test_concurrent_decoding_has_streams_of_its_own_and_later_decoding_reuses_them(
    cuda: FakeCuda,
) -> None:
    def decode() -> object:
        with DecodeStage(GPU):
            return cuda.current_stream(GPU)

    with DecodeStage(GPU):
        first = cuda.current_stream(GPU)
        second = decode()
        assert second is not first
    assert {decode(), decode()} <= {first, second}
    with DecodeStage(GPU):
        assert {cuda.current_stream(GPU), decode()} == {first, second}
    assert len(cuda.streams) == 2


def test_on_a_cpu_there_are_no_streams() -> None:
    with DecodeStage(torch.device("cpu")) as stage:
        stage.wait_for_kernels()
        stage.hand_over([torch.zeros(1)])
    assert AsyncDownload(torch.ones(1)).get().tolist() == [1]
    assert CudaTimer(torch.device("cpu")).elapsed_seconds() == 0


def test_a_gpu_that_ray_counts_but_torch_does_not_find_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "imgcls"):
        assert stages.find_worker_device("cuda") == torch.device("cpu")
    assert caplog.messages == [
        "Ray assigned a GPU to this worker, but torch finds none: using the CPU"
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert stages.find_worker_device("cuda") == torch.device("cuda", 3)
    assert stages.find_worker_device("cpu") == torch.device("cpu")


def test_a_device_that_failed_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended, stages.exit_on_device_failure():
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error")
    assert ended.value.code == stages.DEVICE_FAILURE_STATUS
    with pytest.raises(torch.OutOfMemoryError), stages.exit_on_device_failure():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_process_whose_device_failed_ends_after_its_responses(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planned: list[tuple[object, ...]] = []

    class Timer:
        def __init__(self, *args: object) -> None:
            self.args = args

        def start(self) -> None:
            planned.append(self.args)

    monkeypatch.setattr(threading, "Timer", Timer)
    try:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error")
    except torch.AcceleratorError:
        stages.exit_after_device_failure(0.5)
    assert planned == [(0.5, os._exit, (stages.DEVICE_FAILURE_STATUS,))]
    assert "uncorrectable ECC error" in capfd.readouterr().err
