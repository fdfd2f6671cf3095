"""Whole programs run as commands: `imgcls predict` and peers, with their rates and labels.

A peer whose labels differ from those of imgcls by more than the precision explains does other work:
it has no rate.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks import peers
from benchmarks.workloads import read_manifest

TIMEOUT_S = 1200
"""Of a peer, in seconds."""
MIN_AGREEMENT = 0.95
"""Minimum share of the rows of known images with the label of imgcls at the same precision. With
ResNet-18 and 56 images, bfloat16 instead of float32 gave 1.0, BGR instead of RGB 0.64, and pixels
that are not normalized 0.02."""


class PeerFailed(Exception):
    """A peer without a rate; the text has the reason."""


@dataclass(frozen=True)
class Rate:
    """A measurement.

    precision: empty for decoding alone
    value: images/s
    agreement: share of the rows of known images with the label of imgcls; None for a peer with
        weights of its own
    """

    name: str
    precision: str
    value: float
    agreement: float | None = None


def measure_imgcls(
    bundle: Path, manifest: Path, output: Path, precision: str = "auto", engine: str = "auto"
) -> tuple[float, float | None]:
    """Images per second of `imgcls predict`: of the whole command, and after start-up.

    The latter is None for a run without a second chunk per worker.
    """
    command = [
        *(sys.executable, "-m", "imgcls.cli", "predict", "--manifest", str(manifest)),
        *("--model", str(bundle), "--output", str(output)),
        *("--precision", precision, "--engine", engine),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    success: dict[str, Any] = json.loads((output / "_SUCCESS").read_text())
    return success["rows"] / whole, success["steady_images_per_second"]


def read_imgcls_labels(output: Path, known: Iterable[Path]) -> dict[str, int]:
    """The class of known images in the predictions of a bundle of `workloads.make_bundle`."""
    table = pq.read_table(output / "predictions", columns=["path", "predicted_label"])
    labels = [int(label.removeprefix("class ")) for label in table["predicted_label"].to_pylist()]
    found = dict(zip(table["path"].to_pylist(), labels, strict=True))
    return {str(path): found[str(path)] for path in known if str(path) in found}


def measure_peer(
    name: str,
    bundle: Path,
    manifest: Path,
    output: Path,
    precision: str,
    expected: Mapping[str, int],
    packages: Path,
) -> Rate:
    """The rate of a peer's whole program.

    precision: at which the peer runs
    expected: class by path, of known images
    packages: folder of the packages of Daft
    Raises PeerFailed.
    """
    command = [
        *(sys.executable, "-m", "benchmarks.peers", name),
        *(str(bundle), str(manifest), str(output), precision),
    ]
    environment = dict(os.environ)
    if name.startswith("Daft"):
        if not packages.is_dir():
            raise PeerFailed(
                f"no folder {packages}; run `make bench`, or pass one with --daft-packages"
            )
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"not finished after {TIMEOUT_S} s") from None
    took = time.perf_counter() - start
    if done.returncode:
        raise PeerFailed(f"failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    found = read_peer_labels(output)
    rows = len(read_manifest(manifest))
    compared = None if peers.has_own_weights(name, bundle) else expected
    return Rate(name, precision, rows / took, check_labels(found, rows, compared))


def read_peer_labels(output: Path) -> list[tuple[str, int]]:
    """Path and class of each row that a peer wrote: a CSV file or a folder of Parquet files."""
    if output.is_dir():
        table = pq.read_table(output, columns=["path", "predicted"])
        return list(zip(table["path"].to_pylist(), table["predicted"].to_pylist(), strict=True))
    with output.open(newline="") as stream:
        return [(row["path"], int(row["predicted"])) for row in csv.DictReader(stream)]


def check_labels(
    found: list[tuple[str, int]], rows: int, expected: Mapping[str, int] | None
) -> float | None:
    """The share of rows with the expected class; None without expected ones.

    rows: of the manifest
    expected: class by path; rows of other paths are not compared
    Raises PeerFailed if rows are missing, or too few have the expected class.
    """
    if len(found) != rows:
        raise PeerFailed(f"not comparable: {len(found):,} rows written of {rows:,}")
    if expected is None:
        return None
    compared = [expected[path] == label for path, label in found if path in expected]
    agreement = sum(compared) / len(compared)
    if agreement < MIN_AGREEMENT:
        raise PeerFailed(
            f"not comparable: {agreement:.1%} of the labels are those of imgcls, "
            f"at least {MIN_AGREEMENT:.0%} needed"
        )
    return agreement
