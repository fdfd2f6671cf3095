"""What end-to-end tests of the documentation begin with: a folder in which the demo was run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from imgcls.models import zoo
from tests.conftest import COLORS, draw
from tests.processes import REPOSITORY, RayCluster, imgcls


@pytest.fixture(scope="package")
def joined(cluster: RayCluster) -> Iterator[None]:
    """This process is a driver of the test cluster, for commands by `run_here`."""
    with cluster.joined():
        yield


@dataclass(frozen=True)
class Demonstrated:
    """A folder in which the demo was run, and a cluster."""

    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def demonstrated(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Demonstrated:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("jobs", "manifests"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in COLORS:
        (folder / "photos" / name).mkdir(parents=True)
        for seed in range(30):
            draw(name, seed=seed).save(folder / "photos" / name / f"{seed}.jpg")
    for name in ("cat", "dog"):
        draw("red", (64, 64)).save(folder / f"{name}.jpg")
    network = zoo.build_network(zoo.resolve_architecture("resnet18"), 3)
    torch.save(network.state_dict(), folder / "resnet18.pth")
    (folder / "imagenet.txt").write_text("\n".join(COLORS))
    environment = cluster.environment()
    done = imgcls("demo", "--epochs", 2, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Demonstrated(folder, environment)
