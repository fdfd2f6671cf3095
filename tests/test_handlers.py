"""No `except` clause is out of reach behind one that catches its base class."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from imgcls import errors
from tests.conftest import REPOSITORY

KNOWN = {
    name: value
    for name, value in (vars(builtins) | vars(errors)).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
"""Python's exceptions and ours, by name; others are left aside, so that nothing is imported."""


def caught(handler: ast.ExceptHandler) -> tuple[type[BaseException], ...]:
    """The known classes that a clause names."""
    kind = handler.type
    parts = kind.elts if isinstance(kind, ast.Tuple) else [] if kind is None else [kind]
    names = (ast.unparse(part).rpartition(".")[2] for part in parts)
    return tuple(KNOWN[name] for name in names if name in KNOWN)


def unreachable(source: str, name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        before: tuple[type[BaseException], ...] = ()
        for handler in node.handlers if isinstance(node, ast.Try) else []:
            for kind in caught(handler):
                if issubclass(kind, before):
                    yield f"{name}:{handler.lineno}: {kind.__name__}"
            before += caught(handler)


def test_no_handler_hides_a_later_one_of_a_subclass() -> None:
    files = [
        f
        for folder in ("imgcls", "jobs", "benchmarks")
        for f in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(files) > 100
    assert [line for file in files for line in unreachable(file.read_text(), str(file))] == []


def test_such_a_handler_is_found() -> None:
    source = "try: f()\nexcept RunFailed: pass\nexcept (ValueError, errors.Interrupted): pass\n"
    assert list(unreachable(source, "x.py")) == ["x.py:3: Interrupted"]
    source = "try: f()\nexcept Interrupted: pass\nexcept RunFailed: pass\n"
    assert list(unreachable(source, "x.py")) == []
