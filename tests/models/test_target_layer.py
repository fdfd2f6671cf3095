"""The layer that explains a network, found for each kind of network without its name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imgcls.errors import NotExplainable
from imgcls.models import zoo
from imgcls.models.target_layer import find_target_layer

SMALL = [
    ("small_cnn", {"width": 4}, 32, "channels_first", 8),
    ("resnet18", {}, 64, "channels_first", 2),
    ("squeezenet1_0", {"head_relu": False}, 64, "channels_first", 3),
    ("mobilenet_v3_small", {}, 64, "channels_first", 2),
    (
        "timm:vit_tiny_patch16_224",
        {"img_size": 64, "depth": 2, "reg_tokens": 4},
        64,
        "tokens",
        4,
    ),
]
SLOW = [
    ("timm:tf_efficientnet_lite0", {}, 64, "channels_first", 2),
    ("timm:swin_tiny_patch4_window7_224", {"img_size": 64}, 64, "channels_last", 2),
]


@pytest.mark.parametrize(
    ("name", "options", "size", "layout", "side"),
    [*SMALL, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_the_target_is_the_last_map_before_pooling(
    name: str, options: dict[str, object], size: int, layout: str, side: int
) -> None:
    network = build(name, options)
    target = find_target_layer(network, size)
    assert (target.layout, target.side) == (layout, side)
    with target.keep_output(network) as kept, torch.no_grad():
        network(torch.zeros(3, 3, size, size))
    found = target.to_map(kept[0])
    assert found.shape[0] == 3
    assert found.shape[2:] == (side, side)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size", "expected"),
    [
        ("resnet50", {}, 64, "layer4"),
        ("squeezenet1_1", {"head_relu": True}, 64, "classifier.0"),
        ("efficientnet_b0", {}, 64, "features"),
        ("densenet121", {}, 64, "features"),
        ("inception_v3", {"aux_logits": True, "transform_input": True}, 299, "Mixed_7c"),
        ("googlenet", {}, 64, "inception5b"),
        ("vgg11_bn", {}, 64, "features.27"),
        ("convnext_tiny", {}, 64, "features"),
        ("shufflenet_v2_x0_5", {}, 64, "conv5"),
        ("mnasnet0_5", {}, 64, "layers"),
        ("regnet_y_400mf", {}, 64, "trunk_output"),
        ("vit_b_16", {"image_size": 64}, 64, "encoder.layers.encoder_layer_11.ln_1"),
        ("swin_t", {}, 64, "permute"),
        ("swin_v2_t", {}, 64, "permute"),
        ("maxvit_t", {}, 224, "blocks.3"),
        ("timm:convnext_atto", {}, 64, "norm_pre"),
        ("timm:deit_tiny_distilled_patch16_224", {"img_size": 64}, 64, "blocks.11.norm1"),
        ("timm:vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}, 64, "blocks"),
        ("timm:resnet18", {}, 64, "layer4"),
        ("timm:mobilenetv3_small_050", {}, 64, "blocks"),
        ("timm:seresnet18", {}, 64, "layer4"),
        ("timm:mixer_s32_224", {}, 224, "norm"),
        ("timm:mobilevit_xxs", {}, 64, "final_conv"),
        ("open_clip:ViT-B-32", {}, 224, "visual.transformer.resblocks.11.ln_1"),
        ("open_clip:RN50", {}, 224, "visual.layer4"),
    ],
)
def test_every_kind_of_network_has_a_target(
    name: str, options: dict[str, object], size: int, expected: str
) -> None:
    target = find_target_layer(build(name, options), size)
    assert target.name.startswith(expected), target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("timm:resmlp_12_224", 224, ("norm", 14, 0)),
        ("timm:tnt_s_legacy_patch16_224", 224, ("blocks.11.norm_out", 14, 1)),
        ("timm:csatv2", 512, ("stages.3.6.norm2", 8, 0)),
    ],
)
def test_tokens_have_the_grid_of_the_patches(
    name: str, size: int, expected: tuple[str, int, int]
) -> None:
    target = find_target_layer(build(name, {}), size)
    assert (target.name, target.side, target.prefix) == expected


def test_a_layer_before_most_others_is_refused() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    rest = [nn.Linear(4 * 14 * 14, 8), *(nn.Linear(8, 8) for _ in range(3))]
    with pytest.raises(NotExplainable):
        find_target_layer(nn.Sequential(stem, *rest, nn.Linear(8, 2)).eval(), 16)


def test_a_class_token_is_explained_by_the_input_of_the_last_attention() -> None:
    network = build("timm:vit_tiny_patch16_224", {"img_size": 64, "depth": 3, "reg_tokens": 4})
    target = find_target_layer(network, 64)
    assert target.name == "blocks.2.norm1"
    assert target.prefix == 5


def test_a_grid_is_that_of_the_patches_where_the_number_of_tokens_is_ambiguous() -> None:
    # 2 x 2 patches and 5 other tokens are as many as 3 x 3
    network = build("timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "reg_tokens": 4})
    assert find_target_layer(network, 32).prefix == 5


def test_a_network_without_a_map_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(3 * 16 * 16, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.hidden(images.flatten(1)))
            return logits

    with pytest.raises(NotExplainable, match=r"Flat: has no feature map.*use another architecture"):
        find_target_layer(Flat().eval(), 16)


def build(name: str, options: dict[str, object]) -> nn.Module:
    """A network with random weights, in eval mode."""
    torch.manual_seed(0)
    return zoo.build_network(zoo.resolve_architecture(name, options), 5).eval()
