"""The table of libraries of networks."""

from __future__ import annotations

from imgcls.models.bundle import Architecture
from imgcls.models.libraries.base import NetworkLibrary
from imgcls.models.libraries.open_clip_library import OpenClipLibrary
from imgcls.models.libraries.own_library import OwnLibrary
from imgcls.models.libraries.timm_library import TimmLibrary
from imgcls.models.libraries.torchvision_library import TorchvisionLibrary
from imgcls.models.libraries.transformers_library import TransformersLibrary

LIBRARIES: tuple[NetworkLibrary, ...] = (
    OwnLibrary(),
    TorchvisionLibrary(),
    TimmLibrary(),
    TransformersLibrary(),
    OpenClipLibrary(),
)
_BY_SOURCE = {library.source: library for library in LIBRARIES}


def find_library(architecture: Architecture) -> NetworkLibrary:
    """The library that defines a network."""
    return _BY_SOURCE[architecture.source]
