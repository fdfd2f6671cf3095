"""What a strategy needs, which layers it moves, and how fast."""

from __future__ import annotations

from typing import get_args

import pytest
from torch import nn

from imgcls.errors import RequestError
from imgcls.models import zoo
from imgcls.training.config import FinetuneConfig, Strategy, TrainConfig
from imgcls.training.optim.param_groups import split_layers
from imgcls.training.optim.strategy import (
    choose_default_lr,
    choose_schedule,
    describe_schedule,
    find_trainable,
    has_probe,
    plan_param_groups,
    resolve_strategy,
)

NETWORK = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2)
)
EVERYTHING = {name for name, _ in NETWORK.named_parameters()}
HEAD, MIDDLE = {"4.weight", "4.bias"}, {"2.weight", "2.bias"}


def test_it_depends_on_weights_where_none_is_given() -> None:
    assert resolve_strategy(None, pretrained=True) == "probe_then_finetune"
    assert resolve_strategy(None, pretrained=False) == "scratch"


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_only_scratch_does_without_weights(strategy: Strategy) -> None:
    assert resolve_strategy(strategy, pretrained=True) == strategy
    if strategy == "scratch":
        assert resolve_strategy(strategy, pretrained=False) == strategy
        return
    with pytest.raises(RequestError, match=rf"strategy {strategy} needs weights .*--model"):
        resolve_strategy(strategy, pretrained=False)


def test_the_strategies_that_probe() -> None:
    assert [s for s in get_args(Strategy) if has_probe(s)] == [
        "probe",
        "probe_then_finetune",
        "lora",
    ]


def test_finetuning_slows_the_layers_below_the_head() -> None:
    config = FinetuneConfig(backbone_lr_scale=0.2, layer_decay=0.5)
    for strategy, low, middle in (("scratch", 1.0, 1.0), ("finetune", 0.1, 0.2)):
        scale = {
            name: group.lr_scale
            for group in plan_param_groups(NETWORK, strategy, config)
            for name in group.names
        }
        assert scale["4.weight"] == scale["4.bias"] == 1.0
        assert scale["2.weight"] == pytest.approx(middle)
        assert scale["0.weight"] == scale["1.bias"] == pytest.approx(low)
        assert set(scale) == EVERYTHING


def test_everything_moves_at_once_unless_asked_otherwise() -> None:
    for strategy in ("scratch", "finetune", "probe_then_finetune"):
        assert find_trainable(NETWORK, strategy, FinetuneConfig(), 1) == EVERYTHING
    # from random weights there is nothing to be careful with
    assert find_trainable(NETWORK, "scratch", FinetuneConfig(unfreeze_every=1), 1) == EVERYTHING


def test_layers_are_set_free_one_by_one_from_the_head_down() -> None:
    assert len(split_layers(NETWORK)) == 3
    config = FinetuneConfig(unfreeze_every=2)
    free = [find_trainable(NETWORK, "finetune", config, epoch) for epoch in range(1, 9)]
    assert free == [HEAD, HEAD, HEAD | MIDDLE, HEAD | MIDDLE] + [EVERYTHING] * 4


def test_after_a_probe_the_layer_below_the_head_is_free_from_the_start() -> None:
    config = FinetuneConfig(unfreeze_every=1)
    free = [find_trainable(NETWORK, "probe_then_finetune", config, epoch) for epoch in (1, 2, 3)]
    assert free == [HEAD | MIDDLE, EVERYTHING, EVERYTHING]


def test_weights_that_are_good_already_are_moved_more_carefully() -> None:
    resnet, small = zoo.resolve_architecture("resnet18"), zoo.resolve_architecture("small_cnn")
    assert choose_default_lr("scratch", small) == 3e-3
    assert choose_default_lr("scratch", resnet) == 1e-3
    for strategy in ("finetune", "probe_then_finetune"):
        assert choose_default_lr(strategy, resnet) == choose_default_lr(strategy, small) == 3e-4


@pytest.mark.parametrize(
    ("strategy", "rows", "expected", "text"),
    [
        # 54 and 198 of 60 and 220 photographs, 1,260 of 1,400
        ("probe_then_finetune", 20, (10, 8), "10 epochs in batches of 8"),
        ("probe_then_finetune", 54, (10, 8), "10 epochs in batches of 8"),
        ("probe_then_finetune", 198, (10, 16), "10 epochs in batches of 16"),
        ("probe_then_finetune", 1_260, (4, 64), "4 epochs in batches of 64"),
        ("probe_then_finetune", 100_000, (4, 64), "4 epochs in batches of 64"),
        ("finetune", 54, (10, 8), "batches of 8"),
        ("scratch", 54, (10, 64), None),
        ("probe", 54, (10, 64), None),
    ],
)
def test_few_images_take_more_epochs_and_smaller_batches(
    strategy: Strategy, rows: int, expected: tuple[int, int], text: str | None
) -> None:
    asked = TrainConfig.model_validate({"data": "train.csv", "output": "out"})
    chosen = choose_schedule(asked, strategy, rows)
    assert (chosen.epochs, chosen.batch_size) == expected
    note = None if text is None else f"{text}, chosen for fine-tuning with {rows:,} training images"
    assert describe_schedule(asked, chosen, strategy, rows) == note


def test_a_schedule_that_is_set_is_kept_and_every_worker_has_an_image() -> None:
    request = {"data": "train.csv", "output": "out", "scale": {"num_workers": 6, "accumulate": 2}}
    asked = TrainConfig.model_validate(request)
    assert choose_schedule(asked, "probe_then_finetune", 54).batch_size == 12
    asked = asked.model_copy(update={"epochs": 3, "batch_size": 32})
    chosen = choose_schedule(asked, "probe_then_finetune", 54)
    assert (chosen.epochs, chosen.batch_size) == (3, 32)
    assert describe_schedule(asked, chosen, "probe_then_finetune", 54) is None
