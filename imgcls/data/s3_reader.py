"""Reading S3 objects: one GET each and nothing beside it, at little cost to the processor.

botocore spends a millisecond on each request: rules for the endpoint, hooks, a model of the answer.
So it asks for a bucket's first object, and the others are asked for as that was, with its signature
and over its connections, and hence with the certificates, proxies and times they are set up with.
Whatever is not plain goes its long way.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgcls.data.readahead import UNLIMITED, BodyBuffer, ReadAllowance
from imgcls.data.storage_errors import too_large_error
from imgcls.errors import StorageUnavailable


@dataclass(frozen=True)
class _RequestTemplate:
    """How a bucket's objects are asked for: what is before the key, headers, where to sign for."""

    url_prefix: str
    headers: dict[str, str]
    signing_region: str | None
    """None for requests that are not signed."""


class S3Reader:
    """Reads whole objects through an s3fs file system; lives in its event loop."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._buckets: dict[str, _RequestTemplate | None] = {}
        self._sent: dict[str, Any] = {}
        self._client: Any = None

    async def read(
        self, path: str, doubted: set[str], allowance: ReadAllowance = UNLIMITED
    ) -> bytes:
        """An object's bytes, held against its checksum, or else its ETag.

        path: bucket/key, with ?versionId=... for another version than the latest

        An ETag is the MD5 of most objects, but a store need not keep to that: bytes that come twice
        alike are taken for what is stored, which is what `doubted` remembers between attempts.

        Raises StorageUnavailable for bytes that are not what is stored, StorageTooLarge or NoRoom
        before more is read than is allowed, and what botocore raises when it has an answer that is
        no object.
        """
        path, _, version = path.partition("?versionId=")
        bucket, key, _ = self._fs.split_path(path)
        data, headers = await self._get_object(bucket, key, version, allowance)
        told = _get_crc32(headers)
        if told is not None:
            damaged = zlib.crc32(data) != told
        else:
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            damaged = md5 != _get_md5(headers, otherwise=md5) and md5 not in doubted
            doubted.add(md5)
        if damaged:
            raise StorageUnavailable(f"s3://{path}: arrived damaged (not as its checksum says)")
        return data

    async def _get_object(
        self, bucket: str, key: str, version: str, allowance: ReadAllowance
    ) -> tuple[bytes, Mapping[str, str]]:
        await self._fs.set_session()
        client = await self._fs.get_s3(bucket)
        asked = self._buckets.get(bucket)
        if asked is not None:
            answer = await _send_from_template(client, asked, bucket, key, version, allowance)
            if answer is not None:
                return answer
        known = bucket in self._buckets
        if not known and client is not self._client:
            client.meta.events.register("before-send.s3.GetObject", self._record_request)
            self._client = client
        more = {"VersionId": version} if version else {}
        response = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, **more)
        headers = response["ResponseMetadata"]["HTTPHeaders"]
        async with response["Body"] as body:
            try:
                data = await _read_body(f"s3://{bucket}/{key}", body.raw_stream, headers, allowance)
            except BaseException:
                body.raw_stream.close()
                raise
        if known:
            self._buckets[bucket] = None  # the long way has an answer where the short one had none
        elif bucket not in self._buckets:
            self._buckets[bucket] = _build_template(self._sent, key)
            self._sent.clear()
        return data, headers

    def _record_request(self, request: Any, **_: Any) -> None:
        self._sent[request.url] = request.headers


async def _send_from_template(
    client: Any,
    asked: _RequestTemplate,
    bucket: str,
    key: str,
    version: str,
    allowance: ReadAllowance,
) -> tuple[bytes, Mapping[str, str]] | None:
    """The object and the answer's headers; None when botocore is to ask, which knows more answers.

    Raises botocore's ClientError when the object is refused or missing, or the store in trouble,
    StorageTooLarge and NoRoom.
    """
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import ClientError

    params = {"versionId": version} if version else {}
    request = AWSRequest(
        "GET",
        asked.url_prefix + _quote_key(key),
        headers=asked.headers,
        params=params,
        stream_output=True,  # else the whole body is read before its size is looked at
    )
    if asked.signing_region is not None:
        # with the client's credentials, which are fresh where they expire
        signer = await client._request_signer.get_auth_instance("s3", asked.signing_region, "s3v4")
        signer.add_auth(request)
    answer = await client._endpoint.http_session.send(request.prepare())
    status = answer.status_code
    if status == 200:
        try:
            body = await _read_body(f"s3://{bucket}/{key}", answer.raw, answer.headers, allowance)
        except BaseException:
            answer.raw.close()  # what is left of the body is not wanted
            raise
        return body, answer.headers
    data: bytes = await answer.content
    code, message = _CODE.search(data), _MESSAGE.search(data)
    if code is None or (status < 500 and status not in (403, 404)):
        return None
    told = {
        "Code": code[1].decode(errors="replace"),
        "Message": message[1].decode(errors="replace") if message else "",
    }
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": answer.headers}
    raise ClientError({"Error": told, "ResponseMetadata": metadata}, "GetObject")


async def _read_body(
    url: str, answer: Any, headers: Mapping[str, str], allowance: ReadAllowance
) -> bytes:
    """A body, if it is no longer than allowed: by its Content-Length, else counted as it comes."""
    length = headers.get("content-length", "")
    if length.isdigit():
        if allowance.is_exceeded_by(int(length)):
            raise too_large_error(url, allowance.max_bytes, int(length))
        allowance.reserve(int(length))
        whole: bytes = await answer.read()
        return whole
    with BodyBuffer(url, allowance, None) as body:
        while part := await answer.content.read(_PIECE_BYTES):
            body.append(part)
        return body.join()


def _build_template(sent: Mapping[str, Any], key: str) -> _RequestTemplate | None:
    """How botocore asked for an object; None when that takes more than a key and a signature."""
    for url, headers in sent.items():
        prefix = url.removesuffix(_quote_key(key))
        if prefix == url or not prefix.endswith("/"):
            continue
        signed = {name.lower(): _to_text(value) for name, value in headers.items()}
        plain = {name: value for name, value in signed.items() if name in _KEPT_HEADERS}
        if "authorization" not in signed:
            return _RequestTemplate(prefix, plain, None)
        scope = _SCOPE.match(signed["authorization"])
        return _RequestTemplate(prefix, plain, scope[1]) if scope else None
    return None


def _quote_key(key: str) -> str:
    from botocore.utils import percent_encode

    quoted: str = percent_encode(key, safe="/~")
    return quoted


def _to_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _get_crc32(headers: Mapping[str, str]) -> int | None:
    """The CRC-32 of a whole object, where the store tells it."""
    told = headers.get("x-amz-checksum-crc32", "")
    parts = "-" in told or headers.get("x-amz-checksum-type") == "COMPOSITE"
    return None if parts or not told else int.from_bytes(base64.b64decode(told), "big")


def _get_md5(headers: Mapping[str, str], *, otherwise: str) -> str:
    """The MD5 that an object's ETag tells, in hexadecimal digits, if it looks like one."""
    found = _MD5.fullmatch(headers.get("etag", ""))
    return found[1] if found is not None and _CUSTOMER_KEY not in headers else otherwise


_PIECE_BYTES = 1 << 16
_KEPT_HEADERS = ("x-amz-request-payer", "x-amz-checksum-mode", "user-agent")
_CUSTOMER_KEY = "x-amz-server-side-encryption-customer-algorithm"
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/([^/,]+)/s3/aws4_request,")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_CODE = re.compile(rb"<Code>([^<]+)</Code>")
_MESSAGE = re.compile(rb"<Message>([^<]*)</Message>")
