"""The settings of `storage` that are passed to a catalog of pyiceberg."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.data.manifests.iceberg_table import build_catalog_properties
from imgcls.data.storage.storage_settings import StorageConfig


def test_settings_that_are_not_set_are_left_to_pyiceberg() -> None:
    assert build_catalog_properties(StorageConfig()) == {}


def test_settings_become_properties_of_the_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = "[night]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    (tmp_path / "credentials").write_text(credentials)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    config = StorageConfig(endpoint_url="http://store:9000", region="us-east-2", profile="night")
    assert build_catalog_properties(config) == {
        "client.profile-name": "night",
        "s3.endpoint": "http://store:9000",
        "s3.region": "us-east-2",
        "s3.access-key-id": "key",
        "s3.secret-access-key": "secret",
    }
    assert build_catalog_properties(StorageConfig(anon=True)) == {
        "s3.anonymous": "true",
        "adls.anon": "true",
    }
