"""How MLflow and Weights & Biases are told of a training.

Each tracker speaks its tool's own dialect: names of metrics, ways to go on with a run, files. None
is imported before it is wanted. Errors are left to `track`, save for the checks before the start.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import posixpath
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from imgcls.cluster.session import set_env_defaults
from imgcls.data import filesystem
from imgcls.errors import RequestError, one_line
from imgcls.training.loggers.tensorboard import build_tag

MAX_PARAMS_PER_CALL = 100
"""MLflow's limit on the parameters of one call."""
SERVER_TIMEOUT_SECONDS = 10
"""For MLflow's server to answer: its own 7 attempts of 120 s would hold up the driver."""
UPLOAD_TIMEOUT_SECONDS = 60.0
"""For Weights & Biases to send what is left at the end; what it keeps can be sent by hand."""


class MLflowLogger:
    """A run of an experiment, with the settings as parameters and the files as artifacts.

    state: run_id, by which a resumed training goes on; epochs that the run knows are not told again
    """

    name = "mlflow"

    def __init__(
        self, uri: str, experiment: str, run: str, state: Mapping[str, Any] | None
    ) -> None:
        self.state: dict[str, Any] = dict(state or {})
        self._uri, self._experiment, self._run = uri, experiment, run
        self._is_resumed = "run_id" in self.state
        self._client: Any = None
        self._last_epoch = -1

    def check(self) -> None:
        package = _import_package("mlflow", "MlflowClient", "track.mlflow")
        try:
            with _short_timeouts():
                package.MlflowClient(self._uri).search_experiments(max_results=1)
        except Exception as error:
            raise RequestError(
                f"track.mlflow {self._uri}: {one_line(error)}; give the URI of an MLflow "
                "server that "
                "runs, or of a file as in sqlite:///mlflow.db"
            ) from error

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        mlflow = _import_package("mlflow", "MlflowClient", "track.mlflow")
        with _short_timeouts():
            self._client = client = mlflow.MlflowClient(self._uri)
            if "run_id" not in self.state:
                found = client.get_experiment_by_name(self._experiment)
                home = found.experiment_id if found else client.create_experiment(self._experiment)
                tags = {"mlflow.source.name": "imgcls train", "mlflow.source.type": "JOB"}
                created = client.create_run(home, run_name=self._run, tags=tags)
                self.state = {"run_id": created.info.run_id}
            run = client.get_run(self.state["run_id"])
            if self._is_resumed:
                client.update_run(run.info.run_id, status="RUNNING")
                for metric in run.data.metrics:
                    known = client.get_metric_history(run.info.run_id, metric)
                    self._last_epoch = max([self._last_epoch, *(point.step for point in known)])
            else:
                params = [
                    mlflow.entities.Param(build_mlflow_key(key), str(value)[:500])
                    for key, value in settings.items()
                ]
                for at in range(0, len(params), MAX_PARAMS_PER_CALL):
                    client.log_batch(run.info.run_id, params=params[at : at + MAX_PARAMS_PER_CALL])
        where = f"{self._uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/"
        web = self._uri.startswith(("http://", "https://"))
        return f"{where}{run.info.run_id}" if web else f"run {run.info.run_id} in {self._uri}"

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        if number > self._last_epoch:
            self._log_metrics(values, number)
            self._last_epoch = number

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        try:
            self._log_metrics(summary, max(0, self._last_epoch))
            with tempfile.TemporaryDirectory() as folder, _short_timeouts():
                for name, url in files.items():
                    filesystem.write(filesystem.join(folder, name), filesystem.read(url))
                self._client.log_artifacts(self.state["run_id"], folder)
        finally:
            self._terminate("FINISHED")

    def stop(self, *, interrupted: bool) -> None:
        self._terminate("KILLED" if interrupted else "FAILED")

    def _log_metrics(self, values: Mapping[str, float], step: int) -> None:
        metric = _import_package("mlflow", "MlflowClient", "track.mlflow").entities.Metric
        now = int(time.time() * 1000)
        metrics = [
            metric(build_mlflow_key(name), value, now, step) for name, value in values.items()
        ]
        with _short_timeouts():
            self._client.log_batch(self.state["run_id"], metrics=metrics)

    def _terminate(self, status: str) -> None:
        with _short_timeouts():
            self._client.set_terminated(self.state["run_id"], status)


def build_mlflow_key(name: str) -> str:
    """A name that MLflow takes: letters, digits, spaces and _ - . : / in a plain relative path.

    Any other character, as the brackets of a class `cat [wild]`, is written -uHEX-, with its
    Unicode code point: `cat -u5b-wild-u5d-`. So names differ where the originals do. One above
    MLflow's limit of 250 characters is cut and ends in a hash of the whole.
    """
    key = re.sub(r"[^/\w.\- :]|-(?=u[0-9a-f]+-)", _escape_character, name)
    if key in ("", ".") or posixpath.normpath(key) != key or key.startswith(("/", "..")):
        key = re.sub(r"/|^\.+", _escape_character, key) or "-u-"
    if len(key) > _MAX_KEY_LENGTH:
        key = key[: _MAX_KEY_LENGTH - 13] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return key


def _escape_character(found: re.Match[str]) -> str:
    return "".join(f"-u{ord(character):x}-" for character in found[0])


_MAX_KEY_LENGTH = 250


class WandbLogger:
    """A run of a project; sent in the background, or kept here if W&B was told to be offline.

    state: id, by which a resumed training goes on; W&B itself drops steps that it knows
    """

    name = "wandb"

    def __init__(self, project: str, run: str, state: Mapping[str, Any] | None) -> None:
        self.state: dict[str, Any] = dict(state or {"id": uuid.uuid4().hex[:12]})
        self._entity, _, self._project = project.rpartition("/")
        self._name = run
        self._run: Any = None

    def check(self) -> None:
        wandb = _import_package("wandb", "init", "track.wandb")
        if self._is_offline(wandb):
            return
        place = f"track.wandb {self._project}"
        try:
            known = wandb.login(prompt=False)
        except Exception as error:
            raise RequestError(
                f"{place}: {one_line(error)}; see to the key and the network, or set "
                "WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from error
        if not known:
            raise RequestError(
                f"{place}: Weights & Biases has no key; run `wandb login`, set WANDB_API_KEY, or "
                "set WANDB_MODE=offline"
            )

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        wandb = _import_package("wandb", "init", "track.wandb")
        self._run = wandb.init(
            entity=self._entity or None,
            project=self._project,
            id=self.state["id"],
            name=self._name,
            config=dict(settings),
            resume="allow",
            reinit="create_new",  # a notebook may have a run of its own
            # what is printed is the job's affair, and it would be printed twice
            settings=wandb.Settings(
                console="off",
                silent=True,
                finish_timeout=UPLOAD_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        if self._is_offline(wandb):
            folder = os.path.dirname(self._run.dir)
            return f"offline; send it with `wandb sync {folder}`"
        return str(self._run.url)

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        points = {build_tag(name): value for name, value in values.items()}
        self._run.log(points | {"epoch": number}, step=number, commit=True)

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        try:
            self._run.summary.update(dict(summary))
            for name, url in files.items():
                path = os.path.join(self._run.dir, name)
                filesystem.write(path, filesystem.read(url))
                self._run.save(path, base_path=self._run.dir, policy="end")
        finally:
            self._run.finish(exit_code=0)

    def stop(self, *, interrupted: bool) -> None:
        self._run.finish(exit_code=130 if interrupted else 1)

    @staticmethod
    def _is_offline(wandb: ModuleType) -> bool:
        return wandb.setup().settings.mode in ("offline", "dryrun", "disabled")


def _import_package(name: str, attribute: str, key: str) -> ModuleType:
    """An optional package; raises RequestError when it is not installed."""
    try:
        package = importlib.import_module(name)
        # a folder of the same name, such as W&B writes, is imported as an empty package
        getattr(package, attribute)
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"{key}: the package {name} is not installed ({one_line(error)}); "
            f"pip install 'imgcls[{name}]' on the machine that runs the driver"
        ) from error
    return package


@contextlib.contextmanager
def _short_timeouts() -> Iterator[None]:
    """Within it MLflow gives up on its server sooner, unless the user has set it otherwise."""
    timeouts = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(SERVER_TIMEOUT_SECONDS),
    }
    with set_env_defaults(timeouts):
        yield
