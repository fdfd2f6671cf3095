"""Class activation maps: the arithmetic of the paper, on the right half of real photographs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn

from imgcls.errors import BundleError, NotAnImage, RequestError
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.explain import Explainer, compute_class_maps
from imgcls.models.target_layer import find_target_layer
from tests.conftest import draw
from tests.models.test_target_layer import build

Floats = npt.NDArray[np.float64]


def bilinear(image: Floats, size: int) -> Floats:
    """Resize a square image by linear interpolation between the centers of its pixels."""
    side = len(image)
    at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.minimum(at.astype(int), side - 2)
    share = at - low
    rows = image[low] * (1 - share)[:, None] + image[low + 1] * share[:, None]
    resized: Floats = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    return resized


def scaled(image: Floats) -> Floats:
    shifted: Floats = image - image.min()
    return shifted / shifted.max() if shifted.max() > 0 else shifted


@pytest.mark.parametrize(
    ("name", "options", "layer", "size"),
    [
        ("resnet18", {}, "layer4", 96),
        pytest.param(
            "timm:vit_tiny_patch16_224",
            {"img_size": 64, "depth": 2},
            "blocks.1.norm1",
            64,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "timm:swin_tiny_patch4_window7_224",
            {"img_size": 64, "depths": (1, 1, 1, 1)},
            "norm",
            64,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_map_is_the_positive_part_of_the_channels_weighted_by_their_mean_gradients(
    name: str, options: dict[str, Any], layer: str, size: int
) -> None:
    network = build(name, options)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((2, 3, size, size), generator=generator)
    maps = compute_class_maps(network, find_target_layer(network, size), inputs, [3, 0])

    values: list[torch.Tensor] = []
    module = network.get_submodule(layer)
    handle = module.register_forward_hook(lambda *call: values.append(call[2]))
    for index, (image, code) in enumerate(zip(inputs, [3, 0], strict=True)):
        values.clear()
        logits = network(image[None].requires_grad_())
        slopes = torch.autograd.grad(logits[0, code], values[0])[0][0].double().numpy()
        features = values[0][0].detach().double().numpy()
        if features.ndim == 2:  # the first token is that of the class
            side = int(len(features) ** 0.5)
            features, slopes = (each[1:].reshape(side, side, -1) for each in (features, slopes))
        if features.shape[0] != features.shape[1]:
            features, slopes = (np.moveaxis(each, 0, 2) for each in (features, slopes))
        weights = slopes.mean((0, 1))
        expected = scaled(bilinear(scaled(np.maximum(features @ weights, 0)), size))
        assert np.abs(maps[index] - expected).max() < 1e-3
    handle.remove()
    assert maps.dtype == np.float32
    assert maps.shape == (2, size, size)


def test_an_explainer_may_be_made_in_inference_mode(color_bundle: Path) -> None:
    image = draw("red")
    expected = Classifier.load(str(color_bundle), device="cpu").explain(image)[0].class_map
    with torch.inference_mode():
        found = Classifier.load(str(color_bundle), device="cpu").explain(image)[0].class_map
    assert np.array_equal(found, expected)


def test_without_a_class_the_one_with_the_highest_logit_is_explained(color_bundle: Path) -> None:
    explainer = Explainer(load_bundle(str(color_bundle)))
    batch = np.stack([np.asarray(draw("red", (32, 32)), np.uint8).transpose(2, 0, 1)] * 2)
    best = Classifier.load(str(color_bundle), device="cpu").classify(batch).scores.argmax(1)
    assert np.array_equal(
        explainer.compute_class_maps(batch), explainer.compute_class_maps(batch, best.tolist())
    )


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "weights", "side"),
    [
        ("squeezenet1_0", "squeezenet1_0-imagenet.pth", "left"),
        pytest.param(
            "timm:tf_efficientnet_lite0",
            "tf_efficientnet_lite0-imagenet.pth",
            "right",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_map_is_on_the_half_of_the_canvas_with_the_photograph(
    name: str, weights: str, side: str, shared: Path, tmp_path: Path
) -> None:
    architecture = zoo.resolve_architecture(name)
    state = zoo.load_weights(str(shared / "weights" / weights), architecture)
    network = zoo.build_network(architecture, 1000)
    zoo.apply_weights(network, state, replace_head=False)
    classes = (shared / "weights" / "imagenet-classes.txt").read_text().splitlines()
    spec = BundleSpec(
        architecture=architecture,
        classes=classes,
        preprocess=zoo.get_default_preprocess(architecture),
    )
    save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())
    sample = shared / "data" / "imagenet-sample"
    path, label = PHOTOGRAPH
    photograph = Image.open(sample / path).convert("RGB")
    width, height = photograph.size
    canvas = Image.new("RGB", (2 * width, 2 * width), (124, 116, 104))
    canvas.paste(photograph, (0 if side == "left" else width, (2 * width - height) // 2))

    classifier = Classifier.load(str(tmp_path / "bundle"), device="cpu")
    explanation = classifier.explain(canvas, label)[0]
    half = explanation.class_map.shape[1] // 2
    left, right = (part.sum() for part in np.split(explanation.class_map, [half], axis=1))
    assert (left if side == "left" else right) > 0.7 * (left + right)


PHOTOGRAPH = ("images/n01518878_ostrich.JPEG", "ostrich")
"""An image of the sample, with its label."""


def test_explaining_changes_no_prediction_and_loads_nothing_before(color_bundle: Path) -> None:
    classifier = Classifier.load(str(color_bundle), device="cpu")
    image = draw("blue")
    before = classifier.predict(image)[0]
    assert "_explainer" not in vars(classifier)
    found = classifier.explain(image)[0]
    assert found.label == before.label
    assert classifier.predict(image)[0] == before


def test_threads_may_share_an_explainer(color_bundle: Path) -> None:
    explainer = Explainer(load_bundle(str(color_bundle)))
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 256, (8, 1, 3, 32, 32), dtype=np.uint8)
    alone = [explainer.compute_class_maps(batch, [1]) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: explainer.compute_class_maps(batch, [1]), batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_class_of_a_multilabel_bundle_has_a_map(multilabel_bundle: Path) -> None:
    classifier = Classifier.load(str(multilabel_bundle), device="cpu")
    maps = [classifier.explain(draw("red"), name)[0].class_map for name in ("red", "green", "blue")]
    assert any(each.any() for each in maps)
    assert not np.array_equal(maps[0], maps[1])


def test_what_cannot_be_explained_is_refused(color_bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(str(color_bundle), device="cpu")
    with pytest.raises(RequestError, match=r"class_name: 'rod' is not one of the 3.*'red'"):
        classifier.explain(draw("red"), "rod")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(NotAnImage, match=r"text\.jpg"):
        classifier.explain([tmp_path / "text.jpg"])
    architecture = zoo.resolve_architecture("small_cnn", {"width": 4})
    spec = BundleSpec(
        architecture=architecture,
        classes=[],
        preprocess=zoo.get_default_preprocess(architecture),
    )
    network = zoo.build_network(architecture, 1)
    save_bundle(str(tmp_path / "backbone"), spec, network.state_dict())
    with pytest.raises(BundleError, match="has no classes"):
        Classifier.load(str(tmp_path / "backbone"), device="cpu").explain(draw("red"))


def test_a_layer_that_works_in_place_does_not_change_the_map() -> None:
    def build_network(*, inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        ).eval()

    inputs = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    maps = [
        compute_class_maps(network, find_target_layer(network, 16), inputs, [0, 1])
        for network in (build_network(inplace=False), build_network(inplace=True))
    ]
    assert np.array_equal(maps[0], maps[1])
