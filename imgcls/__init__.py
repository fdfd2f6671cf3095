"""Distributed batch image classification on Ray: fine-tune, label, evaluate and serve."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

LAZY_EXPORTS = {
    "Classifier": ("imgcls.models.classifier", "Classifier"),
    "Client": ("imgcls.client", "Client"),
    "check": ("imgcls.curation.check", "check"),
    "embed": ("imgcls.inference.embed", "embed"),
    "evaluate": ("imgcls.evaluation.evaluate", "evaluate"),
    "find_similar": ("imgcls.evaluation.similar", "find_similar"),
    "import_labels": ("imgcls.curation.import_labels", "import_labels"),
    "label": ("imgcls.inference.predict", "predict"),
    "list_runs": ("imgcls.evaluation.overview.overview", "list_runs"),
    "load_bundle": ("imgcls.models.bundle", "load_bundle"),
    "relabel": ("imgcls.inference.relabel", "relabel"),
    "select": ("imgcls.evaluation.select", "select"),
    "train": ("imgcls.inference.students", "train_student"),
}
__all__ = [
    "Classifier",
    "Client",
    "__version__",
    "check",
    "embed",
    "evaluate",
    "find_similar",
    "import_labels",
    "label",
    "list_runs",
    "load_bundle",
    "relabel",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that `import imgcls` stays quick."""
    if name in LAZY_EXPORTS:
        module, attribute = LAZY_EXPORTS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What tab completion shows: also names that are not imported yet."""
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))
