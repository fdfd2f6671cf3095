"""Time and memory of the search for near duplicates: random hashes, some copied with bits changed.

    python -m benchmarks.duplicates [--hashes 10000 100000 1000000] [--copies 0.05] [--bits 0.02]

Each size runs in its own process; prints seconds, peak memory and the share of the copies found.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from benchmarks.machine import read_cpu
from benchmarks.processes import run_alone

SIZES = (10_000, 100_000, 1_000_000)
MAX_DISTANCE = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hashes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--copies", type=float, default=0.05)
    parser.add_argument("--bits", type=float, default=0.02)
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    print(f"{'hashes':>10}  {'seconds':>8}  {'peak MB':>8}  {'found':>7}")
    for count in options.hashes:
        seconds, peak, found = run_alone(measured, count, options.copies, options.bits)
        print(f"{count:>10,}  {seconds:>8.2f}  {peak:>8,.0f}  {found:>7.2%}", flush=True)


def measured(count: int, copies: float, bits: float) -> tuple[float, float, float]:
    """Seconds, peak memory of the process in MB, and the share of the copies found."""
    from imgcls.curation.checks.hash_search import find_near_pairs

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    planted = int(count * copies)
    source = rng.choice(count // 2, planted, replace=False)
    target = count // 2 + rng.choice(count - count // 2, planted, replace=False)
    noise = np.packbits(rng.random((planted, 256)) < bits, axis=1).view(np.uint64)
    hashes[target] = hashes[source] ^ noise
    mirror = rng.integers(0, 2**64, 4, dtype=np.uint64)
    began = time.perf_counter()
    pairs = find_near_pairs(hashes, mirror, max_distance=MAX_DISTANCE)
    seconds = time.perf_counter() - began
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    wanted = set(zip(source.tolist(), target.tolist(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds, peak, len(found & wanted) / planted


if __name__ == "__main__":
    main()
