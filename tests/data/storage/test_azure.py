"""Azure Blob Storage: what holds on S3 holds there, on Azurite over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imgcls.data.storage import azure, object_store
from imgcls.data.storage.azure import AzureStore
from imgcls.errors import StorageError
from tests import clouds
from tests.clouds import Cloud
from tests.data.storage.store_promises import Place, StorePromises, placed


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with clouds.azure() as running:
        yield running


@pytest.fixture
def place(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with placed(cloud, monkeypatch) as made:
        yield made


class TestAzure(StorePromises):
    module = azure
    refusals = (
        (401, "NoAuthenticationInformation"),
        (403, "AuthorizationPermissionMismatch"),
        (404, "ContainerNotFound"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (503, "ServerBusy"),
    )


def test_a_url_may_name_the_account() -> None:
    url = "abfss://photos@myaccount.dfs.core.windows.net/2026/a#b.jpg"
    assert AzureStore.get_account(url) == "myaccount"
    assert AzureStore.get_account("az://photos/a@b.jpg") is None
    assert object_store.build_url(url, "photos/2026/c.jpg") == (
        "abfss://photos@myaccount.dfs.core.windows.net/2026/c.jpg"
    )
    with pytest.raises(StorageError, match=r"host example\.com is not an Azure storage account"):
        AzureStore.get_account("abfs://photos@example.com/a.jpg")
