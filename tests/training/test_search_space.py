"""Search spaces are checked before anything starts, and trials are limited to the cluster."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ray import tune as ray_tune

from imgcls.cluster.session import Node
from imgcls.config import build
from imgcls.errors import ConfigError, RequestError
from imgcls.training.scaling import WorkerPlan
from imgcls.training.search_space import (
    Axis,
    TuneConfig,
    build_trial_config,
    check_space,
    resolve_search_paths,
)
from imgcls.training.tune import check_probe_axes, check_teacher_axes, resolve_concurrency


def order(space: dict[str, Any], **more: Any) -> TuneConfig:
    return build(TuneConfig, {"data": "x", "output": "/out", "tune": {"space": space, **more}})


@pytest.mark.parametrize(
    ("axis", "within"),
    [
        ({"choice": ["a", "b"]}, lambda value: value in ("a", "b")),
        ({"uniform": [0.1, 0.2]}, lambda value: 0.1 <= value <= 0.2),
        ({"loguniform": [1e-4, 1.0]}, lambda value: 1e-4 <= value <= 1),
        ({"randint": [2, 3]}, lambda value: value in (2, 3)),
        ({"lograndint": [1, 8]}, lambda value: 1 <= value <= 8),
    ],
)
def test_values_are_drawn_from_the_whole_axis_and_nothing_else(axis: Any, within: Any) -> None:
    drawn = [Axis.model_validate(axis).build_domain().sample() for _ in range(300)]
    assert all(map(within, drawn))
    assert len(set(drawn)) > 1
    if "randint" in axis:
        assert set(drawn) == {2, 3}


def test_paths_are_absolute_but_for_models_of_the_registry() -> None:
    def resolve(path: str) -> str:
        config = build(TuneConfig, {"data": "x", "output": "/out", "teacher": {"path": path}})
        teacher = resolve_search_paths(config).teacher
        assert teacher is not None
        return teacher.path

    assert resolve("models:/large@champion") == "models:/large@champion"
    assert resolve("run") == os.path.abspath("run")


def test_of_a_grid_each_value_is_tried() -> None:
    assert Axis(grid=[1, 2]).build_domain() == ray_tune.grid_search([1, 2])


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ({}, "set exactly one of"),
        ({"choice": [1], "grid": [1]}, "2 are set"),
        ({"choice": []}, "is empty"),
        ({"uniform": [2, 1]}, "the smaller number first"),
        ({"loguniform": [0, 1]}, "greater than 0"),
    ],
)
def test_an_axis_that_is_none_is_refused(axis: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        order({"optim.lr": axis})


def test_every_problem_of_a_search_space_is_reported_at_once() -> None:
    space = {
        "optim.learning_rate": {"uniform": [0.1, 0.2]},
        "optim.lr": {"uniform": [-1.0, 0.2]},
        "output": {"choice": ["a"]},
        "epochs": {"grid": [1, 2]},
        "teacher.mode": {"choice": ["soft", "hard"]},
        "data.val_fraction": {"choice": [0.1, 0.2]},
    }
    with pytest.raises(ConfigError) as caught:
        check_space(order(space, search="optuna"))
    text = str(caught.value)
    assert "tune.space.optim.learning_rate: 0.1: optim.learning_rate: unknown key" in text
    assert "tune.space.optim.lr: -1.0: optim.lr" in text
    assert "tune.space.output: does not change the trained model" in text
    assert "tune.space.epochs: grid needs tune.search random" in text
    for key in ("teacher.mode", "data.val_fraction"):
        assert f"tune.space.{key}: changes the images, which all trials share" in text
    with pytest.raises(ConfigError, match="nothing to search"):
        check_space(order({}))


@pytest.mark.parametrize(
    ("space", "teacher", "words"),
    [
        (
            {"teacher.temperature": {"choice": [1.0, 4.0]}},
            {"mode": "hard"},
            "teacher.temperature 1: teacher.temperature: is for teacher.mode soft",
        ),
        (
            {"teacher.weight": {"uniform": [0.1, 0.9]}},
            {"mode": "hard"},
            "teacher.weight: is for teacher.mode soft",
        ),
        (
            {
                "strategy": {"choice": ["scratch", "probe"]},
                "teacher.temperature": {"choice": [2.0]},
            },
            {},
            "strategy probe  teacher.temperature 2: teacher.temperature: has no effect on a linear",
        ),
    ],
)
def test_a_searched_value_without_effect_on_the_teacher_is_refused(
    space: dict[str, Any], teacher: dict[str, Any], words: str
) -> None:
    config = order(space)
    check_teacher_axes(config, "single_label")
    taught = {"teacher": {"path": "run", **teacher}}
    config = build(TuneConfig, {**config.model_dump(mode="json", exclude_none=True), **taught})
    with pytest.raises(ConfigError, match=words):
        check_teacher_axes(config, "single_label")


def test_a_searched_value_that_a_probe_ignores_is_refused() -> None:
    smoothing = {"loss.label_smoothing": {"choice": [0.0, 0.1]}}
    check_probe_axes(order(smoothing))
    check_probe_axes(order({"strategy": {"choice": ["probe", "finetune"]}}))
    with pytest.raises(ConfigError, match=r"strategy probe: loss.label_smoothing: has no effect"):
        check_probe_axes(order(smoothing | {"strategy": {"choice": ["finetune", "probe"]}}))


def test_a_trial_is_the_training_with_the_drawn_values() -> None:
    config = order({"optim.lr": {"uniform": [0.1, 0.2]}})
    trial = build_trial_config(
        config, {"optim.lr": 0.15, "augment.preset": "none"}, "/out/trials/1"
    )
    assert (trial.optim.lr, trial.augment.preset) == (0.15, "none")
    assert (trial.output, trial.epochs) == ("/out/trials/1", config.num_epochs)


def test_no_more_trials_run_at_a_time_than_the_cpus_hold() -> None:
    config = order({"epochs": {"choice": [1, 2]}}, trials=20)
    one, two = WorkerPlan(1, 1.0, 0, 1, 1), WorkerPlan(2, 1.0, 0, 2, 2)
    eight = [Node(8, 0)]
    assert resolve_concurrency(config, one, eight, cached=True) == 8
    assert resolve_concurrency(config, one, eight, cached=False) == 4  # each decodes as well
    assert resolve_concurrency(config, two, eight, cached=True) == 4
    assert resolve_concurrency(config, WorkerPlan(1, 1.0, 1, 1, 1), [Node(8, 2)], cached=True) == 2
    few = order({"epochs": {"choice": [1, 2]}}, trials=3)
    assert resolve_concurrency(few, one, eight, cached=True) == 3
    with pytest.raises(RequestError, match=r"each trial takes 2 CPUs of 4, so at most 2 fit"):
        resolve_concurrency(order({}, max_concurrent=3), two, [Node(4, 0)], cached=True)


def test_no_trial_is_counted_on_that_would_have_to_be_split_between_machines() -> None:
    config = order({"epochs": {"choice": [1, 2]}}, trials=20)
    large = WorkerPlan(1, 12.0, 0, 1, 1)
    assert resolve_concurrency(config, large, [Node(16, 0)] * 3, cached=True) == 3
    assert resolve_concurrency(config, large, [Node(16, 0)] * 3, cached=False) == 3
    # half a core is left on each of two machines, and no task decodes in halves
    assert (
        resolve_concurrency(config, WorkerPlan(1, 1.5, 0, 1, 1), [Node(2, 0)] * 2, cached=False)
        == 1
    )
    # the workers of one trial may lie on different machines
    assert (
        resolve_concurrency(config, WorkerPlan(2, 12.0, 0, 2, 2), [Node(16, 0)] * 4, cached=True)
        == 2
    )


def test_a_grid_is_as_many_trials_as_it_has_values() -> None:
    grids = {"optim.lr": {"grid": [0.1] * 12}, "epochs": {"grid": [1, 2]}}
    one = WorkerPlan(1, 1.0, 0, 1, 1)
    config = order({**grids, "batch_size": {"choice": [32, 64]}}, trials=2)
    assert config.tune.total_trials == 2 * 12 * 2
    assert resolve_concurrency(config, one, [Node(60, 0)], cached=True) == 48
    assert order({"epochs": {"choice": [1, 2]}}, trials=3).tune.total_trials == 3
