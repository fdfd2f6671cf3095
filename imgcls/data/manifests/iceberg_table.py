"""Iceberg tables through pyiceberg: the catalog and the table that a name means.

Catalogs are configured as pyiceberg reads them: `~/.pyiceberg.yaml` or the environment. Endpoint,
region, profile and anonymous access of `storage` are added to that if they are set; credentials
come from pyiceberg's own chain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.data.optional_packages import import_package
from imgcls.data.storage.aws_profile import read_aws_profile
from imgcls.data.storage.storage_settings import StorageConfig, current_settings
from imgcls.errors import RequestError, StorageMissing, one_line

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table


def check_pyiceberg(key: str) -> None:
    """Raise RequestError if pyiceberg, which the configuration key `key` needs, is missing."""
    import_package("pyiceberg.catalog", "load_catalog", key, "iceberg")


def open_catalog(name: str) -> tuple[Catalog, tuple[str, ...]]:
    """The catalog of CATALOG.NAMESPACE.TABLE, and the identifier of the table in it.

    Raises RequestError for a name with fewer parts, or a catalog without settings, and StorageError
    where the catalog cannot be reached.
    """
    from pyiceberg.catalog import load_catalog

    catalog, *identifier = name.split(".")
    if len(identifier) < 2 or not all([catalog, *identifier]):
        raise RequestError(
            f"iceberg:{name}: pass iceberg:CATALOG.NAMESPACE.TABLE, such as iceberg:prod.ml.labels"
        )
    try:
        return load_catalog(catalog, **build_catalog_properties()), tuple(identifier)
    except (ValueError, ImportError) as error:
        raise RequestError(
            f"iceberg:{name}: the catalog {catalog!r} cannot be used ({one_line(error)}). Set its "
            f"uri in ~/.pyiceberg.yaml or as PYICEBERG_CATALOG__{catalog.upper()}__URI"
        ) from error
    except Exception as error:
        raise translate_table_error(f"iceberg:{name}", error) from error


def open_iceberg_table(name: str) -> Table:
    """Open the current state of a table; raises as `open_catalog`, and StorageMissing."""
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

    catalog, identifier = open_catalog(name)
    try:
        return catalog.load_table(identifier)
    except (NoSuchTableError, NoSuchNamespaceError) as error:
        raise StorageMissing(f"iceberg:{name}: the catalog has no such table") from error
    except Exception as error:
        raise translate_table_error(f"iceberg:{name}", error) from error


def build_catalog_properties(settings: StorageConfig | None = None) -> dict[str, str]:
    """The properties of a catalog's file system that `storage` sets; others are left to pyiceberg.

    settings: by default those that apply here
    """
    settings = settings or current_settings()
    profile = read_aws_profile(settings.profile)
    chosen = {
        "client.profile-name": settings.profile,
        "s3.endpoint": settings.endpoint_url,
        "s3.region": settings.region or profile.region,
        "s3.access-key-id": profile.access_key,
        "s3.secret-access-key": profile.secret_key,
        "s3.session-token": profile.token,
        "s3.anonymous": "true" if settings.anon else None,
        "adls.anon": "true" if settings.anon else None,
        "gcs.requester-pays": "true" if settings.requester_pays else None,
    }
    return {key: value for key, value in chosen.items() if value}
