"""torchvision without its import of torch's compiler, which adds one second to a process's start.

`torchvision.ops.roi_align`, an operator for detection, imports the compiler for one function. It
gets a stand-in for this module, whose function imports the compiler when it is called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_COMPILER_MODULE = "torch._dynamo.utils"


def is_compile_supported(device_type: str) -> bool:
    """Same as `torch._dynamo.utils.is_compile_supported`, imported at the first call."""
    from torch._dynamo.utils import is_compile_supported as original

    return bool(original(device_type))


def _import_torchvision() -> ModuleType:
    if _COMPILER_MODULE in sys.modules:
        return importlib.import_module("torchvision")
    stand_in = ModuleType(_COMPILER_MODULE)
    stand_in.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    sys.modules[_COMPILER_MODULE] = stand_in
    try:
        return importlib.import_module("torchvision")
    finally:
        del sys.modules[_COMPILER_MODULE]


torchvision = _import_torchvision()
