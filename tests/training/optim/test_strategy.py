"""What a strategy needs, which layers it moves, and how fast."""

from __future__ import annotations

from typing import get_args

import pytest
from torch import nn

from imgcls.errors import RequestError
from imgcls.models import zoo
from imgcls.training.config import FinetuneConfig, Strategy
from imgcls.training.optim.param_groups import split_layers
from imgcls.training.optim.strategy import (
    choose_default_lr,
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


def test_the_two_that_probe() -> None:
    assert [s for s in get_args(Strategy) if has_probe(s)] == ["probe", "probe_then_finetune"]


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
