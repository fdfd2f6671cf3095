"""Translate raw errors of the operating system and of stores into StorageErrors.

Separates transient errors, which are retried, from permanent ones, and throttling from outages.
"""

from __future__ import annotations

import datetime
import email.utils
import errno
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from imgcls.errors import (
    StorageBucketMissing,
    StorageClockSkew,
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
    one_line,
)

GET, PUT, LIST, DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
"""Permissions that requests need, by their S3 names."""
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
"""Their names in other stores; Azure has roles."""

_THROTTLED_CODES = frozenset(
    "SlowDown Throttling ThrottlingException ThrottledException RequestThrottled TooManyRequests "
    "RequestLimitExceeded BandwidthLimitExceeded ServerBusy 503 429".split()
)
_TRANSIENT_CODES = frozenset(
    "RequestTimeout InternalError ServiceUnavailable OperationTimedOut 408 500 502 504 "
    # a body that was damaged on its way to the store
    "BadDigest IncompleteBody XAmzContentSHA256Mismatch "
    # two writers of one name at once; a retry finds the object
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
"""Stores whose 401 means bad credentials; that of a web server may concern one page."""
_REDIRECT_CODES = frozenset(
    "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException "
    "301 307".split()
)
_KNOWN_CODES = frozenset(
    {"InvalidObjectState", *_THROTTLED_CODES, *_TRANSIENT_CODES, *_CREDENTIAL_CODES, *_CLOCK_CODES}
    | {*_FORBIDDEN_CODES, *_MISSING_CODES, *_REDIRECT_CODES}
)
"""Other codes are classified by their HTTP status."""


def translate_error(url: str, error: BaseException, permission: str = "") -> StorageError:
    """The StorageError that explains a raw error of the operating system or a store.

    permission: what the request needs, named in the message where it was refused
    """
    if isinstance(error, StorageError):
        return error
    code = get_error_code(error)
    if code not in _KNOWN_CODES:
        code = _get_http_status(error) or code
    failure = _Failure(url, error, code, permission)
    return next(explain(failure) for applies, explain in _RULES if applies(failure))


@dataclass(frozen=True)
class _Failure:
    """A failed request: its URL, raw error, the store's code, and the permission it needs."""

    url: str
    error: BaseException
    code: str
    permission: str

    @property
    def place(self) -> str:
        return shorten_url(self.url)

    @property
    def reason(self) -> str:
        return describe_error(self.error)


def _is_missing(failure: _Failure) -> bool:
    return isinstance(failure.error, FileNotFoundError) or failure.code in _MISSING_CODES


def _explain_missing(failure: _Failure) -> StorageError:
    if failure.code in _MISSING_BUCKET_CODES:
        return StorageBucketMissing(f"{failure.place}: no such bucket")
    return StorageMissing(f"{failure.place}: no such file")


def _explain_clock_skew(failure: _Failure) -> StorageError:
    return StorageClockSkew(
        f"{failure.place}: the store refuses every request, because this machine's clock is "
        f"{_describe_clock_skew(failure.error)}; synchronize the clock (NTP), then rerun the same "
        "command"
    )


def _is_bad_credentials(failure: _Failure) -> bool:
    return (
        failure.code in _CREDENTIAL_CODES
        or (failure.code == "401" and failure.url.partition(":")[0] in _SIGNED_PROTOCOLS)
        or any(name in _CREDENTIAL_ERRORS for name in _iter_class_names(failure.error))
    )


def _explain_bad_credentials(failure: _Failure) -> StorageError:
    return StorageCredentials(
        f"{failure.place}: access is refused ({failure.reason}); check the credentials, which come "
        "from the environment, the profile or the machine's role"
    )


def _explain_archived(failure: _Failure) -> StorageError:
    return StorageError(f"{failure.place}: is archived; restore it in the store first")


def _is_forbidden(failure: _Failure) -> bool:
    return (
        isinstance(failure.error, PermissionError)
        or failure.code in _FORBIDDEN_CODES
        or _is_gcsfs_forbidden(failure.error)
    )


def _explain_forbidden(failure: _Failure) -> StorageError:
    remedy = _describe_permission(failure.url, failure.permission)
    return StorageForbidden(f"{failure.place}: access is refused ({failure.reason}){remedy}")


def _explain_redirect(failure: _Failure) -> StorageError:
    region = _find_region(failure.error)
    where = f"in region {region}; set --storage.region {region}" if region else "elsewhere"
    return StorageError(f"{failure.place}: the bucket is {where} ({failure.reason})")


def _is_full(failure: _Failure) -> bool:
    error = failure.error
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _explain_full(failure: _Failure) -> StorageError:
    return StorageFull(f"{failure.place}: no space left; free some")


def _explain_folder(failure: _Failure) -> StorageError:
    return StorageError(f"{failure.place}: is a folder, not a file")


def _explain_throttled(failure: _Failure) -> StorageError:
    return StorageThrottled(
        f"{failure.place}: the store asks for fewer requests ({failure.reason})"
    )


def _explain_unavailable(failure: _Failure) -> StorageError:
    return StorageUnavailable(f"{failure.place}: the store did not answer ({failure.reason})")


_RULES: tuple[tuple[Callable[[_Failure], bool], Callable[[_Failure], StorageError]], ...] = (
    (_is_missing, _explain_missing),
    (lambda failure: failure.code in _CLOCK_CODES, _explain_clock_skew),
    (_is_bad_credentials, _explain_bad_credentials),
    (lambda failure: failure.code == "InvalidObjectState", _explain_archived),
    (_is_forbidden, _explain_forbidden),
    (lambda failure: failure.code in _REDIRECT_CODES, _explain_redirect),
    (_is_full, _explain_full),
    (lambda failure: isinstance(failure.error, IsADirectoryError), _explain_folder),
    (lambda failure: failure.code in _THROTTLED_CODES, _explain_throttled),
    (
        lambda failure: failure.code in _TRANSIENT_CODES or _is_transient(failure.error),
        _explain_unavailable,
    ),
    (lambda failure: True, lambda failure: StorageError(f"{failure.place}: {failure.reason}")),
)
"""Tests of a failure, and the error of the first one that applies."""


def too_large_error(url: str, limit: int | None, size: int | None = None) -> StorageTooLarge:
    """The error of a file with more than `limit` bytes; size: its bytes, where known."""
    found = f"has {size:,} bytes, more" if size is not None else "has more bytes"
    return StorageTooLarge(
        f"{shorten_url(url)}: {found} than the limit of {limit:,}; raise max_bytes to read it"
    )


def get_error_code(error: BaseException | None) -> str:
    """The store's error code, also of an error that a driver has wrapped; empty when unknown.

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
    """The HTTP status of the response behind an error; empty when unknown."""
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
    """Seconds to wait before the next request, from the header Retry-After; None without one.

    Source: RFC 9110, section 10.2.3: seconds, or a date, which is compared with the date of the
    response because this machine's clock may be wrong.
    """
    headers = _get_headers(error)
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isdigit():
        return float(value)
    until, now = _parse_http_date(value), _parse_http_date(headers.get("date", ""))
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


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _get_headers(error: BaseException) -> dict[str, str]:
    """The headers of the response behind an error, names in lower case."""
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
    """Whether an error of gcsfs is a 403, for which gcsfs has neither a class nor a code."""
    return type(error) is OSError and str(error).startswith("Forbidden: ")


def _iter_class_names(error: BaseException) -> Iterator[str]:
    return (type(each).__name__ for each in _iter_causes(error))


def _describe_permission(url: str, permission: str) -> str:
    """The permission that a refused request needs, by the store's name; empty for a disk."""
    protocol = url.partition(":")[0]
    if protocol in ("http", "https"):
        return "; a signed URL may have expired"
    family = _STORE_FAMILIES.get(protocol)
    if family is None or not permission:
        return ""
    name = _PERMISSION_NAMES.get(family, {}).get(permission, permission)
    remedy = f"; the request needs the {'role' if family == 'azure' else 'permission'} {name}"
    if permission == GET and family == "s3":
        remedy += f" (or the file is missing, which a store reports only with {LIST})"
    return remedy


def _find_region(error: BaseException) -> str:
    """The region that a store names in a redirect; empty without one."""
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
