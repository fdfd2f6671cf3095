"""Configuration of the workers of a job.

It is checked without torch and Ray, so that a wrong key is refused at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from imgcls.config import Section, UnitFloat


class ScaleConfig(Section):
    """Number and placement of workers."""

    layout: Literal["auto", "cpu", "gpu", "gpu_decode"] = "auto"
    """cpu: one worker per core runs every stage. gpu: CPUs decode for GPUs. gpu_decode: GPUs decode
    baseline JPEGs."""
    workers: PositiveInt | None = None
    """Number of model workers. Default: one per core, or one per GPU."""
    io_concurrency: PositiveInt = 16
    """Concurrent reads per worker."""
    batch_size: PositiveInt | None = None
    """Images per forward pass. Default: 32 on CPUs; on GPUs measured, or 128 for a short run."""
    cpu_decode_fraction: UnitFloat | None = None
    """Fraction of the chunks that CPUs decode wholly for GPUs that decode too. Default: measured,
    or 0 for a short run."""
    crash_retries: NonNegativeInt = 1
    """Retries of a chunk after a worker crash before its images are processed one at a time."""
    worker_timeout_s: PositiveFloat = 600.0
    """Maximum time without a finished image, in seconds; then the worker is killed and replaced.

    With an object store it must be more than three times storage.retry_timeout_s.
    """
    resource_timeout_s: PositiveFloat = 1800.0
    """Maximum wait for nodes or workers, in seconds."""
