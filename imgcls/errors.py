"""Exceptions of the package, with the exit code of the command and the status of a row.

Every message names the path, key or row, the reason and the fix. Only the class determines the exit
code of a command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OK = "ok"
"""The status of a row without an error; an error class has the status of its rows."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error on one line, cut after `limit` characters; else the error's class."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text; else the error's class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ImgclsError(Exception):
    """Base class of all errors of imgcls."""

    exit_code = 1


class RequestError(ImgclsError):
    """The request is wrong; nothing was started."""

    exit_code = 2


class ConfigError(RequestError):
    """A configuration key or value is wrong.

    settings: the nested settings, where they were read before they were found to be wrong
    """

    def __init__(self, message: str, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.settings = settings or {}


class ManifestError(RequestError):
    """The manifest cannot be read as a table of image paths."""


class BundleError(RequestError):
    """The model bundle is missing, damaged or does not fit."""


class NotExplainable(BundleError):
    """The network has no feature map over the image, so its predictions cannot be explained."""


class OutputError(RequestError):
    """The output folder cannot be written, or belongs to another run."""


class OutputLocked(OutputError):
    """Another driver holds the lease on this output."""


class ResourcesError(RequestError):
    """The cluster does not have the resources for the requested layout."""


class RunFailed(ImgclsError):
    """The run failed; rerun the same command to resume it."""


class Interrupted(RunFailed):
    """The run was stopped; rerun the same command to resume it."""


class TooManyErrors(ImgclsError):
    """More rows failed than `max_error_rate` allows; the run was not committed."""

    exit_code = 3


class IssuesFound(ImgclsError):
    """A data set has issues that `fail_on` names."""

    exit_code = 3


class StorageError(RunFailed):
    """Reading or writing a file failed.

    status:       of the row whose image it is
    is_temporary: whether the same request may succeed later
    """

    status = "unreadable"
    is_temporary = False


class StorageMissing(StorageError):
    """There is no such file."""

    status = "missing"


class StorageBucketMissing(StorageMissing):
    """There is no such bucket or container."""


class StorageChanged(StorageMissing):
    """The file was replaced while parts of it were read."""


class StorageForbidden(StorageError):
    """The store refuses access."""

    status = "forbidden"


class StorageOptedOut(StorageForbidden):
    """The owner of the image does not allow its use; it was not read, or is not used."""

    status = "opted_out"


class StorageCredentials(StorageForbidden):
    """Credentials are wrong, missing or expired; every request will be refused."""


class StorageClockSkew(StorageCredentials):
    """This machine's clock is too far from the store's, which refuses every signed request."""


class StorageTooLarge(StorageError):
    """The file is larger than the limit; no more was read."""

    status = "too_large"


class StorageFull(StorageError):
    """No space is left."""

    is_temporary = True


class StorageUnavailable(StorageError):
    """The store does not answer correctly, even after retries."""

    status = "unavailable"
    is_temporary = True


class StorageThrottled(StorageUnavailable):
    """The store throttles requests, even after retries."""

    status = "throttled"


def request_error(
    kind: type[RequestError], message: str, cause: BaseException
) -> RequestError | StorageError:
    """The error to raise when a file that a request names cannot be read or written.

    It is of `kind` (exit code 2), or of the cause's own class (exit code 1) when a later attempt
    may succeed.
    """
    if isinstance(cause, StorageError) and cause.is_temporary:
        return type(cause)(f"{message}; a later try may succeed")
    return kind(message)


class ImageError(ImgclsError):
    """The bytes are not an image that can be used; `status` is the row's status."""

    status = "unreadable"


class EmptyImage(ImageError):
    """The file has no bytes, or the image no pixels."""

    status = "empty"


class TruncatedImage(ImageError):
    """The file ends before the image does."""

    status = "truncated"


class NotAnImage(ImageError):
    """The bytes are in no supported image format."""

    status = "not_an_image"


class UnsupportedImage(ImageError):
    """A valid image file of a kind that is not supported; the message names the kind."""

    status = "unsupported"


class ImageTooLarge(ImageError):
    """The header declares more pixels than allowed."""

    status = "too_large"


class NotFinite(ImageError):
    """The network returns NaN or infinity for the image."""

    status = "not_finite"


class CrashingImage(ImageError):
    """A worker crashed or hung on the image."""

    status = "crashed"
