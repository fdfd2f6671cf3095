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
    | dealt|hush|hushed|purse|pocket|errs|for[ ]ever|of[ ]late|so[ ](?:long|many|often)
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

ALLOWED: dict[str, tuple[str, ...]] = {
    "imgcls/data/storage/object_store.py": ("tell",),  # a method of Python's streams
    "imgcls/data/containers/tar_archive.py": ("tell",),
    "tests/e2e/test_bad_input.py": ("per cent.png",),
}
"""Texts that may stay, by file: names in output files, quotations, words of other programs."""

PLAIN_FILES = (
    "*.md",
    "manifests/*.md",
    "docs/*.md",
    "jobs/*.yaml",
    "imgcls/**/*.j2",
    "imgcls/**/*.html",
)
CODE_FILES = ("imgcls/**/*.py", "jobs/*.py", "benchmarks/**/*.py", "tests/**/*.py")


def find_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of a file: all of a page; names, strings and comments of Python code.

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
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", node.name)
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
        found += [f"{name}:{line}: {word}" for word in find_in_text(text)]
    return found


def find_in_text(text: str) -> list[str]:
    text = re.sub(r"`[^`]*`|\"\w+\"|'\w+'", "", text)  # code and names
    return [match.group() for match in (*DIALECT.finditer(text), *BRITISH.finditer(text))]


def list_files() -> list[Path]:
    patterns = (*PLAIN_FILES, *CODE_FILES)
    files = {path for pattern in patterns for path in REPOSITORY.glob(pattern)}
    return sorted(path for path in files if path != Path(__file__))


def test_texts_are_plain_american_english() -> None:
    found = []
    for path in list_files():
        found += find_words(path)
    assert not found, "use standard American English:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('"""What is told."""', ["told"]),
        ('x = f"nobody in {COLUMN}"', ["nobody"]),
        ("x = 1  # a grey area", ["grey"]),
        ("def judge_all(): ...", ["judge"]),
        ("class LabelledRows: ...", ["Labelled"]),
        ("# rows of LabelLists", ["LabelLists"]),
        ("x = '\\u2014said by'", ["said"]),
        ("x = ('it is so '\n     f'long')", ["so long"]),
        ("COLUMN = 'labelled'", []),
        ("x = \"`said` and 'judged' are names\"", []),
    ],
)
def test_words_of_names_strings_docstrings_and_comments_are_found(
    source: str, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    assert [word for _, text in find_texts(file) for word in find_in_text(text)] == words
