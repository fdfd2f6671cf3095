"""The commands in the documentation are accepted."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from imgcls import config
from imgcls.cli import COMMANDS, main
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_what_schedulers_are_given_is_well_formed() -> None:
    text = (REPOSITORY / "docs" / "nightly.md").read_text()
    python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    ast.parse(python)
    (manifest,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    job = yaml.safe_load(manifest)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"]
    for entry in re.findall(r"imgcls (predict [^\n\"]+)", python + job["spec"]["entrypoint"]):
        assert shlex.split(entry)[1] == "--config"
    minute, hour, *rest = re.search(r"^ {4}(\d+ \d+ \* \* \*)", text, re.MULTILINE)[1].split()  # type: ignore[index]
    assert (0 <= int(minute) < 60, 0 <= int(hour) < 24, rest) == (True, True, ["*"] * 3)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    words = shlex.split(command.example)
    assert words[0] == "imgcls"
    assert words[1 : 1 + len(name.split())] == name.split()
    model = command.load_model()
    config.load(model, words[1 + len(name.split()) :])
    assert main([*name.split(), "--help"]) == 0
    page = capsys.readouterr().out.replace("\\\n", " ")
    assert shlex.split(page.partition("example:\n")[2].partition("\n\n")[0]) == words


def test_every_page_is_linked_from_the_readme() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_file_that_a_page_names_exists(page: Path) -> None:
    for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
        assert (REPOSITORY / name).is_file(), name
