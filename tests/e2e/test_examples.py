"""What `--help` and the pages tell people to run, run: after the demo, as they are told to."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import requests
import torch

from imgcls.cli import COMMANDS
from imgcls.models import zoo
from tests.conftest import COLOURS, draw
from tests.processes import REPOSITORY, RayCluster, imgcls, started, wait_for
from tests.test_docs import PAGES, commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIRST = ["predict", "key new"]
"""Examples that others go on from."""
ELSEWHERE = {"nightly": "is a DAG for Airflow"}
"""Pages whose Python is for other programs."""


@dataclass(frozen=True)
class Demonstrated:
    """A folder in which the demo was run, and a cluster."""

    folder: Path
    environment: dict[str, str]


@pytest.fixture
def after_the_demo(demonstrated: Demonstrated, tmp_path: Path) -> Demonstrated:
    """A folder of the test's own in which the demo was run."""
    folder = shutil.copytree(demonstrated.folder, tmp_path / "repository", symlinks=True)
    return replace(demonstrated, folder=folder)


@pytest.fixture(scope="module")
def demonstrated(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Demonstrated:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("jobs", "manifests"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in COLOURS:
        (folder / "photos" / name).mkdir(parents=True)
        for seed in range(30):
            draw(name, seed=seed).save(folder / "photos" / name / f"{seed}.jpg")
    for name in ("cat", "dog"):
        draw("red", (64, 64)).save(folder / f"{name}.jpg")
    network = zoo.build(zoo.architecture("resnet18"), 3)
    torch.save(network.state_dict(), folder / "resnet18.pth")
    (folder / "imagenet.txt").write_text("\n".join(COLOURS))
    environment = cluster.environment()
    done = imgcls("demo", "--epochs", 2, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Demonstrated(folder, environment)


def test_the_example_of_every_command_can_be_run(after_the_demo: Demonstrated) -> None:
    there = after_the_demo
    order = sorted(COMMANDS, key=lambda name: (name not in FIRST, name in ("serve", "demo")))
    for name in order:
        words = shlex.split(COMMANDS[name].example)[1:]
        if name == "serve":
            with served(there, *words):
                continue
        done = imgcls(*words, env=there.environment, cwd=there.folder, timeout=400)
        # int8 is refused where the processor has none
        refused = name == "model quantise" and "does not multiply it" in done.stderr
        assert done.returncode == 0 or refused, (name, done.stdout, done.stderr)


@contextlib.contextmanager
def served(there: Demonstrated, *words: str) -> Iterator[str]:
    """`imgcls serve` until it is no longer needed."""
    with started(*words, env=there.environment, cwd=there.folder) as process:
        url = "http://127.0.0.1:8000"

        def ready() -> bool:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            with contextlib.suppress(requests.RequestException):
                return requests.get(f"{url}/readyz", timeout=5).ok
            return False

        wait_for(ready, 120)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


PLACEHOLDER = re.compile(r"[A-Z_]{1,}|.*(s3://|\.\.\.|imagenet-sample|yesterday|late\.csv).*")
"""Words that stand for something of the reader's."""
RUN = ("README", "data", "export")
"""Pages whose commands go on from the demo."""


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_can_be_run(after_the_demo: Demonstrated, page: str) -> None:
    there = after_the_demo
    (path,) = (each for each in PAGES if each.stem == page)
    ran = 0
    for name, words in commands(path):
        needs_more = any(PLACEHOLDER.fullmatch(word) for word in words)
        # a server is started by other tests, a hub is not to be had here, int8 not everywhere
        if needs_more or name in ("serve", "model quantise") or "--model.weights" in words:
            continue
        if any(word in ("bundle", "calibrated") for word in words):
            continue
        done = imgcls(*name.split(), *words, env=there.environment, cwd=there.folder, timeout=400)
        assert done.returncode == 0, (name, words, done.stdout, done.stderr)
        ran += 1
    assert ran >= 1


def blocks() -> Iterator[tuple[str, int, str]]:
    for page in PAGES:
        found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for number, text in enumerate(found):
            yield page.stem, number, text


@pytest.mark.parametrize(
    ("page", "number", "text"), list(blocks()), ids=lambda part: str(part)[:12]
)
def test_the_python_on_a_page_can_be_run(
    after_the_demo: Demonstrated, page: str, number: int, text: str
) -> None:
    if page in ELSEWHERE:
        pytest.skip(f"{page}: {ELSEWHERE[page]}")
    there = after_the_demo
    with contextlib.ExitStack() as stack:
        if "Client(" in text:
            stack.enter_context(served(there, "serve", "--model", "demo/bundle"))
            text = f"key = None\n{text}"
        done = subprocess.run(
            [sys.executable, "-c", text],
            cwd=there.folder,
            env={**os.environ, **there.environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_what_a_shell_is_told_to_ask_the_endpoint_is_answered(
    after_the_demo: Demonstrated,
) -> None:
    there = after_the_demo
    (page,) = (each for each in PAGES if each.stem == "serving")
    (block,) = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    with served(there, "serve", "--model", "demo/bundle"):
        done = subprocess.run(
            ["bash", "-euc", block.replace("curl ", "curl --silent --fail-with-body ")],
            cwd=there.folder,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"predictions":') == 2
    assert '"classes":["0","1"' in done.stdout
