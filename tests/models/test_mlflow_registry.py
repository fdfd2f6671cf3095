"""Bundles named by `models:/`: found by version and alias, verified, refused with the reason."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import imgcls
from imgcls.errors import BundleError, RequestError, StorageError, StorageUnavailable
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.models.cache_folder import find_cache_folder
from imgcls.models.mlflow_registry import (
    HASH_TAG,
    _describe_endpoint,
    _move_download,
    parse_registry_uri,
    resolve_registered,
)
from tests.conftest import draw
from tests.mlflow_store import ModelStore


@pytest.fixture
def changed_bundle(color_bundle: Path, tmp_path: Path) -> Path:
    """`color_bundle` with another temperature, so with another hash."""
    bundle = load_bundle(str(color_bundle))
    spec = bundle.spec.model_copy(update={"temperature": 2.0})
    save_bundle(str(tmp_path / "changed"), spec, load_bundle_weights(bundle))
    return tmp_path / "changed"


def test_a_version_and_an_alias_mean_the_registered_bundle_where_it_lies(
    model_store: ModelStore, color_bundle: Path, changed_bundle: Path
) -> None:
    model_store.register("colors", color_bundle, "champion")
    second = model_store.register("colors", changed_bundle)
    first, newer = load_bundle(str(color_bundle)), load_bundle(str(changed_bundle))
    found = load_bundle("models:/colors@champion")
    assert found == imgcls.load_bundle("models:/colors/1")
    assert found.sha256 == first.sha256
    assert found.registered is not None
    assert found.registered.pinned_uri == "models:/colors/1"
    assert "/artifacts/" in found.url
    model_store.client.set_registered_model_alias("colors", "champion", second)
    assert load_bundle("models:/colors@champion").sha256 == newer.sha256
    assert not Path(find_cache_folder("models")).exists()  # nothing was downloaded


def test_a_classifier_of_the_registry_gives_the_labels_of_the_bundle(
    model_store: ModelStore, color_bundle: Path
) -> None:
    model_store.register("classified", color_bundle, "live")
    images = [draw(name) for name in ("red", "green", "blue")]
    found = imgcls.Classifier.load("models:/classified@live").predict(images)
    assert found == imgcls.Classifier.load(color_bundle).predict(images)


def test_files_that_cannot_be_read_in_place_are_downloaded_once(
    model_store: ModelStore, color_bundle: Path
) -> None:
    version = model_store.register("remote", color_bundle)
    known = model_store.client.get_model_version("remote", version)
    source = f"runs:/{known.run_id}/model"  # of another service: only MLflow can read it
    tags = {HASH_TAG: load_bundle(str(color_bundle)).sha256}
    model_store.client.create_model_version("remote", source, run_id=known.run_id, tags=tags)
    found = load_bundle("models:/remote/2")
    assert found.url.startswith(find_cache_folder("models"))
    (folder,) = Path(find_cache_folder("models")).iterdir()
    weights = folder / "data" / "bundle" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    load_bundle("models:/remote/2")
    assert weights.stat().st_mtime_ns == before


def test_a_plain_bundle_folder_may_be_registered_too(
    model_store: ModelStore, color_bundle: Path
) -> None:
    model_store.client.create_registered_model("plain")
    model_store.client.create_model_version("plain", color_bundle.as_uri())
    assert load_bundle("models:/plain/1").sha256 == load_bundle(str(color_bundle)).sha256


def test_unknown_names_versions_and_aliases_are_refused_with_those_that_exist(
    model_store: ModelStore, color_bundle: Path
) -> None:
    model_store.register("known", color_bundle, "champion")
    for uri in ("models:/known/9", "models:/known@challenger"):
        with pytest.raises(
            BundleError, match=r"pass another \(versions: 1; aliases: champion\)"
        ) as caught:
            load_bundle(uri)
        assert uri in str(caught.value)
    with pytest.raises(BundleError, match=r"--track\.register-as NAME"):
        load_bundle("models:/unknown/1")


@pytest.mark.parametrize("uri", ["models:/a", "models:/a/b/1", "models:/a/latest", "models:/@x"])
def test_a_uri_without_a_version_is_refused(uri: str) -> None:
    with pytest.raises(BundleError, match="pass models:/NAME/VERSION or models:/NAME@ALIAS"):
        parse_registry_uri(uri)


def test_a_model_that_is_no_bundle_is_refused_with_its_loader(
    model_store: ModelStore, tmp_path: Path
) -> None:
    (tmp_path / "sklearn").mkdir()
    text = "flavors: {python_function: {loader_module: mlflow.sklearn}}\n"
    (tmp_path / "sklearn" / "MLmodel").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "escape").mkdir()
    loader = "loader_module: imgcls.models.mlflow_flavor, data: ../../etc"
    (tmp_path / "escape" / "MLmodel").write_text(f"flavors: {{python_function: {{{loader}}}}}")
    model_store.client.create_registered_model("foreign")
    for name in ("sklearn", "empty", "escape"):
        model_store.client.create_model_version("foreign", (tmp_path / name).as_uri())
    with pytest.raises(BundleError, match=r"version 1 .*not a bundle.*loader is mlflow\.sklearn"):
        load_bundle("models:/foreign/1")
    with pytest.raises(BundleError, match=r"version 2 .*has no bundle\.json and no MLmodel"):
        load_bundle("models:/foreign/2")
    with pytest.raises(BundleError, match=r"version 3 .*is not a bundle"):
        load_bundle("models:/foreign/3")


def test_artifacts_that_were_replaced_are_refused(
    model_store: ModelStore, color_bundle: Path, changed_bundle: Path
) -> None:
    model_store.register("replaced", color_bundle)
    folder = resolve_registered("models:/replaced/1").url
    shutil.rmtree(folder)
    shutil.copytree(changed_bundle, folder)
    with pytest.raises(BundleError, match="was registered; restore the artifacts"):
        load_bundle("models:/replaced/1")


def test_a_registry_that_is_not_set_or_does_not_answer_is_an_error_with_the_fix(
    model_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match="check MLFLOW_TRACKING_URI") as caught:
        load_bundle("models:/colors/1")
    assert "registry http://127.0.0.1:9 does" in str(caught.value)
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(BundleError, match="set MLFLOW_TRACKING_URI, such as"):
        load_bundle("models:/colors/1")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RequestError, match=r"pip install 'imgcls\[mlflow\]'"):
        load_bundle("models:/colors/1")


def test_a_folder_whose_name_is_quoted_in_its_uri_is_found(
    model_store: ModelStore, color_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a b"
    shutil.copytree(color_bundle, folder)
    model_store.client.create_registered_model("quoted")
    assert "%20" in folder.as_uri()
    for uri in (folder.as_uri(), (tmp_path / "no c").as_uri()):
        model_store.client.create_model_version("quoted", uri)
    assert load_bundle("models:/quoted/1").url == str(folder)
    with pytest.raises(BundleError, match=r"no c does not exist on this machine; restore"):
        load_bundle("models:/quoted/2")


def test_a_download_that_cannot_be_stored_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        _move_download(str(tmp_path / "none"), str(tmp_path / "gone" / "model"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "first" / "model").mkdir(parents=True)
    _move_download(str(tmp_path / "mine"), str(tmp_path / "first"))  # another process was first


def test_the_endpoint_of_mlflow_is_named_where_its_artifacts_are_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://me:secret@minio:9000")
    hint = _describe_endpoint("s3://bucket/model")
    assert "MLFLOW_S3_ENDPOINT_URL http://minio:9000; pass it as --storage.endpoint-url" in hint
    assert "secret" not in hint
    assert _describe_endpoint("/local/model") == ""
