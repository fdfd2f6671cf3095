"""Snapshots: folders with a network of timm, as timm and the Hugging Face Hub store it.

A folder on a disk or a store, or a repository of the Hub, with `config.json` (architecture, its
arguments, preprocessing) and `model.safetensors` or `pytorch_model.bin`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, StorageError, request_error
from imgcls.models.timm_models import TIMM_PREFIX

CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB = "hf://"
_TIMM_HUB, _TIMM_FOLDER = f"{TIMM_PREFIX}hf-hub:", f"{TIMM_PREFIX}local-dir:"


@dataclass(frozen=True)
class Snapshot:
    """A network of timm in a folder.

    url:        of the folder
    name:       of the architecture, as `model.name` takes it
    options:    arguments of its constructor, without the number of classes
    pretrained: timm's description of the weights: input size, mean and so on
    """

    url: str
    name: str
    options: Mapping[str, Any]
    pretrained: Mapping[str, Any]

    def find_weights(self) -> str:
        """URL of the weights file. Raises BundleError without one."""
        for name in WEIGHTS_FILES:
            url = filesystem.join(self.url, name)
            if filesystem.exists(url):
                return url
        raise BundleError(
            f"model {self.url}: has no {' or '.join(WEIGHTS_FILES)}; pass the weights file as "
            "model.weights"
        )


def find_folder(name: str) -> str | None:
    """The folder that a name of a network means; None for a name of a library.

    `hf://OWNER/NAME` or `timm:hf-hub:OWNER/NAME`, or a path, which has a slash.
    """
    if name.startswith(_TIMM_HUB):
        return _HUB + name.removeprefix(_TIMM_HUB)
    if name.startswith(_TIMM_FOLDER):
        return filesystem.absolute(name.removeprefix(_TIMM_FOLDER))
    return filesystem.absolute(name) if "/" in name and not name.startswith(TIMM_PREFIX) else None


def load_snapshot(url: str) -> Snapshot:
    """Read the configuration of a snapshot. Raises BundleError."""
    config = _read_config(url)
    snapshot = _parse_config(url, config)
    if snapshot is not None:
        return snapshot
    kind = config.get("model_type") if isinstance(config, dict) else None
    found = f"a model of transformers ({kind})" if kind else f"no {CONFIG_FILE} of timm"
    raise BundleError(
        f"model {url}: is {found}; pass a network of timm, which has most architectures under "
        "timm:NAME"
    )


def find_snapshot_of_weights(weights: str | None) -> Snapshot | None:
    """The snapshot that a weights file is part of; None for a file alone.

    Raises BundleError for a configuration that cannot be read, since it has the preprocessing.
    """
    folder, _, name = (weights or "").rpartition("/")
    if not folder or name not in WEIGHTS_FILES:
        return None
    try:
        has_config = filesystem.exists(filesystem.join(folder, CONFIG_FILE))
    except StorageError as error:
        raise request_error(BundleError, f"model.weights {weights}: {error}", error) from error
    return _parse_config(folder, _read_config(folder)) if has_config else None


def _read_config(url: str) -> Any:
    try:
        return json.loads(filesystem.read(filesystem.join(url, CONFIG_FILE)))
    except (StorageError, ValueError) as error:
        raise request_error(
            BundleError,
            f"model {url}: {error}; a folder with a network has timm's {CONFIG_FILE}. Networks of "
            "torchvision and timm have names: `imgcls model list`, timm:NAME",
            error,
        ) from error


def _parse_config(url: str, config: Any) -> Snapshot | None:
    """None unless timm wrote the configuration."""
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return None
    pretrained = config.get("pretrained_cfg")
    return Snapshot(
        url=url,
        name=TIMM_PREFIX + config["architecture"],
        options={k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"},
        # older files have its keys at the top
        pretrained=pretrained if isinstance(pretrained, dict) else config,
    )
