"""Reading of request bodies: limited in bytes, time and number of images; large ones on disk.

A request that must be rejected is not read further than needed to know it. File names sent by a
client are returned and never opened.
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

from imgcls.data.formats import identify_format
from imgcls.serving.config import MIB, LimitsConfig
from imgcls.serving.problems import Problem, build_busy_problem, build_too_large_problem

MAX_FORM_FIELDS = 16
"""Maximum number of form fields other than images; none is used, but some forms send a few."""
MAX_JSON_BYTES = 1 << 20
"""Maximum size of a JSON body, in bytes."""


@dataclass
class Upload:
    """One image file, received completely.

    name: the client's file name, only to be returned in the response
    """

    file: IO[bytes]
    size: int
    name: str | None = None

    def read(self) -> bytes:
        self.file.seek(0)
        return self.file.read()


class BodyBudget:
    """Limit on the total size of all request bodies held at a time, in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def reserve(self, count: int) -> None:
        """Reserve bytes; raises a Problem (503) if the limit is exceeded."""
        if self.held_bytes + count > self._max_bytes:
            raise build_busy_problem(1)
        self.held_bytes += count

    def release(self, count: int) -> None:
        self.held_bytes -= count


@asynccontextmanager
async def receive_uploads(
    request: Request, limits: LimitsConfig, budget: BodyBudget
) -> AsyncIterator[list[Upload]]:
    """Receive the images of a request: the body itself, or the files of a multipart form.

    Raises a Problem as soon as the body turns out to be too large, too slow or malformed.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = content_type == "multipart/form-data"
    is_image = content_type in ("", "application/octet-stream") or content_type.startswith("image/")
    if not (is_form or is_image):
        raise Problem(
            415,
            "unsupported_body",
            f"unsupported content type {content_type[:80]!r}. Send one image as image/* or "
            "application/octet-stream, or several images as multipart/form-data",
        )
    max_bytes = limits.body_bytes if is_form else limits.image_bytes
    body = _BoundedBody(request, max_bytes, limits, budget)
    uploads: list[Upload] = []
    try:
        uploads = await (_read_form(request, body, limits) if is_form else _read_raw(body))
        if not uploads:
            raise Problem(
                400, "no_image", "the form contains no file. Send each image as a file field"
            )
        yield uploads
    finally:
        for upload in uploads:
            upload.file.close()
        budget.release(body.num_bytes)


async def receive_json(request: Request, limits: LimitsConfig, budget: BodyBudget) -> bytes:
    """Receive a JSON body of at most MAX_JSON_BYTES, not parsed. Raises a Problem."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Problem(
            415,
            "unsupported_body",
            f"unsupported content type {content_type[:80]!r}. Send application/json",
        )
    body = _BoundedBody(request, MAX_JSON_BYTES, limits, budget)
    try:
        return b"".join([chunk async for chunk in body.iter_chunks()])
    finally:
        budget.release(body.num_bytes)


class _BoundedBody:
    """A request body, read chunk by chunk within limits of size and time."""

    def __init__(
        self, request: Request, max_bytes: int, limits: LimitsConfig, budget: BodyBudget
    ) -> None:
        self.num_bytes = 0
        self._request = request
        self._max_bytes = max_bytes
        self._budget = budget
        self._timeout_s = limits.upload_timeout_s
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > max_bytes:
            raise build_too_large_problem(max_bytes)

    async def iter_chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes as they arrive; raises a Problem if they are too many or too slow."""
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
                    f"the request body did not arrive within {self._timeout_s:g} s",
                ) from None
            if self.num_bytes + len(chunk) > self._max_bytes:
                raise build_too_large_problem(self._max_bytes)
            self._budget.reserve(len(chunk))
            self.num_bytes += len(chunk)
            yield chunk


async def _read_raw(body: _BoundedBody) -> list[Upload]:
    file = tempfile.SpooledTemporaryFile(max_size=MIB)  # noqa: SIM115  receive_uploads closes it
    try:
        async for chunk in body.iter_chunks():
            file.write(chunk)
    except BaseException:
        file.close()
        raise
    return [Upload(file, body.num_bytes)]


class _FormParser(MultiPartParser):
    """Parser of a form that must be complete, and whose images must be files.

    Starlette takes a form that was cut off for a shorter one, and a part without a file name for
    text: the response would lack images.
    """

    def __init__(self, request: Request, body: _BoundedBody, limits: LimitsConfig) -> None:
        self._is_complete = False
        super().__init__(
            request.headers,
            self._check_end(body.iter_chunks()),
            max_files=limits.images,
            max_fields=MAX_FORM_FIELDS,
        )

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        for name, value in part.item_headers:
            is_text = value.strip().lower().startswith((b"text/", b"application/json"))
            if name.lower() == b"content-type" and part.file is None and not is_text:
                raise _build_no_file_error(part.field_name)

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None and not _is_text(part.data) and identify_format(bytes(part.data)):
            raise _build_no_file_error(part.field_name)
        super().on_part_end()

    def on_end(self) -> None:
        self._is_complete = True

    async def _check_end(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Pass the chunks on, then raise MultiPartException if images are missing."""
        async for chunk in chunks:
            yield chunk
        if not self._is_complete:
            raise MultiPartException(
                "ends without the closing boundary, so a part of it was lost. Send it again"
            )
        file_fields = {name for name, part in self.items if isinstance(part, UploadFile)}
        for name, part in self.items:
            if name in file_fields and not isinstance(part, UploadFile):
                raise _build_no_file_error(name)


def _is_text(data: bytearray) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def _build_no_file_error(field: str) -> MultiPartException:
    return MultiPartException(
        f"a part of the field {field!r:.80} is an image without a file name. Send it as a file, as "
        "`curl -F image=@cat.jpg` does"
    )


async def _read_form(request: Request, body: _BoundedBody, limits: LimitsConfig) -> list[Upload]:
    parser = _FormParser(request, body, limits)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise Problem(
                413, "too_many_images", f"the request has more than {limits.images} images"
            ) from None
        raise Problem(400, "malformed_form", f"multipart/form-data: {error.message}") from None
    except (KeyError, UnicodeError, LookupError):
        raise Problem(400, "malformed_form", "multipart/form-data: no boundary") from None
    return [
        Upload(part.file, part.size or 0, _clean_filename(part.filename))
        for _, part in form.multi_items()
        if isinstance(part, UploadFile)
    ]


def _clean_filename(name: str | None) -> str | None:
    """Replace what cannot be encoded as UTF-8; some charsets decode to lone surrogates."""
    return None if name is None else name.encode("utf-8", "replace").decode("utf-8")
