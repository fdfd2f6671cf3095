"""On a GPU: the same scores by replayed graphs, and none that belongs to another batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls.models.classifier import Classifier
from tests.models.test_classifier import bundle_of, random_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Classifier]:
    """One that launches each kernel, and one that replays them."""
    bundle: Path = bundle_of(tmp_path_factory.mktemp("gpu") / "bundle", "resnet18")
    options = {"precision": "fp32", "device": "cuda"}
    return Classifier.load(str(bundle), **options), Classifier.load(
        str(bundle), batch_size=SIZE, **options
    )


@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1])
def test_a_replayed_network_answers_as_it_does_otherwise(
    pair: tuple[Classifier, Classifier], count: int
) -> None:
    plain, replayed = pair
    batch = random_batch(plain, count)
    expected = plain.classify(batch).scores
    np.testing.assert_allclose(replayed.classify(batch).scores, expected, atol=1e-5)


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
