"""Metric logger for Weights & Biases: one run with settings, metrics per epoch, and files.

The package `wandb` is imported when the logger is first used.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from imgcls.data.optional_packages import import_package
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError, one_line
from imgcls.training.loggers.tensorboard import build_tag

if TYPE_CHECKING:
    from imgcls.training.config import TrackConfig

UPLOAD_TIMEOUT_S = 60.0
"""Time to upload the rest of a run at its end; `wandb sync` can upload what is left then."""


class WandbLogger:
    """One run of a W&B project, uploaded in the background; kept on disk in offline mode.

    state: id, with which a resumed training continues the run; W&B ignores steps that it has
    """

    name = "wandb"

    def __init__(self, project: str, run: str, state: Mapping[str, Any] | None) -> None:
        self.state: dict[str, Any] = dict(state or {"id": uuid.uuid4().hex[:12]})
        self._entity, _, self._project = project.rpartition("/")
        self._name = run
        self._run: Any = None

    @classmethod
    def from_config(
        cls, config: TrackConfig, output: str, state: Mapping[str, Any] | None
    ) -> WandbLogger | None:
        """None if no project is configured."""
        if config.wandb is None:
            return None
        return cls(config.wandb, config.resolve_run_name(output), state)

    def check(self) -> None:
        package = _import_wandb()
        if self._is_offline(package):
            return
        place = f"track.wandb {self._project}"
        try:
            known = package.login(prompt=False)
        except Exception as error:
            raise RequestError(
                f"{place}: {one_line(error)}. Check the API key and the network, or set "
                "WANDB_MODE=offline and upload the run later with `wandb sync`."
            ) from error
        if not known:
            raise RequestError(
                f"{place}: Weights & Biases has no key. Run `wandb login`, set WANDB_API_KEY, or "
                "set WANDB_MODE=offline."
            )

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        package = _import_wandb()
        self._run = package.init(
            entity=self._entity or None,
            project=self._project,
            id=self.state["id"],
            name=self._name,
            config=dict(settings),
            resume="allow",
            reinit="create_new",  # a notebook may have a run of its own
            # the job writes its own log; W&B would print it a second time
            settings=package.Settings(
                console="off",
                silent=True,
                finish_timeout=UPLOAD_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        if self._is_offline(package):
            folder = os.path.dirname(self._run.dir)
            return f"offline; upload it with `wandb sync {folder}`"
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
    def _is_offline(package: ModuleType) -> bool:
        return package.setup().settings.mode in ("offline", "dryrun", "disabled")


def _import_wandb() -> ModuleType:
    return import_package("wandb", "init", "track.wandb")
