"""Every process collects the same tests under the same names, or xdist refuses to run them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TESTS = REPOSITORY / "tests"
CLOCKS = {"now", "utcnow", "today", "time", "time_ns", "monotonic", "perf_counter"}
CHANCE = {"random", "randint", "choice", "uuid1", "uuid4", "urandom", "token_hex", "getpid", "id"}
LISTINGS = {"iterdir", "glob", "rglob", "listdir", "scandir", "walk"}
SETS = {"set", "frozenset"}


def parameters(tree: ast.Module) -> Iterator[ast.expr]:
    """What stands in `parametrize(...)` and `fixture(params=...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "parametrize":
                yield from [*node.args, *(each.value for each in node.keywords)]
            if node.func.attr == "fixture":
                yield from (each.value for each in node.keywords if each.arg == "params")


def is_set(node: ast.AST) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SETS
    return called or isinstance(node, (ast.Set, ast.SetComp))


def unstable(tree: ast.Module) -> set[str]:
    """Calls and sets in parameters that may differ from process to process, by name.

    Names are followed to what the module defines; what is within `sorted(...)` has an order. A set
    that is one parameter does no harm, unlike a set of parameters.
    """
    defined: dict[str, list[ast.AST]] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            defined[node.name] = [node]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    defined[target.id] = [node.value]
    found: set[str] = set()
    followed: set[str] = set()

    def look(node: ast.AST, ordered: bool) -> None:
        if isinstance(node, ast.Lambda):
            return  # of a value, when a test runs or to name it
        if is_set(node) and not ordered:
            found.add("a set")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in CLOCKS | CHANCE or (name in LISTINGS and not ordered):
                found.add(name)
            ordered = ordered or name == "sorted"
        if isinstance(node, ast.Name) and node.id in defined and node.id not in followed:
            followed.add(node.id)
            for each in defined[node.id]:
                look(each, ordered)
        if isinstance(node, ast.Compare):
            return  # a set that is only looked into
        listed = isinstance(node, (ast.List, ast.Tuple, ast.Dict))
        for child in ast.iter_child_nodes(node):
            if not (listed and is_set(child)):
                look(child, ordered)

    for expression in parameters(tree):
        look(expression, False)
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("@pytest.mark.parametrize('x', [date(1)])\ndef f(x): ...", {"now"}),
        ("@pytest.mark.parametrize('x', NAMES)\ndef f(x): ...", {"a set"}),
        ("@pytest.mark.parametrize('x', [{1, 2}, set()])\ndef f(x): ...", set()),
        ("@pytest.mark.parametrize('x', sorted(NAMES))\ndef f(x): ...", set()),
        ("@pytest.fixture(params=[p for p in HERE.iterdir()])\ndef f(): ...", {"iterdir"}),
        ("@pytest.mark.parametrize('x', [1, 2])\ndef f(x): time.time()", set()),
    ],
    ids=["clock", "set", "element", "sorted", "folder", "body"],
)
def test_what_differs_from_process_to_process_is_seen(source: str, expected: set[str]) -> None:
    module = "NAMES = {'a', 'b'}\ndef date(s):\n    return datetime.now() + s\n" + source
    assert unstable(ast.parse(module)) == expected


def test_no_parameter_depends_on_the_process_that_collects_it() -> None:
    bad = {}
    for file in sorted(TESTS.rglob("*.py")):
        if found := unstable(ast.parse(file.read_text(encoding="utf-8"))):
            bad[str(file.relative_to(TESTS))] = sorted(found)
    assert bad == {}


def test_no_name_of_a_test_holds_an_address(request: pytest.FixtureRequest) -> None:
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if re.search(r"\b0x[0-9a-f]{6,}| object at ", name)] == []


def collected(seed: str, *paths: str | Path) -> list[str]:
    """What another process collects, in its order."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0"),
            *("-p", "no:cacheprovider", *paths),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_two_processes_collect_the_same_tests() -> None:
    first = collected("1", TESTS)
    time.sleep(2)  # another second
    assert collected("2", TESTS) == first
    assert len(first) > 1000
