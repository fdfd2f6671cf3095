"""The registered bundle that a training starts from: the version that it began with is kept.

`_train/run.json`, `bundle.json` and `_tune.json` have its URI, version and hash. A training that is
resumed uses this version, also if the alias has another one by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, RequestError, StorageError, StorageUnavailable
from imgcls.models.bundle import is_registry_uri, read_description
from imgcls.models.mlflow_registry import RegisteredModel, pin_uri
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import TrainConfig
from imgcls.training.search_space import SEARCH_FILE, TuneConfig, parse_search_model

ConfigT = TypeVar("ConfigT", bound=TrainConfig)
ModelRecord = Mapping[str, Any]


def find_starting_model(config: TrainConfig) -> RegisteredModel | None:
    """The version that `model.name` means, or that the stored training began with.

    None for a model that is not in the registry. Raises RequestError for weights that are named by
    a URI of the registry, BundleError for a version that is not found or was changed.
    """
    uri, weights = config.model.name, config.model.weights
    if is_registry_uri(weights or ""):
        raise RequestError(
            f"model.weights {weights}: is a bundle; pass it as model.name, with model.weights "
            "pretrained"
        )
    if not is_registry_uri(uri):
        return None
    if weights is None:
        log.emit(
            "note",
            f"model.name {uri}: the network starts from random weights; pass --model.weights "
            "pretrained to start from those of the bundle",
        )
    stored = None if config.overwrite else _load_stored(config)
    if stored is not None and stored.get("uri") == uri:
        bundle = read_description(pin_uri(stored))
        if bundle.sha256 != stored.get("sha256"):
            raise BundleError(
                f"model.name {uri}: version {stored['version']} has the bundle "
                f"{bundle.sha256[:12]}, but the training in {config.output} began with "
                f"{str(stored.get('sha256'))[:12]}; pass --overwrite to start over"
            )
    else:
        bundle = read_description(uri)
    assert bundle.registered is not None
    found = replace(bundle.registered, uri=uri)
    found.log_version()
    return found


def use_model(config: ConfigT, name: str) -> ConfigT:
    """The configuration with another `model.name`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})


def check_space_models(config: TuneConfig) -> None:
    """Raise RequestError for a search over versions of registered models.

    A trial may run on another machine, which may not reach the registry.
    """
    for key, axis in config.tune.space.items():
        for value in (*(axis.choice or ()), *(axis.grid or ())):
            if isinstance(value, str) and is_registry_uri(value):
                raise RequestError(
                    f"tune.space.{key}: {value}: a search has one registered model; pass it as "
                    "model.name, or pass the folders of the bundles here"
                )


def _load_stored(config: TrainConfig) -> ModelRecord | None:
    """The model that the training or the search in the output began with."""
    if isinstance(config, TuneConfig):
        return parse_search_model(_read(filesystem.join(config.output, SEARCH_FILE)))
    known = Checkpoints(config.output).read_identity()
    if known is None:
        try:
            known = read_description(config.output).spec.provenance.get("run")
        except StorageUnavailable:
            raise
        except BundleError:
            return None
    found = known.get("registered_model") if isinstance(known, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _read(url: str) -> str:
    try:
        return filesystem.read(url).decode(errors="replace")
    except StorageUnavailable:
        raise
    except StorageError:
        return ""
