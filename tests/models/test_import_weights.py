"""`imgcls model import`: plain weights become a bundle that classifies as they did, or exit 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imgcls import cli
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle
from imgcls.models.classifier import Classifier
from tests.processes import imgcls

CLASSES = ["cat", "dog", "horse"]
Import = Callable[..., int]


def network(num_classes: int = 3, width: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": width}), num_classes)


@pytest.fixture
def import_(tmp_path: Path) -> Import:
    """Runs the command with weights and classes that fit; keywords change its options."""
    torch.save(network().state_dict(), tmp_path / "weights.pth")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")

    def run(*more: object, **changes: object) -> int:
        options: dict[str, object] = {
            "arch": "small_cnn",
            "weights": tmp_path / "weights.pth",
            "classes": tmp_path / "classes.txt",
            "output": tmp_path / "bundle",
            "options.width": 4,
        } | changes
        argv = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        return cli.main(["model", "import", *argv, *map(str, more)])

    return run


def test_the_decode_setting_is_kept_in_the_bundle(import_: Import, tmp_path: Path) -> None:
    assert import_("--decode", "exact") == 0
    assert load_bundle(str(tmp_path / "bundle")).spec.preprocess.decode == "exact"


def test_imported_weights_classify_as_they_did(
    import_: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_() == 0
    printed = capsys.readouterr().out
    assert printed == f"bundle  {tmp_path / 'bundle'}  (small_cnn, 3 classes)\n"
    spec = load_bundle(str(tmp_path / "bundle")).spec
    assert spec.classes == CLASSES
    assert spec.provenance == {"imported_from": str(tmp_path / "weights.pth")}
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    batch = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    inputs = (torch.from_numpy(batch) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        expected = network().eval()(inputs).softmax(1)
    np.testing.assert_allclose(classifier.classify(batch).scores, expected, atol=1e-5)


def test_imported_weights_can_have_any_number_of_labels_per_image(
    import_: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_("--task", "multilabel") == 0
    printed = capsys.readouterr().out
    assert printed == f"bundle  {tmp_path / 'bundle'}  (small_cnn, 3 classes, multilabel)\n"
    spec = load_bundle(str(tmp_path / "bundle")).spec
    assert (spec.task, spec.format_version, spec.threshold) == ("multilabel", 2, 0.5)
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    batch = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    inputs = (torch.from_numpy(batch) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        expected = network().eval()(inputs).sigmoid()
    np.testing.assert_allclose(classifier.classify(batch).scores, expected, atol=1e-5)
    assert "Any number of classes per image" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_backbone_has_no_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model", "import", "--arch", "small_cnn", "--weights", str(tmp_path / "none.pth")]
    assert cli.main([*command, "--output", str(tmp_path / "b"), "--task", "multilabel"]) == 2
    assert "task multilabel: needs the list of classes; pass --classes" in capsys.readouterr().err


def test_a_backbone_is_the_same_bundle_from_weights_with_and_without_a_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = network().state_dict()
    head, _ = zoo.find_head(network())
    body = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    hashes = []
    for name, weights in (("whole", state), ("body", body)):
        torch.save(weights, tmp_path / f"{name}.pth")
        command = ["model", "import", "--arch", "small_cnn", "--options.width", "4"]
        command += ["--weights", str(tmp_path / f"{name}.pth"), "--output", str(tmp_path / name)]
        assert cli.main(command) == 0
        assert capsys.readouterr().out == (
            f"bundle  {tmp_path / name}  (small_cnn, a backbone, for `imgcls embed`)\n"
        )
        hashes.append(load_bundle(str(tmp_path / name), needs_classes=False).weights_sha256)
    assert hashes[0] == hashes[1]
    del body[next(iter(body))]
    torch.save(body, tmp_path / "body.pth")
    assert cli.main([*command, "--overwrite"]) == 2
    assert "is missing in the file" in capsys.readouterr().err


def test_an_input_size_that_the_network_cannot_process_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = zoo.build_network(zoo.resolve_architecture("vit_b_16", {"image_size": 32}), 3)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    command = ["model", "import", "--arch", "vit_b_16", "--weights", str(tmp_path / "weights.pth")]
    command += ["--output", str(tmp_path / "bundle"), "--crop", "48"]
    assert cli.main([*command, "--options.image_size", "32"]) == 2
    assert (
        "crop 48: VisionTransformer cannot process images of this size" in capsys.readouterr().err
    )
    assert not (tmp_path / "bundle").exists()


def test_weights_of_a_bundle_classify_as_the_bundle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = zoo.resolve_architecture("squeezenet1_1", {"head_relu": False})
    preprocess = zoo.get_default_preprocess(architecture)
    spec = BundleSpec(
        architecture=architecture,
        classes=CLASSES,
        preprocess=preprocess.model_copy(update={"crop": 64, "resize": 64}),
    )
    made = zoo.build_network(architecture, 3)
    save_bundle(str(tmp_path / "trained"), spec, made.state_dict())
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    command = ["model", "import", "--arch", "squeezenet1_1", "--output", str(tmp_path / "imported")]
    command += ["--weights", str(tmp_path / "trained" / "model.safetensors")]
    assert cli.main([*command, "--classes", str(tmp_path / "classes.txt")]) == 0
    batch = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    scores = [
        Classifier.load(str(tmp_path / name), precision="fp32", device="cpu").classify(batch).scores
        for name in ("trained", "imported")
    ]
    np.testing.assert_array_equal(*scores)


@pytest.mark.shared
def test_the_installed_command_imports_real_weights(shared: Path, tmp_path: Path) -> None:
    done = imgcls(
        *("model", "import", "--arch", "squeezenet1_0", "--output", tmp_path / "bundle"),
        *("--weights", shared / "weights" / "squeezenet1_0-imagenet.pth"),
        *("--classes", shared / "weights" / "imagenet-classes.txt"),
    )
    assert done.returncode == 0, done.stderr
    assert "(squeezenet1_0, 1,000 classes)" in done.stdout
    spec = load_bundle(str(tmp_path / "bundle")).spec
    assert (spec.preprocess.resize, spec.preprocess.crop) == (256, 224)
    assert (tmp_path / "bundle" / "README.md").exists()


def test_safetensors_prefixes_and_windows_lists_are_taken(import_: Import, tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in network().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nh\xc3\xbchner\r\n")
    assert import_(weights=tmp_path / "w.safetensors", classes=tmp_path / "bom.txt") == 0
    assert load_bundle(str(tmp_path / "bundle")).spec.classes == ["cat", "dog", "hühner"]


def test_the_input_size_can_be_set(import_: Import, tmp_path: Path) -> None:
    assert import_(resize=80, crop=64) == 0
    preprocess = load_bundle(str(tmp_path / "bundle")).spec.preprocess
    assert (preprocess.resize, preprocess.crop) == (80, 64)
    assert preprocess.mean == (0.5, 0.5, 0.5)


def test_a_bundle_is_replaced_only_when_requested(
    import_: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_() == 0
    first = load_bundle(str(tmp_path / "bundle"))
    other = zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 4}), 3)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert import_(weights=tmp_path / "other.pth") == 2
    assert "already has a bundle; pass --overwrite to replace it" in capsys.readouterr().err
    assert load_bundle(str(tmp_path / "bundle")) == first
    assert import_("--overwrite", weights=tmp_path / "other.pth") == 0
    assert load_bundle(str(tmp_path / "bundle")).sha256 != first.sha256


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (b"cat\ndog\n", "has 2 classes, but the weights have 3 outputs"),
        (b"cat\ndog\nhorse\ncow\n", "has 4 classes, but the weights have 3 outputs"),
        (b"cat\ndog\ncat\n", "line 3: 'cat' is also on line 1"),
        (b"cat\n\ndog\n", "line 2: is blank"),
        (b"", "has no class names"),
        (b"\xff\xfe\x00", "pass a text file with one name per line"),
        (None, "classes.txt: no such file; pass a text file with one name per line"),
    ],
    ids=["few", "many", "doubled", "blank", "empty", "binary", "missing"],
)
def test_a_class_list_that_does_not_fit_is_refused(
    import_: Import,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    classes: bytes | None,
    expected: str,
) -> None:
    (tmp_path / "classes.txt").unlink()
    if classes is not None:
        (tmp_path / "classes.txt").write_bytes(classes)
    assert import_() == 2
    message = capsys.readouterr().err
    assert message.startswith("imgcls model import: ")
    assert expected in message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arch": "smal_cnn"}, "no such architecture; did you mean small_cnn"),
        ({"weights": "none.pth"}, "none.pth: no such file; pass a file"),
        ({"options.width": 8}, "features.0.0.weight: shape (4, 3, 3, 3) in the file, (8,"),
        ({"options.nonsense": 1}, "unexpected keyword argument 'nonsense'"),
        ({"crop": 64}, "resize (32) must be at least crop (64); pass --resize 64"),
        ({"crop": 0}, "crop: Input should be greater than 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_request_makes_no_bundle(
    import_: Import,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    expected: str,
) -> None:
    assert import_(**changes) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_architectures_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "list"]) == 0
    assert capsys.readouterr().out.split() == zoo.list_architectures()
    assert cli.main(["model", "list", "--contains", "squeeze"]) == 0
    assert capsys.readouterr().out.split() == ["squeezenet1_0", "squeezenet1_1"]
