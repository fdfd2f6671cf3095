"""The table of stores, by the protocols of their URLs."""

from __future__ import annotations

from imgcls.data.storage.azure import AzureStore
from imgcls.data.storage.gcs import GCSStore
from imgcls.data.storage.http import HttpStore
from imgcls.data.storage.hub import HubStore
from imgcls.data.storage.s3 import S3Store
from imgcls.data.storage.store import Store

STORES: dict[str, type[Store]] = {
    protocol: kind
    for kind in (S3Store, GCSStore, AzureStore, HttpStore, HubStore)
    for protocol in kind.protocols
}
"""Every other protocol is served by `Store` itself."""


def find_store(url: str) -> type[Store]:
    """The class of the store of a URL; also of a local path, which no subclass serves."""
    return STORES.get(get_protocol(url), Store)


def get_protocol(url: str) -> str:
    return url.partition(":")[0]
