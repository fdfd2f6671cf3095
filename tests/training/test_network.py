"""The network as it is before the first step, and what it is refused for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import StochasticDepth

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.normalize import Normalizer
from imgcls.training.config import ModelConfig
from imgcls.training.network import (
    build_initial_network,
    check_can_train,
    limit_norm_windows,
    resolve_model,
    set_regularization,
)

SMALL = zoo.resolve_architecture("small_cnn", {"width": 8})


@pytest.mark.parametrize(
    ("settings", "crop", "resize"),
    [
        ({"name": "resnet18"}, 224, 232),
        ({"name": "resnet18", "image_size": 112}, 112, 116),
        ({"name": "resnet18", "crop_pct": 0.875}, 224, 256),
        ({"name": "vit_h_14", "weights": "IMAGENET1K_SWAG_E2E_V1"}, 518, 518),
        ({"name": "small_cnn"}, 32, 32),
    ],
)
def test_prediction_sees_nearly_all_of_an_image_by_default(
    settings: dict[str, Any], crop: int, resize: int
) -> None:
    _, preprocess = resolve_model(ModelConfig.model_validate(settings))
    assert (preprocess.crop, preprocess.resize) == (crop, resize)


def test_the_resize_mode_can_be_chosen() -> None:
    _, preprocess = resolve_model(ModelConfig(name="resnet18", resize_mode="pad"))
    assert (preprocess.mode, preprocess.crop) == ("pad", 224)


def test_the_decode_setting_travels_in_the_bundle() -> None:
    for decode in ("exact", "fast"):
        _, preprocess = resolve_model(ModelConfig.model_validate({"decode": decode}))
        assert preprocess.decode == decode
    _, preprocess = resolve_model(ModelConfig())
    assert preprocess.decode == Preprocess().decode


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat(
            [p.flatten() for p in build_initial_network(SMALL, None, 3, seed=seed).parameters()]
        )

    before = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), before), "the caller's own randomness is left alone"


def test_given_weights_are_kept_but_for_the_head_of_other_classes(tmp_path: Path) -> None:
    file = str(tmp_path / "weights.safetensors")
    old = build_initial_network(SMALL, None, 5, seed=1).state_dict()
    save_file(old, file)
    new = build_initial_network(SMALL, file, 3, seed=2).state_dict()
    head = {"head.4.weight", "head.4.bias"}
    assert all(torch.equal(new[key], old[key]) for key in old if key not in head)
    assert new["head.4.weight"].shape[0] == 3


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "weights.safetensors")
    save_file(
        build_initial_network(
            zoo.resolve_architecture("small_cnn", {"width": 4}), None, 3, seed=0
        ).state_dict(),
        file,
    )
    with pytest.raises(BundleError, match="the weights do not match the network"):
        build_initial_network(SMALL, file, 3, seed=0)


def test_images_that_the_network_cannot_take_are_refused_before_the_start() -> None:
    network = build_initial_network(SMALL, None, 3, seed=0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_can_train(network, Preprocess(resize=32, crop=32), 2)
    with pytest.raises(BundleError, match="cannot train on 2 images of 4x4 per worker"):
        check_can_train(network, Preprocess(resize=4, crop=4), 2)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_pixels_are_normalized_by_mean_and_std() -> None:
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    batch = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7), np.uint8)
    found = Normalizer(preprocess, torch.device("cpu"))(batch)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    np.testing.assert_allclose(found.numpy(), (batch / 255 - mean) / std, atol=1e-5)


def test_squeezenet_is_trained_without_the_relu_that_no_logit_could_leave() -> None:
    architecture, _ = resolve_model(ModelConfig(name="squeezenet1_1"))
    assert architecture.options == {"head_relu": False}
    network = build_initial_network(architecture, None, 5, seed=0).eval()
    assert network(torch.randn(2, 3, 64, 64)).min() < 0
    kept, _ = resolve_model(ModelConfig(name="squeezenet1_1", options={"head_relu": True}))
    assert build_initial_network(kept, None, 5, seed=0).eval()(torch.randn(2, 3, 64, 64)).min() >= 0


# ------------------------------------------------------------------ dropout, stochastic depth


def built(name: str, **options: Any) -> nn.Module:
    return build_initial_network(zoo.resolve_architecture(name, options), None, 3, seed=0)


@pytest.mark.parametrize(
    ("name", "options"), [("small_cnn", {"width": 4}), ("mobilenet_v3_small", {}), ("alexnet", {})]
)
def test_dropout_is_set_where_the_head_has_some(name: str, options: dict[str, Any]) -> None:
    network = built(name, **options)
    before = [m.p for m in network.modules() if isinstance(m, nn.Dropout2d)]
    set_regularization(network, ModelConfig(dropout=0.45))
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.45}
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout2d)] == before


def test_the_dropout_of_a_transformers_tokens_is_not_that_of_its_head() -> None:
    pytest.importorskip("timm")
    for name in ("timm:vit_tiny_patch16_224", "timm:deit_tiny_distilled_patch16_224"):
        network: Any = built(name, img_size=32, depth=1)
        set_regularization(network, ModelConfig(dropout=0.45))
        changed = [n for n, m in network.named_modules() if getattr(m, "p", None) == 0.45]
        assert changed == ["head_drop"]
        assert not any(head._forward_pre_hooks for head in zoo.find_heads(network).values())


def test_a_head_without_dropout_gets_it_in_training_alone() -> None:
    network = built("resnet18")
    _, head = zoo.find_head(network)
    seen: list[torch.Tensor] = []
    set_regularization(network, ModelConfig(dropout=0.25))
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randn(8, 3, 32, 32)
    keys = list(network.state_dict())
    network.eval()
    once, again = network(images), network(images)
    assert torch.equal(once, again)
    assert torch.equal(seen[0], seen[1])
    network.train()
    network(images)
    blank = (seen[2] == 0).float().mean() - (seen[0] == 0).float().mean()
    assert blank.item() == pytest.approx(0.25, abs=0.05)
    assert keys == list(built("resnet18").state_dict()), "the weights keep their names"


def test_dropout_is_left_alone_where_it_is_not_given() -> None:
    network = built("small_cnn", width=4, dropout=0.3)
    set_regularization(network, ModelConfig())
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_stochastic_depth_grows_from_none_to_what_was_asked_for() -> None:
    network = built("efficientnet_b0")
    set_regularization(network, ModelConfig(name="efficientnet_b0", stochastic_depth=0.4))
    shares = [m.p for m in network.modules() if isinstance(m, StochasticDepth)]
    assert len(shares) > 5
    np.testing.assert_allclose(shares, np.linspace(0, 0.4, len(shares)))


def test_stochastic_depth_is_refused_where_there_is_none() -> None:
    with pytest.raises(BundleError, match=r"model\.stochastic_depth: resnet18 has none"):
        set_regularization(built("resnet18"), ModelConfig(name="resnet18", stochastic_depth=0.1))


@pytest.mark.parametrize(
    ("momentum", "steps", "limited"),
    [
        (0.01, 100, 0.1),  # at most torch's default
        (0.01, 400, 0.05),
        (0.01, 4000, 0.01),
        (0.1, 10, 0.1),
        (0.3, 100, 0.3),
        (None, 100, None),  # the mean over all steps
    ],
)
def test_running_statistics_are_averaged_over_a_twentieth_of_a_training_or_ten_steps(
    momentum: float | None, steps: int, limited: float | None
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum))
    limit_norm_windows(network, steps)
    assert [network[1].momentum] == [limited]
