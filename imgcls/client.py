"""A client of `imgcls serve`: images in, rows out, patient where the service asks for patience.

Needs no torch and no Ray, so it can be used where neither is installed.
"""

from __future__ import annotations

import datetime
import email.utils
import math
import os
import random
import re
import time
from collections.abc import Sequence
from typing import Any, Self

import requests
import requests.auth

from imgcls.errors import RequestError, RunFailed

ImageInput = str | os.PathLike[str] | bytes
_RETRY_STATUSES = (429, 503)


class ServiceError(RunFailed):
    """The service refused a request or could not be reached.

    status: of HTTP; None when there was no answer
    kind:   the last word of the problem's type, e.g. truncated, key_unknown, busy
    """

    def __init__(self, message: str, status: int | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Client:
    """Asks one service.

    url:             where it is, e.g. http://127.0.0.1:8000
    key:             an API key; IMGCLS_API_KEY in the environment when not given
    timeout_seconds: for one answer
    patience_seconds: a service that is busy is asked again for so long
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_seconds: float = 120.0,
        patience_seconds: float = 60.0,
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_seconds
        self._retry_timeout_s = patience_seconds
        self._session = requests.Session()
        # not a header of the session: a password in ~/.netrc would take its place
        self._session.auth = _BearerAuth(key or os.environ.get("IMGCLS_API_KEY"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._session.close()

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        embeddings: bool = False,
    ) -> list[dict[str, Any]]:
        """Label image files, given as paths or bytes; one row each, in the columns of a table.

        A bad image among several is a row with its `status` and `error`.
        Raises ServiceError when the request is refused, so also for one bad image alone.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            images = [images]
        if not images:
            raise RequestError("predict: no image was given")
        files = [("image", _read_image(image)) for image in images]
        asked = {"top_k": top_k, "threshold": threshold, "embeddings": embeddings or None}
        params = {name: value for name, value in asked.items() if value is not None}
        rows: list[dict[str, Any]] = self._request(
            "POST", "/v1/predict", files=files, params=params
        ).json()["predictions"]
        return rows

    def model(self) -> dict[str, Any]:
        """Classes, preprocessing, thresholds and metrics of the model that answers."""
        described: dict[str, Any] = self._request("GET", "/v1/model").json()
        return described

    def reload(self) -> None:
        """Have the service load its bundle again; needs a key with the scope admin."""
        self._request("POST", "/v1/model/reload")

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        deadline = time.monotonic() + self._retry_timeout_s
        while True:
            try:
                response = self._session.request(
                    method, self._url + path, timeout=self._timeout_s, **options
                )
            except requests.RequestException as error:
                raise ServiceError(f"{self._url}: {error}") from error
            if response.ok:
                return response
            wait = _parse_retry_after(response.headers.get("Retry-After", ""))
            if response.status_code not in _RETRY_STATUSES or time.monotonic() + wait > deadline:
                raise _build_error(response)
            # else all who were told to wait come again at once
            time.sleep(max(wait, 0.1) * random.uniform(1.0, 1.5))


class _BearerAuth(requests.auth.AuthBase):
    """Gives requests an API key, and nothing else to authenticate with."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _parse_retry_after(retry_after: str) -> float:
    """How long a Retry-After asks to wait; for ever when it makes no sense.

    It is a number of seconds or a date. Source: RFC 9110, section 10.2.3.
    """
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        when = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return math.inf
    if when.tzinfo is None:  # as -0000 is read: UTC, and nothing said of where
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


def _read_image(image: ImageInput) -> tuple[str, bytes]:
    if isinstance(image, bytes):
        return "image", image
    path = os.fspath(image)
    try:
        with open(path, "rb") as file:
            return os.path.basename(path), file.read()
    except OSError as error:
        raise RequestError(f"image {path}: {error.strerror or error}") from error


def _build_error(response: requests.Response) -> ServiceError:
    try:
        problem = response.json()
        kind, detail = str(problem["type"]).rpartition(":")[2], str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        kind, detail = "", response.text[:200]
    return ServiceError(
        f"{response.url}: {response.status_code} {response.reason}: {detail}",
        response.status_code,
        kind,
    )
