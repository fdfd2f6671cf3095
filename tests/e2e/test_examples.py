"""The examples in `--help` and in the documentation, run after the demo."""

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
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from safetensors.torch import save_file

from imgcls.cli import COMMANDS
from tests.e2e.conftest import Demonstrated
from tests.processes import imgcls, started, wait_for
from tests.test_docs import PAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIRST = ["predict", "calibrate", "key new"]
"""Examples whose outputs other examples use."""
ELSEWHERE = {
    "nightly": "is run by test_documentation.py, or is a DAG for Airflow",
    "existing_clusters": "asks a cluster for a job",
    "tutorial": "is run by test_documentation.py",
}
"""Pages whose Python code is for other programs, or run by another test."""


@pytest.fixture
def after_the_demo(demonstrated: Demonstrated, tmp_path: Path) -> Demonstrated:
    """A separate copy of the folder in which the demo was run."""
    folder = shutil.copytree(demonstrated.folder, tmp_path / "repository", symlinks=True)
    return replace(demonstrated, folder=folder)


def test_the_example_of_every_command_can_be_run(after_the_demo: Demonstrated) -> None:
    there = after_the_demo
    open_clip = pytest.importorskip("open_clip")
    save_file(open_clip.create_model("ViT-B-32").state_dict(), there.folder / "clip.safetensors")
    order = sorted(COMMANDS, key=lambda name: (name not in FIRST, name in ("serve", "demo")))
    for name in order:
        words = shlex.split(COMMANDS[name].example)[1:]
        if name == "serve":
            with served(there, *words):
                continue
        done = imgcls(*words, env=there.environment, cwd=there.folder, timeout=400)
        # int8 is refused where the processor has none
        refused = name == "model quantize" and "this CPU has none of" in done.stderr
        assert done.returncode == 0 or refused, (name, done.stdout, done.stderr)


@contextlib.contextmanager
def served(there: Demonstrated, *words: str) -> Iterator[str]:
    """`imgcls serve` while the block runs."""
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


def test_the_shell_examples_of_requests_are_answered(
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
