"""torchvision, without a second of every process's start.

An operator that no classifier has, `torchvision.ops.roi_align`, imports torch's compiler as soon as
torchvision is imported, to ask one thing of it later. Here it gets something to ask that imports
the compiler then.
"""

from __future__ import annotations

import sys
from types import ModuleType

_COMPILER_MODULE = "torch._dynamo.utils"


def is_compile_supported(device_type: str) -> bool:
    """What the compiler says, once somebody asks."""
    from torch._dynamo.utils import is_compile_supported as asked

    return bool(asked(device_type))


def _import_torchvision() -> ModuleType:
    if _COMPILER_MODULE in sys.modules:
        import torchvision

        return torchvision
    stand_in = ModuleType(_COMPILER_MODULE)
    stand_in.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    sys.modules[_COMPILER_MODULE] = stand_in
    try:
        import torchvision
    finally:
        del sys.modules[_COMPILER_MODULE]
    return torchvision


torchvision = _import_torchvision()
