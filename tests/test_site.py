"""The documentation site: built strictly, complete, without anything from other hosts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import pytest
import yaml

import imgcls
from imgcls.errors import ImgclsError
from tests.browser import launched, opened
from tests.command_lines import check_line
from tests.conftest import REPOSITORY
from tests.site import (
    FILE,
    Block,
    build,
    build_site,
    copy_sources,
    list_pages,
    load_builder,
    read_blocks,
    read_steps,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


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


@pytest.fixture(scope="module")
def blocks(site: Path) -> dict[str, list[Block]]:
    """The blocks of code of every built page, by its path without a suffix."""
    return {
        page.relative_to(site).with_suffix("").as_posix(): read_blocks(page)
        for page in list_pages(site)
    }


def test_outputs_are_marked_and_commands_are_not(blocks: dict[str, list[Block]]) -> None:
    tutorial = blocks["docs/tutorial"]
    assert [block.language for block in tutorial[:2]] == ["text", "python"]
    shown = next(block for block in tutorial if block.is_output)
    assert shown.text.startswith("manifest   602 images")
    assert shown.section == "build-a-manifest"
    for name, page in blocks.items():
        for block in page:
            # after `$` both are in one block
            if block.text.startswith("imgcls ") and not block.text.startswith("imgcls labels im"):
                assert not block.is_output, (name, block.text)


def test_the_tutorial_has_files_commands_and_outputs(site: Path) -> None:
    page = site / "docs" / "tutorial.html"
    steps = read_steps(page)
    assert [step.file for step in steps if step.file] == ["draw.py", "ask.py"]
    commands = [step for step in steps if not step.file]
    assert sum(bool(step.output) for step in commands) >= len(commands) / 2
    typed = "\n".join(step.commands for step in steps)
    source = (REPOSITORY / "docs" / "tutorial.md").read_text()
    for line in re.findall(r"^ {4}\S.*$", source, re.MULTILINE):
        assert line.strip() in typed


def test_every_command_and_option_on_the_site_exists(
    blocks: dict[str, list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    wrong, checked = [], 0
    for name, page in blocks.items():
        files = {match[1] for block in page if (match := FILE.match(block.text))}
        for line in (line for block in page for line in block.commands):
            checked += 1
            try:
                check_line(line, files)
            except (AssertionError, ImgclsError, click.ClickException) as error:
                wrong.append(f"{name}: {line}\n    {error}")
    assert not wrong, "\n".join(wrong)
    assert checked > 200
    for line, message in (
        ("imgcls predict --model m --output o --manifest m --no-such-key 1", "no_such_key"),
        ("imgcls predikt --model m", "no command"),
        ("make domo", "domo"),
        ("cd x && pip install -c constraints.txt '.[dmeo]'", "dmeo"),
        ("pip install --no-such .", "no such option"),
        ("ray job submit --woking-dir . -- python jobs/predict.py", "--woking-dir"),
        ("ray job submit -- python jobs/predict.py --outptu o", "outptu"),
        ("python -m benchmarks.engins", "engins"),
        ("python drwa.py photos", "drwa.py"),
    ):
        with pytest.raises((AssertionError, ImgclsError, click.ClickException), match=message):
            check_line(line, {"draw.py"})


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


def check_accessibility(pages: Iterable[Path]) -> None:
    with launched() as browser:
        for page in pages:
            with opened(page.as_uri(), browser=browser) as watched:
                watched.check_accessible("light", "dark")


def test_axe_finds_nothing_wrong_on_the_first_and_the_longest_pages(site: Path) -> None:
    longest = sorted(list_pages(site), key=lambda page: page.stat().st_size)[-2:]
    check_accessibility([site / "index.html", *longest])


@pytest.mark.slow
def test_axe_finds_nothing_wrong_on_any_page(site: Path) -> None:
    check_accessibility(list_pages(site))


@pytest.mark.slow
@pytest.mark.parametrize("link", ["[no page](missing.md)", "[no anchor](concepts.md#missing)"])
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str) -> None:
    copy_sources(tmp_path)
    page = tmp_path / "docs" / "faq.md"
    page.write_text(f"{page.read_text()}\n{link}\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "faq.md" in done.stdout + done.stderr
