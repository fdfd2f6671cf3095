"""The optional package OpenVINO: whether it is there, and its import without usage reports.

Imports no torch: a request is checked before workers start.
"""

from __future__ import annotations

import sys
from importlib import util
from typing import Any

from imgcls.errors import RequestError
from imgcls.models.bundle import EngineName

INSTALL = "pip install 'imgcls[openvino]'"


def is_openvino_installed() -> bool:
    """Whether the package is there; does not import it."""
    return util.find_spec("openvino") is not None


def check_engine(wanted: EngineName, *, compile: bool = False) -> None:
    """Raise RequestError if OpenVINO is wanted and cannot be used as requested.

    compile: whether the network is to be compiled
    """
    if wanted != "openvino":
        return
    if compile:
        raise RequestError(
            "engine openvino: takes no compiled network; use --engine torch, or set --compile never"
        )
    if not is_openvino_installed():
        raise RequestError(
            f"engine openvino: the package is not installed; run: {INSTALL}, or use --engine torch"
        )


def import_openvino() -> Any:
    """The package, without the usage reports that it sends to its vendor when it is imported."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    import openvino.preprocess

    return openvino
