"""The commands of the pages, run one after another as a reader would type them.

What a page takes for granted, files and buckets of the reader's own, is made beforehand under the
names that the page gives them.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
import torch

from imgcls.models import zoo
from tests.conftest import COLOURS, write_manifest
from tests.e2e.conftest import Demonstrated
from tests.processes import BIN, REPOSITORY, RayCluster, imgcls, kill_family
from tests.s3 import environment
from tests.test_docs import PAGES, commands

pytestmark = pytest.mark.timeout(1800)

HUB = {"resnet18": "resnet18-f37072fd.pth", "resnet50": "resnet50-11ad3fa6.pth"}
"""Where torchvision keeps the weights that it has downloaded: nothing can be here."""
STANDS_FOR = {
    "M": "test.csv",
    "BUNDLE": "demo/bundle",
    "OUT": "labelled-out",
    "/tmp/tonight": "tonight-listed",
    "...": "--manifest test.csv --output labelled-int8",
    "s3://photos/labels/tonight": "s3://photos/labels/date=2026-11-01",
    "demo/cluster-labels": "demo/predictions",
}
LABELLED = ("evaluate", "--manifest", "test.csv", "--model", "bundle/", "--output")
ANEW = ("train", "model import", "manifest build")
"""Commands for which pages use one name of an output again and again."""
SHELL = re.compile(r"(?:^ {4}\S.*\n(?:^ {4,}.*\n)*)", re.MULTILINE)


@pytest.fixture(scope="module")
def reader(
    demonstrated: Demonstrated, cluster: RayCluster, endpoint: str
) -> Iterator[Demonstrated]:
    """Somebody who has run the demo and has all that the pages speak of."""
    there = Demonstrated(
        demonstrated.folder,
        {
            **cluster.environment(),
            **environment(endpoint),
            "TORCH_HOME": str(demonstrated.folder / "hub"),
        },
    )
    _tables(there.folder)
    _weights(there.folder)
    shutil.copytree(there.folder / "demo" / "bundle", there.folder / "bundle")
    _types(there, *LABELLED, "yesterday/")
    shutil.copytree(there.folder / "yesterday", there.folder / "tonight")
    with _buckets(there, endpoint):
        yield there


def pages() -> list[Path]:
    """Those with commands; the reference repeats what `--help` has, which is run elsewhere."""
    return [page for page in PAGES if page.stem != "reference" and any(commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_can_be_run(
    reader: Demonstrated, page: Path, tmp_path: Path
) -> None:
    there = Demonstrated(tmp_path / "repository", reader.environment)
    shutil.copytree(reader.folder, there.folder, symlinks=True)
    for name, words in commands(page):
        if name == "serve":  # a server has tests of its own
            continue
        words = [each for word in words for each in STANDS_FOR.get(word, word).split()]
        if name in ANEW and "--output" in words:
            shutil.rmtree(there.folder / words[words.index("--output") + 1], ignore_errors=True)
        if name == "train":
            words = [*words, "--epochs", "1"]
            if "timm" in words:  # its weights come from a hub
                del words[words.index("timm") - 1 : words.index("timm") + 1]
        if "out/" in words and not (there.folder / "out").exists():
            _types(there, *LABELLED, "out/")
        if name == "calibrate" and not (there.folder / "val").exists():
            # of photos/ too few are held out of training to choose a threshold by
            held = "photos/" if page.stem == "README" else "bundle/validation.parquet"
            order = ("--model", "bundle", "--output", "val", "--scores")
            _types(there, "predict", "--manifest", held, *order)
        _types(there, *name.split(), *words)


def _types(there: Demonstrated, *words: str) -> None:
    done = imgcls(*words, env=there.environment, cwd=there.folder, timeout=900)
    # int8 is refused where the processor has none
    refused = "int8" in " ".join(words) and "does not multiply it" in done.stderr
    assert done.returncode == 0 or refused, (words, done.stdout, done.stderr)


def _tables(folder: Path) -> None:
    """Manifests of digits under the names of the pages, with columns to slice by."""
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
    """Weights of networks, drawn at random, where a hub and the reader would have put them."""
    network = zoo.build_network(zoo.resolve_architecture("squeezenet1_0"), len(COLOURS))
    for weights, classes in (("squeezenet1_0", "imagenet"), ("weights", "classes")):
        torch.save(network.state_dict(), folder / f"{weights}.pth")
        (folder / f"{classes}.txt").write_text("\n".join(COLOURS))
    sample = folder / "imagenet-sample"
    shutil.copytree(folder / "photos", sample)
    rows = [(f"{name}/{i}.jpg", name) for name in COLOURS for i in range(30)]
    write_manifest(sample / "manifest.csv", rows, ("path", "label"))
    hub = folder / "hub" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    for name, file in HUB.items():
        torch.save(zoo.build_network(zoo.resolve_architecture(name), 1000).state_dict(), hub / file)


@contextlib.contextmanager
def _buckets(there: Demonstrated, endpoint: str) -> Iterator[None]:
    """`photos` with what came in and a first night's labels, and `models` with the current one."""
    client: Any = boto3.session.Session(
        aws_access_key_id=there.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=there.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    ).resource("s3", endpoint_url=endpoint)
    buckets = [client.create_bucket(Bucket=name) for name in ("photos", "models")]
    try:
        for number, file in enumerate(sorted((there.folder / "photos").rglob("*.jpg"))):
            buckets[0].upload_file(str(file), f"incoming/{number}.jpg")
        for file in (there.folder / "demo" / "bundle").rglob("*"):
            if file.is_file():
                name = file.relative_to(there.folder / "demo" / "bundle")
                buckets[1].upload_file(str(file), f"current/{name.as_posix()}")
        _types(
            *(there, "predict", "--manifest", "s3://photos/incoming", "--model"),
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
def test_the_way_to_a_cluster_can_be_typed_as_it_is_written(tmp_path: Path) -> None:
    """In namespaces of its own: `ray stop` ends every Ray that it sees, the ports are Ray's own."""
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
        told, _ = process.communicate(timeout=1500)
    finally:
        kill_family(process.pid)
    assert process.returncode == 0, told
    assert told.count("succeeded") >= 3, told
    assert f"committed  359 rows: {checkout}/demo/cluster-labels" in told
