"""Networks by name: all can be built, have a head, and take weights that fit, or raise an error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from imgcls.errors import BundleError, RequestError
from imgcls.models import zoo

NAMES = zoo.list_architectures()
SMALL = {"width": 4}


class Empty(TorchFunctionMode):
    """Networks as shapes: what parameters are made of takes no memory, and filling them no time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def shape_of(name: str, num_classes: int = 7) -> nn.Module:
    with Empty():
        return zoo.build_network(
            zoo.add_pretrained_options(zoo.resolve_architecture(name)), num_classes
        )


def small(num_classes: int = 3) -> nn.Module:
    return zoo.build_network(zoo.resolve_architecture("small_cnn", SMALL), num_classes)


def test_every_torchvision_classifier_is_listed() -> None:
    assert set(NAMES) == {"small_cnn", *torchvision.models.list_models(module=torchvision.models)}
    assert {"resnet18", "inception_v3", "vit_b_16", "squeezenet1_0", "efficientnet_b0"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_network_builds_with_a_head_of_the_classes(name: str) -> None:
    network = shape_of(name)
    head_name, head = zoo.find_head(network)
    outputs = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    assert outputs == 7
    assert head_name in zoo.list_head_names(network)


@pytest.mark.parametrize(
    "name",
    [
        "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3",
        "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
        "resnet18", "shufflenet_v2_x0_5", "small_cnn", "squeezenet1_0", "swin_t", "swin_v2_t",
        "vgg11", "vit_b_16",
    ],
)  # fmt: skip
def test_the_heads_are_all_that_the_number_of_classes_changes(name: str) -> None:
    network = shape_of(name)
    other = {key: value.shape for key, value in shape_of(name, 9).state_dict().items()}
    differ = {
        key.rpartition(".")[0]
        for key, value in network.state_dict().items()
        if other[key] != value.shape
    }
    assert differ == zoo.list_head_names(network)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_a_preprocessing(name: str) -> None:
    spec = zoo.get_default_preprocess(zoo.resolve_architecture(name))
    assert spec.resize >= spec.crop >= 32
    if name == "small_cnn":
        return
    for weights in torchvision.models.get_model_weights(name):
        recipe = weights.transforms()
        spec = zoo.get_default_preprocess(zoo.resolve_architecture(name), weights.name)
        assert (spec.resize, spec.crop) == (recipe.resize_size[0], recipe.crop_size[0])
        assert spec.interpolation == recipe.interpolation.value
        assert (spec.mean, spec.std) == (tuple(recipe.mean), tuple(recipe.std))


def test_the_preprocessing_is_that_of_the_weights_that_are_loaded() -> None:
    resnet = zoo.resolve_architecture("resnet50")
    default = torchvision.models.get_model_weights("resnet50").DEFAULT.transforms()
    assert zoo.get_default_preprocess(resnet, "torchvision").resize == default.resize_size[0] == 232
    assert zoo.get_default_preprocess(resnet, "IMAGENET1K_V1").resize == 256
    assert zoo.get_default_preprocess(resnet, "weights/resnet50.pth").resize == 256


@pytest.mark.parametrize(
    ("name", "weights", "options"),
    [
        ("resnet18", None, {}),
        ("inception_v3", None, {"transform_input": True, "aux_logits": True}),
        ("googlenet", None, {"transform_input": True, "aux_logits": True}),
        ("vit_b_16", None, {"image_size": 224}),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}),
        ("vit_h_14", "torchvision", {"image_size": 518}),
    ],
)
def test_pretrained_networks_are_built_as_their_weights_need(
    name: str, weights: str | None, options: dict[str, Any]
) -> None:
    architecture = zoo.add_pretrained_options(zoo.resolve_architecture(name), weights)
    assert architecture.options == options
    mine = dict.fromkeys(options, "mine")
    completed = zoo.add_pretrained_options(zoo.resolve_architecture(name, mine), weights)
    assert completed.options == mine


def test_a_vision_transformer_takes_another_input_size_with_its_weights() -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    default = zoo.resolve_architecture("vit_b_16")
    whole = zoo.build_network(default, 3)
    architecture = zoo.add_pretrained_options(zoo.set_image_size(default, 96))
    assert architecture.options == {"image_size": 96}
    network = zoo.build_network(architecture, 3)
    state = whole.state_dict()
    matched = zoo.match_weights(network, state)
    assert matched.interpolated_keys == ("encoder.pos_embedding",)
    assert matched.describe_changes() == [
        "interpolated to the input size of the network: encoder.pos_embedding"
    ]
    zoo.apply_weights(network, state, replace_head=False)
    expected = interpolate_embeddings(96, 16, OrderedDict(state))
    assert network.state_dict().keys() == expected.keys()
    for key, value in network.state_dict().items():
        assert torch.equal(value, expected[key])
    assert network.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    # as before where the sizes are equal
    assert zoo.match_weights(whole, state).interpolated_keys == ()


def test_a_convolutional_network_takes_any_size_without_an_option() -> None:
    for name in ("resnet18", "small_cnn"):
        architecture = zoo.resolve_architecture(name)
        assert zoo.set_image_size(architecture, 96) == architecture


def test_options_of_the_user_come_before_the_image_size() -> None:
    mine = zoo.resolve_architecture("vit_b_16", {"image_size": 384})
    assert zoo.set_image_size(mine, 96) == mine


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet_18", "resnet18"),
        ("ResNet18", "resnet18"),
        ("vit", "vit_"),
        ("smallcnn", "small_cnn"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(BundleError, match="no such architecture; did you mean") as caught:
        zoo.resolve_architecture(name)
    assert nearest in str(caught.value)
    assert issubclass(BundleError, RequestError)
    with pytest.raises(BundleError, match="see `imgcls model list`"):
        zoo.resolve_architecture("zzz")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"nonsense": 1}),
        ("small_cnn", {"nonsense": 1}),
        ("small_cnn", {"width": "8"}),
        ("small_cnn", {"width": -8}),
        ("vit_b_16", {"image_size": 100}),
        ("resnet18", {"weights": "DEFAULT"}),
    ],
)
def test_an_option_that_does_not_suit_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=rf"model {name}: .*; check model\.options"):
        zoo.build_network(zoo.resolve_architecture(name, options), 5)


def test_options_reach_the_network() -> None:
    assert zoo.find_head(small())[1].in_features == 16
    wide = zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 8}), 3)
    assert zoo.find_head(wide)[1].in_features == 32


# ------------------------------------------------------------------ as it is trained best


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_squeezenet_is_trained_without_its_last_relu(name: str) -> None:
    architecture = zoo.adapt_for_training(zoo.resolve_architecture(name))
    assert architecture.options == {"head_relu": False}
    torch.manual_seed(0)
    network, published = (
        zoo.build_network(architecture, 4).eval(),
        zoo.build_network(zoo.resolve_architecture(name), 4),
    )
    assert isinstance(published.classifier[2], nn.ReLU)
    published.eval().load_state_dict(network.state_dict())
    images = torch.randn(4, 3, 64, 64)
    # the ReLU stands before the mean over space: without it, logits are no larger
    assert network(images).min() < 0 <= published(images).min()
    assert (network(images) <= published(images)).all()
    assert zoo.find_head(network)[0] == zoo.find_head(published)[0] == "classifier.1"


def test_who_asks_for_the_last_relu_gets_it() -> None:
    architecture = zoo.adapt_for_training(
        zoo.resolve_architecture("squeezenet1_1", {"head_relu": True})
    )
    assert isinstance(zoo.build_network(architecture, 4).classifier[2], nn.ReLU)


@pytest.mark.parametrize("name", ["resnet18", "small_cnn", "vit_b_16"])
def test_other_networks_are_trained_as_they_are(name: str) -> None:
    architecture = zoo.resolve_architecture(name, {"dropout": 0.1})
    assert zoo.adapt_for_training(architecture) == architecture


def test_a_bundle_brings_squeezenet_back_without_its_relu(tmp_path: Path) -> None:
    from imgcls.models.bundle import BundleSpec, load_bundle, load_bundle_weights, save_bundle

    architecture = zoo.adapt_for_training(zoo.resolve_architecture("squeezenet1_1"))
    torch.manual_seed(0)
    network = zoo.build_network(architecture, 3).eval()
    spec = BundleSpec(
        architecture=architecture,
        classes=["a", "b", "c"],
        preprocess=zoo.get_default_preprocess(architecture),
    )
    save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())
    bundle = load_bundle(str(tmp_path / "bundle"))
    again = zoo.build_network(bundle.spec.architecture, 3).eval()
    zoo.apply_weights(again, load_bundle_weights(bundle), replace_head=False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), network(images))
    assert again(images).min() < 0


# ------------------------------------------------------------------ weights in


def refused(network: nn.Module, state: dict[str, torch.Tensor], **options: Any) -> str:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(BundleError) as caught:
        zoo.apply_weights(network, state, **{"replace_head": False} | options)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    return str(caught.value)


def test_weights_that_fit_are_taken_whole() -> None:
    network, other = small(), small()
    assert zoo.apply_weights(network, other.state_dict(), replace_head=False) == []
    for key, value in other.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)


def test_weights_that_do_not_fit_are_refused_by_their_keys() -> None:
    network, state = small(), dict(small(5).state_dict())
    del state["features.0.0.weight"]
    state["features.0.1.weight"] = torch.zeros(9)
    state["extra.bias"] = torch.zeros(1)
    message = refused(network, state)
    assert message.startswith("the weights do not match the network in 5 keys:")
    for line in (
        "features.0.1.weight: shape (9,) in the file, (4,) in the network",
        "head.4.weight: shape (5, 16) in the file, (3, 16) in the network",
        "head.4.bias: shape (5,) in the file, (3,) in the network",
        "features.0.0.weight: is missing in the file",
        "extra.bias: is missing in the network",
    ):
        assert f"\n  {line}" in message


def test_of_many_keys_that_do_not_fit_some_are_listed_and_all_are_counted() -> None:
    message = refused(small(), {f"layer{i}": torch.zeros(1) for i in range(50)})
    missing = sum(not key.endswith("num_batches_tracked") for key in small().state_dict())
    assert f"in {50 + missing} keys" in message
    assert message.endswith(f"and {50 + missing - 12} more")
    assert len(message.splitlines()) == 14


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_a_head_of_other_classes_is_left_for_training_when_asked(name: str) -> None:
    architecture = zoo.resolve_architecture(name)
    network, pretrained = zoo.build_network(architecture, 3), zoo.build_network(architecture, 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    left = zoo.apply_weights(network, pretrained.state_dict(), replace_head=True)
    head, _ = zoo.find_head(network)
    assert sorted(left) == [f"{head}.bias", f"{head}.weight"]
    for key, value in network.state_dict().items():
        source = before if key in left else pretrained.state_dict()
        assert torch.equal(value, source[key])
    assert "in the file, (3" in refused(zoo.build_network(architecture, 3), pretrained.state_dict())


def test_only_the_head_may_differ_when_it_is_replaced() -> None:
    wide = zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 8}), 5)
    message = refused(small(), dict(wide.state_dict()), replace_head=True)
    assert (
        "features.0.0.weight: shape (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the network"
        in message
    )


def test_auxiliary_heads_are_replaced_with_the_head() -> None:
    for name, heads in (
        ("inception_v3", {"fc", "AuxLogits.fc"}), ("googlenet", {"fc", "aux1.fc2", "aux2.fc2"}),
    ):  # fmt: skip
        network, pretrained = shape_of(name, 2), shape_of(name, 1000)
        left = zoo.apply_weights(network, pretrained.state_dict(), replace_head=True)
        assert {key.rpartition(".")[0] for key in left} == heads


# ------------------------------------------------------------------ weights from files


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[Any], str]:
    def save(content: Any) -> str:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        return str(path)

    return save


def load(path: str) -> dict[str, torch.Tensor]:
    return zoo.load_weights(path, zoo.resolve_architecture("small_cnn", SMALL))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}, "args": None},
    ],
    ids=["plain", "distributed", "checkpoint", "tutorial", "torchvision"],
)
def test_a_state_dict_is_found_where_training_scripts_put_it(
    stored: Callable[[Any], str], wrap: Callable[[Any], Any]
) -> None:
    state = small().state_dict()
    found = load(stored(wrap(dict(state))))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert zoo.apply_weights(small(), found, replace_head=False) == []


def test_safetensors_and_urls_are_read(tmp_path: Path) -> None:
    state = small().state_dict()
    save_file(dict(state), tmp_path / "w.safetensors")
    for place in (f"{tmp_path}/w.safetensors", f"file://{tmp_path}/w.safetensors"):
        assert load(place).keys() == state.keys()


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_file_that_holds_code_is_refused_and_runs_nothing(
    stored: Callable[[Any], str], tmp_path: Path
) -> None:
    path = stored({"state_dict": small().state_dict(), "extra": Trap(tmp_path / "sprung")})
    with pytest.raises(
        BundleError, match=r"not a plain state dict .*torch\.save\(model\.state_dict"
    ):
        load(path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(BundleError, match="not a plain state dict"):
        load(stored(small()))  # a whole module: its classes are code


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"a": "text"}, torch.zeros(3)])
def test_a_file_without_tensors_by_name_is_refused(
    stored: Callable[[Any], str], content: Any
) -> None:
    with pytest.raises(BundleError, match="has no state dict of tensors"):
        load(stored(content))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02junk", b"PK\x03\x04junk", b"x" * 999])
def test_a_damaged_weights_file_is_refused_by_name(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_weights_that_are_not_there_are_refused_with_the_choices() -> None:
    with pytest.raises(BundleError, match="no such file") as caught:
        zoo.load_weights("/none.pth", zoo.resolve_architecture("resnet50"))
    assert "one of pretrained, IMAGENET1K_V1, IMAGENET1K_V2" in str(caught.value)
