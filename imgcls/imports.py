"""Import of large packages when a process starts.

Every process of a job pays for its imports before it does any work: torch alone takes more than a
CPU second.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import version
from types import ModuleType

META_KERNELS = "torch._meta_registrations"
CHECKED_TORCH = "2.14"
"""Version of torch whose import was checked without `META_KERNELS`."""
COMPILER_PACKAGES = ("torch._dynamo", "torch._inductor")
"""Packages of torch's compiler, which can be imported after `META_KERNELS` only. None of them is
imported by it."""


@contextlib.contextmanager
def pause_collector() -> Iterator[None]:
    """Within the block, run no garbage collection.

    Modules stay until the process ends, but collections visit all of their objects again and again:
    a quarter of the time of torch's import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_torch() -> ModuleType:
    """Import torch without the kernels for meta tensors, which have a shape and no data.

    They are a fifth of torch's import, and are imported with torch's compiler, when it is needed.
    Before that, an operation on a meta tensor raises NotImplementedError; `import_meta_kernels`
    imports them for one.

    For processes that run no other code than this package's. Imports torch as a whole if it is not
    the version that was checked, or if it was imported before.
    """
    with pause_collector():
        if "torch" in sys.modules or not version("torch").startswith(f"{CHECKED_TORCH}."):
            return importlib.import_module("torch")
        sys.modules[META_KERNELS] = ModuleType(META_KERNELS)
        try:
            torch = importlib.import_module("torch")
        finally:
            del sys.modules[META_KERNELS]
        del torch._meta_registrations
        sys.meta_path.insert(0, _MetaKernelsFirst())
        return torch


class _MetaKernelsFirst(MetaPathFinder):
    """Imports the kernels before the first package that needs them; finds no module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname.startswith(COMPILER_PACKAGES) and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_meta_kernels()


def import_meta_kernels() -> None:
    """Import the kernels that `import_torch` has left out, if it has."""
    importlib.import_module(META_KERNELS)
