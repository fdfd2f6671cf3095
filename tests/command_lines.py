"""Command lines, checked without running them: their programs, commands, options and files."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Set
from pathlib import Path

import click

from imgcls import config
from imgcls.cli import COMMANDS
from tests.conftest import REPOSITORY

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")
REDIRECTION = re.compile(r" \d?>>?(?:&\d| ?\S+)")
SCHEDULE = re.compile(r"^(?:[\d*/]+ ){4}[\d*/]+ +")
"""The times of a line for cron."""


def check_line(line: str, files: Set[str] = frozenset()) -> None:
    """Check every command of a line of a shell, those of `ray job submit` included.

    Programs other than imgcls, its jobs and benchmarks, make, pip and ray are not checked.

    files: names of scripts that the reader has saved
    """
    for words in split_commands(SCHEDULE.sub("", line)):
        check_command(words, files)


def split_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without assignments and redirections."""
    # not posix: a quoted operator is a word, so the quotes are removed afterwards
    lexer = shlex.shlex(REDIRECTION.sub("", line), posix=False, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in itertools.chain(lexer, [";"]):
        if set(word) <= set("();|&<>"):
            if words:
                yield words
            words = []
        elif words or not ASSIGNMENT.fullmatch(word):
            words += shlex.split(word)


def check_command(words: list[str], files: Set[str]) -> None:
    program, *rest = words
    checks: dict[str, Callable[[list[str]], None]] = {
        "imgcls": _check_imgcls,
        "make": _check_make,
        "pip": _check_pip,
        "ray": lambda rest: _check_ray(rest, files),
        "python": lambda rest: _check_python(rest, files),
    }
    check = checks.get(Path(program).name.replace("python3", "python"))
    if check:
        check(rest)


def _check_imgcls(words: list[str]) -> None:
    if words[0] in ("--help", "--version", "COMMAND"):
        return
    name = next((name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS), None)
    assert name, f"no command {words[:2]}"
    _check_options(name, words[len(name.split()) :])


def _check_options(name: str, words: list[str]) -> None:
    if "--help" not in words and "..." not in words:
        example = {file.name: str(file) for file in (REPOSITORY / "examples").iterdir()}
        config.load(COMMANDS[name].load_model(), [example.get(word, word) for word in words])


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), f"make has no target {set(words) - set(targets)}"


def _check_pip(words: list[str]) -> None:
    from pip._internal.commands import create_command

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, packages = create_command(words[0]).parse_args(words[1:])
    except SystemExit:
        raise AssertionError(errors.getvalue()) from None
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for package in packages:
        own = re.fullmatch(r"(?:imgcls|\.)\[([\w,-]+)\]", package)
        unknown = set(own[1].split(",")) - set(project["optional-dependencies"]) if own else ()
        assert not unknown, f"no extra {unknown}"
    for file in (*options.constraints, *getattr(options, "requirements", [])):
        assert (REPOSITORY / file).is_file(), file


def _check_ray(words: list[str], files: Set[str]) -> None:
    from ray.scripts.scripts import cli

    command: click.Command | None = cli
    own, _, job = " ".join(map(shlex.quote, words)).partition(" -- ")
    rest = shlex.split(own)
    name = "ray"
    while isinstance(command, click.Group):
        name = rest.pop(0)
        command = command.get_command(click.Context(command), name)
    assert command, f"ray has no command {name}"
    command.make_context(name, [*rest, *(["--", "true"] if job else [])])
    if job:
        check_line(job, files)


def _check_python(words: list[str], files: Set[str]) -> None:
    if words[:2] == ["-m", "imgcls"]:
        return _check_imgcls(words[2:])
    if words[0] == "-m":
        if words[1].startswith("benchmarks."):
            module = REPOSITORY / f"{words[1].replace('.', '/')}.py"
            assert module.is_file(), words[1]
            for option in (word for word in words if word.startswith("--")):
                assert option in module.read_text(), f"{words[1]} has no option {option}"
        return None
    if words[0].startswith("jobs/"):
        assert (REPOSITORY / words[0]).is_file(), words[0]
        return _check_options(Path(words[0]).stem, words[1:])
    written_by_export = Path(words[0]).name == "example.py"
    known = words[0] in files or written_by_export or (REPOSITORY / words[0]).is_file()
    assert words[0] == "-" or known, f"no file {words[0]}"
    return None
