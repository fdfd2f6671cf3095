"""Removal of credentials from URLs that are shown or stored."""

from __future__ import annotations

import re

_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
"""Azure's URLs, where the name before the @ is a container: abfs://container@account/..."""
_USER_INFO = re.compile(r"([A-Za-z][\w+.-]*)://([^/\s'\"<>]*|[^/\s:@'\"<>]+:(?!\d+/)[^\s@'\"<>]*)@")
_QUERY = re.compile(r"\b(?!(?:s3|gs|file|hf)://)([A-Za-z][\w+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>)#]+")


def hide_credentials(text: str) -> str:
    """A text whose URLs have no user, no password and no query, such as that of a signed URL.

    A query is replaced by `?...`. In paths of s3, gs, hf and files, a `?` begins no query.

    Examples
    --------
    >>> hide_credentials("https://me:secret@host/a.csv?X-Amz-Signature=1f is missing")
    'https://host/a.csv?... is missing'
    """
    return _QUERY.sub(r"\1?...", _USER_INFO.sub(_drop_user, text))


def _drop_user(found: re.Match[str]) -> str:
    if found[1] in _CONTAINER_SCHEMES and ":" not in found[2]:
        return found[0]
    return f"{found[1]}://"
