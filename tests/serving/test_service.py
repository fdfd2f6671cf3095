"""The model of a replica, as it is loaded, and on a GPU that has no memory or fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from torch import nn

from imgcls.errors import ResourcesError
from imgcls.serving import service
from imgcls.serving.config import ServeConfig
from tests.processes import wait_for
from tests.serving.app import Running, assert_problem, jpeg, post, serving


def test_a_replica_with_a_gpu_captures_and_warms_up_a_graph_for_a_lone_image(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[Any] = []
    warmed: list[tuple[int, bool]] = []

    def classify(batch: np.ndarray[Any, Any], *, embeddings: bool) -> None:
        warmed.append((len(batch), embeddings))

    def build(bundle: Any, *, batch_size: Any, **_: Any) -> Any:
        sizes.append(batch_size)
        return SimpleNamespace(
            bundle=bundle, classify=classify, device=torch.device("cuda"), ood_detector=None
        )

    monkeypatch.setattr(service, "Classifier", build)
    service.ServedModel.load(ServeConfig(model=str(color_bundle), batch_size=16), "cuda")
    assert sizes == [(1, 4, 16)]
    assert warmed == [(1, True), (4, False), (16, False)]


# ---------------------------------------------------------------------- a GPU without memory


class SmallGpu:
    """Raises the errors of a GPU from the forward pass of a server's network.

    most:  number of images that it has memory for
    error: raised for more images
    sizes: of the batches of all forward passes
    """

    def __init__(self, network: nn.Module) -> None:
        self.most = 1000
        self.error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.sizes: list[int] = []
        self.has_started, self.may_start = threading.Event(), threading.Event()
        self.may_start.set()
        self._hook = network.register_forward_pre_hook(self._check)

    def _check(self, network: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.has_started.set()
        assert self.may_start.wait(60)
        self.sizes.append(len(inputs[0]))
        if len(inputs[0]) > self.most:
            raise self.error

    def remove(self) -> None:
        self._hook.remove()


def network_of(running: Running) -> nn.Module:
    network: Any = running.service.model.classifier._engine._compute_logits
    assert isinstance(network, nn.Module)
    return network


@pytest.fixture
def small_gpu(server: Running) -> Iterator[SmallGpu]:
    gpu = SmallGpu(network_of(server))
    yield gpu
    gpu.remove()


def post_images(server: Running, count: int) -> requests.Response:
    form = [("image", (f"{i}.jpg", jpeg("red", i), "image/jpeg")) for i in range(count)]
    return requests.post(f"{server.url}/v1/predict", files=form, timeout=60)


def post_as_one_batch(server: Running, gpu: SmallGpu, count: int) -> requests.Response:
    """Send images that wait for one forward pass, behind a first one that is held."""
    batcher = server.service._batcher
    found: list[requests.Response] = []
    gpu.has_started.clear()
    gpu.may_start.clear()
    threads = [
        threading.Thread(target=lambda: post(server, jpeg())),
        threading.Thread(target=lambda: found.append(post_images(server, count))),
    ]
    threads[0].start()
    assert gpu.has_started.wait(60)
    threads[1].start()
    wait_for(lambda: batcher._queue.qsize() == count, 60, 0.01)
    gpu.may_start.set()
    for thread in threads:
        thread.join(60)
    return found[0]


def test_a_batch_that_a_gpu_has_no_memory_for_is_split_and_gets_the_same_scores(
    server: Running, small_gpu: SmallGpu
) -> None:
    expected = post_images(server, 10).json()
    small_gpu.most, small_gpu.sizes = 4, []
    response = post_as_one_batch(server, small_gpu, 10)
    assert small_gpu.sizes == [1, 10, 3, 3, 3, 1]
    assert response.status_code == 200
    found = response.json()
    assert found["model"] == expected["model"]
    for one, other in zip(found["predictions"], expected["predictions"], strict=True):
        # with AVX2 alone the last bit depends on the number of images in a forward pass
        for name in ("confidence", "topk_scores"):
            assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-6)
        assert one == other


@pytest.mark.parametrize(("count", "smallest"), [(10, 3), (1, 1)])
def test_images_that_a_gpu_has_no_memory_for_get_503_with_the_remedy(
    server: Running, small_gpu: SmallGpu, count: int, smallest: int
) -> None:
    small_gpu.most = 0
    response = post_as_one_batch(server, small_gpu, count)
    assert small_gpu.sizes == [1, *dict.fromkeys((count, smallest))]
    problem = assert_problem(response, 503, "out_of_memory")
    assert problem["detail"] == (
        f"the GPU has not enough memory for a batch of {smallest}. Set a smaller --batch-size of "
        "the service, or use a GPU with more memory"
    )
    assert response.headers["Retry-After"] == "5"
    small_gpu.most = 1000
    assert post(server, jpeg()).status_code == 200


def test_other_images_of_a_batch_keep_their_scores(server: Running, small_gpu: SmallGpu) -> None:
    """Embeddings take another forward pass; they can need more memory."""
    model = server.service.model
    crop = model.classifier.preprocess.crop
    pixels = np.zeros((crop, crop, 3), np.uint8).transpose(2, 0, 1)
    items = [service.ForwardItem(model, pixels, embedding=i % 2 == 1) for i in range(4)]
    run = model.classifier.classify

    def classify(batch: Any, *, embeddings: bool) -> Any:
        if embeddings:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.classifier, "classify", classify)
        found = server.service._classify_batch(items)
    kinds = [type(result).__name__ for result in found]
    assert kinds == ["ImageScores", "Problem", "ImageScores", "Problem"]


def test_a_replica_whose_gpu_has_failed_answers_503_and_ends(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[float] = []
    monkeypatch.setattr(service, "exit_after_device_failure", exits.append)
    with serving(color_bundle) as running:
        gpu = SmallGpu(network_of(running))
        gpu.most, gpu.error = 0, torch.AcceleratorError("CUDA error: an illegal memory access")
        for _ in range(2):
            assert_problem(post(running, jpeg()), 503, "device_failure")
    assert gpu.sizes == [1]  # the failed device is not used again
    assert exits == [service.EXIT_DELAY_S]


def test_a_model_that_a_gpu_has_no_memory_for_is_refused_with_the_remedy(
    color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(service, "Classifier", fail)
    with pytest.raises(ResourcesError, match=r"batches of 16: .*Set a smaller --batch-size"):
        service.ServedModel.load(ServeConfig(model=str(color_bundle)), "cuda")


# ---------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def gpu_server(color_bundle: Path) -> Iterator[Running]:
    with serving(color_bundle, device="cuda", precision="fp32") as running:
        yield running


def assert_nearly(found: Any, expected: Any, atol: float = 1e-4) -> None:
    """The same predictions, whose scores may be rounded differently."""
    assert len(found["predictions"]) == len(expected["predictions"])
    for here, there in zip(found["predictions"], expected["predictions"], strict=True):
        scores = dict(zip(here["topk_labels"], here["topk_scores"], strict=True))
        wanted = dict(zip(there["topk_labels"], there["topk_scores"], strict=True))
        assert scores == pytest.approx(wanted, abs=atol)
        assert (here["status"], here["width"]) == (there["status"], there["width"])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_a_service_on_a_gpu_has_the_predictions_of_one_on_a_cpu(
    server: Running, gpu_server: Running, count: int
) -> None:
    assert gpu_server.service.model.classifier.device.type == "cuda"
    # the CPU may compute in bf16
    expected = post_images(server, count).json()
    assert_nearly(post_images(gpu_server, count).json(), expected, atol=0.005)


def reload_under_load(running: Running) -> None:
    """Load the bundle five times, while two clients send images."""
    expected = post_images(running, 5).json()
    stop = threading.Event()
    found: list[requests.Response] = []

    def send() -> None:
        while not stop.is_set():
            found.append(post_images(running, 5))

    clients = [threading.Thread(target=send) for _ in range(2)]
    for client in clients:
        client.start()
    for _ in range(5):
        before = running.service.model
        update = running.service.update(running.service.config)
        asyncio.run_coroutine_threadsafe(update, running.loop).result(300)
        assert running.service.model is not before
    stop.set()
    for client in clients:
        client.join(60)
    assert found
    for response in found:
        assert response.status_code == 200
        assert_nearly(response.json(), expected)


@pytest.mark.gpu
def test_a_bundle_is_reloaded_on_a_gpu_while_requests_are_answered(gpu_server: Running) -> None:
    reload_under_load(gpu_server)


@pytest.mark.gpu
def test_a_batch_beyond_the_memory_of_a_gpu_is_split(
    gpu_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = gpu_server.service.model.classifier
    classify, sizes = classifier.classify, []

    def classify_with_much_memory(batch: Any, *, embeddings: bool) -> Any:
        sizes.append(len(batch))
        if len(batch) > 4:
            torch.empty(2**46, dtype=torch.uint8, device="cuda")
        return classify(batch, embeddings=embeddings)

    monkeypatch.setattr(classifier, "classify", classify_with_much_memory)
    crop = classifier.preprocess.crop
    pixels = np.zeros((crop, crop, 3), np.uint8).transpose(2, 0, 1)
    items = [service.ForwardItem(gpu_server.service.model, pixels, False) for _ in range(16)]
    found = gpu_server.service._classify_batch(items)
    assert sizes == [16, 4, 4, 4, 4]
    expected = classify(pixels[None]).scores[0]
    for result in found:
        assert isinstance(result, service.ImageScores)
        np.testing.assert_allclose(result.scores, expected, atol=1e-5)
