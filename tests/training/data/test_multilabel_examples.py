"""Rows with any number of labels become targets, and errors name the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.image_urls import normalize_url
from imgcls.errors import ConfigError, ManifestError
from imgcls.training.config import DataConfig, TrainConfig
from imgcls.training.data.examples import Examples, read_examples
from imgcls.training.setup import check_task

LABELS: list[list[str] | None] = [["cat", "dog"], [], ["dog"], ["cat"], ["bird", "cat", "dog"]]


def write_lists(file: Path, labels: list[list[str] | None], times: int = 6) -> Path:
    paths = [f"{file.stem}/{number}.png" for number in range(times * len(labels))]
    column = pa.array(labels * times, pa.list_(pa.string()))
    pq.write_table(pa.table({"path": paths, "label": column}), file)
    return file


def read(train: Path | dict[str, Any], task: Any = "auto", **settings: Any) -> Examples:
    given = str(train) if isinstance(train, Path) else train
    return read_examples(DataConfig.model_validate({"train": given, **settings}), task)


def encode(examples: Examples) -> list[list[float]]:
    codes = examples.rows.column("label").to_numpy()
    found: list[list[float]] = examples.targets.encode(codes).tolist()
    return found


def test_lists_make_a_training_multilabel(tmp_path: Path) -> None:
    examples = read(write_lists(tmp_path / "train.parquet", LABELS))
    assert examples.targets.task == "multilabel"
    assert examples.classes == ["bird", "cat", "dog"]
    assert encode(examples)[:5] == [[0, 1, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]]
    counts = [examples.count_per_class(held=held) for held in (False, True)]
    assert np.sum(counts, axis=0).tolist() == [6, 18, 18]
    negatives = [examples.count_negatives(held=held) for held in (False, True)]
    assert np.sum(negatives, axis=0).tolist() == [24, 12, 12]
    assert examples.count(held=True) == 3


def test_text_with_a_delimiter_and_columns_per_class_have_the_same_targets(tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("path,tags\na.png,cat; dog\nb.png,;\nc.png,dog\n")
    (tmp_path / "columns.csv").write_text("path,cat,dog\na.png,1,1\nb.png,0,0\nc.png,0,1\n")
    text = read(
        {"path": str(tmp_path / "text.csv"), "label_column": "tags", "label_delimiter": ";"},
        val_fraction=0.4,
    )
    columns = read(
        {"path": str(tmp_path / "columns.csv"), "label_columns": ["cat", "dog"]}, val_fraction=0.4
    )
    assert encode(text) == encode(columns) == [[1, 1], [0, 0], [0, 1]]
    assert text.rows.equals(columns.rows)


def test_an_unknown_class_is_no_negative(tmp_path: Path) -> None:
    file = tmp_path / "columns.csv"
    file.write_text("path,cat,dog\n" + "".join(f"{n}.png,1,\n{n}x.png,,1\n" for n in range(9)))
    examples = read({"path": str(file), "label_columns": ["cat", "dog"]})
    targets = np.array(encode(examples))
    np.testing.assert_array_equal(np.isnan(targets), targets != 1)
    assert examples.count_negatives(held=False) == [0, 0]
    manifest = examples.build_manifest(held=True)
    assert manifest.column_names == ["path", "cat", "dog"]
    assert manifest.column("dog").null_count + manifest.column("cat").null_count == len(manifest)


def test_the_held_out_rows_are_written_as_they_were_read(tmp_path: Path) -> None:
    examples = read(write_lists(tmp_path / "train.parquet", LABELS), val_fraction=0.5)
    manifest = examples.build_manifest(held=True)
    numbers = [int(Path(path).stem) for path in manifest["path"].to_pylist()]
    assert manifest["label"].to_pylist() == [LABELS[number % 5] for number in numbers]


def test_an_image_of_each_class_remains_to_train_on(tmp_path: Path) -> None:
    labels = [["rare"] if number == 3 else ["often"] for number in range(8)]
    examples = read(write_lists(tmp_path / "train.parquet", labels, 1), val_fraction=0.9)
    assert examples.count_per_class(held=False)[1] == 1
    assert examples.count(held=True) > 0


def test_rows_of_one_path_are_never_in_both_splits(tmp_path: Path) -> None:
    paths = [f"{'./' * (number > 20)}{number % 5}.png" for number in range(40)]
    labels = pa.array([["a"], ["b"]] * 20, pa.list_(pa.string()))
    pq.write_table(pa.table({"path": paths, "label": labels}), tmp_path / "t.parquet")
    rows = read(tmp_path / "t.parquet", val_fraction=0.4).rows.to_pylist()
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(normalize_url(row["url"]), set()).add(row["held"])
    assert {len(each) for each in sides.values()} == {1}


def test_names_that_are_no_class_leave_the_other_classes_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lists(tmp_path / "train.parquet", LABELS)
    examples = read(file, classes=["dog", "cat"])
    assert encode(examples)[:5] == [[1, 1], [0, 0], [1, 0], [0, 1], [1, 1]]
    assert "6 rows with labels that are not among data.classes" in capsys.readouterr().out


def test_a_plain_label_column_may_be_trained_as_multilabel(tmp_path: Path) -> None:
    file = tmp_path / "plain.csv"
    file.write_text("path,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(20)))
    examples = read(file, "multilabel")
    assert encode(examples)[:2] == [[1, 0], [0, 1]]
    assert read(file).targets.task == "single_label"


def test_several_labels_are_not_trained_as_one(tmp_path: Path) -> None:
    file = write_lists(tmp_path / "train.parquet", LABELS)
    with pytest.raises(
        ManifestError, match=r"column 'label' may have several labels .* multilabel"
    ):
        read(file, "single_label")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["a"], None, ["b"]], r"row 1 \('train/1.png'\) has no label in column 'label'"),
        ([[], []], "no row has a label in column 'label'"),
        ([["a"], ["a"]], "no training image for class 'b'"),
    ],
)
def test_labels_that_cannot_be_trained_on_are_named(
    tmp_path: Path, labels: list[list[str] | None], message: str
) -> None:
    settings: dict[str, Any] = {"classes": ["a", "b"]} if labels == [["a"], ["a"]] else {}
    with pytest.raises(ManifestError, match=message):
        read(write_lists(tmp_path / "train.parquet", labels), **settings)


def test_validation_rows_may_have_labels_without_a_training_image(tmp_path: Path) -> None:
    train = write_lists(tmp_path / "train.parquet", LABELS)
    val = write_lists(tmp_path / "val.parquet", [["cat", "whale"], ["dog"]])
    examples = read(train, val=str(val))
    assert examples.count(held=True) == 12
    assert examples.count_per_class(held=True) == [0, 6, 6]


def test_columns_of_classes_are_named_in_one_unicode_form(tmp_path: Path) -> None:
    file = tmp_path / "columns.csv"
    rows = "".join(f"{n}.png,{n % 2},1\n" for n in range(20))
    file.write_text(f"path,cafe\u0301,dog\n{rows}")
    examples = read({"path": str(file), "label_columns": ["cafe\u0301", "dog"]})
    assert examples.classes == ["caf\u00e9", "dog"]


def test_a_class_named_path_does_not_hide_the_paths(tmp_path: Path) -> None:
    file = tmp_path / "columns.csv"
    file.write_text("img,path,dog\n" + "".join(f"{n}.png,1,\n{n}x.png,,1\n" for n in range(9)))
    settings = {"path": str(file), "path_column": "img", "label_columns": ["path", "dog"]}
    manifest = read(settings).build_manifest(held=True)
    assert manifest.column_names == ["path_", "path", "dog"]


def test_settings_that_a_task_or_a_probe_ignores_are_refused(tmp_path: Path) -> None:
    examples = read(write_lists(tmp_path / "train.parquet", LABELS))
    plain = tmp_path / "plain.csv"
    plain.write_text("path,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(20)))
    single = read(plain)

    def config(**settings: Any) -> TrainConfig:
        return TrainConfig.model_validate({"data": str(plain), "output": "x", **settings})

    asymmetric = config(loss={"negative_gamma": 4.0})
    check_task(asymmetric, examples, "scratch")
    for given, rows, strategy, message in (
        (asymmetric, examples, "probe", "negative_gamma: has no effect on a linear probe"),
        (
            config(loss={"focal_gamma": 2.0, "label_smoothing": 0.1}),
            single,
            "probe",
            "loss.focal_gamma, loss.label_smoothing: have no effect on a linear probe",
        ),
        (
            config(data={"train": "x", "sampling": "balanced"}),
            single,
            "probe",
            "data.sampling balanced: has no effect on a linear probe",
        ),
        (asymmetric, single, "scratch", "negative_gamma: is for multilabel"),
        (config(best_by="val_mean_average_precision"), single, "scratch", "is for multilabel"),
        (config(data={"train": "x", "sampling": "balanced"}), examples, "scratch", "balanced"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_task(given, rows, strategy)


def test_a_mean_average_precision_without_positives_and_negatives_chooses_no_epoch(
    tmp_path: Path,
) -> None:
    settings = {"data": "x", "output": "x", "best_by": "val_mean_average_precision"}
    config = TrainConfig.model_validate(settings)
    with pytest.raises(ConfigError, match=r"no class has validation images with and without it"):
        check_task(config, read(write_lists(tmp_path / "few.parquet", LABELS, 2)), "scratch")
    check_task(config, read(write_lists(tmp_path / "two.parquet", LABELS, 2)), "probe")
    check_task(config, read(write_lists(tmp_path / "more.parquet", LABELS, 10)), "scratch")


def test_an_earlier_training_has_the_same_identity(tmp_path: Path) -> None:
    settings = TrainConfig.model_validate({"data": "x.csv", "output": "x"}).dump_settings()
    assert "task" not in settings
    assert not {"label_delimiter", "label_columns"} & set(settings["data"]["train"])
    assert not {"negative_gamma", "negative_margin"} & set(settings["loss"])
    tags = {"path": "x.csv", "label_delimiter": ";"}
    made = TrainConfig.model_validate({"data": {"train": tags}, "output": "x"}).dump_settings()
    assert made["data"]["train"]["label_delimiter"] == ";"
