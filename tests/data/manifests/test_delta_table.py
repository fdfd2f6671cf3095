"""Delta tables are opened with the settings of `storage`, and their errors are explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.data.manifests.delta_table import build_delta_options, open_delta_table
from imgcls.data.storage.storage_settings import StorageConfig, use_settings
from imgcls.errors import StorageMissing, StorageUnavailable


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS settings of this test only: a profile `night` in a file."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    credentials = "[night]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    (tmp_path / "credentials").write_text(credentials)
    (tmp_path / "config").write_text("[profile night]\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


@pytest.mark.parametrize(
    ("url", "settings", "expected"),
    [
        ("s3://b/t", {}, {}),
        (
            "s3://b/t",
            {"endpoint_url": "http://store:9000", "region": "us-east-2"},
            {
                "AWS_ENDPOINT_URL": "http://store:9000",
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-2",
            },
        ),
        (
            "s3a://b/t",
            {"profile": "night"},
            {
                "AWS_REGION": "eu-west-3",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
        ),
        ("s3://b/t", {"anon": True}, {"AWS_SKIP_SIGNATURE": "true"}),
        ("gs://b/t", {"anon": True}, {"google_skip_signature": "true"}),
        ("az://b/t", {"anon": True}, {"azure_skip_signature": "true"}),
        ("s3://b/t", {"requester_pays": True}, {"AWS_REQUEST_PAYER": "true"}),
    ],
)
def test_the_settings_become_options_of_deltalake(
    url: str, settings: dict[str, object], expected: dict[str, str]
) -> None:
    config = StorageConfig.model_validate({**settings, "attempt_timeout_s": 7})
    with use_settings(config):
        found = build_delta_options(url)
    assert found == {"timeout": "7s", "connect_timeout": "7s", **expected}


def test_a_path_needs_no_options() -> None:
    assert build_delta_options("/lake/table") is None


def test_the_environment_names_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store")
    options = build_delta_options("s3://b/t", StorageConfig())
    assert options is not None
    assert options["AWS_ENDPOINT_URL"] == "https://store"
    assert "AWS_ALLOW_HTTP" not in options


def test_a_folder_without_a_table_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageMissing, match="is not a Delta table"):
        open_delta_table(str(tmp_path))


def test_a_store_that_does_not_answer_is_a_temporary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_retries": "0", "retry_timeout": "1s", "AWS_REGION": "us-east-1"}
    settings = StorageConfig(endpoint_url="http://127.0.0.1:9", profile="night")
    built = build_delta_options("s3://b/t", settings)
    assert built is not None
    monkeypatch.setattr(
        "imgcls.data.manifests.delta_table.build_delta_options", lambda url: {**built, **options}
    )
    with pytest.raises(StorageUnavailable, match="s3://b/t: cannot be reached") as caught:
        open_delta_table("s3://b/t")
    assert "\x1b" not in str(caught.value)
