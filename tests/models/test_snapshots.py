"""Networks in folders as timm writes them, on a disk, and in the form of the Hub's cache."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls.errors import BundleError, StorageForbidden
from imgcls.models import snapshots, zoo
from imgcls.models.bundle import BundleSpec, load_bundle, load_bundle_weights, save_bundle
from imgcls.models.snapshots import find_folder, find_snapshot_of_weights, load_snapshot
from imgcls.training import network as networks
from imgcls.training.config import ModelConfig
from tests.processes import imgcls

timm = pytest.importorskip("timm")


def save(folder: Path, name: str = "vit_tiny_patch16_224", **options: Any) -> dict[str, Any]:
    """A network as timm's own function saves it; returns its weights."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model(name, **options)
    save_for_hf(network, str(folder), model_args=options, safe_serialization="both")
    state: dict[str, Any] = network.state_dict()
    return state


def test_a_folder_of_timm_is_trained_from_its_weights_with_its_preprocessing(
    tmp_path: Path,
) -> None:
    state = save(tmp_path / "snapshot", img_size=96, num_classes=7)
    config = json.loads((tmp_path / "snapshot" / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.8}
    (tmp_path / "snapshot" / "config.json").write_text(json.dumps(config))
    asked = ModelConfig(name=f"{tmp_path}/snapshot", weights="pretrained")
    resolved = networks.resolve_model_snapshot(asked)
    assert resolved.name == "timm:vit_tiny_patch16_224"
    assert resolved.weights == f"{tmp_path}/snapshot/model.safetensors"
    assert resolved.options["img_size"] == [96, 96]
    architecture, preprocess = networks.resolve_model(resolved)
    assert preprocess.mean == (0.1, 0.2, 0.3)
    network = networks.build_initial_network(architecture, resolved.weights, 3, seed=0)
    for key, value in network.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(value, state[key]), key
    assert network.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    # another input size interpolates the position embeddings
    sized = networks.resolve_model_snapshot(asked.model_copy(update={"image_size": 64}))
    architecture, preprocess = networks.resolve_model(sized)
    assert (architecture.options["img_size"], preprocess.crop) == (64, 64)
    network = networks.build_initial_network(architecture, sized.weights, 3, seed=0)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    # safetensors come first; a folder may have one of both
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    assert str(networks.resolve_model_snapshot(asked).weights).endswith("/pytorch_model.bin")
    (tmp_path / "snapshot" / "pytorch_model.bin").unlink()
    with pytest.raises(BundleError, match=r"has no model.safetensors or pytorch_model.bin; pass"):
        networks.resolve_model_snapshot(asked)
    assert networks.resolve_model_snapshot(ModelConfig(name=f"{tmp_path}/snapshot")).weights is None


def test_a_file_of_the_user_and_his_options_come_before_those_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "snapshot", img_size=96)
    asked = ModelConfig(
        name=f"timm:local-dir:{tmp_path}/snapshot", weights="mine.pth", options={"img_size": 64}
    )
    resolved = networks.resolve_model_snapshot(asked)
    assert (resolved.weights, resolved.options["img_size"]) == ("mine.pth", 64)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("hf://timm/resnet18.a1_in1k", "hf://timm/resnet18.a1_in1k"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "hf://timm/resnet18.a1_in1k"),
        ("timm:local-dir:/models/a", "/models/a"),
        ("/models/a", "/models/a"),
        ("s3://bucket/models/a", "s3://bucket/models/a"),
        ("resnet18", None),
        ("timm:vit_small_patch14_dinov2.lvd142m", None),
    ],
)
def test_names_of_folders_differ_from_names_of_networks(name: str, folder: str | None) -> None:
    assert find_folder(name) == folder
    if folder is None:
        assert zoo.resolve_snapshot(name, None, {"a": 1}, 64) == (name, None, {"a": 1})


def test_older_configurations_have_their_keys_at_the_top(tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "input_size": [3, 160, 160], "mean": [0, 0, 0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    snapshot = load_snapshot(str(tmp_path))
    assert (snapshot.name, snapshot.options) == ("timm:resnet18", {})
    assert snapshot.load_preprocess().crop == 160


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no such file; a folder with a network has timm's or transformers' config.json"),
        ("{", r"a folder with a network has timm's or transformers' config.json"),
        ("[]", r"is no config.json of timm or transformers; pass a network of timm"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        zoo.resolve_snapshot(str(tmp_path), "pretrained", {}, None)


def test_a_file_of_weights_has_the_preprocessing_of_its_folder_or_none(tmp_path: Path) -> None:
    file = str(tmp_path / "model.safetensors")
    assert find_snapshot_of_weights(None) is None
    assert find_snapshot_of_weights("torchvision") is None
    assert find_snapshot_of_weights(file) is None
    (tmp_path / "config.json").write_text('{"library": "another"}')
    assert find_snapshot_of_weights(file) is None
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "crop_pct": 0.9}')
    found = find_snapshot_of_weights(file)
    assert found is not None
    preprocess = found.load_preprocess()
    assert preprocess.crop / preprocess.resize == pytest.approx(0.9, abs=0.005)
    assert find_snapshot_of_weights(str(tmp_path / "other.safetensors")) is None
    with contextlib.chdir(tmp_path):  # the same file
        named = find_snapshot_of_weights("model.safetensors")
        assert named is not None
        assert (named.url, named.load_preprocess()) == (found.url, preprocess)
    # what cannot be read is no default
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"a folder with a network has timm's or "):
        find_snapshot_of_weights(file)


@pytest.mark.parametrize("config", ['{"model_type": "mine"}', '{"architecture": "resnet18_mine"}'])
def test_a_folder_of_another_library_does_not_concern_a_network(
    tmp_path: Path, config: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    architecture = zoo.resolve_architecture("resnet18")
    found = zoo.get_default_preprocess(architecture, f"{tmp_path}/model.safetensors")
    assert found == zoo.get_default_preprocess(architecture, "other.pth")


def test_a_folder_that_may_not_be_listed_is_taken_for_one_without_a_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str) -> bool:
        raise StorageForbidden(f"{url}: access is refused")

    monkeypatch.setattr(snapshots.filesystem, "exists", refuse)
    assert find_snapshot_of_weights(f"{tmp_path}/model.safetensors") is None
    with pytest.raises(BundleError, match="no such file; a folder with a network has"):
        load_snapshot(str(tmp_path))


def test_the_input_size_of_a_bundle_can_be_changed(tmp_path: Path) -> None:
    options = {"image_size": 64, "dropout": 0.0}
    architecture = zoo.resolve_architecture("vit_b_32", options)
    with torch.device("meta"):
        state = zoo.build_network(architecture, 2).state_dict()
    weights = {key: torch.zeros(value.shape) for key, value in state.items()}
    preprocess = zoo.get_default_preprocess(architecture).model_copy(update={"crop": 64})
    spec = BundleSpec(architecture=architecture, classes=["a", "b"], preprocess=preprocess)
    save_bundle(str(tmp_path / "bundle"), spec, weights)
    asked = ModelConfig(name=f"{tmp_path}/bundle", weights="pretrained", image_size=96)
    resolved = networks.resolve_model_snapshot(asked)
    architecture, preprocess = networks.resolve_model(resolved)
    assert (architecture.options, preprocess.crop) == ({"image_size": 96, "dropout": 0.0}, 96)
    # and kept where it is not
    resolved = networks.resolve_model_snapshot(asked.model_copy(update={"image_size": None}))
    assert networks.resolve_model(resolved)[0].options["image_size"] == 64


def test_weights_of_a_bundle_have_the_options_of_its_network(tmp_path: Path) -> None:
    def save_options(name: str, options: dict[str, Any], crop: int) -> str:
        architecture = zoo.resolve_architecture(name, options)
        preprocess = zoo.get_default_preprocess(architecture)
        sized = preprocess.model_copy(update={"crop": crop, "resize": crop})
        spec = BundleSpec(architecture=architecture, classes=["a", "b"], preprocess=sized)
        save_bundle(str(tmp_path / name), spec, {"weight": torch.zeros(1)})
        return f"{tmp_path}/{name}/model.safetensors"

    def find_options(name: str, weights: str, size: int | None = None, **own: Any) -> Any:
        architecture = zoo.resolve_architecture(name, own)
        if size is not None:
            architecture = zoo.set_image_size(architecture, size)
        return zoo.add_pretrained_options(architecture, weights, size).options

    trained = save_options("squeezenet1_1", {"head_relu": False}, 224)
    assert find_options("squeezenet1_1", trained) == {"head_relu": False}
    assert find_options("squeezenet1_1", trained, head_relu=True) == {"head_relu": True}
    # of ImageNet's weights, another one is set
    assert find_options("inception_v3", save_options("inception_v3", {}, 299)) == {}
    small = save_options("timm:vit_tiny_patch16_224", {"img_size": 64}, 64)
    assert find_options("timm:vit_tiny_patch16_224", small) == {"img_size": 64}
    assert find_options("timm:vit_tiny_patch16_224.augreg_in21k", small) == {"img_size": 64}
    assert find_options("timm:vit_tiny_patch16_384", small) == {"img_size": 64}
    assert find_options("timm:vit_tiny_patch16_224", small, 96) == {"img_size": 96}
    assert find_options("timm:vit_tiny_patch16_224", small, 224) == {}
    assert find_options("resnet18", small) == {}


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the Hub does for the repository owner/name of models."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/owner/name":
            return self._answer(json.dumps({"id": "owner/name", "sha": "a" * 40}).encode())
        if path == "/api/models/owner/name/tree/main":
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": "b" * 40}
                for name, data in self.files.items()
            ]
            return self._answer(json.dumps(found).encode())
        data = self.files.get(path.removeprefix("/owner/name/resolve/main/"))
        return self._answer(data or b"{}", 404 if data is None else 200)

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *values: object) -> None: ...


def test_a_network_on_the_hub_is_imported_with_its_weights(tmp_path: Path) -> None:
    state = save(tmp_path / "snapshot", "test_vit", num_classes=3)
    HubHandler.files = {path.name: path.read_bytes() for path in (tmp_path / "snapshot").iterdir()}
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = imgcls(
            *("model", "import", "--arch", "hf://owner/name", "--weights", "pretrained"),
            *("--classes", tmp_path / "classes.txt", "--output", tmp_path / "bundle"),
            env={"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"},
        )
        server.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert (bundle.spec.architecture.source, bundle.spec.architecture.name) == ("timm", "test_vit")
    stored = load_bundle_weights(bundle)
    assert stored.keys() == state.keys()
    for key, value in stored.items():
        assert torch.equal(value, state[key]), key
