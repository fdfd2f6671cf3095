"""Environment variables that are set for a block of code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def set_env_defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Within the block, set environment variables that the user has not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
