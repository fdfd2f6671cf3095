"""What a hyper-parameter search tries: the axes of its space, each checked as it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from ray import tune

from imgcls.config import Section, build
from imgcls.errors import ConfigError
from imgcls.training.config import TrainConfig

SearchRange = tuple[float, float]


class Axis(Section):
    """How the values of one key are drawn: give exactly one of these."""

    choice: list[Any] | None = None
    """One of these values."""
    grid: list[Any] | None = None
    """Each of these values in turn, `trials` times over; with random search only."""
    uniform: SearchRange | None = None
    """[low, high], any number alike."""
    loguniform: SearchRange | None = None
    """[low, high], any order of magnitude alike: for learning rates and the like."""
    randint: tuple[int, int] | None = None
    """[low, high], any whole number alike, both ends included."""
    lograndint: tuple[int, int] | None = None
    """[low, high], whole numbers, any order of magnitude alike."""

    _domains: ClassVar[dict[str, Callable[..., Any]]] = {
        "uniform": tune.uniform,
        "loguniform": tune.loguniform,
        "randint": lambda low, high: tune.randint(low, high + 1),
        "lograndint": lambda low, high: tune.lograndint(low, high + 1),
    }

    @model_validator(mode="after")
    def _check(self) -> Axis:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {names}; {len(given)} are given")
        ((kind, values),) = given.items()
        if kind in ("choice", "grid"):
            if not values:
                raise ValueError(f"{kind}: has no value to choose from")
            return self
        low, high = values
        if low >= high:
            raise ValueError(f"{kind} [{low}, {high}]: give the smaller number first")
        if kind.startswith("log") and low <= 0:
            raise ValueError(f"{kind} [{low}, {high}]: its numbers must be greater than 0")
        return self

    @property
    def kind(self) -> str:
        (kind,) = self.model_dump(exclude_none=True)
        return str(kind)

    def build_domain(self) -> Any:
        """As Ray Tune takes it."""
        values = getattr(self, self.kind)
        if self.kind == "choice":
            return tune.choice(values)
        if self.kind == "grid":
            return tune.grid_search(values)
        return self._domains[self.kind](*values)

    def list_extremes(self) -> list[Any]:
        """Values that must be possible if all are."""
        return list(getattr(self, self.kind))


class AshaConfig(Section):
    """Asynchronous successive halving: trials that fall behind are stopped early.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    grace_period: PositiveInt = 1
    """Epochs that every trial may have."""
    reduction_factor: int = Field(default=3, ge=2)
    """Of so many trials that reach a rung one goes on; rungs are this factor of epochs apart."""


class SearchConfig(Section):
    """What to try, and how often."""

    space: dict[str, Axis] = {}
    """By key of the training, e.g. `optim.lr: {loguniform: [1e-4, 1e-1]}`."""
    trials: PositiveInt = 8
    """Trainings with values of their own."""
    search: Literal["random", "optuna"] = "random"
    """optuna: each trial learns from those before it (pip install 'imgcls[optuna]')."""
    scheduler: Literal["asha", "fifo"] = "asha"
    """fifo: every trial runs to its end."""
    asha: AshaConfig = AshaConfig()
    max_concurrent: PositiveInt | None = None
    """Trials at a time; as many as the machines hold."""
    seed: NonNegativeInt = 0
    """Of the values that are drawn."""

    @property
    def total_trials(self) -> int:
        """Trainings in all: each combination of the grids' values, `trials` times over."""
        grids = (axis.grid for axis in self.space.values() if axis.grid is not None)
        return self.trials * math.prod(len(values) for values in grids)


class TuneConfig(TrainConfig):
    """Search the best settings of a training: its keys, and what to try."""

    tune: SearchConfig = SearchConfig()
    output: str
    """The folder to write: trials/, results.parquet, plots/ and the best bundle, best/."""
    overwrite: bool = False
    """Throw away the search that is there."""


def build_trial_config(config: TuneConfig, values: dict[str, Any], output: str) -> TrainConfig:
    """The training of one trial.

    Raises ConfigError when a value is none that the training takes.
    """
    base = config.model_dump(mode="json", exclude={"tune", "output", "overwrite", "find_lr"})
    return build(TrainConfig, {**base, **values, "output": output})


def check_space(config: TuneConfig) -> None:
    """Raise ConfigError, with all that is wrong, before anything starts."""
    search = config.tune
    if not search.space:
        raise ConfigError(
            "tune.space: is empty, so there is nothing to search; name keys and what they may be, "
            "as in tune: {space: {optim.lr: {loguniform: [1e-4, 1e-1]}}}"
        )
    problems = []
    for key, axis in search.space.items():
        if key.split(".")[0] in ("output", "overwrite", "find_lr", "storage", "track"):
            problems.append(f"tune.space.{key}: is no setting that changes what is learnt")
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
        raise ConfigError(f"the search cannot be made:\n{lines}")
