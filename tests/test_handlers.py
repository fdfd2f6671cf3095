"""No `except` clause is out of reach behind one that catches its base class."""

from __future__ import annotations

import ast
import builtins
import importlib
from collections.abc import Iterator
from types import ModuleType

from tests.conftest import REPOSITORY


def caught(node: ast.expr | None, module: ModuleType) -> tuple[type[BaseException], ...]:
    """The classes that a clause names, as far as the module's own namespace knows them."""
    parts = node.elts if isinstance(node, ast.Tuple) else [] if node is None else [node]
    found: list[type[BaseException]] = []
    for part in parts:
        value: object = module
        for name in ast.unparse(part).split("."):
            value = getattr(value, name, getattr(builtins, name, None))
        if isinstance(value, type) and issubclass(value, BaseException):
            found.append(value)
    return tuple(found)


def unreachable(source: str, module: ModuleType) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Try, ast.TryStar)):
            continue
        before: tuple[type[BaseException], ...] = ()
        for handler in node.handlers:
            for kind in caught(handler.type, module):
                if issubclass(kind, before):
                    yield f"{module.__name__}:{handler.lineno}: {kind.__name__}"
            before += caught(handler.type, module)


def test_no_handler_hides_a_later_one_of_a_subclass() -> None:
    found = []
    for file in sorted((REPOSITORY / "imgcls").rglob("*.py")):
        source = file.read_text()
        tries = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Try)]
        if any(len(node.handlers) > 1 for node in tries):  # others need not be imported
            name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
            found += unreachable(source, importlib.import_module(name.removesuffix(".__init__")))
    assert found == []


def test_such_a_handler_is_found() -> None:
    module = importlib.import_module("imgcls.errors")
    source = "try: f()\nexcept RunFailed: pass\nexcept (ValueError, Interrupted): pass\n"
    assert list(unreachable(source, module)) == ["imgcls.errors:3: Interrupted"]
    source = "try: f()\nexcept Interrupted: pass\nexcept RunFailed: pass\n"
    assert list(unreachable(source, module)) == []
