"""Build the documentation site with Zensical (`make docs`).

The pages link to each other and to files of the repository by relative paths, so that they also
work on a code host. For the site they are copied to build/docs, in the layout of the repository,
together with every file that they link to. The build is strict: a broken link or anchor is an
error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from imgcls import LAZY_EXPORTS

REPOSITORY = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "manifests/*.md",
    "docs/*.md",
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
"""A Markdown link or image with a relative target."""
DIRECTIVE = re.compile(r"^<!-- ::: imgcls\.(\w+) -->$", re.MULTILINE)
"""A place for the documentation of a public name, which code hosts do not show."""
FENCE = re.compile(r"^```(.*)\n([\s\S]*?)^```$", re.MULTILINE)
"""A fenced block of code: its language, and its text."""
ASSETS = ("docs/site.css", "docs/site.js")
"""Files that mkdocs.yml adds to every page."""


def list_pages() -> list[Path]:
    return sorted(path for pattern in PAGES for path in REPOSITORY.glob(pattern))


def find_linked_files(page: Path) -> set[Path]:
    """Files of the repository that a page links to."""
    targets = LINK.findall(_without_code(page.read_text()))
    return {(page.parent / target).resolve() for target in targets}


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`|^    .*?$", "", text, flags=re.MULTILINE | re.DOTALL)


def stage(folder: Path) -> None:
    """Copy the pages and the files that they link to into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = list_pages()
    linked = {path for page in pages for path in find_linked_files(page) if path.is_file()}
    for path in {*pages, *linked, *(REPOSITORY / name for name in ASSETS)}:
        target = folder / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for page in pages:
        target = folder / page.relative_to(REPOSITORY)
        target.write_text(DIRECTIVE.sub(_to_directive, FENCE.sub(_mark_output, target.read_text())))


def _mark_output(match: re.Match[str]) -> str:
    """A block without a language, which is the output of commands, with classes for the style."""
    language, text = match.groups()
    return match[0] if language else f"``` {{.text .output .no-copy}}\n{text}```"


def _to_directive(match: re.Match[str]) -> str:
    """A directive of mkdocstrings; names that `imgcls` imports on first use, by their module."""
    return f"::: {'.'.join(LAZY_EXPORTS[match[1]])}"


def main() -> int:
    stage(REPOSITORY / "build" / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
