"""Search space of a hyperparameter search: its axes, and the checks before it starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from imgcls.config import Section, build
from imgcls.data.manifests.discovery import resolve_source
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage import filesystem
from imgcls.errors import ConfigError, OutputError, StorageMissing
from imgcls.models.bundle import is_registry_uri
from imgcls.training.config import TrainConfig

SEARCH_FILE = "_tune.json"
RESULTS_FILE = "results.parquet"
TRIALS_FOLDER = "trials"
BEST_FOLDER = "best"
STATE_FOLDER = "_tune"

_IMAGE_KEYS = ("data.train", "data.val", "data.classes", "teacher")
"""Prefixes of keys that choose the images, their labels, or which of them are held out."""
_TEACHER_LOSS_KEYS = ("teacher.temperature", "teacher.weight")

SearchRange = tuple[float, float]


class Axis(Section):
    """Values or distribution of one key; exactly one field is set."""

    choice: list[Any] | None = None
    """One of these values."""
    grid: list[Any] | None = None
    """Each of these values, `trials` times; only with tune.search random."""
    uniform: SearchRange | None = None
    """[low, high], uniform."""
    loguniform: SearchRange | None = None
    """[low, high], uniform on a log scale, e.g. for learning rates."""
    randint: tuple[int, int] | None = None
    """[low, high], uniform over the integers, both ends included."""
    lograndint: tuple[int, int] | None = None
    """[low, high], integers, uniform on a log scale, both ends included."""

    @model_validator(mode="after")
    def _check(self) -> Axis:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"set exactly one of {names}; {len(given)} are set")
        ((kind, values),) = given.items()
        if kind in ("choice", "grid"):
            if not values:
                raise ValueError(f"{kind}: the list is empty")
            return self
        low, high = values
        if low >= high:
            raise ValueError(f"{kind} [{low}, {high}]: pass the smaller number first")
        if kind.startswith("log") and low <= 0:
            raise ValueError(f"{kind} [{low}, {high}]: the bounds must be greater than 0")
        return self

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        (kind,) = self.model_dump(exclude_none=True)
        return str(kind)

    def build_domain(self) -> Any:
        """The axis as a search domain of Ray Tune."""
        from ray import tune  # not to check the configuration

        values = getattr(self, self.kind)
        if self.kind == "choice":
            return tune.choice(values)
        if self.kind == "grid":
            return tune.grid_search(values)
        low, high = values
        if self.kind.endswith("randint"):
            high += 1  # Ray Tune excludes the upper end
        return getattr(tune, self.kind)(low, high)

    def list_extremes(self) -> list[Any]:
        """Values to check: all of a list, the ends of an interval."""
        return list(getattr(self, self.kind))


class AshaConfig(Section):
    """Asynchronous successive halving (ASHA): stops the worse trials early.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    grace_period: PositiveInt = 1
    """Minimum number of epochs of every trial."""
    reduction_factor: int = Field(default=3, ge=2)
    """One in this many trials continues at each rung; the rungs are this factor of epochs apart."""


class SearchConfig(Section):
    """Search space, number of trials, and search algorithm."""

    space: dict[str, Axis] = {}
    """Axis of each training key to search, e.g. `optim.lr: {loguniform: [1e-4, 1e-1]}`."""
    trials: PositiveInt = 8
    """Number of trials; with grids, number of trials per combination."""
    search: Literal["random", "optuna"] = "random"
    """random, or optuna: uses the results of earlier trials (pip install 'imgcls[optuna]')."""
    scheduler: Literal["asha", "fifo"] = "asha"
    """asha: stop the worse trials early; fifo: run every trial to its end."""
    asha: AshaConfig = AshaConfig()
    max_concurrent: PositiveInt | None = None
    """Maximum number of concurrent trials (default: as many as fit on the cluster)."""
    seed: NonNegativeInt = 0
    """Seed of the drawn values."""

    @property
    def total_trials(self) -> int:
        """Total number of trials: each combination of the grids, `trials` times."""
        grids = (axis.grid for axis in self.space.values() if axis.grid is not None)
        return self.trials * math.prod(len(values) for values in grids)


class TuneConfig(TrainConfig):
    """Hyperparameter search: the keys of a training, and the search space."""

    tune: SearchConfig = SearchConfig()
    output: str
    """Output folder: trials/, results.parquet, plots/ and the best bundle, best/."""
    overwrite: bool = False
    """Delete the search in the output folder first."""


def build_trial_config(config: TuneConfig, values: dict[str, Any], output: str) -> TrainConfig:
    """The training configuration of one trial.

    values: value of each key of the search space
    Raises ConfigError if a value is not valid for its key.
    """
    base = config.model_dump(mode="json", exclude={"tune", "output", "overwrite", "find_lr"})
    # schedulers compare epochs, so that all trials have the same number
    base["epochs"] = config.num_epochs
    return build(TrainConfig, {**base, **values, "output": output})


def check_space(config: TuneConfig) -> None:
    """Raise ConfigError that lists every problem of the search space."""
    search = config.tune
    if config.data.embeddings is not None:
        raise ConfigError(
            "data.embeddings: a search trains on images; remove it, or fit one head with "
            "`imgcls train`"
        )
    if not search.space:
        raise ConfigError(
            "tune.space: is empty, so there is nothing to search; add keys and values, as in "
            "tune: {space: {optim.lr: {loguniform: [1e-4, 1e-1]}}}"
        )
    problems = []
    for key, axis in search.space.items():
        if key.split(".")[0] in ("output", "overwrite", "find_lr", "storage", "track"):
            problems.append(f"tune.space.{key}: does not change the trained model")
            continue
        if key.startswith(_IMAGE_KEYS) and key not in _TEACHER_LOSS_KEYS:
            problems.append(f"tune.space.{key}: changes the images, which all trials share")
            continue
        if axis.kind == "grid" and search.search != "random":
            problems.append(f"tune.space.{key}: grid needs tune.search random")
        for value in axis.list_extremes():
            try:
                build_trial_config(config, {key: value}, config.output)
            except ConfigError as error:
                line = str(error).splitlines()[-1].strip()
                problems.append(f"tune.space.{key}: {value!r}: {line}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"the search space has problems:\n{lines}")


def resolve_search_paths(config: TuneConfig) -> TuneConfig:
    """Make all paths absolute: Ray Tune runs each trial in another working directory."""

    def absolute(manifest: ManifestConfig | None) -> ManifestConfig | None:
        if manifest is None:
            return None
        root = None if manifest.root is None else filesystem.absolute(manifest.root)
        return manifest.model_copy(update={"path": resolve_source(manifest.path), "root": root})

    data = config.data.model_copy(
        update={"train": absolute(config.data.train), "val": absolute(config.data.val)}
    )
    teacher = config.teacher
    if teacher is not None:
        paths = {
            "path": (
                teacher.path if is_registry_uri(teacher.path) else filesystem.absolute(teacher.path)
            ),
            "manifest": absolute(teacher.manifest),
            "exclude": absolute(teacher.exclude),
        }
        teacher = teacher.model_copy(update=paths)
    weights = config.model.weights
    if weights is not None and filesystem.exists(weights):
        weights = filesystem.absolute(weights)
    return config.model_copy(
        update={
            "output": filesystem.absolute(config.output),
            "data": data,
            "teacher": teacher,
            "model": config.model.model_copy(update={"weights": weights}),
        }
    )


def claim_search(
    config: TuneConfig,
    inputs: Mapping[str, Any],
    registered_model: Mapping[str, Any] | None = None,
) -> None:
    """Record a search in its output folder; raise OutputError if that has another one.

    config: with the version in `model.name` for a registered model
    inputs: fingerprints of the manifests and of the initial weights
    """
    url = filesystem.join(config.output, SEARCH_FILE)
    free = {"output", "overwrite", "scale", "track", "storage", "tune"}
    if config.teacher is None:  # as earlier versions, whose searches are resumed
        free.add("teacher")
    earlier = config.model_dump_json(exclude=free) + config.tune.model_dump_json(
        exclude={"max_concurrent"}
    )
    if registered_model is not None:
        earlier += json.dumps({"registered_model": dict(registered_model)})
    mine = earlier + json.dumps({"inputs": dict(inputs)}, sort_keys=True)
    if config.overwrite:
        for name in (BEST_FOLDER, TRIALS_FOLDER, STATE_FOLDER, RESULTS_FILE, SEARCH_FILE):
            filesystem.remove(filesystem.join(config.output, name))
    try:
        there = filesystem.read(url).decode()
    except StorageMissing:
        filesystem.write(url, mine.encode())
        return
    if there in (mine, earlier):
        return
    changed = "settings, or of another version of imgcls. Rerun its command"
    if there.startswith(earlier):
        changed = "images, labels or initial weights. Restore those"
    raise OutputError(
        f"output {config.output}: has a search with other {changed} to resume it, pass --overwrite "
        "to replace it, or pass another --output."
    )


def parse_search_model(text: str) -> Mapping[str, Any] | None:
    """The registered model in `_tune.json`, the third of its JSON values; None without one."""
    values: list[Any] = []
    try:
        while text:
            value, end = json.JSONDecoder().raw_decode(text)
            values.append(value)
            text = text[end:].lstrip()
    except ValueError:
        return None
    found = values[2].get("registered_model") if len(values) > 2 else None
    return found if isinstance(found, Mapping) else None
