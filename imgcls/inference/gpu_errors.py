"""Errors of a GPU in a worker that labels: no memory left, or a device that has failed.

Imports no torch: the driver of a run does not need it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from imgcls.errors import RunFailed, one_line


@contextlib.contextmanager
def handle_gpu_errors(batch_size: int) -> Iterator[None]:
    """Convert errors of the GPU in the block.

    Without memory, RunFailed with the setting to change is raised. A failed device ends the
    process; Ray starts another one, and the attempt at the chunk counts as a crash, so that an
    image that causes it is found.
    """
    import torch

    from imgcls.data.cuda import exit_on_device_failure

    try:
        with exit_on_device_failure():
            yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(describe_out_of_memory(error, batch_size)) from error


def describe_out_of_memory(error: Exception, batch_size: int) -> str:
    """The message for a GPU without enough memory for a batch size."""
    return (
        f"a GPU of {socket.gethostname()} has not enough memory for batches of {batch_size}: "
        f"{one_line(error)}. Set a smaller --scale.batch-size, with --overwrite if the run has "
        "already finished chunks"
    )
