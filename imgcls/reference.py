"""Every key of every command, as a page: `python -m imgcls.reference > docs/reference.md`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from imgcls import config
from imgcls.cli import COMMANDS


def page() -> str:
    """docs/reference.md, made from the models that read the keys."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Every key"
    yield ""
    yield (
        "Made from the code by `python -m imgcls.reference`. A key is given as `--key VALUE`, in a "
        "YAML file (`--config`), or to the function in Python; what may be left out has a default."
    )
    for name, command in COMMANDS.items():
        model = getattr(importlib.import_module(command.module), command.config)
        yield from (
            "",
            f"## imgcls {name}",
            "",
            f"{command.summary[0].upper()}{command.summary[1:]}.",
        )
        yield from (
            "",
            f"    {command.example}",
            "",
            "| key | type | default | |",
            "| --- | --- | --- | --- |",
        )
        for key in config.keys(model):
            default = key.default.removeprefix("default ")
            yield _row(f"`{key.name}`", key.type, default, key.meaning)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
