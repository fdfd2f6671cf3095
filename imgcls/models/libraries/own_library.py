"""The small CNN of imgcls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models.bundle import Architecture
from imgcls.models.libraries.base import NetworkLibrary
from imgcls.models.small_cnn import SmallCNN

_PREPROCESS = Preprocess(
    resize=32, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), mode="squash"
)


class OwnLibrary(NetworkLibrary):
    """`small_cnn`, which has no pretrained weights."""

    source = "imgcls"

    def list_names(self) -> list[str]:
        return ["small_cnn"]

    def check_name(self, name: str) -> None:
        """Names without a prefix are checked by the zoo."""

    def build(self, name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
        return SmallCNN(num_classes, **options)

    def get_preprocess(self, architecture: Architecture, weights: str | None) -> Preprocess:
        return _PREPROCESS
