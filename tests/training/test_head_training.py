"""A head fitted to the embeddings of a run is that of the probe, in a bundle like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgcls import train
from imgcls.errors import (
    BundleError,
    ConfigError,
    OutputError,
    RequestError,
    RunFailed,
    TooManyErrors,
)
from imgcls.inference.relabel import relabel
from imgcls.models.bundle import load_bundle, load_bundle_weights
from imgcls.runs import layout
from imgcls.training.checkpoints import Checkpoints, TrainProgress
from imgcls.training.data.examples import read_examples
from imgcls.training.optim import linear_probe
from imgcls.training.optim.linear_probe import ProbeFeatures
from imgcls.training.search_space import TuneConfig, check_space
from imgcls.training.train import TrainConfig
from tests.conftest import write_manifest
from tests.runs.embedded import CLASSES, commit_run, save_with_head

ROWS = 120


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_head(tmp_path_factory.mktemp("bundle") / "b", CLASSES, 1)


@pytest.fixture
def run(tmp_path: Path, bundle: Path) -> tuple[Path, np.ndarray]:
    """A run of 120 images in /, of which row 5 failed, and its embeddings."""
    vectors = commit_run(tmp_path / "run", bundle, ROWS, kind="float16")
    return tmp_path / "run", vectors


def label_by_embedding(folder: Path, vectors: np.ndarray, rows: list[int]) -> Path:
    """A manifest of some rows, in this order, labeled by the sign of a linear function."""
    is_up = vectors @ np.linspace(-1, 1, vectors.shape[1]) > 0
    labels = [(f"/{row}.jpg", "up" if is_up[row] else "down") for row in rows]
    return write_manifest(folder / "labels.csv", labels, ("path", "label"))


OTHER_ROWS = [row for row in range(ROWS) if row != 5]


def arguments(run: Path, labels: Path, output: Path, **more: Any) -> dict[str, Any]:
    data = {
        "train": str(labels),
        "embeddings": str(run),
        "val_fraction": 0.2,
        **more.pop("data", {}),
    }
    return {"data": data, "output": str(output), **more}


def test_the_bundle_has_the_network_of_the_run_and_the_head_of_the_probe(
    tmp_path: Path, run: tuple[Path, np.ndarray], bundle: Path, alone: None
) -> None:
    folder, vectors = run
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS[::-1])
    given = arguments(folder, labels, tmp_path / "bundle")
    result = train(**given)
    made = load_bundle(result.bundle)
    assert made.spec.classes == ["down", "up"]
    old, new = load_bundle_weights(load_bundle(str(bundle))), load_bundle_weights(made)
    assert {name for name in new if not torch.equal(new[name], old[name])} == {
        "head.4.weight",
        "head.4.bias",
    }
    examples = read_examples(TrainConfig.model_validate(given).data)
    order = [int(Path(url).stem) for url in examples.rows["url"].to_pylist()]
    held = examples.rows["held"].to_numpy()
    codes = torch.from_numpy(examples.rows["label"].to_numpy().copy())
    inputs = torch.from_numpy(vectors[order])
    splits = [ProbeFeatures(inputs[rows], codes[rows]) for rows in (~held, held)]
    expected = linear_probe.fit_head(*splits, 2, l2=None, weights=None)
    torch.testing.assert_close(new["head.4.weight"], expected.weight)
    torch.testing.assert_close(new["head.4.bias"], expected.bias)
    (epoch,) = result.history
    assert (epoch.name, epoch.train_rows, epoch.val_rows) == ("the probe", 95, 24)
    assert epoch.val_loss == pytest.approx(expected.val_loss, abs=1e-6)
    assert epoch.val_accuracy > 0.8
    assert pd.read_parquet(tmp_path / "bundle" / "history.parquet").phase.tolist() == ["probe"]
    assert "from embeddings" in (tmp_path / "bundle" / "README.md").read_text()
    assert made.spec.provenance["strategy"] == "probe"
    assert not (tmp_path / "bundle" / "_lease").exists()


def test_labeling_the_run_again_with_the_new_head_gives_its_labels(
    tmp_path: Path, run: tuple[Path, np.ndarray]
) -> None:
    folder, vectors = run
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS)
    result = train(**arguments(folder, labels, tmp_path / "bundle"))
    again = relabel(source=str(folder), model=result.bundle, output=str(tmp_path / "again"))
    assert again.status == {"missing": 1, "ok": ROWS - 1}
    table = pq.read_table(tmp_path / "again" / layout.PREDICTIONS_FOLDER)
    wanted = dict(pd.read_csv(labels).itertuples(index=False))
    found = zip(table["path"].to_pylist(), table["predicted_label"].to_pylist(), strict=True)
    right = sum(wanted[f"/{path}"] == label for path, label in found if label is not None)
    assert right / (ROWS - 1) > 0.9


def test_the_same_request_returns_the_finished_bundle_and_another_one_is_refused(
    tmp_path: Path, run: tuple[Path, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, vectors = run
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS)
    given = arguments(folder, labels, tmp_path / "bundle")
    first = train(**given)
    assert train(**given).history[0].val_loss == first.history[0].val_loss
    assert "already holds the bundle of this training" in capsys.readouterr().out
    success = folder / layout.SUCCESS_FILE
    record = json.loads(success.read_text())
    success.write_text(json.dumps(record | {"committed": "2026-02-02T00:00:00+00:00"}))
    with pytest.raises(OutputError, match="already holds a bundle"):
        train(**given)
    train(**given, overwrite=True)


def test_an_unfinished_training_is_only_replaced_on_request(
    tmp_path: Path, run: tuple[Path, np.ndarray]
) -> None:
    folder, vectors = run
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS)
    given = arguments(folder, labels, tmp_path / "bundle")
    unfinished = Checkpoints(str(tmp_path / "bundle"))
    unfinished.start_run({"settings": {}})
    unfinished.save(TrainProgress(), {"network": {}}, {"weight": torch.zeros(1)})
    unfinished.wait_until_saved()
    with pytest.raises(OutputError, match="holds another, unfinished training"):
        train(**given)
    assert unfinished.list_states()
    train(**given, overwrite=True)
    assert not Path(unfinished.folder).exists()


def test_rows_without_an_embedding_are_left_out_up_to_the_allowed_share(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = commit_run(tmp_path / "run", bundle, ROWS, kind="float16", lost=[7])
    labels = label_by_embedding(tmp_path, vectors, list(range(ROWS)))
    with labels.open("a") as stream:
        stream.write("/elsewhere.jpg,up\n/0.jpg,up\n")
    given = arguments(tmp_path / "run", labels, tmp_path / "bundle")
    with pytest.raises(TooManyErrors) as refused:
        train(**given)
    message = str(refused.value)
    assert "3 of 122 images have no embedding" in message
    assert (
        "\n  /5.jpg: missing\n  /7.jpg: has no embedding, beyond the range of float16\n" in message
    )
    assert "\n  /elsewhere.jpg: is not in the run\n" in message
    assert not list((tmp_path / "bundle").iterdir())
    given["data"]["max_error_rate"] = 0.05
    result = train(**given)
    assert result.failed == 3
    assert result.history[0].train_rows + result.history[0].val_rows == 119
    assert "left out:" in capsys.readouterr().out


def test_the_predictions_of_the_validation_rows_are_in_the_bundle(
    tmp_path: Path, bundle: Path
) -> None:
    vectors = commit_run(tmp_path / "run", bundle, ROWS, kind="float16", lost=[7])
    labels = label_by_embedding(tmp_path, vectors, list(range(ROWS)))
    with labels.open("a") as stream:
        stream.write("/elsewhere.jpg,up\n")
    data = {"val": str(labels), "max_error_rate": 0.05}
    (epoch,) = train(**arguments(tmp_path / "run", labels, tmp_path / "bundle", data=data)).history
    held = pd.read_parquet(tmp_path / "bundle" / "validation.parquet")
    found = pd.read_parquet(tmp_path / "bundle" / "validation_predictions.parquet")
    assert found.path.tolist() == held.path.tolist()
    ok = found[found.status == "ok"]
    assert len(ok) == epoch.val_rows == ROWS - 2
    assert (ok.predicted_label == ok.label).mean() == epoch.val_accuracy
    lost = found[found.status != "ok"]
    assert dict(zip(lost.path, lost.status, strict=True)) == {
        "/5.jpg": "missing", "/7.jpg": "not_finite", "/elsewhere.jpg": "missing",
    }  # fmt: skip
    assert lost.predicted_label.isna().all()


def test_embeddings_that_overflow_give_no_bundle(tmp_path: Path, bundle: Path) -> None:
    vectors = commit_run(tmp_path / "run", bundle, ROWS)
    for file in (tmp_path / "run" / "predictions").iterdir():
        table = pq.read_table(file)
        column = table["embedding"].combine_chunks()
        huge = pa.FixedSizeListArray.from_arrays(
            pa.array(np.full(len(column) * column.type.list_size, 1e30, np.float32)),
            column.type.list_size,
        )
        place = table.schema.get_field_index("embedding")
        pq.write_table(table.set_column(place, table.schema.field(place), huge), file)
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS)
    with pytest.raises(RunFailed, match="the embeddings of 119 images are NaN or too large"):
        train(**arguments(tmp_path / "run", labels, tmp_path / "bundle"))
    assert not list((tmp_path / "bundle").iterdir())


def test_rows_without_a_path_are_left_out(tmp_path: Path, bundle: Path) -> None:
    commit_run(tmp_path / "run", bundle, 20)
    table = pa.table({"path": pa.nulls(4, pa.string()), "label": ["a", "b", "a", "b"]})
    pq.write_table(table, tmp_path / "labels.parquet")
    given = arguments(tmp_path / "run", tmp_path / "labels.parquet", tmp_path / "bundle")
    given["data"]["val"] = str(tmp_path / "labels.parquet")
    with pytest.raises(TooManyErrors, match=r"8 of 8 images have no embedding(.|\n)*has no path"):
        train(**given)


def test_a_history_is_refused(tmp_path: Path, run: tuple[Path, np.ndarray]) -> None:
    folder, vectors = run
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS)
    stored = layout.load_run(str(folder))
    assert stored is not None
    stored["identity"]["merged"] = ["one", "other"]
    layout.write_run(str(folder), stored)
    with pytest.raises(RequestError, match="is a history of several runs; pass one of them"):
        train(**arguments(folder, labels, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"strategy": "finetune"}, RequestError, "needs images"),
        ({"find_lr": True}, RequestError, "find_lr: needs images"),
        ({"model": {"name": "resnet50"}}, RequestError, "is that of data.embeddings"),
        ({"data": {"embeddings_model": "absent"}}, RequestError, "data.embeddings-model"),
    ],
)
def test_a_request_that_needs_images_is_refused(
    tmp_path: Path,
    run: tuple[Path, np.ndarray],
    more: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    labels = label_by_embedding(tmp_path, run[1], OTHER_ROWS)
    with pytest.raises(error, match=message):
        train(**arguments(run[0], labels, tmp_path / "bundle", **more))
    assert not (tmp_path / "bundle").exists()


def test_a_run_without_embeddings_or_of_another_kind_of_head_is_refused(
    tmp_path: Path, run: tuple[Path, np.ndarray]
) -> None:
    folder, vectors = run
    labels = label_by_embedding(tmp_path, vectors, OTHER_ROWS)
    other = save_with_head(tmp_path / "squeeze", CLASSES, 1, name="squeezenet1_0")
    commit_run(tmp_path / "other", other, 20)
    with pytest.raises(BundleError, match="by one linear layer"):
        train(**arguments(tmp_path / "other", labels, tmp_path / "bundle"))
    for file in (folder / "predictions").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["embedding"]), file)
    with pytest.raises(RequestError, match="has no embeddings"):
        train(**arguments(folder, labels, tmp_path / "bundle"))


def test_a_search_has_no_use_for_embeddings() -> None:
    space = {"space": {"probe.l2": {"uniform": [0.1, 1.0]}}}
    config = TuneConfig.model_validate(
        {"data": {"train": "a.csv", "embeddings": "run"}, "output": "o", "tune": space}
    )
    with pytest.raises(ConfigError, match="a search trains on images"):
        check_space(config)
