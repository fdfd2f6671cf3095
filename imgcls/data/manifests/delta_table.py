"""Delta Lake tables through deltalake: opened at a version, with the settings of `storage`.

deltalake has a storage layer of its own. Endpoint, region, profile and anonymous access are passed
to it; credentials come from its own chain (environment, profile, role).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.data.optional_packages import import_package
from imgcls.data.storage import filesystem
from imgcls.data.storage.aws_profile import read_aws_profile
from imgcls.data.storage.storage_settings import StorageConfig, current_settings
from imgcls.errors import StorageMissing

if TYPE_CHECKING:
    from deltalake import DeltaTable


def check_deltalake(key: str) -> None:
    """Raise RequestError if deltalake, which the configuration key `key` needs, is missing."""
    import_package("deltalake", "DeltaTable", key, "delta")


def open_delta_table(url: str, version: int | None = None) -> DeltaTable:
    """Open a table at a version, by default the newest.

    Raises StorageMissing where there is no table, or not this version, and StorageError where it
    cannot be read.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    try:
        return DeltaTable(url, version=version, storage_options=build_delta_options(url))
    except TableNotFoundError as error:
        raise StorageMissing(f"{url}: is not a Delta table") from error
    except Exception as error:
        if version is not None and "specified end version" in str(error):
            raise StorageMissing(
                f"{url}: has no version {version}; it may have been removed from the log"
            ) from error
        raise translate_table_error(url, error) from error


def build_delta_options(url: str, settings: StorageConfig | None = None) -> dict[str, str] | None:
    """The storage options of deltalake for a URL; None for a path.

    settings: by default those that apply here
    """
    if filesystem.is_local(url):
        return None
    settings = settings or current_settings()
    options = {
        "timeout": f"{settings.attempt_timeout_s:g}s",
        "connect_timeout": f"{settings.attempt_timeout_s:g}s",
    }
    protocol = url.partition(":")[0]
    if protocol in ("s3", "s3a"):
        return options | _build_s3_options(settings)
    if settings.anon:
        options["google_skip_signature" if protocol == "gs" else "azure_skip_signature"] = "true"
    return options


def _build_s3_options(settings: StorageConfig) -> dict[str, str]:
    profile = read_aws_profile(settings.profile)
    endpoint = settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or ""
    options = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true" if endpoint.startswith("http://") else None,
        "AWS_REGION": settings.region or profile.region,
        "AWS_ACCESS_KEY_ID": profile.access_key,
        "AWS_SECRET_ACCESS_KEY": profile.secret_key,
        "AWS_SESSION_TOKEN": profile.token,
        "AWS_SKIP_SIGNATURE": "true" if settings.anon else None,
        "AWS_REQUEST_PAYER": "true" if settings.requester_pays else None,
    }
    return {name: value for name, value in options.items() if value}
