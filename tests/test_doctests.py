"""The examples in docstrings of the package run as written."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.conftest import REPOSITORY


def list_modules() -> list[str]:
    """Modules of the package with examples."""
    files = sorted((REPOSITORY / "imgcls").rglob("*.py"))
    names = [file.relative_to(REPOSITORY).with_suffix("").as_posix() for file in files]
    return [
        name.replace("/", ".").removesuffix(".__init__")
        for name, file in zip(names, files, strict=True)
        if ">>> " in file.read_text()
    ]


@pytest.mark.parametrize("module", list_modules())
def test_examples_of_docstrings_give_what_they_show(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0, capsys.readouterr().out
    assert found.attempted > 0
