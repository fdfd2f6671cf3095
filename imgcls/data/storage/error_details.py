"""Details of raw errors of the operating system and of stores: code, status, headers, text."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator, Mapping
from typing import Any

from imgcls.errors import one_line


def get_error_code(error: BaseException | None) -> str:
    """The store's error code, also of an error that a driver has wrapped; empty when unknown.

    For stores without codes, the HTTP status.
    """
    for each in iter_causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            return str(response.get("Error", {}).get("Code", ""))
    for each in iter_causes(error):
        named = getattr(each, "error_code", None)  # Azure: an enumeration of strings
        if named:
            return str(getattr(named, "value", named))
    return get_http_status(error)


def get_http_status(error: BaseException | None) -> str:
    """The HTTP status of the response behind an error; empty when unknown."""
    for each in iter_causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        # aiohttp and Azure; a `code` means an HTTP status to gcsfs alone
        own = ("code",) if type(each).__module__.startswith("gcsfs") else ()
        for attribute in ("status", "status_code", *own):
            status = getattr(each, attribute, None)
            if isinstance(status, int):
                return str(status)
            if isinstance(status, str) and status.isdigit():
                return status
    return ""


def get_retry_after(error: BaseException) -> float | None:
    """Seconds to wait before the next request, from the header Retry-After; None without one.

    Source: RFC 9110, section 10.2.3: seconds, or a date, which is compared with the date of the
    response because this machine's clock may be wrong.
    """
    headers = get_headers(error)
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isdigit():
        return float(value)
    until, now = parse_http_date(value), parse_http_date(headers.get("date", ""))
    return None if until is None else max(0.0, until - (time.time() if now is None else now))


def describe_error(error: BaseException) -> str:
    """The text of an error on one line; for an OSError without text, the store's code."""
    text = getattr(error, "strerror", None)
    if text is None and isinstance(error, OSError):
        text = get_error_code(error)  # a store may send a code without a message
    return one_line(text or error)


def shorten_url(url: str) -> str:
    """A URL for a message, cut when it is longer than 300 characters."""
    return url if len(url) <= 300 else f"{url[:120]}...({len(url)} characters)"


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def get_headers(error: BaseException) -> dict[str, str]:
    """The headers of the response behind an error, names in lower case."""
    for each in iter_causes(error):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        else:
            found = getattr(each, "headers", None) or getattr(response, "headers", None)
        if isinstance(found, Mapping):
            return {str(name).lower(): str(value) for name, value in found.items()}
    return {}


def parse_http_date(text: str) -> float | None:
    """Seconds since the epoch of an HTTP date."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None


def iter_class_names(error: BaseException) -> Iterator[str]:
    return (type(each).__name__ for each in iter_causes(error))


def find_region(error: BaseException) -> str:
    """The region that a store names in a redirect; empty without one."""
    for each in iter_causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            named = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
            return str(named or "")
    return ""
