"""The documentation site as a reader has it: built, and the blocks of code on its pages."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

from tests.conftest import REPOSITORY


def load_builder(repository: Path) -> ModuleType:
    """docs/build_site.py of a copy of the repository."""
    spec = importlib.util.spec_from_file_location(
        "build_site", repository / "docs" / "build_site.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_sources(folder: Path) -> None:
    """The pages with the files that they link to, in a folder without the rest."""
    load_builder(REPOSITORY).stage(folder)
    for page in load_builder(REPOSITORY).list_pages():  # as they were before they were staged
        shutil.copyfile(page, folder / page.relative_to(REPOSITORY))
    for name in ("mkdocs.yml", "docs/build_site.py"):
        shutil.copyfile(REPOSITORY / name, folder / name)
    (folder / "imgcls").symlink_to(REPOSITORY / "imgcls")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "docs/build_site.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def build_site(folder: Path) -> Path:
    """Build the site from a copy of the sources in an empty folder; return the site's folder."""
    copy_sources(folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "site"


@dataclass
class Block:
    """A block of code on a page.

    section: the id of the heading above it
    language: `text` for commands and outputs
    """

    section: str
    language: str
    is_output: bool
    text: str = ""

    @property
    def lines(self) -> list[str]:
        """Its lines without comments; continued ones are joined."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if line.strip() and line[0] != "#"]

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell in it; those after `$` if it also shows their output."""
        if self.is_output or self.language not in ("text", "bash"):
            return []
        if self.text.startswith("$ "):
            return [line[2:] for line in self.lines if line.startswith("$ ")]
        return [line for line in self.lines if is_command(line)]


PROGRAMS = {
    *("imgcls", "make", "pip", "python", "python3", "ray", "docker", "head", "cp", "ln", "curl"),
    *("export", "aws", "kubectl", "echo", "cron", "serve", "tensorboard"),
}
"""Programs that pages call in a shell."""
ASSIGNMENT = re.compile(r"^[A-Za-z_]+=\$?\(?\S*\s+")
SCHEDULE = re.compile(r"^(?:[\d*/]+ ){4}[\d*/]+ +")
"""The times of a line for cron."""


def is_command(line: str) -> bool:
    """Whether a line of a block is a command, and not an output or a list of files."""
    words = ASSIGNMENT.sub("", SCHEDULE.sub("cron ", line)).split()
    return bool(words) and (words[0] in PROGRAMS or line.startswith(".venv/bin/"))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self._section = ""
        self._block: Block | None = None
        self._is_code = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        classes = (values.get("class") or "").split()
        if re.fullmatch("h[1-6]", tag) and values.get("id"):
            self._section = str(values["id"])
        elif tag == "div" and "highlight" in classes:
            language = next((name[9:] for name in classes if name.startswith("language-")), "text")
            self._block = Block(self._section, language, "output" in classes)
        elif tag == "code":
            self._is_code = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "code":
            self._is_code = False
            if self._block is not None:
                self.blocks.append(self._block)
                self._block = None

    def handle_data(self, data: str) -> None:
        if self._block is not None and self._is_code:
            self._block.text += data


def read_blocks(page: Path) -> list[Block]:
    """The blocks of code on a built page, in their order."""
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader.blocks


def list_pages(site: Path) -> Iterator[Path]:
    """The built pages, but for the one that a server shows for a missing page."""
    return (page for page in sorted(site.rglob("*.html")) if page.name != "404.html")


@dataclass
class Step:
    """The commands of one block and the output that the page shows for them, or a file to save."""

    section: str
    commands: str = ""
    output: str = ""
    file: str = ""


FILE = re.compile(r"# (\S+\.py)\n")
"""First line of a block that is to be saved as a file."""


def read_steps(page: Path) -> list[Step]:
    """What a reader types on a built page, in its order: commands with their output, and files.

    Blocks of other languages are left out, as are lists of files. Output without a command before
    it is an error.
    """
    steps: list[Step] = []
    for block in read_blocks(page):
        file = FILE.match(block.text)
        if file:
            steps.append(Step(block.section, block.text, file=file[1]))
        elif block.is_output:
            assert steps, f"{page}: no command before the output {block.text!r}"
            assert not steps[-1].file, f"{page}: no command before the output {block.text!r}"
            steps[-1].output += block.text
        elif block.commands:
            steps.append(Step(block.section, block.text))
        elif block.language == "python":
            steps.append(Step(block.section, f"python - <<'PYTHON'\n{block.text}PYTHON\n"))
    return steps
