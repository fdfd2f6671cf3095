"""Bodies as they arrive: bounded in bytes, in time and in number, on disk where they are large.

Nothing is read that is not needed to know that a request must be refused. No name or path that a
client gives is ever opened.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from imgcls.serving.config import MIB, LimitsConfig
from imgcls.serving.problems import Problem, build_busy_problem, build_too_large_problem

MAX_FORM_FIELDS = 16
"""Form fields beside the images: none is needed, and some forms send a few."""


@dataclass
class Upload:
    """One image file that has arrived whole.

    name: what the client calls it, to be told back and for nothing else
    """

    file: IO[bytes]
    size: int
    name: str | None = None

    def read(self) -> bytes:
        self.file.seek(0)
        return self.file.read()


class BodyBudget:
    """Counts the bytes of all bodies that are held, so that they never exceed a bound."""

    def __init__(self, most: int) -> None:
        self._max_bytes = most
        self.held_bytes = 0

    def reserve(self, count: int) -> None:
        """Hold so many bytes more; raises a Problem when there is no room."""
        if self.held_bytes + count > self._max_bytes:
            raise build_busy_problem(1)
        self.held_bytes += count

    def release(self, count: int) -> None:
        self.held_bytes -= count


@asynccontextmanager
async def receive_uploads(
    request: Request, limits: LimitsConfig, spool: BodyBudget
) -> AsyncIterator[list[Upload]]:
    """The images in a request's body: itself, or the files of a multipart form.

    Raises a Problem as soon as the body is seen to be too large, too slow or no such thing.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not (form or not kind or kind == "application/octet-stream" or kind.startswith("image/")):
        raise Problem(
            415,
            "unsupported_body",
            f"content type {kind[:80]!r}: send the bytes of an image as image/* or "
            "application/octet-stream, or several as multipart/form-data",
        )
    body = _BoundedBody(request, limits.body_bytes if form else limits.image_bytes, limits, spool)
    uploads: list[Upload] = []
    try:
        uploads = await (_read_form(request, body, limits) if form else _read_raw(body))
        if not uploads:
            raise Problem(400, "no_image", "the form has no file; send each image as one")
        yield uploads
    finally:
        for upload in uploads:
            upload.file.close()
        spool.release(body.num_bytes)


class _BoundedBody:
    """A request's body, chunk by chunk, held to a size and a time."""

    def __init__(
        self, request: Request, most: int, limits: LimitsConfig, spool: BodyBudget
    ) -> None:
        self.num_bytes = 0
        self._request = request
        self._max_bytes = most
        self._budget = spool
        self._timeout_s = limits.upload_timeout_s
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise build_too_large_problem(most)

    async def iter_chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes as they come; raises a Problem when they are too many or too slow."""
        deadline = time.monotonic() + self._timeout_s
        stream = self._request.stream()
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    chunk = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Problem(
                    408,
                    "too_slow",
                    f"the body did not arrive within {self._timeout_s:g} seconds",
                ) from None
            if self.num_bytes + len(chunk) > self._max_bytes:
                raise build_too_large_problem(self._max_bytes)
            self._budget.reserve(len(chunk))
            self.num_bytes += len(chunk)
            yield chunk


async def _read_raw(body: _BoundedBody) -> list[Upload]:
    file = tempfile.SpooledTemporaryFile(max_size=MIB)  # noqa: SIM115  closed by `received`
    try:
        async for chunk in body.iter_chunks():
            file.write(chunk)
    except BaseException:
        file.close()
        raise
    return [Upload(file, body.num_bytes)]


async def _read_form(request: Request, body: _BoundedBody, limits: LimitsConfig) -> list[Upload]:
    parser = MultiPartParser(
        request.headers, body.iter_chunks(), max_files=limits.images, max_fields=MAX_FORM_FIELDS
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise Problem(
                413, "too_many_images", f"more than {limits.images} images in one request"
            ) from None
        raise Problem(400, "malformed_form", f"multipart/form-data: {error.message}") from None
    except (KeyError, UnicodeError, LookupError):
        raise Problem(400, "malformed_form", "multipart/form-data: without a boundary") from None
    return [
        Upload(part.file, part.size or 0, _clean_filename(part.filename))
        for _, part in form.multi_items()
        if isinstance(part, UploadFile)
    ]


def _clean_filename(name: str | None) -> str | None:
    """A name without what cannot be told back: in some charsets half a character may be one."""
    return None if name is None else name.encode("utf-8", "replace").decode("utf-8")
