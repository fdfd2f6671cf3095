"""Import of large packages when a process starts.

Every process of a job pays for its imports before it does any work: torch alone takes more than a
CPU second.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import sys
from collections.abc import Iterator


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


@functools.cache
def skip_collection_at_exit() -> None:
    """Let this process end without a search for garbage among all that it has imported.

    The interpreter collects garbage several times while it ends: 0.8 CPU seconds after torch and
    Ray were imported. A process that has imported DuckDB collects it as usual: DuckDB reports
    objects that it still finds at the end as leaks, on stderr.
    """
    atexit.register(_freeze_collector)


def _freeze_collector() -> None:
    if "_duckdb" not in sys.modules:
        gc.freeze()
