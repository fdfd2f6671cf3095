"""A registered bundle, loaded by MLflow itself."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

import imgcls
from imgcls.models.bundle import load_bundle
from imgcls.models.mlflow_registry import resolve_registered
from tests.conftest import draw, save
from tests.mlflow_store import ModelStore


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    files = [tmp_path / f"{name}.png" for name in ("red", "green", "blue")]
    for file in files:
        save(draw(file.stem), file)
    return [str(file) for file in files]


def test_pyfunc_gives_the_labels_of_the_classifier_for_paths_and_for_bytes(
    model_store: ModelStore, color_bundle: Path, images: list[str]
) -> None:
    from mlflow import pyfunc

    model_store.register("pyfunc", color_bundle)
    model = pyfunc.load_model("models:/pyfunc/1")
    expected = imgcls.Classifier.load(color_bundle).predict(images, top_k=2)
    data = [Path(image).read_bytes() for image in images]
    for table in (pd.DataFrame({"path": images}), pd.DataFrame({"image": data})):
        found = model.predict(table, params={"top_k": 2})
        assert found["predicted_label"].tolist() == [each.label for each in expected]
        assert found["confidence"].tolist() == [each.confidence for each in expected]
        assert found["topk_labels"].tolist() == [each.topk_labels for each in expected]
        assert list(found.columns) == model.metadata.signature.outputs.input_names()


def test_an_image_that_cannot_be_used_is_a_row_with_its_status(
    model_store: ModelStore, multilabel_bundle: Path, images: list[str]
) -> None:
    from mlflow import pyfunc

    model_store.register("multilabel", multilabel_bundle)
    model = pyfunc.load_model("models:/multilabel/1")
    found = model.predict(pd.DataFrame({"path": [images[0], "/none.png", None]}))
    assert found["predicted_labels"].tolist() == [["red", "blue"], None, None]
    assert found["status"].tolist() == ["ok", "missing", "missing"]
    found = model.predict(pd.DataFrame({"image": [Path(images[0]).read_bytes(), None]}))
    assert found["status"].tolist() == ["ok", "empty"]
    with pytest.raises(Exception, match=r"one of the columns image \(bytes\) and path"):
        model.predict(pd.DataFrame({"path": [images[0]], "image": [b""]}))


def test_the_stored_model_has_no_pickled_code_and_all_files_of_the_bundle(
    model_store: ModelStore, color_bundle: Path
) -> None:
    model_store.register("stored", color_bundle)
    url = Path(resolve_registered("models:/stored/1").url)
    folder = url.parents[1]
    assert not list(folder.rglob("*.pkl"))
    flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]
    assert flavor["loader_module"] == "imgcls.models.mlflow_flavor"
    assert f"imgcls=={imgcls.__version__}" in (folder / "requirements.txt").read_text().split()
    assert {each.name for each in url.iterdir()} == {each.name for each in color_bundle.iterdir()}
    version = model_store.client.get_model_version("stored", "1")
    assert version.tags["imgcls.bundle_sha256"] == load_bundle(str(color_bundle)).sha256
    assert version.tags["imgcls.task"] == "single_label"
