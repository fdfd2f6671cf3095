"""Results of the labeling benchmark: a table, a bar chart, a Parquet file with a description."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import peers
from benchmarks.machine import ISA_LIMIT, Cpu
from benchmarks.programs import Rate

RESULTS = Path("bench-results")
LIMIT, PLAIN = "limit: both", "limit: both by torchvision"
WHOLE = "imgcls, whole job"
NOT_LIMITED = f"ONNX Runtime ignores {ISA_LIMIT}: its rows are those of the CPU as it is"
_PACKAGES = ("ray", "torch", "torchvision", "timm", "transformers", "openvino", "onnxruntime")

Medians = dict[tuple[str, str], float]
"""Images/s by name and precision."""


def compute_medians(rates: list[Rate]) -> Medians:
    """The median of each name and precision, in the order of the first measurements."""
    values: dict[tuple[str, str], list[float]] = {}
    for rate in rates:
        values.setdefault((rate.name, rate.precision), []).append(rate.value)
    return {key: statistics.median(each) for key, each in values.items()}


def format_table(rates: list[Rate], cpu: Cpu) -> str:
    """The medians as text, with the CPU; rows compared at equal precision only."""
    medians = compute_medians(rates)
    lines = [
        f"{'median':<38} {'precision':<9} {'images/s':>9} {'of the limit':>13} "
        f"{'of torchvision':>15} {'imgcls is':>10}"
    ]
    for (name, precision), value in medians.items():
        limits = [medians.get((each, precision)) for each in (LIMIT, PLAIN)]
        shares = [f"{value / limit:.0%}" if limit else "" for limit in limits]
        ours = medians.get((WHOLE, precision))
        ratio = f"{ours / value:.2f} x" if name in peers.PEERS and ours else ""
        lines.append(
            f"{name:<38} {precision:<9} {value:>9.1f} {shares[0]:>13} {shares[1]:>15} {ratio:>10}"
        )
    lines.append("imgcls as a whole job and each peer as a whole program, at equal precision")
    if cpu.isa_limit and any(name.startswith("ONNX Runtime") for name, _ in medians):
        lines.append(NOT_LIMITED)
    lines.append(f"CPU: {cpu}")
    return "\n".join(lines)


def write_results(rates: list[Rate], record: Mapping[str, Any], cpu: Cpu, packages: Path) -> Path:
    """Write all measurements and a chart of their medians; the path without its suffix.

    record: description of the run, with `model`, `images` and `rows`
    """
    RESULTS.mkdir(exist_ok=True)
    described = {
        **record, "cpu": cpu.to_json(), "system": platform.platform(),
        "python": platform.python_version(), "versions": read_versions(packages),
    }  # fmt: skip
    columns = ("name", "precision", "images_per_second", "labels_agree")
    rows = [(rate.name, rate.precision, rate.value, rate.agreement) for rate in rates]
    table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    table = table.replace_schema_metadata({"imgcls.benchmark": json.dumps(described)})
    limited = "" if cpu.isa_limit is None else f"-{cpu.isa_limit.lower()}"
    place = RESULTS / f"labeling-{record['model']}-{record['images']}{limited}"
    pq.write_table(table, f"{place}.parquet")
    title = f"{record['model']}, {record['rows']:,} {record['images']} images"
    draw_chart(compute_medians(rates), title, str(cpu), Path(f"{place}.png"))
    return place


def read_versions(packages: Path) -> dict[str, str]:
    """Versions of the tools that are installed, of Daft in its own folder of packages."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for found in importlib.metadata.distributions(name="daft", path=[str(packages)]):
        versions["daft"] = found.version
    return versions


def draw_chart(medians: Medians, title: str, subtitle: str, file: Path) -> None:
    from matplotlib.figure import Figure

    shown = {
        f"{name}, {precision}": value
        for (name, precision), value in medians.items()
        if not name.startswith(("limit: decode", "limit: forward"))
    }
    figure = Figure(figsize=(9, 0.4 * len(shown) + 1.6), layout="constrained")
    figure.suptitle(title)
    axis = figure.subplots()
    families = {"limit": "0.6", "imgcls": "tab:blue"}
    colors = [
        next((families[each] for each in families if name.startswith(each)), "tab:orange")
        for name in shown
    ]
    bars = axis.barh(list(shown), list(shown.values()), color=colors)
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("images per second")
    axis.set_title(subtitle, fontsize="small", wrap=True)
    figure.savefig(file, dpi=120)
