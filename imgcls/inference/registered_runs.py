"""Runs with a model of the MLflow model registry: each keeps the version that it began with.

`_run.json` has the requested URI, the version that it meant, and the hash of its bundle. A run that
is resumed uses this version, also if the alias has another one by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from imgcls import log
from imgcls.inference.config import PredictConfig, RelabelConfig
from imgcls.inference.nights import OutputSeries
from imgcls.models.bundle import Bundle, is_registry_uri
from imgcls.models.mlflow_registry import pin_uri
from imgcls.runs import layout

ConfigT = TypeVar("ConfigT", PredictConfig, RelabelConfig)


def keep_version(config: PredictConfig) -> PredictConfig:
    """The request with the version that the stored run began with, if its model was the same URI.

    With `since`, a run that is committed is not resumed: the URI is resolved again. A command that
    resumes a run labels new rows with the same version.
    """
    if not is_registry_uri(config.model) or config.overwrite:
        return config
    stored = OutputSeries(config.output, config.date).load_runs()
    if not stored:
        return config
    folder, record = stored[-1] if config.since is not None else stored[0]
    if config.since is not None and not config.retry_errors and layout.is_committed(folder):
        return config
    return _use_stored(config, config.model, record)


def keep_relabel_version(config: RelabelConfig, output: str) -> RelabelConfig:
    """As `keep_version`, for a run of `imgcls relabel`."""
    if config.model is None or not is_registry_uri(config.model) or config.overwrite:
        return config
    return _use_stored(config, config.model, layout.load_run(output) or {})


def pin_version(config: PredictConfig, bundle: Bundle) -> tuple[PredictConfig, Bundle]:
    """The request with the version instead of the alias, and the bundle with the requested URI.

    config: the request before `keep_version`
    """
    if bundle.registered is None:
        return config, bundle
    found = replace(bundle.registered, uri=config.model)
    found.log_version()
    pinned = config.model_copy(update={"model": found.pinned_uri})
    return pinned, replace(bundle, registered=found)


def build_model_entries(bundle: Bundle) -> dict[str, Any]:
    """Entries of `_run.json` about the model: its architecture, and its version in the registry."""
    entries: dict[str, Any] = {"architecture": bundle.spec.architecture.name}
    if bundle.registered is not None:
        entries["registered_model"] = bundle.registered.record
    return entries


def _use_stored(config: ConfigT, uri: str, record: Mapping[str, Any]) -> ConfigT:
    stored = record.get("registered_model")
    if not isinstance(stored, Mapping) or stored.get("uri") != uri:
        return config
    pinned = pin_uri(stored)
    if pinned != uri:
        log.emit("model", f"{uri}: version {stored['version']}, with which this run was started")
    return config.model_copy(update={"model": pinned})
