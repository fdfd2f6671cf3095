"""Errors of deltalake, pyiceberg and huggingface_hub by the texts that these give."""

from __future__ import annotations

import pytest

from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.errors import StorageError, StorageForbidden, StorageUnavailable

REFUSED = (
    "Kernel error -> Generic S3 error\n\x1b[31m↳\x1b[0m Error performing GET "
    "http://127.0.0.1:9/b/t/_delta_log/_last_checkpoint in 401.966µs - HTTP error\n↳ error sending "
    "request\n↳ client error (Connect)\n↳ tcp connect error\n↳ Connection refused (os error 111)"
)
DENIED = (
    "Generic S3 error: Error performing GET http://h/b/t/_delta_log/500.json in 503.2ms - Server "
    "returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>"
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (REFUSED, StorageUnavailable),
        (REFUSED.replace("401.966", "403.1"), StorageUnavailable),
        (REFUSED.replace("/b/t/", "/b/403/credentials-1/"), StorageUnavailable),
        (DENIED, StorageForbidden),
        ("Server returned non-2xx status code: 403: no body", StorageForbidden),
        ("An error occurred (403) when calling the HeadObject operation", StorageForbidden),
        ("403 Client Error: for url: https://h/api/datasets/a/b", StorageForbidden),
        ("CredentialsNotLoaded: the credential provider was not enabled", StorageForbidden),
        ("Unable to locate credentials.", StorageForbidden),
        ("503 Server Error: for url: https://h/v1/namespaces", StorageUnavailable),
        ("Server returned non-2xx status code: 429 Too Many Requests", StorageUnavailable),
        ("(sqlite3.OperationalError) database is locked", StorageUnavailable),
        ("Invalid table version: 503 in 500.1ms", StorageError),
        ("no such file s3://b/500/403/part-0.parquet", StorageError),
    ],
)
def test_the_cause_is_read_from_the_text(text: str, kind: type[StorageError]) -> None:
    found = translate_table_error("s3://b/t", OSError(text))
    assert type(found) is kind
    assert str(found).startswith("s3://b/t: ")
