"""Prediction from image files, from tar archives and from rows of Parquet files.

  python -m benchmarks.sources speed  [--rows 100000] [--repeats 3] [--model small_cnn]
  python -m benchmarks.sources memory [--rows 20000]

speed   small JPEG files; the same images in 100 WebDataset archives; the same as rows of 10
        Parquet files. Prediction after start-up, in turn, as medians; ratios are of one turn.
memory  JPEG files of 100 KB; the same as rows of a Parquet file with one row group, and with row
        groups of 1,000 rows. The largest memory of one worker, without shared libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.machine import read_cpu
from benchmarks.programs import measure_imgcls
from benchmarks.workloads import make_bundle

_ARCHIVES, _TABLES = 100, 10
_PIXELS, _LARGE_PIXELS = 48, 400
_GROUP_ROWS = 1_000
_WORKER = "ray::"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="small_cnn")
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="imgcls-sources-") as folder:
        if options.what == "speed":
            compare_speed(Path(folder), options.rows or 100_000, options)
        else:
            compare_memory(Path(folder), options.rows or 20_000, options.model)


def compare_speed(folder: Path, rows: int, options: argparse.Namespace) -> None:
    bundle = make_bundle(folder, options.model)
    sources = {
        "files": write_files(folder / "files", rows, _PIXELS),
        "archives": write_archives(folder / "archives", rows),
        "tables": write_tables(folder / "tables", rows, _PIXELS, -(-rows // _TABLES), 10_000),
    }
    rates: dict[str, list[float]] = {name: [] for name in sources}
    print(f"{rows:,} JPEG images of {_PIXELS} pixels, {options.model}, images/s after start-up")
    for turn in range(options.repeats):
        for name, manifest in sources.items():
            output = folder / f"out-{name}-{turn}"
            _, steady = measure_imgcls(bundle, manifest, output)
            if steady is None:
                raise SystemExit(f"{rows:,} rows are one chunk per worker; pass more --rows")
            rates[name].append(steady)
        print("  ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items()), flush=True)
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["files"], strict=True)]
        print(
            f"{name:<9} {statistics.median(values):>8,.0f}  "
            f"{statistics.median(ratios):.2f} of files ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def compare_memory(folder: Path, rows: int, model: str) -> None:
    bundle = make_bundle(folder, model)
    sources = {
        "files": lambda: write_files(folder / "files", rows, _LARGE_PIXELS),
        f"row groups of {_GROUP_ROWS:,}": lambda: write_tables(
            folder / "small", rows, _LARGE_PIXELS, rows, _GROUP_ROWS
        ),
        "one row group": lambda: write_tables(folder / "one", rows, _LARGE_PIXELS, rows, rows),
    }
    print(
        f"{'source':<24} {'row group MB':>12} {'images/s':>9} {'worker MB':>10} {'driver MB':>10}"
    )
    for at, (name, write) in enumerate(sources.items()):
        manifest = write()
        size = _read_group_size(manifest)
        output = folder / f"out-{at}"
        worker, driver = measure_memory(bundle, manifest, output)
        success = json.loads((output / "_SUCCESS").read_text())
        rate = success["steady_images_per_second"] or 0.0
        print(
            f"{name:<24} {size:>12,.0f} {rate:>9,.0f} {worker:>10,.0f} {driver:>10,.0f}", flush=True
        )


def measure_memory(bundle: Path, manifest: Path, output: Path) -> tuple[float, float]:
    """The largest memory of one worker and of the driver, in MB: anonymous pages (USS)."""
    command = [
        *(sys.executable, "-m", "imgcls.cli", "predict", "--manifest", str(manifest)),
        *("--model", str(bundle), "--output", str(output)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver = psutil.Process(process.pid)
    workers, own = 0.0, 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            own = max(own, driver.memory_full_info().uss)
            for child in driver.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith(_WORKER):
                        workers = max(workers, child.memory_full_info().uss)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    return workers / 1e6, own / 1e6


def _read_group_size(manifest: Path) -> float:
    """MB of the first row group; 0 for files."""
    tables = sorted(manifest.glob("*.parquet"))
    if not tables or "image" not in pq.read_schema(tables[0]).names:
        return 0.0
    return float(pq.ParquetFile(tables[0]).metadata.row_group(0).total_byte_size / 1e6)


# ---------------------------------------------------------------------------- the images


def write_files(folder: Path, rows: int, pixels: int) -> Path:
    """JPEG files in folders of up to 1,000, and a manifest of them."""
    paths = []
    for at, data in enumerate(draw_images(rows, pixels)):
        path = folder / f"{at // 1000:03d}" / f"{at:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(str(path))
    pq.write_table(pa.table({"path": paths}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def write_archives(folder: Path, rows: int) -> Path:
    folder.mkdir()
    size = -(-rows // _ARCHIVES)
    images = enumerate(draw_images(rows, _PIXELS))
    for shard in range(-(-rows // size)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for at, data in _take(images, size):
                member = tarfile.TarInfo(f"{at:06d}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def write_tables(folder: Path, rows: int, pixels: int, table_rows: int, group_rows: int) -> Path:
    """Parquet files with a column `image` of structs of bytes and path, as Hugging Face has it."""
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind)])
    images = enumerate(draw_images(rows, pixels))
    for table, first in enumerate(range(0, rows, table_rows)):
        end = min(first + table_rows, rows)
        with pq.ParquetWriter(folder / f"{table:03d}.parquet", schema) as writer:
            for start in range(first, end, group_rows):
                structs = [
                    {"bytes": data, "path": f"{at:06d}.jpg"}
                    for at, data in _take(images, min(group_rows, end - start))
                ]
                writer.write_table(pa.table({"image": pa.array(structs, kind)}), len(structs))
    return folder


def _take(images: Iterator[tuple[int, bytes]], count: int) -> Iterator[tuple[int, bytes]]:
    for _ in range(count):
        following = next(images, None)
        if following is None:
            return
        yield following


def draw_images(rows: int, pixels: int) -> Iterator[bytes]:
    """Different slightly noisy JPEG images; the same ones for the same arguments."""
    size = pixels + 256
    noise = np.random.default_rng(0).integers(0, 24, (size, size, 3), np.uint8)
    base = noise + (np.arange(size)[:, None, None] * 200 // size).astype(np.uint8)
    for at in range(rows):
        top, left = divmod(at % 65_536, 256)
        yield _encode_jpeg(base[top : top + pixels, left : left + pixels] ^ np.uint8(at >> 16))


def _encode_jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


if __name__ == "__main__":
    main()
