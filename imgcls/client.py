"""Python client of `imgcls serve`: sends images, returns rows, retries when the service is busy.

Needs neither torch nor Ray.
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
    """The service rejected a request or could not be reached.

    Attributes
    ----------
    status : int or None
        HTTP status; None if there was no response.
    kind : str or None
        Last part of the problem's type, e.g. ``truncated``, ``key_unknown``, ``busy``.
    """

    def __init__(self, message: str, status: int | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Client:
    """Client of one service, with a pool of connections; a context manager.

    Responses 429 and 503 with a Retry-After header are retried after that time. Every other error
    is raised at once.

    Parameters
    ----------
    url : str
        Base URL of the service, e.g. ``http://127.0.0.1:8000``.
    key : str, optional
        API key, of which surrounding white space is removed. Default: the environment variable
        ``IMGCLS_API_KEY``.
    timeout_s : float
        Timeout of one request attempt, in seconds.
    retry_timeout_s : float
        Total time to retry a request while the service is busy, in seconds.

    Examples
    --------
    >>> from imgcls import Client
    >>> with Client("http://127.0.0.1:8000", "KEY") as client:  # doctest: +SKIP
    ...     for row in client.predict(["cat.jpg", "dog.jpg"], top_k=3):
    ...         print(row["name"], row["predicted_label"], row["confidence"])

    A multi-label model returns all labels whose scores reach their thresholds, possibly none:

    >>> with Client("http://127.0.0.1:8000", "KEY") as client:  # doctest: +SKIP
    ...     for row in client.predict(["street.jpg"], threshold=0.3, scores=True):
    ...         print(row["name"], row["predicted_labels"], row["scores"]["bicycle"])
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 120.0,
        retry_timeout_s: float = 60.0,
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retry_timeout_s = retry_timeout_s
        self._session = requests.Session()
        # as auth, not as a header: a password in ~/.netrc would replace the header
        self._session.auth = _BearerAuth(_find_key(key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        embeddings: bool = False,
        scores: bool = False,
        explain: bool = False,
    ) -> list[dict[str, Any]]:
        """Classify image files.

        Parameters
        ----------
        images : path, bytes, or a sequence of these
            Image files, as local paths or as the bytes of a file.
        top_k : int, optional
            Number of labels per image. Default: the service's.
        threshold : float, optional
            Minimum confidence of an accepted prediction, 0 to 1. For a multi-label model, minimum
            score of each predicted label. Default: the service's.
        embeddings : bool
            Also return the embedding of each image.
        scores : bool
            Also return the score of each class, as a dict with the class names as keys.
        explain : bool
            Also return the class activation map of each image for its best class: a dict
            ``explanation`` with the ``label`` and a data URI ``image``, a JPEG. For few images.

        Returns
        -------
        list of dict
            One row per image, in the columns of a prediction table. A row of a multi-label model
            has the list ``predicted_labels`` instead of ``predicted_label`` and ``confidence``. If
            several images are sent, a rejected image is a row with its ``status`` and ``error``.

        Raises
        ------
        RequestError
            If there is no image, or a path cannot be read.
        ServiceError
            If the service rejects the request, or the only image of the request, or if the response
            is not one of ``imgcls serve``.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            images = [images]
        if not images:
            raise RequestError("predict: no image. Pass at least one path or bytes object")
        files = [("image", _read_image(image)) for image in images]
        options = {
            "top_k": top_k,
            "threshold": threshold,
            "embeddings": embeddings or None,
            "scores": scores or None,
            "explain": explain or None,
        }
        params = {name: value for name, value in options.items() if value is not None}
        return _read_rows(self._request("POST", "/v1/predict", files=files, params=params))

    def model(self) -> dict[str, Any]:
        """Describe the model in use.

        Returns
        -------
        dict
            Hash, task, architecture, classes, preprocessing, thresholds and metrics.

        Raises
        ------
        ServiceError
            If the service rejects the request or cannot be reached.
        """
        return _read_object(self._request("GET", "/v1/model"))

    def reload(self) -> None:
        """Have the service reload its bundle; needs an API key with the scope ``admin``.

        Returns before the replicas have loaded it.

        Raises
        ------
        ServiceError
            If the service rejects the request or cannot be reached.
        """
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
            # jitter, since all clients that were rejected would otherwise retry at the same time
            time.sleep(max(wait, 0.1) * random.uniform(1.0, 1.5))


class _BearerAuth(requests.auth.AuthBase):
    """Sends an API key, and no other credentials."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _find_key(key: str | None) -> str | None:
    """The key to send; an error does not repeat it, because errors are logged."""
    place = "key" if key else "IMGCLS_API_KEY"
    found = (key or os.environ.get("IMGCLS_API_KEY") or "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", found):
        raise RequestError(
            f"{place}: contains a character that an API key cannot have, such as a space or a line "
            "break. Pass the key as `imgcls key new` printed it"
        )
    return found or None


def _parse_retry_after(value: str) -> float:
    """Seconds to wait by a Retry-After header; infinity if it is invalid.

    The value is a number of seconds or a date. Source: RFC 9110, section 10.2.3.
    """
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return math.inf
    if when.tzinfo is None:  # -0000: the time is in UTC, in an unknown time zone
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


def _read_image(image: ImageInput) -> tuple[str, bytes]:
    """File name and bytes of an image."""
    if isinstance(image, bytes):
        return "image", image
    path = os.fspath(image)
    try:
        with open(path, "rb") as file:
            return os.path.basename(path), file.read()
    except OSError as error:
        raise RequestError(f"image {path}: {error.strerror or error}") from error


def _read_object(response: requests.Response) -> dict[str, Any]:
    """The JSON object of a successful response."""
    try:
        found = response.json()
    except ValueError as error:
        raise _build_foreign_error(response, "it is not JSON") from error
    if not isinstance(found, dict):
        raise _build_foreign_error(response, "it is not a JSON object")
    return found


def _read_rows(response: requests.Response) -> list[dict[str, Any]]:
    rows = _read_object(response).get("predictions")
    if not isinstance(rows, list):
        raise _build_foreign_error(response, "it has no predictions")
    return rows


def _build_foreign_error(response: requests.Response, reason: str) -> ServiceError:
    return ServiceError(
        f"{response.url}: {response.status_code} {response.reason}: the response is not one of "
        f"`imgcls serve`: {reason}. Check the URL, and any proxy in front of the service",
        response.status_code,
    )


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
