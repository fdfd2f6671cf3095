"""The model of a replica, as it is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from imgcls.serving import service
from imgcls.serving.config import ServeConfig


def test_a_replica_with_a_gpu_captures_and_warms_up_a_graph_for_a_lone_image(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[Any] = []
    warmed: list[tuple[int, bool]] = []

    def classify(batch: np.ndarray[Any, Any], *, embeddings: bool) -> None:
        warmed.append((len(batch), embeddings))

    def build(bundle: Any, *, batch_size: Any, **_: Any) -> Any:
        sizes.append(batch_size)
        return SimpleNamespace(bundle=bundle, classify=classify, device=torch.device("cuda"))

    monkeypatch.setattr(service, "Classifier", build)
    service.ServedModel.load(ServeConfig(model=str(color_bundle), batch_size=16), "cuda")
    assert sizes == [(1, 4, 16)]
    assert warmed == [(1, True), (4, False), (16, False)]
