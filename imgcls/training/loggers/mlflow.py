"""Metric logger for MLflow: one run with settings, metrics per epoch, and files.

The package `mlflow` is imported when the logger is first used.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import tempfile
import time
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from imgcls.data.optional_packages import import_package
from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.errors import RequestError, one_line
from imgcls.models.mlflow_registry import use_short_timeouts

if TYPE_CHECKING:
    from imgcls.training.config import TrackConfig

MAX_PARAMS_PER_CALL = 100
"""MLflow's limit on the parameters of one call."""
MAX_PARAM_LENGTH = 500
"""Characters of one parameter; longer values are cut."""
_MAX_KEY_LENGTH = 250


class MLflowLogger:
    """One run of an MLflow experiment: settings as parameters, files as artifacts.

    state: run_id, with which a resumed training continues the run; epochs that the run has already
        are not logged again
    """

    name = "mlflow"

    def __init__(
        self,
        uri: str,
        experiment: str,
        run: str,
        state: Mapping[str, Any] | None,
        *,
        uses_registry: bool = False,
    ) -> None:
        self.state: dict[str, Any] = dict(state or {})
        self._uri, self._experiment, self._run = uri, experiment, run
        self._uses_registry = uses_registry
        self._is_resumed = "run_id" in self.state
        self._client: Any = None
        self._last_epoch = -1

    @classmethod
    def from_config(
        cls, config: TrackConfig, output: str, state: Mapping[str, Any] | None
    ) -> MLflowLogger | None:
        """None if no tracking URI is configured."""
        if config.mlflow is None:
            return None
        name, uses_registry = config.resolve_run_name(output), config.register_as is not None
        return cls(config.mlflow, config.experiment, name, state, uses_registry=uses_registry)

    def check(self) -> None:
        package = _import_mlflow()
        try:
            with use_short_timeouts():
                client = package.MlflowClient(self._uri)
                client.search_experiments(max_results=1)
                if self._uses_registry:
                    client.search_registered_models(max_results=1)
        except Exception as error:
            raise RequestError(
                f"track.mlflow {hide_credentials(self._uri)}: "
                f"{hide_credentials(one_line(error))}. Pass the URI of a running MLflow server, or "
                "of a file as in sqlite:///mlflow.db."
            ) from error

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        package = _import_mlflow()
        with use_short_timeouts():
            self._client = package.MlflowClient(self._uri)
            if "run_id" not in self.state:
                self._create_run()
            run = self._client.get_run(self.state["run_id"])
            if self._is_resumed:
                self._continue_run(run)
            else:
                self._log_settings(package, settings)
        uri = hide_credentials(self._uri)
        if not uri.startswith(("http://", "https://")):
            return f"run {run.info.run_id} in {uri}"
        place = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        return f"{uri.rstrip('/')}/#/{place}"

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        if number > self._last_epoch:
            self._log_metrics(values, number)
            self._last_epoch = number

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        try:
            self._log_metrics(summary, max(0, self._last_epoch))
            with tempfile.TemporaryDirectory() as folder, use_short_timeouts():
                for name, url in files.items():
                    filesystem.write(filesystem.join(folder, name), filesystem.read(url))
                self._client.log_artifacts(self.state["run_id"], folder)
        finally:
            self._terminate("FINISHED")

    def stop(self, *, interrupted: bool) -> None:
        self._terminate("KILLED" if interrupted else "FAILED")

    def _create_run(self) -> None:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(self._experiment)
        )
        tags = {"mlflow.source.name": "imgcls train", "mlflow.source.type": "JOB"}
        created = self._client.create_run(experiment, run_name=self._run, tags=tags)
        self.state = {"run_id": created.info.run_id}

    def _continue_run(self, run: Any) -> None:
        self._client.update_run(run.info.run_id, status="RUNNING")
        for metric in run.data.metrics:
            known = self._client.get_metric_history(run.info.run_id, metric)
            self._last_epoch = max([self._last_epoch, *(point.step for point in known)])

    def _log_settings(self, package: ModuleType, settings: Mapping[str, Any]) -> None:
        params = [
            package.entities.Param(build_mlflow_key(key), str(value)[:MAX_PARAM_LENGTH])
            for key, value in settings.items()
        ]
        for at in range(0, len(params), MAX_PARAMS_PER_CALL):
            part = params[at : at + MAX_PARAMS_PER_CALL]
            self._client.log_batch(self.state["run_id"], params=part)

    def _log_metrics(self, values: Mapping[str, float], step: int) -> None:
        metric = _import_mlflow().entities.Metric
        now = int(time.time() * 1000)
        metrics = [
            metric(build_mlflow_key(name), value, now, step) for name, value in values.items()
        ]
        with use_short_timeouts():
            self._client.log_batch(self.state["run_id"], metrics=metrics)

    def _terminate(self, status: str) -> None:
        with use_short_timeouts():
            self._client.set_terminated(self.state["run_id"], status)


def build_mlflow_key(name: str) -> str:
    """A key that MLflow accepts: letters, digits, spaces and _ - . : / in a normalized path.

    Any other character, such as the brackets in `cat [wild]`, is written -uHEX- with its Unicode
    code point: `cat -u5b-wild-u5d-`, so that different names have different keys. A key above
    MLflow's limit of 250 characters is cut and ends in a hash of the whole name.
    """
    key = re.sub(r"[^/\w.\- :]|-(?=u[0-9a-f]+-)", _escape_character, name)
    if key in ("", ".") or posixpath.normpath(key) != key or key.startswith(("/", "..")):
        key = re.sub(r"/|^\.+", _escape_character, key) or "-u-"
    if len(key) > _MAX_KEY_LENGTH:
        key = key[: _MAX_KEY_LENGTH - 13] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return key


def _escape_character(found: re.Match[str]) -> str:
    return "".join(f"-u{ord(character):x}-" for character in found[0])


def _import_mlflow() -> ModuleType:
    return import_package("mlflow", "MlflowClient", "track.mlflow")
