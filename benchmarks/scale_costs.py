"""What a run of any size takes, by calculation: objects, requests, memory, a resume, and prices.

    python -m benchmarks.scale paper [--rows 1000000 10000000 100000000 1000000000]
    python -m benchmarks.scale cost  [--vcpu-hour 0.02] [--gpu-hour 0.30]

The requests of a chunk are those that `tests/execution/test_completed.py` and
`tests/inference/test_rollup.py` count on a store. The driver's tasks are really made, in a process
of their own, and weighed. All prices are options, and assumptions of November 2026: they are not
quoted from a price list.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from imgcls.data.storage import filesystem
from imgcls.execution.plan import DEFAULT_CHUNK_ROWS, Plan, choose_sizes

ROW_BYTES = 128
"""Size of an output row in Parquet that the plan expects."""
CHUNK_PUTS, CHUNK_GETS = 1, 2
"""Requests of a chunk: it is looked for, written, and read by the roll-up."""
PART_PUTS, PART_GETS = 2, 4
"""Requests of a part: it is written as a shard and as a final file; the roll-up reads the shard by
three requests, and `_run.json`. Its chunks are listed, 1,000 at a time, to be removed."""
PAGE = 1000
"""Names in a page of a listing."""
BLOCK_BYTES = 40_000
"""Memory of the driver for a block of chunks in Ray Data."""
RENEWAL_S, CHECK_S = 6, 5
"""Seconds between two renewals of the lease (a PUT and a listing), and between two checks."""
CONCURRENT_BLOCKS, HASHED_PER_S = 8, 0.8e9
"""Requests for the manifest at a time, and bytes of it that a core hashes per second (AMD EPYC)."""

CORE_RATES = {
    "MobileNetV3-Small": 486.8 / 2,
    "SqueezeNet 1.1": 327.4 / 2,
    "ResNet-18": 268.4 / 2,
    "ResNet-50": 128.3 / 2,
    "ViT-B/16": 30.3 / 2,
}
"""Images/s of one core of a Xeon with AMX, bfloat16, photographs of 106 KB, from
docs/performance.md: `imgcls predict` after start-up on two cores."""
PUBLISHED = {
    "Ray Data 2.50 on g6.xlarge": (1, 4, 803_580 / 456 / 8, "Ray's documentation"),
    "Ray Data 2.50 on g6.8xlarge": (1, 32, 803_580 / 111 / 8, "Ray's documentation"),
    "Daft 0.6.2 on g6.xlarge": (1, 4, 803_580 / 315 / 8, "Ray's documentation"),
    "Daft 0.6.2 on g6.8xlarge": (1, 32, 803_580 / 195 / 8, "Ray's documentation"),
    "Daft on g6.xlarge": (1, 4, 803_580 / 263 / 8, "Daft's README"),
}
"""ResNet-18 over 803,580 ImageNet files from S3 on eight machines of one L4 each: GPUs and vCPUs of
a machine, its images/s over the whole job, and who published them."""


@dataclass(frozen=True)
class Run:
    """What a run of some rows is made of.

    workers: number of processes that take blocks of chunks
    hours:   duration, on which the requests for the lease depend
    """

    plan: Plan
    workers: int
    hours: float

    @property
    def objects(self) -> int:
        """Objects written: chunks, shards and final files."""
        return self.plan.num_chunks + 2 * self.plan.num_parts

    @property
    def puts(self) -> int:
        """Requests at the price of a PUT: writes and listings."""
        seconds = self.hours * 3600
        lease = seconds / CHECK_S + 2 * seconds / RENEWAL_S
        pages = self.plan.num_parts * math.ceil(len(self.plan.chunks_of(0)) / PAGE)
        parts = PART_PUTS * self.plan.num_parts + pages
        return round(CHUNK_PUTS * self.plan.num_chunks + parts + lease)

    @property
    def gets(self) -> int:
        """Requests at the price of a GET, without the images."""
        return CHUNK_GETS * self.plan.num_chunks + PART_GETS * self.plan.num_parts

    @property
    def staged_chunks(self) -> int:
        """Chunks that wait for their roll-up at most: every worker is at a part of its own, or at
        a block of it."""
        block = min(256, 262_144 // self.plan.chunk_rows)
        block = min(block, max(1, self.plan.num_chunks // (8 * self.workers)))
        parts = min(self.plan.num_parts, math.ceil(self.workers * block / self._part_chunks) + 1)
        return parts * self._part_chunks

    @property
    def resume_pages(self) -> int:
        """Pages of the listings of a resume: final files, shards twice, staged chunks."""
        files = 3 * math.ceil(self.plan.num_parts / PAGE)
        return files + math.ceil(self.staged_chunks / PAGE)

    @property
    def _part_chunks(self) -> int:
        return len(self.plan.chunks_of(0))


def make_run(
    rows: int, *, chunk_rows: int | None = None, workers: int = 1000, hours: float = 24
) -> Run:
    """The run of a manifest with some rows, with chunks as `imgcls predict` chooses them."""
    sizes = choose_sizes(rows, chunk_rows=chunk_rows, part_rows=1_000_000, row_bytes=ROW_BYTES)
    return Run(Plan("0123456789ab", rows, *sizes), workers, hours)


def show_growth(options: argparse.Namespace) -> None:
    """A line for each number of rows and size of chunks.

    The seconds of a resume are those of the driver before work starts: it hashes the manifest,
    lists the finished files and makes its tasks. The start of Ray and of the workers is not in it.
    """
    print(
        f"{'rows':>14} {'per chunk':>10} {'objects':>10} {'per million':>12} {'PUT, LIST':>11} "
        f"{'GET':>10} {'USD':>6} {'driver MB':>10} {'blocks':>7} {'CPU s':>6} "
        f"{'resume: pages':>14} {'manifest GETs':>14} {'s':>6}"
    )
    for rows in options.rows or [10**6, 10**7, 10**8, 10**9]:
        for chunk_rows in (
            (options.chunk_rows,) if options.chunk_rows else (None, DEFAULT_CHUNK_ROWS)
        ):
            run = make_run(
                rows, chunk_rows=chunk_rows, workers=options.workers, hours=options.hours
            )
            weighed = weigh_driver(run)
            usd = (run.puts * options.put_price + run.gets * options.get_price) / 1e6
            size = rows * options.manifest_bytes
            reads = math.ceil(size / filesystem.BLOCK_BYTES)
            waits = options.latency * (run.resume_pages + reads / CONCURRENT_BLOCKS)
            seconds = weighed["cpu"] + size / HASHED_PER_S + waits
            print(
                f"{rows:>14,} {run.plan.chunk_rows:>10,} {run.objects:>10,} "
                f"{run.objects / rows * 1e6:>12,.0f} {run.puts:>11,} {run.gets:>10,} {usd:>6.2f} "
                f"{weighed['megabytes']:>10,.0f} {weighed['blocks']:>7,} {weighed['cpu']:>6.1f} "
                f"{run.resume_pages:>14,} {reads:>14,} {seconds:>6,.0f}",
                flush=True,
            )


def weigh_driver(run: Run) -> dict[str, Any]:
    """Memory in MB and CPU seconds of the driver for its tasks, as a resume of nothing makes them.

    Ray Data's share is added by blocks, see `imgcls.execution.pipeline`.
    """
    plan = run.plan
    command = [
        sys.executable, "-m", "benchmarks.scale_costs", str(plan.rows), str(plan.chunk_rows),
        str(plan.part_rows), str(run.workers),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, blocks, cpu = map(float, done.stdout.split())
    return {"megabytes": megabytes + blocks * BLOCK_BYTES / 1e6, "blocks": int(blocks), "cpu": cpu}


def weigh(rows: int, chunk_rows: int, part_rows: int, workers: int) -> None:
    """In a process of its own: make the tasks and blocks of a driver; print what they took."""
    from imgcls.execution.completed import CompletedChunks
    from imgcls.execution.pipeline import build_blocks

    def resident() -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return int(next(line for line in status if line.startswith("VmRSS")).split()[1])

    before, start = resident(), time.process_time()
    completed = CompletedChunks("out", Plan("run", rows, chunk_rows, part_rows), set(), {})
    remaining = {task.chunk: task for task in completed.list_remaining()}
    blocks = build_blocks(list(remaining.values()), workers, chunk_rows)
    seconds = time.process_time() - start
    print((resident() - before) / 1000, len(blocks), seconds)


def show_costs(options: argparse.Namespace) -> None:
    """USD per million and per billion images: our measured rates, and published ones."""
    print(
        f"{'':>44} {'images/s':>9} {'USD/hour':>9} {'compute':>8} {'requests':>9} "
        f"{'USD per million':>16} {'per billion':>12}"
    )
    for network, rate in CORE_RATES.items():
        _show_cost(f"imgcls, {network}, one core", rate, options.vcpu_hour, options)
    if options.gpu_rate:
        price = options.gpu_hour + options.gpu_vcpus * options.vcpu_hour
        _show_cost("imgcls, one machine with a GPU", options.gpu_rate, price, options)
    for name, (gpus, vcpus, rate, source) in PUBLISHED.items():
        price = gpus * options.gpu_hour + vcpus * options.vcpu_hour
        _show_cost(f"{name} ({source})", rate, price, options)


def _show_cost(name: str, rate: float, price: float, options: argparse.Namespace) -> None:
    million, billion = (
        compute_cost(rows, rate, price, options.put_price, options.get_price)
        for rows in (10**6, 10**9)
    )
    print(
        f"{name:>44} {rate:>9,.1f} {price:>9.2f} {million[0]:>8.2f} {million[1]:>9.2f} "
        f"{sum(million):>16.2f} {sum(billion):>12,.0f}"
    )


def compute_cost(
    rows: int, rate: float, price: float, put_price: float, get_price: float
) -> tuple[float, float]:
    """USD of a run: its machines, and the requests for its images and chunks.

    rate, price: images/s, and USD per hour, of a core or machine
    """
    run = make_run(rows, hours=0)
    requests = run.puts * put_price + (run.gets + rows) * get_price
    return rows / rate / 3600 * price, requests / 1e6


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `paper` and `cost`."""
    parser.add_argument("--workers", type=int, default=1000, help="of paper")
    parser.add_argument("--hours", type=float, default=24, help="of paper: the run's duration")
    parser.add_argument("--manifest-bytes", type=float, default=40, help="of paper: per row")
    parser.add_argument("--latency", type=float, default=0.05, help="of paper: seconds per request")
    parser.add_argument("--vcpu-hour", type=float, default=0.02, help="of cost: USD, spot")
    parser.add_argument("--gpu-hour", type=float, default=0.30, help="of cost: USD, one L4, spot")
    parser.add_argument("--gpu-rate", type=float, help="of cost: images/s of your GPU machine")
    parser.add_argument("--gpu-vcpus", type=int, default=4, help="of cost: of that machine")


if __name__ == "__main__":
    weigh(*map(int, sys.argv[1:]))
