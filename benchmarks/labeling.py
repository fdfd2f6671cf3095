"""Throughput of `imgcls predict` against the limits of this machine and against other tools.

    python -m benchmarks.labeling [--models resnet18] [--images imagenet] [--rows 4000]
                                  [--repeats 3] [--peers all] [--limits all] [--engines auto]

Over the same files, in turn, in one run, and reported as medians, in images per second:
  limits  decoding alone by each route, the network alone, both together, in bare processes, with
          the first of --engines ("auto": OpenVINO where it is installed)
  imgcls  `imgcls predict` as a user runs it; the whole command, and after start-up
  peers   Ray Data, Daft, timm, a DataLoader loop, Hugging Face's pipeline, OpenVINO and ONNX
          Runtime, each as documented and tuned; the whole program, from its imports to its output
A tuned peer runs at the precision that a short measurement finds the fastest for its network on
this CPU; imgcls runs at its own and at each precision of a peer, and both are compared at equal
precision. The networks have random weights; their heads recognize 100 of the images, and a peer
that gives them other labels than imgcls is not compared. Prints a table, and leaves a bar chart and
a Parquet file with a description of the machine in bench-results/.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

from benchmarks import exported_peers, limits, peers, precisions
from benchmarks.labeling_results import format_table, write_results
from benchmarks.machine import read_cpu
from benchmarks.programs import (
    PeerFailed,
    Rate,
    measure_imgcls,
    measure_peer,
    read_imgcls_labels,
)
from benchmarks.workloads import (
    KINDS,
    SAMPLE,
    list_known_images,
    make_bundle,
    make_images,
    mean_size,
    write_manifest,
)
from imgcls.models.bundle import EngineName
from imgcls.models.openvino_package import is_openvino_installed

LIMITS = ("none", "engine", "all")
OWN_PRECISIONS = ("fp32", "bf16")
"""Precisions that imgcls has on CPUs, other than int8."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
        for model in options.models:
            for kind in options.images:
                folder = Path(name) / f"{model}-{kind}"
                folder.mkdir()
                measure(model, kind, folder, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--images", nargs="+", default=["imagenet"], choices=KINDS)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["all"], help="all, tuned, or names of peers")
    parser.add_argument("--peer-repeats", type=int, default=1, help="some take minutes")
    parser.add_argument(
        "--limits",
        choices=LIMITS,
        default="all",
        help="engine: decoding and the network together, with the engine of imgcls; no other",
    )
    parser.add_argument("--engines", nargs="+", default=["auto"], help="of imgcls; first: compared")
    parser.add_argument("--source", type=Path, default=SAMPLE, help="a folder of photographs")
    parser.add_argument(
        "--daft-packages",
        type=Path,
        default=Path(sys.prefix) / "daft",
        help="folder with Daft and the packages that it requires",
    )
    options = parser.parse_args()
    if not options.source.is_dir():
        parser.error(f"no folder {options.source}; name one of photographs with --source")
    unknown = set(options.peers) - {"all", "tuned", *peers.PEERS}
    if unknown:
        parser.error(f"no peer {unknown.pop()!r}; there are {', '.join(peers.PEERS)}")
    return options


def measure(model: str, kind: str, folder: Path, options: argparse.Namespace) -> None:
    cpu = read_cpu()
    images = make_images(kind, options.source, folder)
    manifest = write_manifest(folder, images, options.rows)
    bundle = make_bundle(folder, model, images)
    print(
        f"{model}, {kind} images of {mean_size(images) / 1000:.0f} KB, {options.rows:,} rows; "
        f"{cpu}",
        flush=True,
    )
    names = select_peers(options.peers)
    if any(peers.PEERS[name].engine != "torch" for name in names):
        exported_peers.export_network(bundle)
    forward, chosen = choose_precisions(names, bundle)
    own, engine = find_own_precision(), choose_limit_engine(options.engines)
    rates: list[Rate] = []
    for repeat in range(options.repeats):
        for what in choose_limits(options.limits, is_first=repeat == 0):
            value = limits.measure(what, bundle, manifest, own, engine)
            used = "" if what.startswith("decode") else own
            note(rates, Rate(f"limit: {what}", used, value))
        labels = {}
        for precision in dict.fromkeys([own, *chosen.values()]):
            if precision not in OWN_PRECISIONS:
                continue
            where = folder / f"out-{repeat}-{precision}"
            output = measure_engines(rates, bundle, manifest, where, precision, options.engines)
            labels[precision] = read_imgcls_labels(output, list_known_images(images))
        for name in names if repeat < options.peer_repeats else ():
            where, precision = folder / f"{name}-{repeat}", chosen[name]
            job = (name, bundle, manifest, where, precision)
            expected = labels.get(precision, labels[own])
            try:
                note(rates, measure_peer(*job, expected, options.daft_packages))
            except PeerFailed as reason:
                print(f"  {f'{name}, {precision}':<45} {reason}", flush=True)
    if options.limits != "none":
        print(f"\nlimits: engine {engine}", end="")
    print(f"\n{format_table(rates, cpu)}\n", flush=True)
    record = {
        "model": model, "images": kind, "rows": options.rows, "engines": options.engines,
        "limit_engine": engine if options.limits != "none" else None,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "forward_images_per_cpu_second": forward,
    }  # fmt: skip
    place = write_results(rates, record, cpu, options.daft_packages)
    print(f"written to {place}.parquet and .png\n")


def choose_limits(wanted: str, *, is_first: bool) -> list[str]:
    """The limits to measure in a repeat; those of single steps only in the first one.

    wanted: of `LIMITS`
    """
    if wanted == "none":
        return []
    if wanted == "engine":
        return ["both"]
    return [what for what in limits.WHAT if is_first or what.startswith("both")]


def choose_limit_engine(engines: list[EngineName]) -> EngineName:
    """The engine of the limits: the first one; OpenVINO for "auto" where it is installed.

    OpenVINO was the fastest on all CPUs measured. `imgcls predict` takes torch for few rows.
    """
    if engines[0] == "auto":
        return "openvino" if is_openvino_installed() else "torch"
    return engines[0]


def measure_engines(
    rates: list[Rate],
    bundle: Path,
    manifest: Path,
    where: Path,
    precision: str,
    engines: list[str],
) -> Path:
    """Measure imgcls at one precision with each engine; the output of the first one.

    where: outputs are written to folders with names that begin so
    """
    for engine in engines:
        output = where.with_name(f"{where.name}-{engine}")
        whole, steady = measure_imgcls(bundle, manifest, output, precision, engine)
        named = "imgcls" if engine == engines[0] else f"imgcls --engine {engine}"
        if steady is not None:
            note(rates, Rate(f"{named}, after start-up", precision, steady))
        note(rates, Rate(f"{named}, whole job", precision, whole))
    return where.with_name(f"{where.name}-{engines[0]}")


def select_peers(names: list[str]) -> list[str]:
    """The peers that are named; "all" and "tuned" stand for several."""
    return [
        name
        for name, peer in peers.PEERS.items()
        if "all" in names or name in names or (peer.tuned and "tuned" in names)
    ]


def find_own_precision() -> str:
    """The precision that imgcls takes by itself on this CPU."""
    import torch

    from imgcls.models.precision import choose_precision

    return choose_precision("auto", torch.device("cpu"))[0]


def choose_precisions(
    names: list[str], bundle: Path
) -> tuple[dict[peers.Engine, dict[str, float]], dict[str, str]]:
    """Rates of forward passes by engine and precision, for tuned peers; the precision of each peer.

    A documented peer has the precision that its engine takes by itself.
    """
    tuned = {peers.PEERS[name].engine for name in names if peers.PEERS[name].tuned}
    documented = {peers.PEERS[name].engine for name in names if not peers.PEERS[name].tuned}
    rates = precisions.measure_engines(tuned, bundle)
    fastest = {engine: precisions.choose_precision(each) for engine, each in rates.items()}
    usual = {each: precisions.find_default_precision(each, bundle) for each in documented}
    for engine, each in rates.items():
        measured = ", ".join(f"{precision} {rate:.1f}" for precision, rate in each.items())
        print(f"  forward by {engine}, images per CPU second: {measured}; tuned: {fastest[engine]}")
    chosen = {}
    for name in names:
        peer = peers.PEERS[name]
        chosen[name] = (fastest if peer.tuned else usual)[peer.engine]
    return rates, chosen


def note(rates: list[Rate], rate: Rate) -> None:
    """Keep a measurement, and print it."""
    rates.append(rate)
    agreement = "" if rate.agreement is None else f", labels agree {rate.agreement:.1%}"
    named = f"{rate.name}{', ' * bool(rate.precision)}{rate.precision}"
    print(f"  {named:<45} {rate.value:8.1f} images/s{agreement}", flush=True)


if __name__ == "__main__":
    main()
