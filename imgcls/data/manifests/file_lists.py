"""Lists of files in braces, as shells and WebDataset write them: `{000..099}` and `{a,b}`."""

from __future__ import annotations

import itertools
import re

from imgcls.errors import ManifestError
from imgcls.formatting import format_count

_MAX_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(path: str) -> list[str]:
    """The paths of a brace list, in order; the path itself without braces that are a list.

    A range is zero-padded to the width of its longer end. Raises ManifestError for more than a
    million files.

    >>> expand_braces("shards/{08..10}.tar")
    ['shards/08.tar', 'shards/09.tar', 'shards/10.tar']
    """
    parts = _BRACES.split(path)  # text, content of braces, text, ...
    choices = [[part] if at % 2 == 0 else _expand_content(part) for at, part in enumerate(parts)]
    count = 1
    for each in choices:
        count *= len(each)
    if count > _MAX_FILES:
        raise ManifestError(
            f"manifest {path}: its braces name {format_count(count, 'file')}, more than "
            f"{_MAX_FILES:,}; correct the range"
        )
    return ["".join(each) for each in itertools.product(*choices)]


def _expand_content(content: str) -> list[str]:
    found = _RANGE.fullmatch(content)
    if found is None:
        return content.split(",") if "," in content else [f"{{{content}}}"]
    first, last = int(found[1]), int(found[2])
    if abs(last - first) >= _MAX_FILES:
        raise ManifestError(
            f"manifest {{{content}}}: names more than {_MAX_FILES:,} files; correct the range"
        )
    width = max(len(found[1]), len(found[2])) if "0" in (found[1][0], found[2][0]) else 0
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]
