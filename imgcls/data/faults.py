"""What a raw error of the operating system or of a store means, as a StorageError in plain words.

Tells what will pass from what will not, and a store that asks for patience from one that is silent.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from imgcls.errors import (
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageThrottled,
    StorageUnavailable,
)

GET, PUT, LIST, DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
"""The permissions that requests take, as S3 calls them."""

_THROTTLED_CODES = frozenset(
    "SlowDown Throttling ThrottlingException ThrottledException RequestThrottled TooManyRequests "
    "RequestLimitExceeded BandwidthLimitExceeded 503 429".split()
)
_PASSING_CODES = frozenset(
    "RequestTimeout RequestTimeTooSkewed InternalError ServiceUnavailable 500 502 504 "
    # a body that was damaged on its way to the store
    "BadDigest IncompleteBody XAmzContentSHA256Mismatch "
    # two at once on one name: whoever tries again finds it there
    "ConditionalRequestConflict OperationAborted".split()
)
_CREDENTIAL_CODES = frozenset(
    "InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken ExpiredTokenException InvalidToken "
    "RequestExpired TokenRefreshRequired InvalidClientTokenId UnrecognizedClientException".split()
)
_CREDENTIAL_ERRORS = frozenset(
    "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError "
    "SSOTokenLoadError UnauthorizedSSOTokenError NoAuthTokenError ProfileNotFound".split()
)
_FORBIDDEN_CODES = frozenset("AccessDenied AllAccessDisabled 401 403 Forbidden".split())
_MISSING_CODES = frozenset("NoSuchKey NoSuchBucket 404 NotFound".split())
_REDIRECTED_CODES = frozenset(
    "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException "
    "301 307".split()
)


def typed(url: str, error: BaseException, needs: str = "") -> StorageError:
    """The StorageError that says what a raw error means for `url`.

    needs: the permission that the request wanted, named where it was refused
    """
    place, code = short(url), code_of(error)
    if isinstance(error, StorageError):
        return error
    if isinstance(error, FileNotFoundError) or code in _MISSING_CODES:
        what = "bucket" if code == "NoSuchBucket" else "file"
        return StorageMissing(f"{place}: no such {what}")
    if code in _CREDENTIAL_CODES or any(name in _CREDENTIAL_ERRORS for name in _names(error)):
        return StorageCredentials(
            f"{place}: access is refused ({reason(error)}); check the credentials, which come from "
            "the environment, the profile or the machine's role"
        )
    if code == "InvalidObjectState":
        return StorageError(f"{place}: is archived; have the store restore it first")
    if isinstance(error, PermissionError) or code in _FORBIDDEN_CODES:
        remedy = f"; it takes the permission {needs}" if needs and "://" in url else ""
        if remedy and needs == GET:
            remedy += f" (or the file is missing, which a store says only to who has {LIST})"
        return StorageForbidden(f"{place}: access is refused ({reason(error)}){remedy}")
    if code in _REDIRECTED_CODES:
        region = _region_of(error)
        where = f"in region {region}; say --storage.region {region}" if region else "elsewhere"
        return StorageError(f"{place}: the bucket is {where} ({reason(error)})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{place}: no space left; free some")
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{place}: is a folder, not a file")
    if code in _THROTTLED_CODES:
        return StorageThrottled(f"{place}: the store asks for fewer requests ({reason(error)})")
    if code in _PASSING_CODES or _is_passing(error):
        return StorageUnavailable(f"{place}: the store did not answer ({reason(error)})")
    return StorageError(f"{place}: {reason(error)}")


def code_of(error: BaseException | None) -> str:
    """The store's own code for an error, also below what s3fs made of it; empty when unknown."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "status", ""))


def reason(error: BaseException) -> str:
    """An error's own words, on one line."""
    text = getattr(error, "strerror", None)
    if text is None and isinstance(error, OSError):
        text = code_of(error)  # a store may give a code and no words
    return " ".join((text or str(error) or type(error).__name__).split())[:300]


def short(url: str) -> str:
    """A URL as it is told, cut when nobody would read it."""
    return url if len(url) <= 300 else f"{url[:120]}...({len(url)} characters)"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    if error is not None:
        yield error
        if error.__cause__ is not None:
            yield error.__cause__


def _names(error: BaseException) -> Iterator[str]:
    return (type(each).__name__ for each in _chain(error))


def _region_of(error: BaseException) -> str:
    """The region that a store names in a redirection."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            named = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
            return str(named or "")
    return ""


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ESTALE, errno.EIO, errno.EMFILE):
        return True
    if isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError":
        return False
    module = type(error).__module__.partition(".")[0]
    return module in ("aiohttp", "botocore", "aiobotocore", "urllib3") and not code_of(error)
