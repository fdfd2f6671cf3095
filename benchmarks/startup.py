"""Where the seconds before the first prediction go: every process of a small job, and its time.

    python -m benchmarks.startup [--rows 400] [--model resnet18] [--chart docs/startup.svg]

Runs `imgcls predict` with chunks of 32 rows and looks at its processes ten times a second: when
each was there first, and the processor time that it had used when the first prediction was durable
and in the end. The chart has the steps of each process; sampling them takes 2% of the time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import stack_sampler
from benchmarks.machine import CORES, read_cpu
from benchmarks.startup_chart import ProcessTrack, read_samples, render_chart
from benchmarks.workloads import SAMPLE, make_bundle, write_manifest

NAMES = {
    "raylet/raylet": "Ray: raylet",
    "gcs_server": "Ray: global control store",
    "log_monitor.py": "Ray: log monitor",
    "monitor.py": "Ray: autoscaler",
    "dashboard.py": "Ray: dashboard",
    "dashboard/agent.py": "Ray: dashboard agent",
    "DashboardAgent": "Ray: dashboard agent",
    "RuntimeEnvAgent": "Ray: runtime environment agent",
    "runtime_env/agent": "Ray: runtime environment agent",
    "_StatsActor": "Ray Data: statistics",
    "AutoscalingCoordinator": "Ray Data: autoscaling",
    "ActorLocationTracker": "Ray Data: places of actors",
    "MapWorker": "worker",
    "worker_forks.py": "process that forks workers",
    "default_worker.py": "Ray: process without work",
    "imgcls.cli": "driver",
}


@dataclass
class Seen:
    """A process: when it was there first, what it is, and the processor seconds that it has used.

    at_first: those until the first prediction was durable
    """

    since: float
    name: str
    used: float
    at_first: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--chart", type=Path, help="SVG file to write")
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="imgcls-startup-") as name:
        folder = Path(name)
        command = [
            *(sys.executable, "-m", "imgcls.cli", "predict"),
            *("--manifest", str(write_manifest(folder, SAMPLE, options.rows))),
            *("--model", str(make_bundle(folder, options.model))),
            *("--output", str(folder / "out"), "--chunk-rows", "32"),
        ]
        samples = install_sampler(folder) if options.chart else None
        seen, first, origin = watch(command, folder / "out", samples)
        if samples is not None:
            title = f"imgcls predict, {options.model}, {read_cpu_name()}, {CORES} cores"
            tracks = [
                ProcessTrack(
                    process.name,
                    process.since,
                    process.at_first,
                    read_samples(samples / f"{pid}.jsonl", origin),
                )
                for pid, process in seen.items()
                if process.since < first and process.name in NAMES.values()
            ]
            options.chart.write_text(render_chart(title, tracks, first))


def install_sampler(folder: Path) -> Path:
    """A folder for samples, with the sampler in the folder `site` within it."""
    site = folder / "samples" / "site"
    site.mkdir(parents=True)
    shutil.copy(stack_sampler.__file__, site / "sitecustomize.py")
    return site.parent


def read_cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def watch(
    command: list[str], output: Path, samples: Path | None
) -> tuple[dict[int, Seen], float, float]:
    """Run the job and print its times.

    Returns the processes by pid, the seconds until the first prediction, and the time of the
    command as in `time.time()`.
    """
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    if samples is not None:
        environment[stack_sampler.SAMPLES_VARIABLE] = str(samples)
        paths = [str(samples / "site"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    origin, start = time.time(), time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    marks: list[tuple[float, str]] = []

    def listen() -> None:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith(("plan", "committed")):
                marks.append((time.perf_counter() - start, line.split()[0]))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    seen: dict[int, Seen] = {}
    first = None
    while job.poll() is None:
        now = time.perf_counter() - start
        look(job.pid, seen, now)
        if first is None and any(output.glob("_staging/part-00000/chunk-*.parquet")):
            first = now
            for process in seen.values():
                process.at_first = process.used
        time.sleep(0.1)
    thread.join()
    marks += [(first or 0.0, "first predictions durable"), (time.perf_counter() - start, "exit")]
    print("seconds after the command")
    for moment, what in sorted(marks):
        print(f"  {moment:6.1f}  {what}")
    print("\nthere from   processor seconds   by the end   process")
    for process in sorted(seen.values(), key=lambda each: each.since):
        print(
            f"{process.since:10.1f} {process.at_first:19.2f} {process.used:12.2f}   {process.name}"
        )
    total = sum(process.at_first for process in seen.values())
    print(f"{'':10} {total:19.2f}                in all, until the first prediction")
    return seen, first or 0.0, origin


def look(pid: int, seen: dict[int, Seen], now: float) -> None:
    try:
        job = psutil.Process(pid)
        processes = [job, *job.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            times, words = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        used = times.user + times.system
        entry = seen.setdefault(process.pid, Seen(now, "", used))
        entry.used = used
        known = [name for sign, name in NAMES.items() if sign in words]
        entry.name = known[0] if known else entry.name or words[:60]


if __name__ == "__main__":
    main()
