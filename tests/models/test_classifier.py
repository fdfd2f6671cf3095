"""uint8 pixels in, scores out: as the bare network would, at either precision."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import normalize

from imgcls.data.decoding import decode
from imgcls.errors import BundleError, NotAnImage, RequestError, StorageMissing
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, load_bundle_weights, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.precision import choose_precision
from imgcls.models.task import select_top_k
from tests.conftest import COLORS, draw

Scores = npt.NDArray[np.float32]

# What plain PyTorch finds on the ImageNet sample (Pillow, fp32): 215 and 274 of 334
TOP_1, TOP_5, SAMPLE, GIVE = 215, 274, 334, 4
# Measured: bf16 flips 6 of 334 labels
BF16_AGREEMENT = 0.98


def bundle_of(folder: Path, name: str, num_classes: int = 5, **changes: Any) -> Path:
    """A bundle with random weights, the same every time."""
    architecture = zoo.resolve_architecture(name, changes.pop("options", {}))
    torch.manual_seed(0)
    network = zoo.build_network(architecture, num_classes)
    spec = BundleSpec(
        architecture=architecture,
        classes=[f"class {i}" for i in range(num_classes)],
        preprocess=zoo.get_default_preprocess(architecture),
        **changes,
    )
    save_bundle(str(folder), spec, network.state_dict())
    return folder


def random_batch(classifier: Classifier, count: int, seed: int = 0) -> decode.Pixels:
    side = classifier.preprocess.crop
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    smooth = nn.functional.interpolate(torch.from_numpy(coarse), (side, side), mode="bilinear")
    return smooth.numpy()


def plain(
    classifier: Classifier, batch: decode.Pixels, layers: Callable[[nn.Module], nn.Module]
) -> torch.Tensor:
    """The same weights in a network of torchvision's own, run as its tutorials do."""
    spec = classifier.bundle.spec
    network = zoo.build_network(spec.architecture, len(spec.classes)).eval()
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v
         for k, v in load_bundle_weights(classifier.bundle).items()}
    )  # fmt: skip
    inputs = normalize(
        torch.from_numpy(batch).float() / 255, spec.preprocess.mean, spec.preprocess.std
    )
    with torch.inference_mode():
        return layers(network)(inputs)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = bundle_of(tmp_path_factory.mktemp("small") / "bundle", "small_cnn")
    return Classifier.load(str(folder), precision="fp32", device="cpu")


# ------------------------------------------------------------------ embeddings


def test_embeddings_of_images_are_those_of_their_pixels(small: Classifier, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        draw("red", seed=i).save(file)
    found = small.embed(files, batch_size=2)
    pixels = [decode.decode_image(file.read_bytes(), small.preprocess)[0] for file in files]
    expected = small.classify(np.stack(pixels), embeddings=True).embedding
    assert found.dtype == np.float32
    assert found.shape == (5, small.embedding_width)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert small.embed([]).shape == (0, small.embedding_width)
    assert small.embed(files[0]).shape == (1, small.embedding_width)
    with pytest.raises(StorageMissing, match=r"gone\.png"):
        small.embed([files[0], tmp_path / "gone.png"])
    with pytest.raises(RequestError, match="batch_size: 0 is not"):
        small.embed(files, batch_size=0)


# ------------------------------------------------------------------ the bare network's scores


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_fp32_scores_and_embeddings_are_those_of_the_bare_network(
    tmp_path: Path, name: str
) -> None:
    classifier = Classifier.load(
        str(bundle_of(tmp_path / "b", name)), precision="fp32", device="cpu"
    )
    batch = random_batch(classifier, 3)
    found = classifier.classify(batch, embeddings=True)
    expected = plain(classifier, batch, lambda network: network).softmax(1)
    assert found.scores.dtype == np.float32
    assert found.scores.shape == (3, 5)
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    np.testing.assert_allclose(found.scores.sum(1), 1, atol=1e-6)

    def penultimate(network: Any) -> nn.Module:
        if name == "squeezenet1_1":
            return nn.Sequential(network.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if name == "small_cnn":
            return nn.Sequential(network.features, network.pool, *list(network.head)[:-1])
        if name == "resnet18":
            return nn.Sequential(*list(network.children())[:-1], nn.Flatten())
        body = (network.features, network.avgpool, nn.Flatten())
        return nn.Sequential(*body, *list(network.classifier)[:-1])

    assert found.embedding is not None
    assert found.embedding.dtype == np.float32
    assert found.embedding.shape == (3, classifier.embedding_width)
    np.testing.assert_allclose(found.embedding, plain(classifier, batch, penultimate), atol=1e-5)
    bare = classifier.classify(batch)
    assert bare.embedding is None
    assert bare.scores.tobytes() == found.scores.tobytes()


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_networks_with_auxiliary_heads_answer_with_their_main_one(
    tmp_path: Path, name: str
) -> None:
    options = {"transform_input": True, "aux_logits": True, "init_weights": False}
    folder = bundle_of(tmp_path / "b", name, options=options)
    classifier = Classifier.load(str(folder), precision="fp32", device="cpu")
    assert classifier.preprocess.crop == (299 if name == "inception_v3" else 224)
    batch = random_batch(classifier, 2)
    expected = plain(classifier, batch, lambda network: network).softmax(1)
    np.testing.assert_allclose(classifier.classify(batch).scores, expected, atol=1e-6)


@pytest.mark.slow
def test_a_vision_transformer_answers_as_its_bare_network(tmp_path: Path) -> None:
    classifier = Classifier.load(
        str(bundle_of(tmp_path / "b", "vit_b_16")), precision="fp32", device="cpu"
    )
    batch = random_batch(classifier, 2)
    found = classifier.classify(batch, embeddings=True)
    expected = plain(classifier, batch, lambda network: network).softmax(1)
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert found.embedding is not None
    assert found.embedding.shape == (2, 768)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_a_compiled_network_answers_as_it_does_otherwise(color_bundle: Path) -> None:
    options: dict[str, Any] = {"precision": "fp32", "device": "cpu"}
    compiled = Classifier.load(str(color_bundle), compile=True, **options)
    batch = random_batch(compiled, 4)
    expected = Classifier.load(str(color_bundle), **options).classify(batch, embeddings=True)
    for embeddings in (False, True):
        found = compiled.classify(batch, embeddings=embeddings)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_an_image_scores_alone_as_it_does_among_others(small: Classifier) -> None:
    batch = random_batch(small, 9)
    together = small.classify(batch, embeddings=True)
    assert together.embedding is not None
    for i in range(9):
        alone = small.classify(batch[i : i + 1], embeddings=True)
        assert alone.embedding is not None
        np.testing.assert_allclose(alone.scores[0], together.scores[i], atol=1e-6)
        np.testing.assert_allclose(alone.embedding[0], together.embedding[i], atol=1e-5)


def test_in_bf16_the_size_of_a_batch_changes_no_bit(tmp_path: Path) -> None:
    """What is served one by one is what the nightly run writes."""
    if choose_precision("auto", torch.device("cpu"))[0] != "bf16":
        pytest.skip("this CPU has no bfloat16 instructions")
    for name in ("small_cnn", "resnet18"):
        folder = bundle_of(tmp_path / name, name)
        classifier = Classifier.load(str(folder), precision="bf16", device="cpu")
        batch = random_batch(classifier, 8)
        together = classifier.classify(batch).scores
        for size in (1, 2, 3, 5):
            apart = [classifier.classify(batch[i : i + size]).scores for i in range(0, 8, size)]
            np.testing.assert_array_equal(np.concatenate(apart), together)


def test_the_same_batch_scores_the_same_bytes_every_time(small: Classifier) -> None:
    batch = random_batch(small, 4)
    scores = {small.classify(batch).scores.tobytes() for _ in range(3)}
    scores.add(small.classify(torch.from_numpy(batch)).scores.tobytes())
    scores.add(
        Classifier(small.bundle, precision="fp32", device="cpu").classify(batch).scores.tobytes()
    )
    assert len(scores) == 1


def test_threads_that_share_a_classifier_get_their_own_answers(small: Classifier) -> None:
    batches = [random_batch(small, 1 + i % 3, seed=i) for i in range(80)]

    def answer(batch: decode.Pixels) -> tuple[bytes, bytes]:
        found = small.classify(batch, embeddings=True)
        assert found.embedding is not None
        return found.scores.tobytes(), found.embedding.tobytes()

    expected = [answer(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, batches)) == expected


# ------------------------------------------------------------------ temperature, threshold, top k


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 20.0])
def test_the_temperature_divides_the_logits(small: Classifier, temperature: float) -> None:
    batch = random_batch(small, 4)
    logits = plain(small, batch, lambda network: network)
    spec = small.bundle.spec.model_copy(update={"temperature": temperature})
    bundle = type(small.bundle)(
        small.bundle.url, spec, small.bundle.weights_sha256, small.bundle.sha256
    )
    warm = Classifier(bundle, precision="fp32", device="cpu")
    np.testing.assert_allclose(
        warm.classify(batch).scores, (logits / temperature).softmax(1), atol=1e-5
    )


def test_predictions_are_labels_with_their_scores(color_bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(str(color_bundle), device="cpu")
    pictures = [draw(name, seed=i) for i, name in enumerate(COLORS)]
    paths = []
    for i, picture in enumerate(pictures):
        paths.append(tmp_path / f"{i}.png")
        picture.save(paths[-1])
    (first,) = classifier.predict([paths[0]])
    found = classifier.predict(
        [paths[0], str(paths[1]), paths[2].read_bytes(), f"file://{paths[0]}"]
    )
    assert [one.topk_labels[0] for one in found] == [one.label for one in found]
    assert found[0] == found[3]
    assert first.topk_labels == found[0].topk_labels
    for one in found:
        assert sorted(one.topk_labels) == sorted(COLORS)
        assert one.topk_scores == sorted(one.topk_scores, reverse=True)
        assert one.confidence == one.topk_scores[0]
        assert sum(one.topk_scores) == pytest.approx(1)
        assert one.accepted
    assert len(classifier.predict(paths, top_k=1)[0].topk_labels) == 1
    assert classifier.predict([]) == []


def test_a_prediction_below_the_threshold_is_not_accepted(tmp_path: Path) -> None:
    bundles = {t: bundle_of(tmp_path / str(t), "small_cnn", threshold=t) for t in (0.0, 1.0)}
    data = tmp_path / "x.png"
    draw("red").save(data)
    for threshold, folder in bundles.items():
        (one,) = Classifier.load(str(folder), device="cpu").predict([data])
        assert one.accepted is (threshold == 0.0)


def test_the_decode_setting_of_the_bundle_can_be_replaced(small: Classifier) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    scores = {}
    for route in ("exact", "fast"):
        classifier = Classifier(small.bundle, precision="fp32", device="cpu", decode=route)
        spec = small.preprocess.model_copy(update={"decode": route})
        pixels = decode.decode_image(sink.getvalue(), spec)[0]
        scores[route] = classifier.predict([sink.getvalue()], top_k=5)[0].topk_scores
        best = classifier.rank_scores(
            classifier.classify(decode.stack_images([pixels])).scores, top_k=5
        )
        assert scores[route] == best[0].topk_scores
    assert scores["exact"] != scores["fast"]
    assert Classifier(small.bundle, device="cpu").preprocess == small.preprocess


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat16"}, "precision: 'bfloat16' is not one of auto, fp32, bf16"),
        ({"engine": "onnx"}, "engine: 'onnx' is not one of auto, torch, openvino"),
        ({"decode": "quick"}, "decode: 'quick' is not one of exact, fast"),
        ({"device": "gpu"}, "device: 'gpu' is not cpu, cuda or cuda:INDEX"),
        pytest.param(
            {"device": "cuda:1"},
            "device cuda:1: torch finds no GPU; pass cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_an_option_that_does_not_exist_is_refused(
    color_bundle: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Classifier.load(str(color_bundle), **{"device": "cpu", **options})


def test_a_batch_of_another_shape_or_dtype_is_refused(small: Classifier) -> None:
    side = small.preprocess.crop
    wrong = [
        np.zeros((2, 3, side, side), np.float32),
        torch.zeros(2, 3, side, side),
        np.zeros((2, 3, 2 * side, side), np.uint8),
        np.zeros((2, side, side, 3), np.uint8),
        np.zeros((3, side, side), np.uint8),
    ]
    for batch in wrong:
        with pytest.raises(RequestError, match=rf"pass uint8 \(N, 3, {side}, {side}\)"):
            small.classify(batch)


def test_an_image_that_cannot_be_used_is_an_error_here(small: Classifier, tmp_path: Path) -> None:
    with pytest.raises(StorageMissing):
        small.predict([tmp_path / "none.jpg"])
    with pytest.raises(NotAnImage):
        small.predict([b"<html>"])


# ------------------------------------------------------------------ loading


def test_a_bundle_whose_weights_do_not_fit_is_refused(tmp_path: Path, small: Classifier) -> None:
    spec = small.bundle.spec.model_copy(update={"classes": ["a", "b"]})
    save_bundle(str(tmp_path / "b"), spec, load_bundle_weights(small.bundle))
    with pytest.raises(BundleError, match=r"the weights do not fit: .*head"):
        Classifier.load(str(tmp_path / "b"))


def test_the_public_names_are_those_of_the_package(color_bundle: Path) -> None:
    import imgcls

    assert imgcls.Classifier is Classifier
    assert imgcls.Classifier.load(str(color_bundle), device="cpu").classes == list(COLORS)
    assert imgcls.load_bundle(str(color_bundle)).spec.classes == list(COLORS)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        imgcls.nonsense  # noqa: B018


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "squeezenet1_1"])
def test_bf16_scores_are_close_and_sum_to_one(tmp_path: Path, name: str) -> None:
    folder = str(bundle_of(tmp_path / "b", name))
    exact = Classifier.load(folder, precision="fp32", device="cpu")
    quick = Classifier.load(folder, precision="bf16", device="cpu")
    assert (exact.precision, quick.precision) == ("fp32", "bf16")
    batch = random_batch(exact, 4)
    one, other = (c.classify(batch, embeddings=True) for c in (exact, quick))
    np.testing.assert_allclose(other.scores, one.scores, atol=0.02)
    np.testing.assert_allclose(other.scores.sum(1), 1, atol=1e-6)
    assert one.embedding is not None
    assert other.embedding is not None
    assert other.embedding.dtype == np.float32
    scale = np.abs(one.embedding).max()
    np.testing.assert_allclose(other.embedding / scale, one.embedding / scale, atol=0.05)


def test_fp16_scores_are_close_and_one_that_overflows_is_no_prediction(
    small: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, for which fp16 cannot be chosen: the arithmetic is the same, but slow."""
    monkeypatch.setattr(
        "imgcls.models.classifier.choose_precision", lambda *_: ("fp16", "as requested")
    )
    monkeypatch.setattr(
        "imgcls.models.fuse_cpu.fuse_convolutions", lambda network, side, keep: network
    )
    half = Classifier(small.bundle, precision="fp16", device="cpu")
    batch = random_batch(small, 4)
    found = half.classify(batch, embeddings=True)
    np.testing.assert_allclose(found.scores, small.classify(batch).scores, atol=2e-3)
    assert found.embedding is not None
    assert (found.scores.dtype, found.embedding.dtype) == (np.float32, np.float32)
    half._engine._normalize._scale *= 1e6  # beyond 65,504
    assert not half.classify(batch).is_finite.any()
    assert "in fp16; run it with --precision fp32" in str(half.build_not_finite_error())


@pytest.fixture(scope="module")
def sample(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Labels and scores of the ImageNet sample under real weights, at both precisions."""
    folder = shared / "data" / "imagenet-sample"
    names = (shared / "weights" / "imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    architecture = zoo.resolve_architecture("squeezenet1_0")
    weights = str(shared / "weights" / "squeezenet1_0-imagenet.pth")
    spec = BundleSpec(
        architecture=architecture,
        classes=names,
        preprocess=zoo.get_default_preprocess(architecture),
    )
    place = str(tmp_path_factory.mktemp("squeezenet") / "bundle")
    save_bundle(place, spec, zoo.load_weights(weights, architecture))
    with (folder / "manifest.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == SAMPLE
    pixels = [
        decode.decode_image((folder / row["path"]).read_bytes(), spec.preprocess)[0] for row in rows
    ]
    scores = {}
    for precision in ("fp32", "bf16"):
        classifier = Classifier.load(place, precision=precision, device="cpu")
        batches = [np.stack(pixels[i : i + 32]) for i in range(0, SAMPLE, 32)]
        scores[precision] = np.concatenate([classifier.classify(b).scores for b in batches])
    truth = np.array([names.index(row["label"]) for row in rows])
    return {"truth": truth, **scores}


@pytest.mark.shared
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_weights_find_what_plain_pytorch_finds(sample: dict[str, Any], precision: str) -> None:
    top, _ = select_top_k(sample[precision], 5)
    hits = top == sample["truth"][:, None]
    assert abs(int(hits[:, 0].sum()) - TOP_1) <= GIVE
    assert abs(int(hits.any(1).sum()) - TOP_5) <= GIVE


@pytest.mark.shared
def test_bf16_and_fp32_agree_on_the_label(sample: dict[str, Any]) -> None:
    same = sample["fp32"].argmax(1) == sample["bf16"].argmax(1)
    assert same.mean() >= BF16_AGREEMENT
    sure = sample["fp32"].max(1) > 0.5
    assert same[sure].all()


@pytest.mark.shared
@pytest.mark.slow
def test_photographs_of_twelve_megapixels_get_the_label_that_pillow_gives_them(
    shared: Path, tmp_path: Path
) -> None:
    """Decoded at a fraction of their size, against Pillow's full decode; see also benchmarks."""
    architecture = zoo.resolve_architecture("squeezenet1_0")
    weights = str(shared / "weights" / "squeezenet1_0-imagenet.pth")
    spec = BundleSpec(
        architecture=architecture,
        classes=[f"class {i}" for i in range(1000)],
        preprocess=zoo.get_default_preprocess(architecture).model_copy(update={"decode": "fast"}),
    )
    save_bundle(str(tmp_path / "bundle"), spec, zoo.load_weights(weights, architecture))
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    steps = transforms.Compose(
        [transforms.Resize(spec.preprocess.resize), transforms.CenterCrop(spec.preprocess.crop)]
    )
    files = sorted((shared / "data" / "imagenet-sample" / "images").rglob("*.*"))[::7]
    whole, scaled = [], []
    for file in files:
        image = Image.open(file).convert("RGB")
        by = (12e6 / (image.width * image.height)) ** 0.5
        large = image.resize((round(image.width * by), round(image.height * by)))
        sink = io.BytesIO()
        large.save(sink, "JPEG", quality=90)
        reference = steps(Image.open(io.BytesIO(sink.getvalue())).convert("RGB"))
        whole.append(np.asarray(reference).transpose(2, 0, 1))
        scaled.append(decode.decode_image(sink.getvalue(), spec.preprocess)[0])
    expected = classifier.classify(decode.stack_images(whole)).scores
    found = classifier.classify(decode.stack_images(scaled)).scores
    assert len(files) > 40
    assert (found.argmax(1) == expected.argmax(1)).sum() >= len(files) - 1
    assert np.abs(found - expected).max() < 0.15
