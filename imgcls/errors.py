"""The tree of errors a user can meet.

Every message names the place, what was found there and the remedy. The class decides the exit
code that a scheduler sees; nothing else in the package calls `sys.exit` with a number of its own.
"""

from __future__ import annotations

OK = "ok"
"""The status of a row without an error; an error class has the status of its rows."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error on one line, cut after `limit` characters; else the error's class."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text; else the error's class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ImgclsError(Exception):
    """Anything imgcls says to its user."""

    exit_code = 1


class RequestError(ImgclsError):
    """The request was wrong; nothing was started."""

    exit_code = 2


class ConfigError(RequestError):
    """A configuration key or value is wrong."""


class ManifestError(RequestError):
    """The manifest cannot be read as a table of image paths."""


class BundleError(RequestError):
    """The model bundle is missing, damaged or does not fit."""


class OutputError(RequestError):
    """The output folder cannot be written, or belongs to another run."""


class OutputLocked(OutputError):
    """Another driver holds the lease on this output."""


class ResourcesError(RequestError):
    """The cluster cannot hold the layout that was asked for."""


class RunFailed(ImgclsError):
    """The run broke off; the same command resumes it."""


class Interrupted(RunFailed):
    """The run was told to stop; the same command resumes it."""


class TooManyErrors(ImgclsError):
    """The run finished, but with more failed rows than allowed; it was not committed."""

    exit_code = 3


class IssuesFound(ImgclsError):
    """A data set has issues that it must not have."""

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


class StorageForbidden(StorageError):
    """The store refuses access."""

    status = "forbidden"


class StorageCredentials(StorageForbidden):
    """Credentials are wrong, missing or expired: whatever is asked for will be refused."""


class StorageClockSkew(StorageCredentials):
    """This machine's clock is too far from the store's, which refuses every signed request."""


class StorageTooLarge(StorageError):
    """The file has more bytes than the limit; none beyond the limit were read."""

    status = "too_large"


class StorageFull(StorageError):
    """No space is left."""

    is_temporary = True


class StorageUnavailable(StorageError):
    """The store did not answer properly, even after retries."""

    status = "unavailable"
    is_temporary = True


class StorageThrottled(StorageUnavailable):
    """The store asked for fewer requests, even after retries."""

    status = "throttled"


def request_error(
    kind: type[RequestError], message: str, cause: BaseException
) -> RequestError | StorageError:
    """The error to raise where a file that a request names cannot be read or written.

    It is of `kind` (exit code 2), unless a later try may succeed: then it is of the cause's own
    class (exit code 1).
    """
    if isinstance(cause, StorageError) and cause.is_temporary:
        return type(cause)(f"{message}; a later try may succeed")
    return kind(message)


class ImageError(ImgclsError):
    """The bytes are not an image that can be used; `status` is the row's status."""

    status = "unreadable"


class EmptyImage(ImageError):
    """The file has no bytes."""

    status = "empty"


class TruncatedImage(ImageError):
    """The file ends before the image does."""

    status = "truncated"


class NotAnImage(ImageError):
    """The bytes are in no image format that is read here."""

    status = "not_an_image"


class UnsupportedImage(ImageError):
    """A sound image file of a kind that is not decoded here; the message names the kind."""

    status = "unsupported"


class ImageTooLarge(ImageError):
    """The header announces more pixels than allowed."""

    status = "too_large"


class NotFinite(ImageError):
    """The network gives NaN or infinity for the image."""

    status = "not_finite"


class CrashingImage(ImageError):
    """A worker died or hung at it."""

    status = "crashed"
