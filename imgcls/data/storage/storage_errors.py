"""Translate raw errors of the operating system and of stores into StorageErrors.

Separates transient errors, which are retried, from permanent ones, and throttling from outages.
"""

from __future__ import annotations

import datetime
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from imgcls.data.storage.error_details import (
    describe_error,
    find_region,
    get_error_code,
    get_headers,
    get_http_status,
    iter_causes,
    iter_class_names,
    parse_http_date,
    shorten_url,
)
from imgcls.data.storage.registry import find_store
from imgcls.errors import (
    StorageBucketMissing,
    StorageClockSkew,
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageThrottled,
    StorageUnavailable,
)

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
        code = get_http_status(error) or code
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


def _is_unknown_host(failure: _Failure) -> bool:
    """Whether the name of a web server does not exist: lists from the web have many of these.

    A name server that does not answer is EAI_AGAIN, which is retried.
    """
    causes = iter_causes(failure.error)
    errors = [each.errno for each in causes if isinstance(each, socket.gaierror)]
    is_web = failure.url.startswith(("http://", "https://"))
    return is_web and any(each in (socket.EAI_NONAME, socket.EAI_NODATA) for each in errors)


def _explain_unknown_host(failure: _Failure) -> StorageError:
    return StorageMissing(f"{failure.place}: no such host")


def _explain_clock_skew(failure: _Failure) -> StorageError:
    return StorageClockSkew(
        f"{failure.place}: the store refuses every request, because this machine's clock is "
        f"{_describe_clock_skew(failure.error)}; synchronize the clock (NTP), then rerun the same "
        "command"
    )


def _is_bad_credentials(failure: _Failure) -> bool:
    return (
        failure.code in _CREDENTIAL_CODES
        or (failure.code == "401" and find_store(failure.url).rejects_with_401)
        or any(name in _CREDENTIAL_ERRORS for name in iter_class_names(failure.error))
    )


def _explain_bad_credentials(failure: _Failure) -> StorageError:
    return StorageCredentials(
        f"{failure.place}: access is refused ({failure.reason}); check the credentials, which come "
        "from the environment, the profile or the machine's role"
    )


def _explain_archived(failure: _Failure) -> StorageError:
    return StorageError(f"{failure.place}: is archived; restore it in the store first")


def _is_forbidden(failure: _Failure) -> bool:
    return isinstance(failure.error, PermissionError) or failure.code in _FORBIDDEN_CODES


def _explain_forbidden(failure: _Failure) -> StorageError:
    remedy = find_store(failure.url).describe_permission(failure.permission)
    return StorageForbidden(f"{failure.place}: access is refused ({failure.reason}){remedy}")


def _explain_redirect(failure: _Failure) -> StorageError:
    region = find_region(failure.error)
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
    (_is_unknown_host, _explain_unknown_host),
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


def _describe_clock_skew(error: BaseException) -> str:
    date = parse_http_date(get_headers(error).get("date", ""))
    if date is None:
        return "wrong"
    seconds = round(time.time() - date)
    off = datetime.timedelta(seconds=abs(seconds))
    return f"{off} {'ahead of' if seconds > 0 else 'behind'} the store's"


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
