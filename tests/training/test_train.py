"""Whole trainings: requests refused before Ray starts, and small runs of each strategy.

Killed runs are in tests/e2e/test_train_kills.py.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from imgcls.config import Section, load
from imgcls.errors import (
    BundleError,
    ManifestError,
    OutputError,
    RequestError,
    ResourcesError,
    RunFailed,
    TooManyErrors,
)
from imgcls.models import zoo
from imgcls.models.classifier import Classifier
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.train import TrainConfig, TrainResult, train
from tests.conftest import REPOSITORY, write_manifest

TRAIN_ROWS, VAL_ROWS = 397, 83  # primes: nothing divides by workers or batches


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits as files, train.csv with one file that is no image, and val.csv.

    clean.csv is train.csv without that file; parity.csv and parity-val.csv have odd and even.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    folder = tmp_path_factory.mktemp("digits")
    rows = []
    for i in np.random.default_rng(0).permutation(len(data.target))[: TRAIN_ROWS + VAL_ROWS]:
        pixels = (data.images[i] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"{i}.png", str(data.target[i])))
    (folder / "broken.png").write_bytes(b"\x89PNG")
    header = ("path", "label")
    write_manifest(folder / "clean.csv", rows[:TRAIN_ROWS], header)
    parity = [(path, "odd" if int(label) % 2 else "even") for path, label in rows]
    write_manifest(folder / "parity.csv", parity[:TRAIN_ROWS], header)
    write_manifest(folder / "parity-val.csv", parity[TRAIN_ROWS:], header)
    train_rows = [*rows[:100], ("broken.png", "3"), *rows[100:TRAIN_ROWS]]
    write_manifest(folder / "train.csv", train_rows, header)
    write_manifest(folder / "val.csv", rows[TRAIN_ROWS:], header)
    return folder


def config(digits: Path, output: Path, **changes: Any) -> TrainConfig:
    settings = {
        "data": {"train": str(digits / "train.csv"), "val": str(digits / "val.csv")},
        "model": {"name": "small_cnn", "options": {"width": 16}},
        "augment": "none",
        "optim": {"lr": 4e-3},
        "scale": {"num_workers": 2},
        "output": str(output),
        "epochs": 6,
        "batch_size": 30,
    }
    return TrainConfig.model_validate(settings | changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    from imgcls.config import find_section_type

    for name, field in section.model_fields.items():
        inner = find_section_type(field.annotation)
        if inner is None or field.default is None:
            yield prefix + name
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def test_the_shipped_yaml_loads_and_shows_every_key() -> None:
    file = REPOSITORY / "jobs" / "train.yaml"
    load(TrainConfig, ["--config", str(file)])

    def shown(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from shown(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    assert set(shown(yaml.safe_load(file.read_text()))) == set(leaves(TrainConfig))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"batch_size": 1},
            RequestError,
            "is smaller than scale.num_workers 2. Set it to at least 2",
        ),
        ({"scale": {"num_workers": 399}}, RequestError, "398 training images are fewer than scale"),
        ({"model": {"name": "resnet19"}}, BundleError, "did you mean resnet18"),
        ({"model": {"name": "small_cnn", "image_size": 4}}, BundleError, "Set model.image_size"),
        ({"model": {"name": "small_cnn", "options": {"depth": 9}}}, BundleError, "model.options"),
        ({"model": {"name": "small_cnn", "weights": "gone.pth"}}, BundleError, "no such file"),
        ({"strategy": "probe"}, RequestError, "strategy probe needs weights .* --model.weights"),
        ({"strategy": "finetune"}, RequestError, "strategy finetune needs weights to start from"),
    ],
)
def test_a_wrong_request_starts_nothing(
    digits: Path, tmp_path: Path, changes: Any, error: type[Exception], message: str
) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(error, match=message):
        train(config(digits, output, **changes))
    assert not output.exists()


def test_weights_that_do_not_fit_are_refused_key_by_key(
    digits: Path, color_bundle: Path, tmp_path: Path
) -> None:
    narrow = color_bundle / "model.safetensors"
    model = {"name": "small_cnn", "options": {"width": 16}, "weights": str(narrow)}
    listed = r"do not match the network in \d+ keys:\n  [\w.]+: shape \(.+ in the file, \("
    with pytest.raises(BundleError, match=listed):
        train(config(digits, tmp_path / "bundle", model=model))
    assert not (tmp_path / "bundle").exists()


def test_a_label_that_only_validation_has_is_refused_by_its_row(
    digits: Path, tmp_path: Path
) -> None:
    data = {"train": str(digits / "parity.csv"), "val": str(digits / "val.csv")}
    with pytest.raises(
        ManifestError, match=r"row 0 .* is not among the training classes \(even, o"
    ):
        train(config(digits, tmp_path / "bundle", data=data))
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_is_not_overwritten_unasked(digits: Path, color_bundle: Path) -> None:
    before = sorted(file.read_bytes() for file in color_bundle.iterdir())
    with pytest.raises(OutputError, match=r"already holds a bundle\. Pass --overwrite"):
        train(config(digits, color_bundle))
    assert sorted(file.read_bytes() for file in color_bundle.iterdir()) == before


def test_the_folder_of_a_run_is_refused_as_output(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "_run.json").write_text("{}")
    with pytest.raises(OutputError, match="is the folder of a run"):
        train(config(digits, tmp_path))


def test_an_output_that_cannot_be_written_is_refused(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot be written"):
        train(config(digits, tmp_path / "file" / "bundle"))


@pytest.fixture(scope="module")
def trained(joined: None, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(digits, tmp_path_factory.mktemp("trained") / "bundle"))


def test_two_workers_use_every_good_row_exactly_once_per_epoch(trained: TrainResult) -> None:
    assert [epoch.epoch for epoch in trained.history] == [1, 2, 3, 4, 5, 6]
    assert {epoch.train_rows for epoch in trained.history} == {TRAIN_ROWS}
    assert {epoch.val_rows for epoch in trained.history} == {VAL_ROWS}
    assert trained.failed == 1


def test_the_bundle_predicts_as_well_as_the_history_reports(
    trained: TrainResult, digits: Path
) -> None:
    classifier = Classifier.load(trained.bundle, precision="fp32", device="cpu")
    val = pd.read_csv(digits / "val.csv", dtype=str)
    predictions = classifier.predict([digits / path for path in val.path])
    correct = sum(p.label == label for p, label in zip(predictions, val.label, strict=True))
    assert trained.best is not None
    assert correct / VAL_ROWS >= 0.9
    # the workers may have validated in bf16, which can change a row or two
    assert abs(correct - trained.best.val_accuracy * VAL_ROWS) <= 2


def test_the_bundle_holds_the_best_epoch_and_how_it_was_made(
    trained: TrainResult, digits: Path
) -> None:
    body = json.loads((Path(trained.bundle) / "bundle.json").read_text())
    assert trained.best is not None
    assert trained.best == min(trained.history, key=lambda e: e.val_loss)
    assert body["metrics"]["val_accuracy"] == trained.best.val_accuracy
    assert body["metrics"]["epoch"] == trained.best.epoch
    made = body["provenance"]
    assert made["config"]["optim"]["lr"] == 4e-3
    assert made["seed"] == 0
    assert made["versions"]["ray"] == ray.__version__
    assert made["data"]["train_rows"] == TRAIN_ROWS + 1
    assert (made["data"]["train_failed"], made["data"]["val_failed"]) == (1, 0)
    assert made["strategy"] == "scratch"
    source = made["data"]["manifests"]["data.val"]
    assert (source["manifest"], source["rows"]) == (str(digits / "val.csv"), VAL_ROWS)
    assert len(source["fingerprint"]) == 32


@pytest.mark.slow  # test_trainer covers the loop, test_ray_trainer the error
def test_features_that_overflow_end_the_training_before_it_writes_a_bundle(
    joined: None, digits: Path, tmp_path: Path
) -> None:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 16})
    state = zoo.build_network(architecture, 10).state_dict()
    scale = [name for name, value in state.items() if value.dim() == 1 and "weight" in name][-1]
    state[scale].fill_(3e38)  # finite, as the file must be; the squares of the features are not
    torch.save(state, tmp_path / "weights.pth")
    model = {
        "name": "small_cnn",
        "options": {"width": 16},
        "weights": str(tmp_path / "weights.pth"),
    }
    with pytest.raises(
        RunFailed, match=r"^the features of [\d,]+ views of images are NaN or too large"
    ):
        train(config(digits, tmp_path / "bundle", model=model, precision="fp32"))
    assert not (tmp_path / "bundle" / "bundle.json").exists()


def test_the_history_is_a_table_of_every_epoch(trained: TrainResult) -> None:
    table = pd.read_parquet(Path(trained.bundle) / "history.parquet")
    assert table.epoch.tolist() == [1, 2, 3, 4, 5, 6]
    assert table.val_accuracy.tolist() == [epoch.val_accuracy for epoch in trained.history]
    assert {"train_loss", "train_accuracy", "val_loss", "lr", "images_per_second", "seconds"} < set(
        table.columns
    )
    assert {"wait_seconds", "compute_seconds", "val_balanced_accuracy"} < set(table.columns)


def test_nothing_but_the_bundle_is_left(trained: TrainResult) -> None:
    names = {path.name for path in Path(trained.bundle).iterdir()}
    assert names == {
        *("README.md", "bundle.json", "history.parquet", "model.safetensors"),
        *("plots", "tensorboard", "validation.parquet", "validation_predictions.parquet"),
    }


def test_the_bundle_brings_the_manifest_of_its_validation_images(trained: TrainResult) -> None:
    held = pd.read_parquet(Path(trained.bundle) / "validation.parquet")
    assert len(held) == VAL_ROWS
    assert all(Path(path).is_file() for path in held.path)
    rows = Classifier.load(trained.bundle, precision="fp32", device="cpu").predict(
        held.path.tolist()
    )
    right = sum(row.label == label for row, label in zip(rows, held.label, strict=True))
    best = trained.best
    assert best is not None
    assert right / VAL_ROWS == pytest.approx(best.val_accuracy, abs=0.01)


def test_the_bundle_brings_the_predictions_of_its_validation_images_once_each(
    trained: TrainResult,
) -> None:
    folder, best = Path(trained.bundle), trained.best
    assert best is not None
    held = pd.read_parquet(folder / "validation.parquet")
    found = pd.read_parquet(folder / "validation_predictions.parquet")
    pd.testing.assert_frame_equal(found[["path", "label"]], held)
    assert found.row.tolist() == list(range(VAL_ROWS))
    assert set(found.status) == {"ok"}
    assert (found.predicted_label == found.label).mean() == best.val_accuracy
    assert -np.log(found.label_score).mean() == pytest.approx(best.val_loss, rel=1e-4)
    again = Classifier.load(trained.bundle, precision="fp32", device="cpu").predict(
        held.path.tolist()
    )
    # the workers may have validated in bf16
    np.testing.assert_allclose(found.confidence, [each.confidence for each in again], atol=0.02)
    assert found.topk_labels.map(len).tolist() == [5] * VAL_ROWS


def test_the_command_of_a_finished_run_returns_at_once_with_the_same_result(
    trained: TrainResult, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(Path(trained.bundle))
    again = train(config(digits, Path(trained.bundle)))
    assert again == trained
    assert "already holds the bundle of this training" in capsys.readouterr().out
    assert files(Path(trained.bundle)) == before
    # the number of workers does not affect the result; the learning rate does
    assert train(config(digits, Path(trained.bundle), scale={"num_workers": 1})) == trained
    with pytest.raises(OutputError, match="already holds a bundle"):
        train(config(digits, Path(trained.bundle), optim={"lr": 5e-3}))


def from_weights(trained: TrainResult) -> dict[str, Any]:
    weights = str(Path(trained.bundle) / "model.safetensors")
    return {"name": "small_cnn", "options": {"width": 16}, "weights": weights}


def test_a_probe_learns_other_classes_with_the_head_alone(
    trained: TrainResult, digits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    data = {"train": str(digits / "parity.csv"), "val": str(digits / "parity-val.csv")}
    settings = {"data": data, "model": from_weights(trained), "scale": {"num_workers": 1}}
    result = train(config(digits, output, **settings, strategy="probe"))
    assert [(epoch.epoch, epoch.phase) for epoch in result.history] == [(0, "probe")]
    assert result.best is not None
    assert result.best.val_accuracy >= 0.85
    assert (result.best.train_rows, result.best.val_rows) == (TRAIN_ROWS, VAL_ROWS)
    before = load_file(Path(trained.bundle) / "model.safetensors")
    after = load_file(output / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"head.4.weight", "head.4.bias"}
    classifier = Classifier.load(str(output), precision="fp32", device="cpu")
    assert classifier.classes == ["even", "odd"]
    rows = pd.read_csv(digits / "parity-val.csv", dtype=str)
    predictions = classifier.predict([digits / path for path in rows.path])
    correct = sum(p.label == label for p, label in zip(predictions, rows.label, strict=True))
    assert abs(correct - result.best.val_accuracy * VAL_ROWS) <= 2


@pytest.mark.slow
def test_weights_are_finetuned_from_where_they_are(
    trained: TrainResult, digits: Path, tmp_path: Path
) -> None:
    result = train(
        config(
            digits,
            tmp_path / "bundle",
            model=from_weights(trained),
            strategy="finetune",
            optim={"lr": 1e-4},
            scale={"num_workers": 1},
            epochs=1,
        )
    )
    assert [(epoch.epoch, epoch.phase) for epoch in result.history] == [(1, "train")]
    assert trained.best is not None
    # one careful epoch from random weights would be little better than guessing
    assert result.history[0].val_accuracy >= trained.best.val_accuracy - 0.05


@pytest.mark.slow  # test_trainer covers the phases
def test_from_weights_the_head_is_fitted_first_and_then_all_is_finetuned(
    trained: TrainResult, digits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    data = {"train": str(digits / "parity.csv"), "val": str(digits / "parity-val.csv")}
    result = train(
        config(
            digits,
            output,
            data=data,
            model=from_weights(trained),
            optim={},
            scale={"num_workers": 1},
            epochs=1,
        )
    )
    assert [(epoch.epoch, epoch.phase) for epoch in result.history] == [(0, "probe"), (1, "train")]
    assert result.history[1].lr <= 3e-4, "from weights the default is a careful one"
    probe, tuned = result.history
    assert tuned.val_accuracy >= probe.val_accuracy - 0.05
    made = json.loads((output / "bundle.json").read_text())["provenance"]
    assert made["strategy"] == "probe_then_finetune"


@pytest.mark.slow
def test_an_lr_range_test_draws_its_curve_and_makes_no_bundle(
    joined: None, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    # with this interval a training would save a state at every agreement
    eager = {"scale": {"num_workers": 1}, "precision": "fp32", "checkpoint_minutes": 1e-6}
    model = {"name": "small_cnn", "options": {"width": 8}}
    result = train(config(digits, output, find_lr=True, batch_size=8, model=model, **eager))
    table = pd.read_parquet(output / "lr_range.parquet")
    assert tuple(zip(table.lr, table.loss, strict=True)) == result.lr_curve
    assert table.lr.is_monotonic_increasing
    assert table.lr.iloc[0] == pytest.approx(1e-6)
    assert len(table) > 50
    assert (output / "plots" / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    assert (result.best, result.history) == (None, [])
    assert "try --optim.lr" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} <= {"lr_range.parquet", "plots", "_train"}
    assert list(output.glob("_train/*")) == []


@pytest.mark.slow
def test_epochs_without_an_improvement_end_the_training(
    joined: None, tmp_path: Path, colors: Callable[[int], Path]
) -> None:
    request = {"data": {"train": str(colors(60))}, "model": {"name": "small_cnn"}, "epochs": 9}
    request |= {"batch_size": 20, "best_by": "val_accuracy"}
    stop = {"patience": 2, "min_delta": 1.0}
    result = train(
        TrainConfig.model_validate(
            request | {"early_stopping": stop, "output": str(tmp_path / "bundle")}
        )
    )
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3]
    assert Classifier.load(result.bundle).classes == ["blue", "green", "red"]


@pytest.mark.slow
def test_a_class_without_a_validation_image_is_reported(
    joined: None,
    tmp_path: Path,
    colors: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = colors(36)
    header, *rows = manifest.read_text().splitlines()
    some = [row for row in rows if ",green," not in row][:10]
    (tmp_path / "val.csv").write_text("\n".join([header, *some]) + "\n")
    data = {"train": str(manifest), "val": str(tmp_path / "val.csv")}
    request = {"data": data, "model": {"name": "small_cnn"}, "epochs": 1, "batch_size": 12}
    result = train(TrainConfig.model_validate(request | {"output": str(tmp_path / "bundle")}))
    printed = capsys.readouterr().out
    assert "no validation image of 'green': left out of the balanced accuracy" in printed
    assert 0 <= result.history[0].val_balanced_accuracy <= 1


@pytest.mark.slow
def test_images_decoded_in_every_epoch_train_the_same_as_cached_ones(
    joined: None, digits: Path, tmp_path: Path
) -> None:
    found = {}
    for cache in (True, False):
        data = {"train": str(digits / "clean.csv"), "val": str(digits / "val.csv"), "cache": cache}
        result = train(
            config(
                digits,
                tmp_path / f"cache-{cache}",
                data=data,
                augment={"preset": "standard", "hflip": 0.0},
                scale={"num_workers": 2, "cpus_per_worker": 0.5},
                precision="fp32",
                epochs=2,
            )
        )
        found[cache] = result.history
    assert {(e.train_rows, e.val_rows) for e in found[False]} == {(TRAIN_ROWS, VAL_ROWS)}
    for cached, streamed in zip(found[True], found[False], strict=True):
        assert streamed.train_loss == pytest.approx(cached.train_loss, rel=1e-4)
        assert streamed.val_loss == pytest.approx(cached.val_loss, rel=1e-4)
    once, every = (
        pd.read_parquet(tmp_path / f"cache-{cache}" / "validation_predictions.parquet")
        for cache in (True, False)
    )
    pd.testing.assert_frame_equal(
        once[["path", "row", "predicted_label"]], every[["path", "row", "predicted_label"]]
    )
    np.testing.assert_allclose(once.label_score, every.label_score, rtol=1e-3)


@pytest.mark.slow
def test_failures_while_streaming_are_counted_and_too_many_end_the_training(
    joined: None, tmp_path: Path, colors: Callable[[int], Path]
) -> None:
    manifest = colors(36)
    for name in ("00003", "00011"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"")
    output = tmp_path / "bundle"

    def run(**data: Any) -> TrainResult:
        source = {"train": str(manifest), "cache": False, **data}
        request = {"data": source, "model": {"name": "small_cnn"}, "epochs": 2, "batch_size": 8}
        return train(TrainConfig.model_validate(request | {"output": str(output)}))

    with pytest.raises(TooManyErrors, match=r"2 of 36 images .* data.max_error_rate 0.01") as ended:
        run()
    assert ended.value.exit_code == 3
    assert not (output / "bundle.json").exists()

    # the advice of the error works with the same command, as no state was saved yet
    result = run(max_error_rate=0.1)
    assert result.failed == 2
    for epoch in result.history:
        assert epoch.train_failed + epoch.val_failed == 2
        assert epoch.train_rows + epoch.val_rows == 34


def test_too_many_bad_images_train_nothing(
    joined: None, tmp_path: Path, colors: Callable[[int], Path]
) -> None:
    manifest = colors(30)
    for name in ("00003", "00011"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"")
    output = tmp_path / "bundle"
    request = {"data": {"train": str(manifest)}, "model": {"name": "small_cnn"}, "batch_size": 8}
    with pytest.raises(TooManyErrors, match=r"2 of 30 images .*\n.*00003.jpg: the file has no"):
        train(TrainConfig.model_validate(request | {"output": str(output)}))
    assert [path.name for path in output.rglob("*")] == ["_train", "run.json"]


def test_workers_that_do_not_fit_are_refused(joined: None, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourcesError, match="do not fit the nodes"):
        train(config(digits, tmp_path / "bundle", scale={"num_workers": 3}))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(joined: None, digits: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(config(digits, tmp_path / name, epochs=2))
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_a_diverging_run_keeps_the_weights_from_before_and_names_their_file(
    joined: None, digits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    # each of the 14 steps of an epoch doubles the weights, which is too much by the second
    grow = {"lr": 100, "weight_decay": 0.03, "warmup": 0, "schedule": "constant"}
    # found when the workers next agree on what to do, or at the end of the epoch
    reason = r"train_loss is (NaN or infinite|nan|inf) in epoch [23]\. Lower"
    with pytest.raises(RunFailed, match=reason) as ended:
        train(config(digits, output, optim=grow, precision="fp32"))
    kept = str(ended.value).rpartition("The best weights so far are in ")[2]
    assert Path(kept).parent == output / "_train"
    assert load_file(kept).keys() >= {"head.4.weight", "features.0.0.weight"}
    assert not (output / "bundle.json").exists()


@pytest.mark.slow
def test_an_interrupted_run_saves_and_ends_at_once(digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    command = [sys.executable, "-u", str(REPOSITORY / "jobs" / "train.py")]
    command += ["--data.train", str(digits / "train.csv"), "--output", str(output)]
    command += ["--model.name", "small_cnn", "--epochs", "1000", "--scale.num-workers", "2"]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a Ray of its own, not one that another test left its address of
        env=os.environ | {"RAY_ADDRESS": "local"},
    )
    assert run.stdout is not None
    assert run.stderr is not None
    while not run.stdout.readline().startswith("epoch    2/1000"):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "imgcls train: stopped by SIGTERM; state saved, rerun the same command" in errors
    assert not (output / "bundle.json").exists()
    assert not (output / "_lease").exists()
    (newest, *_) = Checkpoints(str(output)).list_states()
    assert len(newest.progress.history) >= 2
    assert {path.name for path in (output / "_train").iterdir()} >= {"run.json", newest.best}
