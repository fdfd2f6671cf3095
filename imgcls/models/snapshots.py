"""Snapshots: folders with a network, as timm, transformers or imgcls write it.

A folder on a disk or a store, or a repository of the Hub, with `config.json` (architecture, its
arguments, preprocessing) and `model.safetensors` or `pytorch_model.bin`; or a bundle.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, StorageError, StorageForbidden, request_error
from imgcls.models.bundle import (
    BUNDLE_FILE,
    WEIGHTS_FILE,
    is_registry_uri,
    read_description,
)
from imgcls.models.libraries.base import Snapshot
from imgcls.models.libraries.registry import LIBRARIES, find_library
from imgcls.models.libraries.timm_library import TIMM_PREFIX

CONFIG_FILE = "config.json"
WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin")
_HUB = "hf://"
_TIMM_HUB, _TIMM_FOLDER = f"{TIMM_PREFIX}hf-hub:", f"{TIMM_PREFIX}local-dir:"


def find_folder(name: str) -> str | None:
    """The folder that a name of a network means; None for a name of a library.

    `hf://OWNER/NAME` or `timm:hf-hub:OWNER/NAME`, `models:/NAME@ALIAS` for a bundle of the MLflow
    model registry, or a path, which has a slash.
    """
    if is_registry_uri(name):
        return read_description(name).url
    if name.startswith(_TIMM_HUB):
        return _HUB + name.removeprefix(_TIMM_HUB)
    if name.startswith(_TIMM_FOLDER):
        return filesystem.absolute(name.removeprefix(_TIMM_FOLDER))
    is_library = any(each.prefix and name.startswith(each.prefix) for each in LIBRARIES)
    return filesystem.absolute(name) if "/" in name and not is_library else None


def load_snapshot(url: str) -> Snapshot:
    """Read the configuration of a snapshot. Raises BundleError."""
    if _has_file(url, BUNDLE_FILE):
        return _read_bundle(url)
    snapshot = _parse_config(url, _read_config(url))
    if snapshot is not None:
        return snapshot
    raise BundleError(
        f"model {url}: is no {CONFIG_FILE} of timm or transformers; pass a network of timm, which "
        "has most architectures under timm:NAME"
    )


def find_weights(snapshot: Snapshot) -> str:
    """URL of the weights file of a snapshot. Raises BundleError without one."""
    for name in WEIGHTS_FILES:
        url = filesystem.join(snapshot.url, name)
        if filesystem.exists(url):
            return url
    raise BundleError(
        f"model {snapshot.url}: has no {' or '.join(WEIGHTS_FILES)}; pass the weights file as "
        "model.weights"
    )


def find_snapshot_of_weights(weights: str | None) -> Snapshot | None:
    """The snapshot that a weights file is part of; None for a file alone.

    Raises BundleError for a configuration that cannot be read, since it has the preprocessing.
    """
    folder = _find_folder_of_weights(weights or "")
    if folder is None:
        return None
    try:
        if _has_file(folder, BUNDLE_FILE):
            return _read_bundle(folder)
        has_config = _has_file(folder, CONFIG_FILE)
    except StorageError as error:
        raise request_error(BundleError, f"model.weights {weights}: {error}", error) from error
    return _parse_config(folder, _read_config(folder)) if has_config else None


def check_weights(weights: str, data: bytes) -> None:
    """Raise BundleError if a weights file of a bundle is not the one that its description names."""
    folder = _find_folder_of_weights(weights)
    if folder is None or not weights.endswith(WEIGHTS_FILE) or not _has_file(folder, BUNDLE_FILE):
        return
    expected, found = read_description(folder).weights_sha256, hashlib.sha256(data).hexdigest()
    if expected != found:
        raise BundleError(
            f"model.weights {weights}: has SHA-256 {found[:12]}..., but the bundle in its folder "
            f"names {expected[:12]}...; the file is damaged, copy the bundle again"
        )


def _find_folder_of_weights(weights: str) -> str | None:
    """The folder of a file that has the name of a snapshot's weights."""
    if weights.rpartition("/")[2] not in WEIGHTS_FILES:
        return None
    return filesystem.absolute(weights).rpartition("/")[0] or None  # also of a name alone


def _has_file(folder: str, name: str) -> bool:
    """S3 answers "forbidden" for a key that does not exist to who may not list the bucket."""
    try:
        return filesystem.exists(filesystem.join(folder, name))
    except StorageForbidden:
        return False


def _read_bundle(url: str) -> Snapshot:
    """The network of a bundle, with the preprocessing of its training."""
    spec = read_description(url).spec
    architecture = spec.architecture
    return Snapshot(
        url=url,
        source=architecture.source,
        name=find_library(architecture).prefix + architecture.name,
        options=architecture.options,
        load_preprocess=lambda: spec.preprocess,
    )


def _read_config(url: str) -> Any:
    try:
        return json.loads(filesystem.read(filesystem.join(url, CONFIG_FILE)))
    except (StorageError, ValueError) as error:
        raise request_error(
            BundleError,
            f"model {url}: {error}; a folder with a network has timm's or transformers' "
            f"{CONFIG_FILE}, or is a bundle. Networks of torchvision and timm have names: `imgcls "
            "model list`, timm:NAME",
            error,
        ) from error


def _parse_config(url: str, config: Any) -> Snapshot | None:
    """None unless a library wrote the configuration."""
    if not isinstance(config, dict):
        return None
    found = (library.read_snapshot(url, config) for library in LIBRARIES)
    return next((snapshot for snapshot in found if snapshot is not None), None)
