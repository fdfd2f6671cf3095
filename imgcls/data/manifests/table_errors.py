"""Errors of the libraries of lakehouse tables, as the StorageError that explains them.

Their own errors have a class per layer, not per cause, so the cause is read from the text.
"""

from __future__ import annotations

import re

from imgcls.errors import StorageError, StorageForbidden, StorageUnavailable, one_line

_DRAWING = re.compile(r"\x1b\[[0-9;]*m|↳")


def _match_status(codes: str) -> str:
    """A pattern for HTTP status codes, and no other number, such as that of `in 401.966µs`."""
    return rf"\b({codes}) (Client|Server) Error|\(({codes})\)|status(?: code)?:? ({codes})\b(?!\.)"


_FORBIDDEN = re.compile(
    _match_status("401|403")
    + r"|AccessDenied|Access Denied|Forbidden|Unauthorized|InvalidAccessKeyId"
    # and not a part of a path
    r"|SignatureDoesNotMatch|(?<![/\w.-])\w*[Cc]redential\w*(?![/\w-]|\.\w)"
)
_TEMPORARY = re.compile(
    _match_status("429|500|502|503|504")
    + r"|SlowDown|error sending request|[Tt]imed out|[Tt]imeout|Too Many Requests"
    r"|Internal Server Error|Bad Gateway|Service Unavailable"
    r"|[Cc]onnection (refused|reset|aborted|error)|ConnectError|database is locked"
)


def translate_table_error(place: str, error: BaseException) -> StorageError:
    """The StorageError for an error of deltalake, pyiceberg or huggingface_hub.

    place: the table, with which the message begins
    """
    if isinstance(error, StorageError):
        return error
    text = one_line(_DRAWING.sub("", str(error) or type(error).__name__))
    if _FORBIDDEN.search(text):
        return StorageForbidden(f"{place}: access is refused ({text}); check the credentials")
    if isinstance(error, (TimeoutError, ConnectionError)) or _TEMPORARY.search(text):
        return StorageUnavailable(f"{place}: cannot be reached ({text})")
    return StorageError(f"{place}: {text}")
