"""Bundles in the MLflow model registry: `models:/NAME/VERSION` and `models:/NAME@ALIAS`.

A version is used where its files lie, on a disk or in an object store; files behind the MLflow
server are downloaded once. The bundle is verified by the hash that was registered with it. The
registry is that of MLflow's own environment variables. `mlflow` is imported on first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import yaml

from imgcls import log
from imgcls.data.environment import set_env_defaults
from imgcls.data.optional_packages import import_package
from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.data.storage.registry import STORES
from imgcls.errors import (
    BundleError,
    StorageError,
    StorageUnavailable,
    one_line,
    request_error,
)
from imgcls.models.bundle import BUNDLE_FILE, REGISTRY_PREFIX
from imgcls.models.cache_folder import find_cache_folder

HASH_TAG = "imgcls.bundle_sha256"
"""Tag of a version: the hash of its bundle."""
LOADER_MODULE = "imgcls.models.mlflow_flavor"
"""Module that loads a registered bundle in MLflow, see there."""
SERVER_TIMEOUT_S = 10
"""Timeout of one request; MLflow's default of 7 attempts of 120 s would block the driver."""
TRANSFER_TIMEOUT_S = 120
"""Timeout of one request that moves files of a model."""
_UNKNOWN_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_MODEL_FILE = "MLmodel"
_FORM = f"{REGISTRY_PREFIX}NAME/VERSION or {REGISTRY_PREFIX}NAME@ALIAS"
_MAX_LISTED = 5
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):")  # also of mlflow-artifacts:/1/model, without a host
_NO_FOLDERS = ("http", "https", "hf")
"""Stores in which a model of the registry is not read in place."""


@dataclass(frozen=True)
class RegisteredModel:
    """A version of a registered model.

    uri:     as it was requested, with the version or an alias
    name, version: of the model in the registry
    url:     folder of the bundle
    sha256:  hash of the bundle; None until it is read, if another tool registered it
    """

    uri: str
    name: str
    version: str
    url: str
    sha256: str | None

    @property
    def record(self) -> dict[str, Any]:
        """What outputs store of the version."""
        return {"uri": self.uri, "name": self.name, "version": self.version, "sha256": self.sha256}

    @property
    def pinned_uri(self) -> str:
        """The URI of this version, which no alias changes."""
        return pin_uri(self.record)

    def log_version(self) -> None:
        """Log the version and the folder that the URI means."""
        digest = (self.sha256 or "")[:12]
        log.emit(
            "model",
            f"{self.uri}: version {self.version}, bundle {digest} in {self.url}",
            name=self.name,
            version=self.version,
            sha256=self.sha256,
        )


def pin_uri(record: Mapping[str, Any]) -> str:
    """The URI of the version in a record of `RegisteredModel`, which no alias changes."""
    return f"{REGISTRY_PREFIX}{record['name']}/{record['version']}"


def resolve_registered(uri: str) -> RegisteredModel:
    """Find the version that a URI means, and the folder of its bundle.

    Raises BundleError for an unknown name, version or alias and for a model that is no bundle,
    RequestError if mlflow is not installed, StorageUnavailable if the registry does not answer.
    """
    name, version, alias = parse_registry_uri(uri)
    package = import_package("mlflow", "MlflowClient", f"model {uri}")
    if not package.is_tracking_uri_set() and not os.environ.get("MLFLOW_REGISTRY_URI"):
        raise BundleError(
            f"model {uri}: no model registry is set; set MLFLOW_TRACKING_URI, such as "
            "http://mlflow:5000 or sqlite:////srv/mlflow.db"
        )
    with use_short_timeouts():
        client = package.MlflowClient()
        try:
            if alias is not None:
                found = client.get_model_version_by_alias(name, alias)
            else:
                found = client.get_model_version(name, version)
            source = client.get_model_version_download_uri(name, found.version)
        except Exception as error:
            raise _explain_failure(uri, name, package, client, error) from error
    place = f"{uri}: version {found.version}"
    model = _find_folder(source) or _download(package, place, found, source)
    url = _find_bundle(place, model)
    return RegisteredModel(uri, name, str(found.version), url, found.tags.get(HASH_TAG))


def parse_registry_uri(uri: str) -> tuple[str, str | None, str | None]:
    """Name, version and alias; one of the last two is None. Raises BundleError."""
    rest = uri.removeprefix(REGISTRY_PREFIX)
    name, separator, last = rest.partition("@") if "@" in rest else rest.partition("/")
    is_version = separator == "/" and last.isdigit()
    if not name or "/" in name or not last or not (is_version or separator == "@"):
        raise BundleError(f"model {uri}: is not a version of a registered model; pass {_FORM}")
    return name, (last if is_version else None), (None if is_version else last)


def verify_registered(model: RegisteredModel, sha256: str) -> RegisteredModel:
    """The version with the hash of its bundle, as it was read.

    Raises BundleError if it is not the bundle that was registered.
    """
    if model.sha256 is not None and model.sha256 != sha256:
        raise BundleError(
            f"model {model.pinned_uri}: {model.url} has the bundle {sha256[:12]}, but "
            f"{model.sha256[:12]} was registered; restore the artifacts of this version, or "
            "register the bundle again"
        )
    return replace(model, sha256=sha256)


@contextlib.contextmanager
def use_short_timeouts(seconds: int = SERVER_TIMEOUT_S) -> Iterator[None]:
    """Shorten MLflow's retries and timeouts, unless the environment already sets them.

    seconds: timeout of one request
    """
    timeouts = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
    }
    with set_env_defaults(timeouts):
        yield


def _explain_failure(
    uri: str, name: str, package: ModuleType, client: Any, error: Exception
) -> BundleError | StorageUnavailable:
    """The error for a version that was not found, or a registry that does not answer."""
    registry, reason = (
        hide_credentials(text) for text in (package.get_registry_uri(), one_line(error))
    )
    code = getattr(error, "error_code", "")
    if code not in _UNKNOWN_CODES:
        return StorageUnavailable(
            f"model {uri}: the registry {registry} does not answer correctly "
            f"({reason}); check MLFLOW_TRACKING_URI"
        )
    reason = reason.removeprefix(f"{code}: ").rstrip(".")
    with contextlib.suppress(Exception):
        versions = sorted(int(each.version) for each in _list_versions(client, name))
        aliases = sorted(client.get_registered_model(name).aliases)
        if versions:
            known = f"versions: {', '.join(map(str, versions[-_MAX_LISTED:]))}"
            known += f"; aliases: {', '.join(aliases[:_MAX_LISTED])}" if aliases else ""
            return BundleError(f"model {uri}: {reason} in {registry}; pass another ({known})")
    return BundleError(
        f"model {uri}: {reason} in {registry}; register one with `imgcls train "
        "--track.register-as NAME`"
    )


def find_version(client: Any, name: str, sha256: str) -> str | None:
    """The newest version of a model that has a bundle with this hash; None if there is none."""
    found = [v for v in _list_versions(client, name) if v.tags.get(HASH_TAG) == sha256]
    return str(max(int(each.version) for each in found)) if found else None


def _list_versions(client: Any, name: str) -> list[Any]:
    escaped = name.replace("'", "\\'")
    return list(client.search_model_versions(f"name='{escaped}'"))


def _find_folder(source: str) -> str | None:
    """The folder of a model that can be read in place; None for one that must be downloaded."""
    scheme = _SCHEME.match(source)
    if scheme is None:
        return filesystem.absolute(source)
    if scheme[1] == "file":
        return filesystem.absolute(urllib.parse.unquote(source))
    return source if scheme[1] in STORES and scheme[1] not in _NO_FOLDERS else None


def _find_bundle(place: str, model: str) -> str:
    """The folder of the bundle in the folder of a model. Raises BundleError if it has none."""
    loader = None
    try:
        if filesystem.exists(filesystem.join(model, BUNDLE_FILE)):
            return model
        url = filesystem.join(model, _MODEL_FILE)
        if filesystem.exists(url):
            flavor = yaml.safe_load(filesystem.read(url))["flavors"]["python_function"]
            loader, data = flavor["loader_module"], flavor.get("data")
            if loader == LOADER_MODULE and data and ".." not in data and not os.path.isabs(data):
                return filesystem.join(model, data)
        if filesystem.is_local(model) and not filesystem.exists(model):
            raise BundleError(
                f"model {place}: the folder {model} does not exist on this machine; restore the "
                "artifacts of this version, or mount their folder on this machine"
            )
    except StorageError as error:
        raise request_error(
            BundleError, f"model {place}: {error}{_describe_endpoint(model)}", error
        ) from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        loader = f"an {_MODEL_FILE} that cannot be read ({one_line(error)})"
    what = f"its loader is {loader}" if loader else f"it has no {BUNDLE_FILE} and no {_MODEL_FILE}"
    raise BundleError(
        f"model {place} in {model} is not a bundle of imgcls: {what}{_describe_endpoint(model)}. "
        "Register a bundle with `imgcls train --track.register-as NAME`"
    )


def _describe_endpoint(model: str) -> str:
    """A hint for a model in S3 if MLflow has an endpoint of its own, which is not used here."""
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if not model.startswith("s3://") or not endpoint:
        return ""
    return (
        f" (imgcls does not use MLFLOW_S3_ENDPOINT_URL {hide_credentials(endpoint)}; pass it as "
        "--storage.endpoint-url too)"
    )


def _download(package: ModuleType, place: str, version: Any, source: str) -> str:
    """The folder of a model in the cache, where it is downloaded if it is not there.

    It appears whole or not at all. A version that was deleted and made again is another one.
    """
    known = (package.get_registry_uri(), version.name, version.version, version.creation_timestamp)
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:24]
    folder = os.path.join(find_cache_folder("models"), f"{version.name}-{version.version}-{digest}")
    if os.path.isdir(folder):
        return folder
    with filesystem.translate_os_errors(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        temporary = tempfile.mkdtemp(dir=os.path.dirname(folder), prefix=".download-")
    try:
        try:
            quiet = set_env_defaults({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"})
            with quiet, use_short_timeouts(TRANSFER_TIMEOUT_S):
                files = package.artifacts.download_artifacts(
                    artifact_uri=source, dst_path=temporary
                )
        except Exception as error:
            raise StorageUnavailable(
                hide_credentials(
                    f"model {place} cannot be downloaded from {source} ({one_line(error)}); check "
                    "that the MLflow server can read its artifacts, and rerun the same command"
                )
            ) from error
        _move_download(files, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _move_download(files: str, folder: str) -> None:
    """Move a whole download to its place, where that of another process may be by now."""
    with filesystem.translate_os_errors(folder):
        try:
            os.rename(files, folder)
        except OSError:
            if not os.path.isdir(folder):
                raise
