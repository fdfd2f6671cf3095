"""The tutorial, typed in an empty folder: every command in order, with the output that it shows."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import SHARED
from tests.processes import REPOSITORY, RayCluster, free_port, kill_family, wait_for

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
WEIGHTS = SHARED / "weights" / "squeezenet1_0-imagenet.pth"
"""Weights that a reader has; without them their block is not run."""
SETUP = "make venv"
"""First words of the block that installs imgcls, which is not run."""

MEASURED = re.compile(r"\d[\d.,]*(?: ?(?:s|ms|min|h|MB|GB|kB|B|images/s)\b)")
FOLDER = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+")
"""The folder of an absolute path: that in which the tutorial is typed."""
VARYING = re.compile(
    r"waiting \d+%|best: epoch \d+|\d{4}-\d\d-\d\d[T ]\d\d:\d\d\S*|\b[0-9a-f]{8,}\b|:\d{4,5}\b"
)
NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")


@dataclass
class Step:
    """Commands of one block and the output that the page shows for them, or a file to save."""

    commands: str = ""
    output: str = ""
    file: str = ""


def read_steps(text: str) -> list[Step]:
    """Blocks of a page: indented commands, ``` outputs, and ```python files by their first line."""
    steps: list[Step] = []
    for block in re.finditer(
        r"^```python\n# (?P<file>\S+\.py)\n(?P<code>[\s\S]*?)^```$|^```\n(?P<output>[\s\S]*?)^```$"
        r"|(?P<commands>(?:^ {4}\S.*\n(?:^ {4,}\S.*\n)*)+)",
        text,
        re.MULTILINE,
    ):
        if block["file"]:
            steps.append(Step(block["code"], file=block["file"]))
        elif block["output"] is not None:
            assert steps[-1].commands, f"no command before the output {block['output']!r}"
            steps[-1].output += block["output"]
        else:
            steps.append(Step(re.sub(r"^ {4}", "", block["commands"], flags=re.MULTILINE)))
    return steps


def normalize(line: str) -> str:
    """A line without folders, times, dates, hashes and ports."""
    line = FOLDER.sub("", line)
    return " ".join(VARYING.sub("#", MEASURED.sub("#", line)).split())


def is_like(shown: str, printed: str) -> bool:
    """Whether a line is as shown; decimals may differ by 12, or by 0.4 if both are at most 1."""
    shown, printed = normalize(shown), normalize(printed)
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    pairs = zip(map(float, NUMBER.findall(shown)), map(float, NUMBER.findall(printed)), strict=True)
    return all(abs(a - b) <= (12 if max(a, b) > 1 else 0.4) for a, b in pairs)


def find_missing(shown: str, printed: str) -> str | None:
    """The first shown line that the output lacks, in order; `...` stands for any lines."""
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if line.strip() not in ("", "...") and not any(is_like(line, each) for each in lines):
            return line
    return None


def test_output_is_compared_but_for_times_and_small_differences() -> None:
    shown = "...\nlabeled  60\naccuracy  96.67%  (88.6 to 99.0)\ndone in 3 s: /home/me/out\n"
    printed = "start\nlabeled 60\nnote\naccuracy 95.00% (86.3 to 98.3)\ndone in 12 s: /tmp/x/out\n"
    assert find_missing(shown, printed) is None
    assert find_missing(shown, printed.replace("60", "59")) == "labeled  60"
    assert find_missing(shown, printed.replace("95.00", "80.00")) == shown.splitlines()[2]
    assert find_missing("b\na\n", "a\nb\n") == "a"


def test_the_tutorial_has_files_commands_and_outputs() -> None:
    steps = read_steps(TUTORIAL.read_text())
    assert [step.file for step in steps if step.file] == ["draw.py", "ask.py"]
    assert steps[0].commands.startswith(SETUP)
    commands = [step for step in steps if not step.file]
    assert sum(bool(step.output) for step in commands) >= len(commands) / 2
    typed = "\n".join(step.commands for step in steps)
    for line in re.findall(r"^ {4}\S.*$", TUTORIAL.read_text(), re.MULTILINE):
        assert line.strip() in typed


@contextlib.contextmanager
def started(step: Step, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A command that runs until it is stopped, after it printed what the page shows."""
    log = folder / "started.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {step.commands}"],
            cwd=folder,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: process.poll() is not None or not find_missing(step.output, log.read_text()),
            120,
        )
        assert process.poll() is None, log.read_text()
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        kill_family(process.pid)
        process.wait()


def run_steps(steps: Sequence[Step], folder: Path, environment: dict[str, str]) -> None:
    with contextlib.ExitStack() as stack:
        for step in steps:
            if step.file:
                (folder / step.file).write_text(step.commands)
            elif step.commands.startswith("imgcls serve"):
                stack.enter_context(started(step, folder, environment))
            elif WEIGHTS.exists() or WEIGHTS.name.partition("-")[0] not in step.commands:
                done = subprocess.run(
                    ["bash", "-euc", step.commands],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=600,
                    check=False,
                )
                assert done.returncode == 0, f"{step.commands}\n{done.stdout}"
                missing = find_missing(step.output, done.stdout)
                assert missing is None, f"{step.commands}\nlacks {missing!r}:\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tutorial_can_be_typed(cluster: RayCluster, tmp_path: Path) -> None:
    port = free_port()
    text = TUTORIAL.read_text().replace(":8000", f":{port}")
    text = re.sub(r"^( {4}imgcls serve .*)$", rf"\1 --http.port {port}", text, flags=re.MULTILINE)
    steps = [step for step in read_steps(text) if not step.commands.startswith(SETUP)]
    if WEIGHTS.exists():
        shutil.copyfile(WEIGHTS, tmp_path / "squeezenet1_0.pth")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run_steps(steps, tmp_path, {**os.environ, **cluster.environment(), "PATH": path})
