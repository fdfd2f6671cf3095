"""Language check: texts use plain American English, without the private dialect of earlier code.

Reads strings, docstrings and comments of the code, templates, job files and documentation pages.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DIALECT = re.compile(
    r"""(?<![\w-])(?:
      tell|tells|telling|told|say|says|saying|said|nobody|somebody|whoever|anew|lest|beside
    | mend|mends|mended|mending|heed|heeds|heeded|judge|judges|judged|judging|judgements?|judgment
    | dealt|hush|hushed|purse|pocket|errs|whence|for[ ]ever|of[ ]late|so[ ](?:long|many|often)
    | per[ ]cent
    )(?![\w-])""",
    re.VERBOSE | re.IGNORECASE,
)
"""Words of the dialect, and words that have a standard term: evaluate, report, print, log."""

BRITISH = re.compile(
    r"""(?<!\w)(?:
      \w*labell\w* | \w*modell\w* | \w*cancell(?:ed|ing) | \w*colour\w* | \w*behaviour\w*
    | \w*neighbour\w* | \w*favour\w* | \w*honour\w* | grey\w* | centre[ds]? | metres? | artefact\w*
    | licences? | judgement\w* | whilst | amongst | learnt | analys(?:e|ed|es|ing)
    | (?:re|un|de)?(?:optim|initial|normal|quant|recogn|organ|serial|parallel|synchron|maxim|minim
      |summar|visual|vector|material|util|final|standard|categor|priorit|custom|token|random|real
      |general|special|central)is(?:e|es|ed|er|ers|ing|ation|ations|able)
    )(?!\w)""",
    re.VERBOSE | re.IGNORECASE,
)

ALLOWED: dict[str, tuple[str, ...]] = {}
"""Texts that may stay, by file: names in output files, quotations, words of other programs."""

PENDING: tuple[str, ...] = ()
"""Paths (prefixes) that are not rewritten yet. This list only shrinks."""

PLAIN_FILES = ("README.md", "docs/*.md", "jobs/*.yaml", "imgcls/**/*.j2", "imgcls/**/*.html")
CODE_FILES = ("imgcls/**/*.py", "jobs/*.py", "benchmarks/**/*.py", "tests/**/*.py")


def find_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of a file: all of a page, strings and comments of Python code.

    Strings without a space are names (columns, keys, options) and are skipped.
    """
    source = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, line


def find_words(path: Path) -> list[str]:
    """`file:line: word` of every word of a file that is not to be used."""
    name = path.relative_to(REPOSITORY).as_posix()
    found = []
    for line, text in find_texts(path):
        for allowed in ALLOWED.get(name, ()):
            text = text.replace(allowed, "")
        text = re.sub(r"`[^`]*`", "", text)  # code
        words = [match.group() for match in (*DIALECT.finditer(text), *BRITISH.finditer(text))]
        found += [f"{name}:{line}: {word}" for word in words]
    return found


def list_files() -> list[Path]:
    patterns = (*PLAIN_FILES, *CODE_FILES)
    files = {path for pattern in patterns for path in REPOSITORY.glob(pattern)}
    return sorted(path for path in files if path != Path(__file__))


def test_texts_are_plain_american_english() -> None:
    found = []
    for path in list_files():
        if not path.relative_to(REPOSITORY).as_posix().startswith(PENDING or ("-",)):
            found += find_words(path)
    assert not found, "\n".join(found)
