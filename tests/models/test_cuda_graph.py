"""A captured network: its streams, a capture that fails, and on a GPU the same scores."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgcls.data.cuda import exit_on_device_failure
from imgcls.models import torch_engine
from imgcls.models.classifier import Classifier
from imgcls.models.cuda_graph import WARM_UP_PASSES, CaptureError, CudaGraphRunner
from imgcls.models.graph_sizes import SizedForward
from tests.fake_cuda import FakeCuda
from tests.fake_cuda import cuda as cuda
from tests.models.test_classifier import bundle_of, random_batch

SIZE = 8


# ------------------------------------------------------------------ capture, on fake streams


class FakeCapture:
    """Captures of `torch.cuda`: the mode, the stream, and the pools that are ended.

    fails: whether the end of the capture fails, as after an error within it
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.modes: list[str] = []
        self.ended_pools: list[object] = []
        self.is_capturing = self.fails = False

    @contextlib.contextmanager
    def __call__(self, graph: Any, pool: Any, stream: Any, *, capture_error_mode: str) -> Any:
        assert stream is self._cuda.current_stream()
        self.modes.append(capture_error_mode)
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False
            if self.fails:
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error")


@pytest.fixture
def capture(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    made = FakeCapture(cuda)
    monkeypatch.setattr(torch.cuda, "graph", made)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))

    def end(device: int, pool: object) -> None:
        made.ended_pools.append(pool)

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return made


def test_a_capture_allows_what_other_threads_do_meanwhile(
    cuda: FakeCuda, capture: FakeCapture
) -> None:
    kernels = cuda.current_stream()
    streams: list[Any] = []

    def network(inputs: torch.Tensor) -> torch.Tensor:
        streams.append(cuda.current_stream())
        return cuda.launch(inputs + 1)

    runner = CudaGraphRunner(network, torch.zeros(SIZE, 2))
    (own,) = cuda.streams
    assert streams == [own] * (WARM_UP_PASSES + 1)
    assert capture.modes == ["thread_local"]
    assert cuda.current_stream() is kernels
    assert kernels.waited[own] == own.queued
    assert capture.ended_pools == []
    assert runner(torch.zeros(SIZE + 1, 2)).shape == (SIZE + 1, 2)  # too large for the graph


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("Cannot copy to the CPU\nmore"), CaptureError, "^Cannot copy to the CPU$"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
    ],
)
def test_a_failed_capture_has_its_first_error_and_leaves_nothing_behind(
    cuda: FakeCuda, capture: FakeCapture, error: Exception, expected: type, message: str
) -> None:
    kernels = cuda.current_stream()
    capture.fails = True

    def network(inputs: torch.Tensor) -> torch.Tensor:
        if capture.is_capturing:
            raise error
        return inputs

    with pytest.raises(expected, match=message):
        CudaGraphRunner(network, torch.zeros(SIZE, 2))
    assert cuda.current_stream() is kernels
    assert capture.ended_pools == [(0, 7)]
    cuda.failure = torch.AcceleratorError("CUDA error: an illegal memory access")
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        CudaGraphRunner(network, torch.zeros(SIZE, 2))


def test_a_network_that_cannot_be_captured_runs_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(network: Any, example: torch.Tensor) -> None:
        raise CaptureError("it waits for the device")

    classifier = Classifier.load(str(bundle_of(tmp_path / "b", "small_cnn")), device="cpu")
    network = classifier._engine._compute_logits
    monkeypatch.setattr(torch_engine, "CudaGraphRunner", refuse)
    with caplog.at_level(logging.WARNING, "imgcls"):
        assert classifier._engine._capture_cuda_graphs([SIZE]) is network
    assert caplog.messages == [
        f"{tmp_path / 'b'} runs without a CUDA graph: it waits for the device"
    ]


# ------------------------------------------------------------------ on a GPU


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Classifier]:
    """One that launches each kernel, and one that replays them."""
    bundle: Path = bundle_of(tmp_path_factory.mktemp("gpu") / "bundle", "resnet18")
    options = {"precision": "fp32", "device": "cuda"}
    return Classifier.load(str(bundle), **options), Classifier.load(
        str(bundle), batch_size=SIZE, **options
    )


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1])
def test_a_replayed_network_answers_as_it_does_otherwise(
    pair: tuple[Classifier, Classifier], count: int
) -> None:
    plain, replayed = pair
    batch = random_batch(plain, count)
    expected = plain.classify(batch).scores
    np.testing.assert_allclose(replayed.classify(batch).scores, expected, atol=1e-5)


@pytest.mark.gpu
def test_batches_under_way_do_not_disturb_each_other(pair: tuple[Classifier, Classifier]) -> None:
    plain, replayed = pair
    batches = [random_batch(plain, SIZE, seed) for seed in range(16)]
    pending = [replayed.submit(batch) for batch in batches]
    for batch, each in zip(batches, pending, strict=True):
        np.testing.assert_allclose(each.get().scores, plain.classify(batch).scores, atol=1e-5)
        assert each.gpu_seconds() > 0
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(replayed.classify, batches))
    for batch, scores in zip(batches, found, strict=True):
        np.testing.assert_allclose(scores.scores, plain.classify(batch).scores, atol=1e-5)


@pytest.fixture(scope="module")
def under_load(pair: tuple[Classifier, Classifier]) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Scores of one batch, from a thread that classifies it repeatedly."""
    _, replayed = pair
    batch, found, stop = random_batch(replayed, SIZE), [], [False]

    def classify() -> None:
        while not stop[0]:
            found.append(replayed.classify(batch).scores)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(classify)
        yield found
        stop[0] = True
        running.result()


@pytest.mark.gpu
def test_a_bundle_is_loaded_while_another_one_answers(
    pair: tuple[Classifier, Classifier], under_load: list[np.ndarray[Any, Any]]
) -> None:
    plain, replayed = pair
    batch = random_batch(plain, SIZE)
    expected = plain.classify(batch).scores
    for _ in range(5):
        loaded = Classifier(replayed.bundle, precision="fp32", device="cuda", batch_size=SIZE)
        assert isinstance(loaded._engine._compute_logits, SizedForward)
        np.testing.assert_allclose(loaded.classify(batch).scores, expected, atol=1e-5)
    for scores in list(under_load):
        np.testing.assert_allclose(scores, expected, atol=1e-5)


class WaitsForTheDevice(torch.nn.Module):
    """A network that cannot be captured: it reads a value back."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.flatten(1)[:, :5] * inputs.abs().max().item()


@pytest.mark.gpu
def test_after_a_capture_that_failed_memory_of_uploads_is_still_reused(
    pair: tuple[Classifier, Classifier],
) -> None:
    plain, _ = pair
    example = torch.zeros((SIZE, 3, 224, 224), device=plain.device)
    with torch.inference_mode(), pytest.raises(CaptureError):
        CudaGraphRunner(WaitsForTheDevice(), example)
    batch = random_batch(plain, 64)
    for _ in range(3):
        plain.classify(batch)
    before = torch.cuda.memory_reserved(plain.device)
    for _ in range(50):
        plain.classify(batch)
    assert torch.cuda.memory_reserved(plain.device) == before


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [None, SIZE])
def test_a_compiled_network_answers_as_it_does_otherwise_on_a_gpu(
    pair: tuple[Classifier, Classifier], captured: int | None
) -> None:
    plain, _ = pair
    compiled = Classifier(
        plain.bundle, precision="fp32", device=plain.device, compile=True, batch_size=captured
    )
    for count in (1, SIZE, SIZE + 1):
        batch = random_batch(plain, count)
        expected = plain.classify(batch).scores
        np.testing.assert_allclose(compiled.classify(batch).scores, expected, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "atol"), [("bf16", 0.02), ("fp16", 0.005)])
def test_half_precision_has_nearly_the_scores_of_fp32(
    pair: tuple[Classifier, Classifier], precision: Any, atol: float
) -> None:
    plain, _ = pair
    half = Classifier(plain.bundle, precision=precision, device=plain.device, batch_size=SIZE)
    batch = random_batch(plain, SIZE)
    found = half.classify(batch, embeddings=True)
    expected = plain.classify(batch, embeddings=True)
    assert (found.scores.dtype, half.precision) == (np.float32, precision)
    np.testing.assert_allclose(found.scores, expected.scores, atol=atol)
    assert found.embedding is not None
    np.testing.assert_allclose(found.embedding, expected.embedding, rtol=0.1, atol=0.1)
    np.testing.assert_allclose(half.classify(batch).scores, found.scores, atol=atol)


@pytest.mark.gpu
def test_a_gpu_has_the_scores_of_a_cpu(pair: tuple[Classifier, Classifier]) -> None:
    cpu = Classifier(pair[0].bundle, precision="fp32", device="cpu")
    batch = random_batch(cpu, SIZE)
    expected = cpu.classify(batch, embeddings=True)
    for classifier in pair:
        pending = classifier.submit(batch, embeddings=True, top_k=3)
        found = pending.get()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-3, atol=1e-3)
        assert found.order is not None
        assert (found.order == np.argsort(-found.scores, axis=1)[:, :3]).all()


@pytest.mark.gpu
def test_a_second_gpu_gives_the_scores_of_the_first(pair: tuple[Classifier, Classifier]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    plain, replayed = pair
    second = Classifier(replayed.bundle, precision="fp32", device="cuda:1", batch_size=SIZE)
    assert torch.cuda.current_device() == 0
    for seed in range(8):
        batch = random_batch(plain, SIZE, seed)
        expected = plain.classify(batch).scores
        pending = second.submit(batch)
        np.testing.assert_allclose(pending.get().scores, expected, atol=1e-5)
        assert pending.gpu_seconds() > 0


@pytest.mark.gpu
def test_a_gpu_without_memory_is_no_device_failure(pair: tuple[Classifier, Classifier]) -> None:
    plain, _ = pair
    with pytest.raises(torch.OutOfMemoryError), exit_on_device_failure():
        torch.empty(2**46, dtype=torch.uint8, device=plain.device)
    assert np.isfinite(plain.classify(random_batch(plain, 1)).scores).all()
