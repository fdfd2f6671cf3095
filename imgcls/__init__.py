"""Distributed batch image classification on Ray: fine-tune, label, evaluate and serve."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Classifier": "imgcls.models.classifier",
    "Client": "imgcls.client",
    "load_bundle": "imgcls.models.bundle",
    "train": "imgcls.training.train",
}
__all__ = ["Classifier", "Client", "__version__", "load_bundle", "train"]


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that `import imgcls` stays quick."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
