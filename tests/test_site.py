"""The documentation site: built strictly, complete, without anything from other hosts."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import imgcls
from tests.browser import opened
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
    for name in ("mkdocs.yml", "docs/build_site.py", "docs/api.md"):
        shutil.copyfile(REPOSITORY / name, folder / name)
    (folder / "imgcls").symlink_to(REPOSITORY / "imgcls")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "docs/build_site.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    copy_sources(folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "site"


def list_navigation(entries: list[dict[str, object]]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            if isinstance(value, list):
                yield from list_navigation(value)
            else:
                yield str(value)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = load_builder(REPOSITORY).list_pages()
    named = list(list_navigation(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert sorted(named) == sorted(page.relative_to(REPOSITORY).as_posix() for page in pages)


def test_every_linked_file_of_the_repository_exists() -> None:
    builder = load_builder(REPOSITORY)
    for page in builder.list_pages():
        for path in builder.find_linked_files(page):
            assert path.is_file(), f"{page.relative_to(REPOSITORY)} links to {path}"


def test_the_site_has_all_pages_and_files(site: Path) -> None:
    for name in ("index", "docs/tutorial", "docs/reference", "manifests/index", "CHANGELOG"):
        assert (site / f"{name}.html").is_file(), name
    assert (site / "cluster.yaml").read_text() == (REPOSITORY / "cluster.yaml").read_text()
    assert (site / "docs" / "images" / "report.png").is_file()


def read_summary(module: str, name: str) -> str:
    """First line of the docstring of a class or function, without importing it."""
    tree = ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text())
    (found,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
    )
    return (ast.get_docstring(found) or "").splitlines()[0]


def test_the_api_page_documents_every_public_name(site: Path) -> None:
    source = (REPOSITORY / "docs" / "api.md").read_text()
    assert set(re.findall(r"`imgcls\.(\w+)`\]?.*\|$", source, re.MULTILINE)) == set(imgcls.__all__)
    named = re.findall(r"^## (\w+)\n\n.*\n\n<!-- ::: imgcls\.(\w+) -->$", source, re.MULTILINE)
    assert {heading for heading, _ in named} == set(imgcls.LAZY_EXPORTS)
    assert all(heading == name for heading, name in named)
    text = re.sub(r"<[^>]+>", "", (site / "docs" / "api.html").read_text())
    for module, name in imgcls.LAZY_EXPORTS.values():
        assert " ".join(read_summary(module, name).split()) in " ".join(text.split()), name
    assert ":::" not in text


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag), f"{page}: {tag}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.html", "docs/api.html", "docs/concepts.html"])
def test_a_browser_reads_no_other_host(site: Path, name: str) -> None:
    with opened((site / name).as_uri()) as watched:
        watched.page.wait_for_timeout(1000)
        hosts = [seen for seen in watched.requests if not re.match("(file|data|blob):", seen)]
        assert hosts == []


@pytest.mark.slow
@pytest.mark.parametrize("link", ["[no page](missing.md)", "[no anchor](concepts.md#missing)"])
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str) -> None:
    copy_sources(tmp_path)
    page = tmp_path / "docs" / "faq.md"
    page.write_text(f"{page.read_text()}\n{link}\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "faq.md" in done.stdout + done.stderr
