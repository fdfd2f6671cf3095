"""Annotations: what people decided about images, as the readers of exports return them."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imgcls.errors import RequestError

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Characters that JSON can contain and UTF-8 cannot."""


@dataclass(frozen=True)
class Annotation:
    """A decision of one person about one image; a row of the labels table.

    path:       of the image, as the export has it
    labels:     class names in Unicode NFC, empty if no class applies; None if the image was skipped
    annotator:  name or email address, None where it is not exported
    labeled_at: in UTC, None where it is not exported
    tool:       as in the labels table
    """

    path: str
    labels: tuple[str, ...] | None
    annotator: str | None
    labeled_at: datetime.datetime | None
    tool: str


@dataclass(frozen=True)
class Export:
    """The annotations of an export.

    unlabeled:    images in it without a label
    unchanged:    images whose labels are unchanged predictions of a model, if the tool records it
    has_suffixes: whether the paths have the suffixes of the files, such as .jpg
    repeated:     names in several tasks of a project, which may be those of several images
    """

    source: str
    annotations: Sequence[Annotation]
    unlabeled: int = 0
    unchanged: int = 0
    has_suffixes: bool = True
    repeated: frozenset[str] = frozenset()


def check_names(values: Iterable[Any], place: str) -> tuple[str, ...]:
    """Class names in Unicode NFC, each once; raises RequestError for a value that is no name."""
    names = []
    for value in values:
        if not isinstance(value, str) or not value.strip() or not is_unicode(value):
            raise RequestError(f"{place}: {value!r} is no class name; correct the export")
        names.append(unicodedata.normalize("NFC", value))
    return tuple(dict.fromkeys(names))


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: it has no single surrogates, which JSON can have."""
    return not _SURROGATE.search(text)


def parse_time(value: Any, place: str) -> datetime.datetime | None:
    """A time in ISO 8601, as UTC if it has no zone; None for no value.

    Raises RequestError for a text that is no time.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        time = (
            value
            if isinstance(value, datetime.datetime)
            else datetime.datetime.fromisoformat(value.strip())
        )
        if time.tzinfo is None:
            return time.replace(tzinfo=datetime.UTC)
        return time.astimezone(datetime.UTC)
    except (ValueError, AttributeError, OverflowError) as error:
        raise RequestError(
            f"{place}: {value!r} is no time; expected ISO 8601, such as 2026-03-01T12:30:00Z"
        ) from error
