"""Registration of a trained bundle in the MLflow model registry, as the next version of a model.

The version's files are an MLflow model with the whole bundle, stored as artifacts of the training's
run. A bundle that is registered already gets no second version, so the same command can be rerun.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from imgcls import log
from imgcls.data.optional_packages import import_package
from imgcls.data.storage.credentials import hide_credentials
from imgcls.errors import ImgclsError, RunFailed, one_line
from imgcls.models.bundle import Bundle, read_description
from imgcls.models.mlflow_registry import (
    HASH_TAG,
    TRANSFER_TIMEOUT_S,
    find_version,
    use_short_timeouts,
)
from imgcls.training.config import TrackConfig

MODEL_ARTIFACT = "model"
"""Folder of the model in the artifacts of the run."""


def register_bundle(
    config: TrackConfig, url: str, logger_state: Mapping[str, Any] | None = None
) -> str | None:
    """Register a bundle as a version of `config.register_as`; does nothing if that is not set.

    logger_state: state of the metric loggers, with the MLflow run of the training; without it the
        version gets a run of its own
    Returns the version. Raises RunFailed if the registry refuses it or does not answer.
    """
    if config.register_as is None or config.mlflow is None:
        return None
    package = import_package("mlflow", "MlflowClient", "track.register_as")
    bundle, name = read_description(url), config.register_as
    place = f"{name!r} in {hide_credentials(config.mlflow)}"
    try:
        with use_short_timeouts():
            client = package.MlflowClient(config.mlflow)
            known = find_version(client, name, bundle.sha256)
            run_id = (logger_state or {}).get("mlflow", {}).get("run_id")
            if known is None and run_id is None:
                run_id = _create_run(client, config, url)
        if known is None:
            _upload_model(client, bundle, run_id)
            with use_short_timeouts():  # another command may have been first during the upload
                known = find_version(client, name, bundle.sha256)
                version = known or _create_version(client, package, bundle, name, run_id)
        if known is not None:
            log.show(f"registered before: version {known} of {place}")
            return known
    except ImgclsError:
        raise
    except Exception as error:
        raise RunFailed(
            f"the bundle is in {url}, but was not registered as {place}: "
            f"{hide_credentials(one_line(error))}. Rerun the same command, which registers it "
            "without training again"
        ) from error
    log.show(f"registered: version {version} of {place}, bundle {bundle.sha256[:12]}")
    return version


def _create_run(client: Any, config: TrackConfig, url: str) -> str:
    """A finished run for a bundle whose training is not tracked any more."""
    found = client.get_experiment_by_name(config.experiment)
    experiment = found.experiment_id if found else client.create_experiment(config.experiment)
    name = f"{config.resolve_run_name(url)} (registered)"
    run = client.create_run(experiment, run_name=name)
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def _upload_model(client: Any, bundle: Bundle, run_id: str) -> None:
    """Write a bundle as an MLflow model into the artifacts of a run."""
    from imgcls.models.mlflow_flavor import save_mlflow_model  # imports torch

    with tempfile.TemporaryDirectory(prefix="imgcls-register-") as temporary:
        folder = os.path.join(temporary, MODEL_ARTIFACT)
        save_mlflow_model(bundle, folder)
        with use_short_timeouts(TRANSFER_TIMEOUT_S):
            client.log_artifacts(run_id, folder, MODEL_ARTIFACT)


def _create_version(client: Any, package: Any, bundle: Bundle, name: str, run_id: str) -> str:
    try:
        client.create_registered_model(name)
    except package.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    artifacts = client.get_run(run_id).info.artifact_uri.rstrip("/")
    metrics = {f"imgcls.{key}": f"{value:.6g}" for key, value in bundle.spec.metrics.items()}
    created = client.create_model_version(
        name,
        f"{artifacts}/{MODEL_ARTIFACT}",
        run_id=run_id,
        tags={HASH_TAG: bundle.sha256, "imgcls.task": bundle.spec.task, **metrics},
        description=f"{bundle.spec.architecture.name}, {len(bundle.spec.classes):,} classes",
    )
    return str(created.version)
