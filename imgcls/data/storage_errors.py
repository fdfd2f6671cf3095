"""What a raw error of the operating system or of a store means, as a StorageError in plain words.

Tells what will pass from what will not, and a store that asks for patience from one that is silent.
"""

from __future__ import annotations

import datetime
import email.utils
import errno
import time
from collections.abc import Iterator, Mapping
from typing import Any

from imgcls.errors import (
    StorageClockSkew,
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)

GET, PUT, LIST, DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
"""The permissions that requests take, as S3 calls them."""
_STORE_FAMILIES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
_PERMISSION_NAMES = {
    "gcs": {
        GET: "storage.objects.get",
        PUT: "storage.objects.create",
        LIST: "storage.objects.list",
        DELETE: "storage.objects.delete",
    },
    "azure": {
        GET: "Storage Blob Data Reader",
        LIST: "Storage Blob Data Reader",
        PUT: "Storage Blob Data Contributor",
        DELETE: "Storage Blob Data Contributor",
    },
}
"""What other stores call them; Azure has roles."""

_THROTTLED_CODES = frozenset(
    "SlowDown Throttling ThrottlingException ThrottledException RequestThrottled TooManyRequests "
    "RequestLimitExceeded BandwidthLimitExceeded ServerBusy 503 429".split()
)
_TRANSIENT_CODES = frozenset(
    "RequestTimeout InternalError ServiceUnavailable OperationTimedOut 408 500 502 504 "
    # a body that was damaged on its way to the store
    "BadDigest IncompleteBody XAmzContentSHA256Mismatch "
    # two at once on one name: whoever tries again finds it there
    "ConditionalRequestConflict OperationAborted "
    # the object was replaced while it was read in pieces
    "ConditionNotMet".split()
)
_CREDENTIAL_CODES = frozenset(
    "InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken ExpiredTokenException InvalidToken "
    "RequestExpired TokenRefreshRequired InvalidClientTokenId UnrecognizedClientException "
    "AuthenticationFailed InvalidAuthenticationInfo NoAuthenticationInformation".split()
)
_CREDENTIAL_ERRORS = frozenset(
    "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError "
    "SSOTokenLoadError UnauthorizedSSOTokenError NoAuthTokenError ProfileNotFound "
    # of Google's and Azure's client libraries
    "DefaultCredentialsError RefreshError ClientAuthenticationError "
    "CredentialUnavailableError".split()
)
_CLOCK_CODES = frozenset("RequestTimeTooSkewed RequestInTheFuture".split())
_FORBIDDEN_CODES = frozenset("AccessDenied AllAccessDisabled 401 403 Forbidden".split())
_MISSING_CODES = frozenset(
    "NoSuchKey NoSuchBucket 404 410 NotFound BlobNotFound ContainerNotFound".split()
)
_MISSING_BUCKET_CODES = frozenset("NoSuchBucket ContainerNotFound".split())
_SIGNED_PROTOCOLS = ("gs", "gcs", "az", "abfs", "abfss", "adl")
"""Stores whose 401 is about the credentials; a web server's may be about one page."""
_REDIRECT_CODES = frozenset(
    "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException "
    "301 307".split()
)
_KNOWN_CODES = frozenset(
    {"InvalidObjectState", *_THROTTLED_CODES, *_TRANSIENT_CODES, *_CREDENTIAL_CODES, *_CLOCK_CODES}
    | {*_FORBIDDEN_CODES, *_MISSING_CODES, *_REDIRECT_CODES}
)
"""What is not among them is judged by its HTTP status."""


def translate_error(url: str, error: BaseException, needs: str = "") -> StorageError:
    """The StorageError that says what a raw error means for `url`.

    needs: the permission that the request wanted, named where it was refused
    """
    place, code = shorten_url(url), get_error_code(error)
    if isinstance(error, StorageError):
        return error
    if code not in _KNOWN_CODES:
        code = _get_http_status(error) or code
    if isinstance(error, FileNotFoundError) or code in _MISSING_CODES:
        what = "bucket" if code in _MISSING_BUCKET_CODES else "file"
        return StorageMissing(f"{place}: no such {what}")
    if code in _CLOCK_CODES:
        return StorageClockSkew(
            f"{place}: the store refuses every request, because this machine's clock is "
            f"{_describe_clock_skew(error)}; synchronize the clock (NTP), then run the same "
            "command again"
        )
    if (
        code in _CREDENTIAL_CODES
        or (code == "401" and url.partition(":")[0] in _SIGNED_PROTOCOLS)
        or any(name in _CREDENTIAL_ERRORS for name in _iter_class_names(error))
    ):
        return StorageCredentials(
            f"{place}: access is refused ({describe_error(error)}); check the credentials, "
            "which come from "
            "the environment, the profile or the machine's role"
        )
    if code == "InvalidObjectState":
        return StorageError(f"{place}: is archived; have the store restore it first")
    if isinstance(error, PermissionError) or code in _FORBIDDEN_CODES or _is_gcsfs_forbidden(error):
        remedy = _describe_permission(url, needs)
        return StorageForbidden(f"{place}: access is refused ({describe_error(error)}){remedy}")
    if code in _REDIRECT_CODES:
        region = _find_region(error)
        where = f"in region {region}; say --storage.region {region}" if region else "elsewhere"
        return StorageError(f"{place}: the bucket is {where} ({describe_error(error)})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{place}: no space left; free some")
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{place}: is a folder, not a file")
    if code in _THROTTLED_CODES:
        return StorageThrottled(
            f"{place}: the store asks for fewer requests ({describe_error(error)})"
        )
    if code in _TRANSIENT_CODES or _is_transient(error):
        return StorageUnavailable(f"{place}: the store did not answer ({describe_error(error)})")
    return StorageError(f"{place}: {describe_error(error)}")


def too_large_error(url: str, limit: int | None, size: int | None = None) -> StorageTooLarge:
    """The error of a file with more than `limit` bytes; size: bytes that it has, where known."""
    found = f"has {size:,} bytes, more" if size is not None else "has more bytes"
    return StorageTooLarge(
        f"{shorten_url(url)}: {found} than the limit of {limit:,}; raise max_bytes to read it"
    )


def get_error_code(error: BaseException | None) -> str:
    """The store's own code for an error, also below what a driver made of it; empty when unknown.

    For stores without codes, the HTTP status.
    """
    for each in _iter_causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            return str(response.get("Error", {}).get("Code", ""))
    for each in _iter_causes(error):
        named = getattr(each, "error_code", None)  # Azure: an enumeration of strings
        if named:
            return str(getattr(named, "value", named))
    return _get_http_status(error)


def _get_http_status(error: BaseException | None) -> str:
    """The HTTP status of the answer that an error comes from; empty when unknown."""
    for each in _iter_causes(error):
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
    """Seconds that a store asks to wait before the next request; None when it asks for none.

    Source: RFC 9110, section 10.2.3: seconds, or a date, which is compared with the answer's own
    date because this machine's clock may be wrong.
    """
    headers = _get_headers(error)
    asked = headers.get("retry-after", "").strip()
    if not asked:
        return None
    if asked.isdigit():
        return float(asked)
    until, now = _parse_http_date(asked), _parse_http_date(headers.get("date", ""))
    return None if until is None else max(0.0, until - (time.time() if now is None else now))


def describe_error(error: BaseException) -> str:
    """An error's own words, on one line."""
    text = getattr(error, "strerror", None)
    if text is None and isinstance(error, OSError):
        text = get_error_code(error)  # a store may give a code and no words
    return " ".join((text or str(error) or type(error).__name__).split())[:300]


def shorten_url(url: str) -> str:
    """A URL as it is told, cut when nobody would read it."""
    return url if len(url) <= 300 else f"{url[:120]}...({len(url)} characters)"


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _get_headers(error: BaseException) -> dict[str, str]:
    """The header fields of the answer that an error comes from, names in lower case."""
    for each in _iter_causes(error):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        else:
            found = getattr(each, "headers", None) or getattr(response, "headers", None)
        if isinstance(found, Mapping):
            return {str(name).lower(): str(value) for name, value in found.items()}
    return {}


def _parse_http_date(text: str) -> float | None:
    """Seconds since the epoch of an HTTP date."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None


def _describe_clock_skew(error: BaseException) -> str:
    date = _parse_http_date(_get_headers(error).get("date", ""))
    if date is None:
        return "wrong"
    seconds = round(time.time() - date)
    off = datetime.timedelta(seconds=abs(seconds))
    return f"{off} {'ahead of' if seconds > 0 else 'behind'} the store's"


def _is_gcsfs_forbidden(error: BaseException) -> bool:
    """Whether gcsfs means a 403, for which it has neither a class nor a code."""
    return type(error) is OSError and str(error).startswith("Forbidden: ")


def _iter_class_names(error: BaseException) -> Iterator[str]:
    return (type(each).__name__ for each in _iter_causes(error))


def _describe_permission(url: str, needs: str) -> str:
    """What a refused request takes, as the store calls it; nothing for a disk."""
    protocol = url.partition(":")[0]
    if protocol in ("http", "https"):
        return "; a signed URL may have expired"
    family = _STORE_FAMILIES.get(protocol)
    if family is None or not needs:
        return ""
    name = _PERMISSION_NAMES.get(family, {}).get(needs, needs)
    remedy = f"; it takes the {'role' if family == 'azure' else 'permission'} {name}"
    if needs == GET and family == "s3":
        remedy += f" (or the file is missing, which a store reports only with {LIST})"
    return remedy


def _find_region(error: BaseException) -> str:
    """The region that a store names in a redirection."""
    for each in _iter_causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            named = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
            return str(named or "")
    return ""


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ESTALE, errno.EIO, errno.EMFILE):
        return True
    if isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError":
        return False
    module = type(error).__module__.partition(".")[0]
    known = ("aiohttp", "botocore", "aiobotocore", "urllib3", "azure", "requests")
    return module in known and not get_error_code(error)
