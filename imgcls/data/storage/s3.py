"""S3 and stores that are compatible with it, through s3fs: one GET per object, little CPU time.

botocore spends 1 ms of CPU time per request on endpoint rules, hooks and response models. So it
requests only the first object of each bucket; later requests are built from that one as a template,
signed by botocore's signer and sent over its connections, with its certificates, proxies and
timeouts. Requests that do not fit the template go through botocore.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import zlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from imgcls.data.storage.error_details import get_http_status
from imgcls.data.storage.readahead import UNLIMITED, BodyBuffer, ReadAllowance, too_large_error
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.data.storage.store import (
    GET,
    LIST,
    BucketStore,
    FileInfo,
    ListingPage,
    ListPage,
    ReadObject,
)
from imgcls.errors import StorageChanged, StorageUnavailable

_SINGLE_PUT_BYTES = 1 << 30


class S3Store(BucketStore):
    """S3, and stores that are compatible with it."""

    protocols = ("s3", "s3a")
    title = "S3"
    put_options = {"chunksize": _SINGLE_PUT_BYTES}  # otherwise s3fs uses a multipart upload

    def __init__(self, protocol: str, settings: StorageConfig, account: str | None = None) -> None:
        super().__init__(protocol, settings, account)
        self._reader = S3Reader(self.file_system)

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        """s3fs without its own retries."""
        import fsspec

        fs = fsspec.filesystem(
            protocol,
            use_listings_cache=False,
            anon=settings.anon,
            endpoint_url=settings.endpoint_url,
            requester_pays=settings.requester_pays,
            client_kwargs={"region_name": settings.region} if settings.region else {},
            config_kwargs={
                "retries": {"total_max_attempts": 1},  # see `retries`
                "connect_timeout": settings.attempt_timeout_s,
                "read_timeout": settings.attempt_timeout_s,
                "max_pool_connections": 64,
            },
            max_concurrency=1,  # otherwise every read requests the size first
            **({"profile": settings.profile} if settings.profile else {}),
        )
        fs.retries = 1
        return fs

    def start_read(self, url: str, allowance: ReadAllowance) -> ReadObject:
        return functools.partial(self._reader.read, suspect=set(), allowance=allowance)

    async def read_range(self, path: str, start: int, end: int, version: str | None) -> bytes:
        fs = self.file_system
        bucket, key, version_id = fs.split_path(path)
        more = {"VersionId": version_id} if version_id else {}
        if version is not None:
            more["IfMatch"] = f'"{version}"'
        try:
            response = await fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **more
            )
        except Exception as error:
            if get_http_status(error) == "412":
                raise StorageChanged(f"s3://{path}: was replaced") from error
            raise
        async with response["Body"] as body:
            data: bytes = await body.read()
            return data

    def start_listing(self, url: str, path: str, *, deep: bool) -> ListPage:
        bucket, key, _ = self.file_system.split_path(path)
        request = {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}
        if not deep:
            request["Delimiter"] = "/"

        async def list_page(token: str | None) -> tuple[ListingPage, str | None]:
            following = {"ContinuationToken": token} if token else {}
            answer = await self.file_system._call_s3("list_objects_v2", **request, **following)
            folders = [
                self.build_key_url(url, each["Prefix"].rstrip("/"))
                for each in answer.get("CommonPrefixes", [])
            ]
            files = [
                FileInfo(
                    self.build_key_url(url, each["Key"]),
                    each["Size"],
                    each["LastModified"],
                    each["ETag"].strip('"'),
                )
                for each in answer.get("Contents", [])
                if not each["Key"].endswith("/")
            ]
            truncated = answer.get("IsTruncated")
            return ListingPage(folders, files), answer[
                "NextContinuationToken"
            ] if truncated else None

        return list_page

    @classmethod
    def describe_permission(cls, permission: str) -> str:
        remedy = super().describe_permission(permission)
        if permission == GET:
            remedy += f" (or the file is missing, which a store reports only with {LIST})"
        return remedy


@dataclass(frozen=True)
class _RequestTemplate:
    """Template of a bucket's requests: URL before the key, headers, region of the signature."""

    url_prefix: str
    headers: dict[str, str]
    signing_region: str | None
    """None for unsigned requests."""


class S3Reader:
    """Reads whole objects through an s3fs file system, on its event loop."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._buckets: dict[str, _RequestTemplate | None] = {}
        self._client: Any = None

    async def read(
        self, path: str, suspect: set[str], allowance: ReadAllowance = UNLIMITED
    ) -> bytes:
        """Read an object, and verify its bytes by its checksum, else by its ETag.

        path:    bucket/key, with ?versionId=... for a version other than the latest
        suspect: MD5 digests of earlier attempts that did not match the ETag

        The ETag is the MD5 of most objects, but a store may use something else: bytes that arrive
        identically twice are accepted, which `suspect` remembers between attempts.

        Raises StorageUnavailable for damaged bytes, StorageTooLarge or BudgetFull before more is
        read than is allowed, and botocore's errors for other responses.
        """
        path, _, version = path.partition("?versionId=")
        bucket, key, _ = self._fs.split_path(path)
        data, headers = await self._get_object(bucket, key, version, allowance)
        expected = _get_crc32(headers)
        if expected is not None:
            damaged = zlib.crc32(data) != expected
        else:
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            damaged = md5 != _get_md5(headers, otherwise=md5) and md5 not in suspect
            suspect.add(md5)
        if damaged:
            raise StorageUnavailable(f"s3://{path}: arrived damaged (its checksum does not match)")
        return data

    async def _get_object(
        self, bucket: str, key: str, version: str, allowance: ReadAllowance
    ) -> tuple[bytes, Mapping[str, str]]:
        await self._fs.set_session()
        client = await self._fs.get_s3(bucket)
        template = self._buckets.get(bucket)
        if template is not None:
            answer = await _send_from_template(client, template, bucket, key, version, allowance)
            if answer is not None:
                return answer
        known = bucket in self._buckets
        if not known and client is not self._client:
            client.meta.events.register("before-send.s3.GetObject", _record_request)
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
            self._buckets[bucket] = None  # botocore got an object where the template did not
        elif bucket not in self._buckets:
            self._buckets[bucket] = _build_template(_sent.get(), key)
        return data, headers


async def _send_from_template(
    client: Any,
    template: _RequestTemplate,
    bucket: str,
    key: str,
    version: str,
    allowance: ReadAllowance,
) -> tuple[bytes, Mapping[str, str]] | None:
    """Send a request built from a template; returns the object and the response headers.

    None for responses that only botocore handles. Raises botocore's ClientError when access is
    refused, the object is missing or the store fails; StorageTooLarge and BudgetFull.
    """
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import ClientError

    params = {"versionId": version} if version else {}
    request = AWSRequest(
        "GET",
        template.url_prefix + _quote_key(key),
        headers=template.headers,
        params=params,
        stream_output=True,  # otherwise the body is read before its size is checked
    )
    if template.signing_region is not None:
        # the client's signer refreshes credentials that expire
        signer = await client._request_signer.get_auth_instance(
            "s3", template.signing_region, "s3v4"
        )
        signer.add_auth(request)
    answer = await client._endpoint.http_session.send(request.prepare())
    status = answer.status_code
    if status == 200:
        try:
            body = await _read_body(f"s3://{bucket}/{key}", answer.raw, answer.headers, allowance)
        except BaseException:
            answer.raw.close()  # without reading the rest of the body
            raise
        return body, answer.headers
    data: bytes = await answer.content
    code, message = _CODE.search(data), _MESSAGE.search(data)
    if code is None or (status < 500 and status not in (403, 404)):
        return None
    details = {
        "Code": code[1].decode(errors="replace"),
        "Message": message[1].decode(errors="replace") if message else "",
    }
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": answer.headers}
    raise ClientError({"Error": details, "ResponseMetadata": metadata}, "GetObject")


async def _read_body(
    url: str, answer: Any, headers: Mapping[str, str], allowance: ReadAllowance
) -> bytes:
    """Read a body within its allowance: by its Content-Length, else counted as it arrives."""
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


_sent: ContextVar[Any] = ContextVar("imgcls_s3_request", default=None)
"""The last request that botocore sent in this task; other tasks send theirs at the same time."""


def _record_request(request: Any, **_: Any) -> None:
    _sent.set(request)


def _build_template(sent: Any, key: str) -> _RequestTemplate | None:
    """Template of a request that botocore sent; None when it holds more than a key needs."""
    if sent is None:
        return None
    prefix = sent.url.removesuffix(_quote_key(key))
    if prefix == sent.url or not prefix.endswith("/"):
        return None
    signed = {name.lower(): _to_text(value) for name, value in sent.headers.items()}
    plain = {name: value for name, value in signed.items() if name in _KEPT_HEADERS}
    if "authorization" not in signed:
        return _RequestTemplate(prefix, plain, None)
    scope = _SCOPE.match(signed["authorization"])
    return _RequestTemplate(prefix, plain, scope[1]) if scope else None


def _quote_key(key: str) -> str:
    from botocore.utils import percent_encode

    quoted: str = percent_encode(key, safe="/~")
    return quoted


def _to_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _get_crc32(headers: Mapping[str, str]) -> int | None:
    """The CRC-32 of a whole object, where the store sends it."""
    value = headers.get("x-amz-checksum-crc32", "")
    parts = "-" in value or headers.get("x-amz-checksum-type") == "COMPOSITE"
    return None if parts or not value else int.from_bytes(base64.b64decode(value), "big")


def _get_md5(headers: Mapping[str, str], *, otherwise: str) -> str:
    """The MD5 in an object's ETag, in hexadecimal digits, if it looks like one."""
    found = _MD5.fullmatch(headers.get("etag", ""))
    return found[1] if found is not None and _CUSTOMER_KEY not in headers else otherwise


_PIECE_BYTES = 1 << 16
_KEPT_HEADERS = ("x-amz-request-payer", "x-amz-checksum-mode", "user-agent")
_CUSTOMER_KEY = "x-amz-server-side-encryption-customer-algorithm"
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/([^/,]+)/s3/aws4_request,")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_CODE = re.compile(rb"<Code>([^<]+)</Code>")
_MESSAGE = re.compile(rb"<Message>([^<]*)</Message>")
