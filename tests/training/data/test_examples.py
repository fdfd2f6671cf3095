"""Every labeled row is trained on or held out, and errors name the row."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.config import load
from imgcls.data.manifests.image_urls import normalize_url
from imgcls.errors import ConfigError, ManifestError
from imgcls.training.config import DataConfig
from imgcls.training.data.examples import Examples, _choose_held_out, read_examples
from tests.conftest import write_manifest

Rows = list[tuple[str, str]]


def rows_of(*classes: str, each: int = 10) -> Rows:
    return [(f"{name}/{i}.png", name) for name in classes for i in range(each)]


def read(folder: Path, train: Rows, val: Rows | None = None, **settings: Any) -> Examples:
    manifest = write_manifest(folder / "train.csv", train, ("path", "label"))
    data: dict[str, Any] = {"train": str(manifest), **settings}
    if val is not None:
        data["val"] = str(write_manifest(folder / "val.csv", val, ("path", "label")))
    return read_examples(DataConfig.model_validate(data))


def paths(examples: Examples, *, held: bool) -> list[str]:
    rows = examples.rows.to_pylist()
    return [row["url"] for row in rows if row["held"] == held]


def test_every_row_is_either_trained_on_or_held_out(tmp_path: Path) -> None:
    examples = read(tmp_path, rows_of("cat", "dog", each=20), val_fraction=0.25)
    assert examples.classes == ["cat", "dog"]
    assert (examples.count(held=False), examples.count(held=True)) == (30, 10)
    assert len({*paths(examples, held=False), *paths(examples, held=True)}) == 40


def test_the_split_takes_the_same_share_of_every_class(tmp_path: Path) -> None:
    examples = read(tmp_path, rows_of("a", each=30) + rows_of("b", each=10), val_fraction=0.2)
    held = [path.split("/")[-2] for path in paths(examples, held=True)]
    assert (held.count("a"), held.count("b")) == (6, 2)


def test_the_split_depends_on_the_paths_and_not_on_their_order(tmp_path: Path) -> None:
    rows = rows_of("cat", "dog", each=20)
    once = paths(read(tmp_path, rows), held=True)
    assert set(paths(read(tmp_path, rows[::-1]), held=True)) == set(once)


@given(st.lists(st.tuples(st.sampled_from("pqrstuv"), st.sampled_from("ab")), min_size=1))
def test_rows_of_one_path_are_never_in_both_splits(rows: list[tuple[str, str]]) -> None:
    import pyarrow as pa

    table = pa.table({"path": [p for p, _ in rows], "label": [name for _, name in rows]})
    held = _choose_held_out(table, 0.5)
    sides: dict[str, set[bool]] = {}
    for (path, _), side in zip(rows, held, strict=True):
        sides.setdefault(path, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())


def test_names_of_one_image_are_never_in_both_splits(tmp_path: Path) -> None:
    names = ["{}", "./{}", f"{tmp_path}/x/../{{}}", f"file://{tmp_path}/{{}}"]
    images = [path for path, _ in rows_of("cat", "dog", each=20)]
    rows = [(name.format(path), path.split("/")[0]) for path in images for name in names]
    examples = read(tmp_path, rows, val_fraction=0.25)
    assert (examples.count(held=False), examples.count(held=True)) == (120, 40)
    held = {normalize_url(path) for path in paths(examples, held=True)}
    assert held.isdisjoint(normalize_url(path) for path in paths(examples, held=False))
    alone = read(tmp_path, [(path, path.split("/")[0]) for path in images], val_fraction=0.25)
    assert len(held) == alone.count(held=True) == 10


def test_relative_paths_start_at_the_manifest(tmp_path: Path) -> None:
    examples = read(tmp_path, rows_of("a", "b"))
    assert all(path.startswith(str(tmp_path)) for path in paths(examples, held=False))


def test_a_given_class_without_a_training_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no training image for class 'cow' and 1 more"):
        read(tmp_path, rows_of("cat", "dog"), classes=["cat", "cow", "dog", "emu"])


def test_an_unknown_validation_label_is_named_with_its_row(tmp_path: Path) -> None:
    val = [("1.png", "cat"), ("2.png", "cow")]
    with pytest.raises(ManifestError, match=r"row 1 \('2.png'\) has label 'cow', which is not"):
        read(tmp_path, rows_of("cat", "dog"), val)


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"row 20 \('x.png'\) has no label"):
        read(tmp_path, [*rows_of("cat", "dog"), ("x.png", "")])


def test_a_manifest_without_labels_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [("1.png", "cat")], ("path", "kind"))
    with pytest.raises(ManifestError, match=r"--data\.train\.label-column"):
        read_examples(DataConfig.model_validate({"train": str(manifest)}))


def test_a_missing_path_column_names_the_key_of_this_job(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [("1.png", "cat")], ("file", "label"))
    with pytest.raises(ManifestError, match=r"--data\.train\.path-column"):
        read_examples(DataConfig.model_validate({"train": str(manifest)}))


def test_an_empty_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no row"):
        read(tmp_path, [])


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="only one class"):
        read(tmp_path, rows_of("cat"))


def test_a_set_too_small_to_hold_any_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="leave nothing to hold out"):
        read(tmp_path, rows_of("cat", "dog", each=2))


def test_a_class_name_given_twice_is_refused() -> None:
    argv = ["--train", "m.csv", "--classes", "[cat, dog, cat]"]
    with pytest.raises(ConfigError, match="class 'cat' is listed twice"):
        load(DataConfig, argv)


def test_images_are_counted_by_class_and_split(tmp_path: Path) -> None:
    rows = rows_of("a", each=30) + rows_of("b", each=10)
    examples = read(tmp_path, rows, val_fraction=0.2)
    assert examples.count_per_class(held=False) == [24, 8]
    assert examples.count_per_class(held=True) == [6, 2]


def test_a_class_without_a_validation_image_counts_none(tmp_path: Path) -> None:
    examples = read(tmp_path, rows_of("cat", "dog"), [("1.png", "cat")])
    assert examples.count_per_class(held=True) == [1, 0]


def test_given_classes_keep_their_order(tmp_path: Path) -> None:
    examples = read(tmp_path, rows_of("a", "b", each=5), classes=["b", "a"], val_fraction=0.2)
    assert examples.classes == ["b", "a"]
    for row in examples.rows.to_pylist():
        assert examples.classes[row["label"]] == Path(row["url"]).parent.name


@pytest.mark.parametrize(
    ("argv", "cache"), [([], None), (["--cache"], True), (["--no-cache"], False)]
)
def test_caching_can_be_set_or_left_open(argv: list[str], cache: bool | None) -> None:
    config = load(DataConfig, ["--train", "m.csv", *argv])
    assert config.cache is cache
    assert config.sampling == "natural"
    assert config.train.path == "m.csv"


def test_spellings_of_one_class_are_named_and_decomposed_ones_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*rows_of("cat", "caf\u00e9"), ("x.png", "Cat"), ("y.png", "cafe\u0301")]
    examples = read(tmp_path, rows)
    assert examples.classes == ["Cat", "caf\u00e9", "cat"]
    assert "'Cat' (1 row) and 'cat' (10 rows)" in capsys.readouterr().out
    named = read(tmp_path, rows_of("cat", "caf\u00e9"), classes=["cat", "cafe\u0301"])
    assert named.classes == ["cat", "caf\u00e9"]


@pytest.mark.parametrize("blank", [" ", "\u3000", "\t "])
def test_a_blank_label_is_no_class(tmp_path: Path, blank: str) -> None:
    with pytest.raises(ManifestError, match=r"row 20 \('x.png'\) has no label in column 'label'"):
        read(tmp_path, [*rows_of("cat", "dog"), ("x.png", blank)])
