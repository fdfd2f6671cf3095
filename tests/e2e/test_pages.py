"""The commands of the documentation pages, run one after another.

Files and buckets that a page assumes are created first, under the names that the page uses.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
import torch

from imgcls.cli import COMMANDS
from imgcls.models import zoo
from tests.conftest import COLORS, write_manifest
from tests.e2e.conftest import Demonstrated
from tests.processes import BIN, REPOSITORY, RayCluster, imgcls, kill_family
from tests.s3 import environment
from tests.test_docs import PAGES

pytestmark = pytest.mark.timeout(1800)

HUB = {"resnet18": "resnet18-f37072fd.pth", "resnet50": "resnet50-11ad3fa6.pth"}
"""File names of weights in torchvision's download cache, which stands in for the network."""
STANDS_FOR = {
    "M": "test.csv",
    "BUNDLE": "demo/bundle",
    "OUT": "labelled-out",
    "/tmp/tonight": "tonight-listed",
    "...": "--manifest test.csv --output labeled-int8",
    "s3://photos/labels/tonight": "s3://photos/labels/date=2026-11-01",
    "demo/cluster-labels": "demo/predictions",
}
EVALUATE = ("evaluate", "--manifest", "test.csv", "--model", "bundle/", "--output")
REUSES_OUTPUT = ("train", "model import", "manifest build")
"""Commands for which pages use the same output name several times."""
SHELL = re.compile(r"(?:^ {4}\S.*\n(?:^ {4,}.*\n)*)", re.MULTILINE)


@pytest.fixture(scope="module")
def reader(
    demonstrated: Demonstrated, cluster: RayCluster, endpoint: str
) -> Iterator[Demonstrated]:
    """A folder with the demo and everything that the pages mention."""
    demo = Demonstrated(
        demonstrated.folder,
        {
            **cluster.environment(),
            **environment(endpoint),
            "TORCH_HOME": str(demonstrated.folder / "hub"),
        },
    )
    _tables(demo.folder)
    _weights(demo.folder)
    shutil.copytree(demo.folder / "demo" / "bundle", demo.folder / "bundle")
    _run_command(demo, *EVALUATE, "yesterday/")
    shutil.copytree(demo.folder / "yesterday", demo.folder / "tonight")
    with _buckets(demo, endpoint):
        yield demo


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every indented `imgcls ...` line of a page, continued lines joined: command and options."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ {4}(?:\S+/)?imgcls (.+)$", text, re.MULTILINE):
        words = shlex.split(line.partition(" && ")[0], comments=True)
        for count in (2, 1):
            name = " ".join(words[:count])
            if name in COMMANDS:
                yield name, words[count:]
                break


def pages() -> list[Path]:
    """Pages with commands, except the reference, whose commands are tested elsewhere."""
    return [page for page in PAGES if page.stem != "reference" and any(commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(reader: Demonstrated, page: Path, tmp_path: Path) -> None:
    demo = Demonstrated(tmp_path / "repository", reader.environment)
    shutil.copytree(reader.folder, demo.folder, symlinks=True)
    for name, words in commands(page):
        if name == "serve":  # servers are tested in test_serve.py
            continue
        words = [each for word in words for each in STANDS_FOR.get(word, word).split()]
        if name in REUSES_OUTPUT and "--output" in words:
            shutil.rmtree(demo.folder / words[words.index("--output") + 1], ignore_errors=True)
        if name == "train":
            words = [*words, "--epochs", "1"]
            if "timm" in words:  # its weights are downloaded
                del words[words.index("timm") - 1 : words.index("timm") + 1]
        if "out/" in words and not (demo.folder / "out").exists():
            _run_command(demo, *EVALUATE, "out/")
        if name == "calibrate" and not (demo.folder / "val").exists():
            # photos/ has too few validation images to choose a threshold
            held = "photos/" if page.stem == "README" else "bundle/validation.parquet"
            order = ("--model", "bundle", "--output", "val", "--scores")
            _run_command(demo, "predict", "--manifest", held, *order)
        _run_command(demo, *name.split(), *words)


def _run_command(demo: Demonstrated, *words: str) -> None:
    done = imgcls(*words, env=demo.environment, cwd=demo.folder, timeout=900)
    # int8 is rejected on processors without it
    refused = "int8" in " ".join(words) and "this CPU has none of" in done.stderr
    assert done.returncode == 0 or refused, (words, done.stdout, done.stderr)


def _tables(folder: Path) -> None:
    """Manifests of digits under the names of the pages, with slice columns."""
    for source, names in {"train": ("train", "val", "labelled"), "test": ("test", "truth")}.items():
        with (folder / "demo" / f"digits-{source}.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))[:240]
        for name in names:
            write_manifest(
                folder / f"{name}.csv",
                [
                    (str(folder / "demo" / row["path"]), row["label"], f"{i % 2}", f"site {i % 3}")
                    for i, row in enumerate(rows)
                ],
                ("path", "label", "camera", "site"),
            )


def _weights(folder: Path) -> None:
    """Random weights under the names of the pages and in the download cache."""
    network = zoo.build_network(zoo.resolve_architecture("squeezenet1_0"), len(COLORS))
    for weights, classes in (("squeezenet1_0", "imagenet"), ("weights", "classes")):
        torch.save(network.state_dict(), folder / f"{weights}.pth")
        (folder / f"{classes}.txt").write_text("\n".join(COLORS))
    sample = folder / "imagenet-sample"
    shutil.copytree(folder / "photos", sample)
    rows = [(f"{name}/{i}.jpg", name) for name in COLORS for i in range(30)]
    write_manifest(sample / "manifest.csv", rows, ("path", "label"))
    hub = folder / "hub" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    for name, file in HUB.items():
        torch.save(zoo.build_network(zoo.resolve_architecture(name), 1000).state_dict(), hub / file)


@contextlib.contextmanager
def _buckets(demo: Demonstrated, endpoint: str) -> Iterator[None]:
    """Bucket `photos` with images and the predictions of one night, and `models` with a bundle."""
    client: Any = boto3.session.Session(
        aws_access_key_id=demo.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=demo.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    ).resource("s3", endpoint_url=endpoint)
    buckets = [client.create_bucket(Bucket=name) for name in ("photos", "models")]
    try:
        for number, file in enumerate(sorted((demo.folder / "photos").rglob("*.jpg"))):
            buckets[0].upload_file(str(file), f"incoming/{number}.jpg")
        for file in (demo.folder / "demo" / "bundle").rglob("*"):
            if file.is_file():
                name = file.relative_to(demo.folder / "demo" / "bundle")
                buckets[1].upload_file(str(file), f"current/{name.as_posix()}")
        _run_command(
            *(demo, "predict", "--manifest", "s3://photos/incoming", "--model"),
            *("s3://models/current", "--output", "s3://photos/labels/date=2026-11-01"),
        )
        yield
    finally:
        for bucket in buckets:
            bucket.objects.delete()
            bucket.delete()


# ------------------------------------------------------------------ from nothing to a cluster


@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_the_cluster_page_can_be_followed_from_the_start(tmp_path: Path) -> None:
    """Runs in new namespaces: `ray stop` stops all visible Rays, and the ports are the default."""
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    way = page[page.index("## One machine") : page.index("## AWS")]
    typed = "".join(re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in SHELL.findall(way))
    assert typed.splitlines()[0] == "make venv && . .venv/bin/activate"
    assert typed.splitlines()[-1] == "ray stop"
    typed = typed.replace(
        "NAME ", '"$(ray job list | grep -o "raysubmit_[A-Za-z0-9]*" | head -1)" '
    )
    checkout = tmp_path / "imgcls"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, checkout], check=True)
    (checkout / ".venv").symlink_to(BIN.parent)
    script = f"set -eux; ip link set lo up; cd {checkout}\n{typed}"
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--net", "--mount-proc", "bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
    )
    try:
        printed, _ = process.communicate(timeout=1500)
    finally:
        kill_family(process.pid)
    assert process.returncode == 0, printed
    assert printed.count("succeeded") >= 3, printed
    assert f"committed  359 rows: {checkout}/demo/cluster-labels" in printed
