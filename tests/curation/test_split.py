"""Splits that are the same everywhere, and that new data leaves alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.config import build
from imgcls.curation.config import SplitConfig
from imgcls.curation.split import assign_parts, split_manifest
from imgcls.data import image_files
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ConfigError, ManifestError, OutputError
from tests.conftest import draw, write_manifest

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@given(
    st.lists(st.binary(max_size=20), unique=True, max_size=60),
    st.lists(st.binary(max_size=20), unique=True, max_size=30),
    st.integers(-(2**40), 2**40),
)
def test_new_data_moves_no_earlier_row(old: list[bytes], new: list[bytes], seed: int) -> None:
    before = dict(zip(old, assign_parts(old, SHARES, seed), strict=True))
    everything = [*new, *old]
    after = dict(zip(everything, assign_parts(everything, SHARES, seed), strict=True))
    assert before.items() <= after.items()


def test_the_parts_have_their_shares_in_every_class() -> None:
    for label in range(10):
        keys = [f"{label}/{row}".encode() for row in range(5000)]
        counts = Counter(assign_parts(keys, SHARES, 0))
        for part, share in SHARES.items():
            # five standard deviations of a binomial
            assert abs(counts[part] - 5000 * share) < 5 * (5000 * share * (1 - share)) ** 0.5


def test_a_seed_gives_another_split() -> None:
    keys = [str(row).encode() for row in range(1000)]
    assert assign_parts(keys, SHARES, 0) == assign_parts(keys, SHARES, 0)
    same = [
        a == b
        for a, b in zip(assign_parts(keys, SHARES, 0), assign_parts(keys, SHARES, 1), strict=True)
    ]
    assert sum(same) < 800


def split_config(manifest: Path, output: Path, **more: object) -> SplitConfig:
    return build(SplitConfig, {"manifest": str(manifest), "output": str(output), **more})


def photographs(folder: Path, count: int) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        draw(("red", "green", "blue")[i % 3], seed=i // 2).save(folder / "images" / f"{i}.png")
        rows.append((f"images/{i}.png", ("red", "green", "blue")[i % 3], f"p{i // 6}"))
    return write_manifest(folder / "m.csv", rows, ("path", "label", "patient"))


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    """By path: the part and the other columns."""
    found = {}
    for file in sorted(output.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            found[row["path"]] = {"part": file.stem, **row}
    return found


def test_every_row_is_in_one_part_with_its_columns_and_an_absolute_path(
    tmp_path: Path,
) -> None:
    manifest = photographs(tmp_path, 60)
    counts = split_manifest(split_config(manifest, tmp_path / "out"))
    found = rows_of(tmp_path / "out")
    assert sum(counts.values()) == len(found) == 60
    assert set(found) == {str(tmp_path / "images" / f"{i}.png") for i in range(60)}
    row = found[str(tmp_path / "images" / "7.png")]
    assert (row["label"], row["patient"]) == ("green", "p1")


def test_images_in_a_table_are_split_by_their_bytes_and_not_copied(tmp_path: Path) -> None:
    images = [bytes([row // 2]) * 2000 for row in range(40)]
    table = pa.table({"image": images, "number": range(40)})
    pq.write_table(table, tmp_path / "m.parquet")
    split_manifest(split_config(tmp_path / "m.parquet", tmp_path / "out"))
    parts = [pq.read_table(file) for file in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sum(part.num_rows for part in parts) == 40
    for part in parts:
        numbers = part["number"].to_pylist()
        assert {number ^ 1 for number in numbers} == set(numbers)
        read = list(image_files.read_ahead(part["image"].to_pylist()))
        assert read == [images[number] for number in numbers]


def test_duplicates_stay_together_in_any_folder(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        for copy in "ab":
            draw("red", seed=i).save(tmp_path / f"{copy}{i}.png")
            rows.append((f"{copy}{i}.png",))
    split_manifest(
        split_config(write_manifest(tmp_path / "m.csv", rows, ("path",)), tmp_path / "out")
    )
    found = {Path(path).name: row["part"] for path, row in rows_of(tmp_path / "out").items()}
    assert all(found[f"a{i}.png"] == found[f"b{i}.png"] for i in range(30))
    assert len(set(found.values())) == 3


def test_a_group_is_in_one_part(tmp_path: Path) -> None:
    split_manifest(split_config(photographs(tmp_path, 90), tmp_path / "out", by="patient"))
    parts: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "out").values():
        parts.setdefault(row["patient"], set()).add(row["part"])
    assert len(parts) == 15
    assert all(len(each) == 1 for each in parts.values())


def test_ten_percent_more_images_do_not_move_the_others(tmp_path: Path) -> None:
    split_manifest(split_config(photographs(tmp_path, 100), tmp_path / "before"))
    split_manifest(split_config(photographs(tmp_path, 110), tmp_path / "after"))
    before, after = rows_of(tmp_path / "before"), rows_of(tmp_path / "after")
    assert len(after) == 110
    assert all(after[path]["part"] == row["part"] for path, row in before.items())


def test_each_fold_is_held_out_once(tmp_path: Path) -> None:
    split_manifest(split_config(photographs(tmp_path, 60), tmp_path / "out", folds=3, by="patient"))
    held = []
    for number in range(3):
        parts = {
            part: pq.read_table(tmp_path / "out" / f"fold-{number}" / f"{part}.parquet")
            for part in ("train", "val")
        }
        train, val = (set(parts[p].column("patient").to_pylist()) for p in ("train", "val"))
        assert not train & val
        assert sum(table.num_rows for table in parts.values()) == 60
        held += parts["val"].column("path").to_pylist()
    assert sorted(held) == sorted(str(tmp_path / "images" / f"{i}.png") for i in range(60))


def test_digests_of_a_manifest_are_used_and_no_image_is_read(tmp_path: Path) -> None:
    rows = [(f"gone/{i}.png", f"{i // 2:032x}") for i in range(40)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "digest"))
    split_manifest(split_config(manifest, tmp_path / "out"))
    found = {row["digest"]: set() for row in rows_of(tmp_path / "out").values()}
    for row in rows_of(tmp_path / "out").values():
        found[row["digest"]].add(row["part"])
    assert all(len(parts) == 1 for parts in found.values())


def test_digests_may_be_bytes(tmp_path: Path) -> None:
    rows = [(f"gone/{i}.png", bytes([255, i // 2] * 8)) for i in range(40)]
    parts = []
    for number, kind in enumerate((pa.binary(16), pa.binary(), pa.string())):
        digests = [digest.hex() if kind == pa.string() else digest for _, digest in rows]
        table = {"path": [path for path, _ in rows], "digest": pa.array(digests, kind)}
        manifest = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(table), manifest)
        split_manifest(split_config(manifest, tmp_path / f"split-{number}"))
        found = rows_of(tmp_path / f"split-{number}")
        parts.append({path: row["part"] for path, row in found.items()})
    assert parts[0] == parts[1] == parts[2]


@pytest.mark.parametrize(
    ("column", "by", "message"),
    [("tags", "tags", "'tags' is list<.*Pass another --by"), ("digest", "content", "not a digest")],
)
def test_a_column_of_lists_is_refused(tmp_path: Path, column: str, by: str, message: str) -> None:
    pq.write_table(pa.table({"path": ["a.png"], column: [["x"]]}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=message):
        split_manifest(split_config(tmp_path / "m.parquet", tmp_path / "out", by=by))


def test_a_folder_of_tables_gets_no_parts(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    photographs(tmp_path, 12).rename(folder / "all.csv")
    with pytest.raises(OutputError, match="would have its rows twice"):
        split_manifest(split_config(folder, folder, by="patient"))
    images = tmp_path / "images"
    with pytest.raises(OutputError, match="is in the folder of images"):
        split_manifest(split_config(images, images))
    split_manifest(split_config(folder, folder / "parts", by="patient"))
    assert open_manifest(ManifestConfig(path=str(folder))).files == (str(folder / "all.csv"),)


def test_only_images_without_a_digest_are_read(tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(b"bytes")
    rows = pa.table({"path": ["gone.png", "here.png"], "digest": ["00ff", None]})
    pq.write_table(rows, tmp_path / "m.parquet")
    config = build(
        SplitConfig, {"manifest": str(tmp_path / "m.parquet"), "output": str(tmp_path / "split")}
    )
    assert sum(split_manifest(config).values()) == 2


def test_a_split_that_is_refused_writes_nothing(tmp_path: Path) -> None:
    manifest = photographs(tmp_path, 12)
    output = tmp_path / "out"
    with pytest.raises(ManifestError, match="no column 'site'"):
        split_manifest(split_config(manifest, output, by="site"))
    with pytest.raises(ConfigError, match="at least two"):
        split_manifest(split_config(manifest, output, parts={"train": 1.0}))
    with pytest.raises(ConfigError, match="not a valid file name"):
        split_manifest(split_config(manifest, output, parts={"../train": 1.0, "test": 1}))
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(ManifestError, match=r"3\.png: no such file.*--drop unreadable"):
        split_manifest(split_config(manifest, output))
    assert not list(output.glob("*.parquet"))
    output.mkdir(exist_ok=True)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"contains notes\.txt"):
        split_manifest(split_config(manifest, output, by="patient", overwrite=True))


def test_a_class_that_a_part_lacks_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"{i}.png", f"{i:032x}", "rare" if i == 0 else "common") for i in range(50)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "digest", "label"))
    split_manifest(split_config(manifest, tmp_path / "out"))
    assert "class 'rare' has no image in " in capsys.readouterr().out
    with pytest.raises(OutputError, match="--overwrite"):
        split_manifest(split_config(manifest, tmp_path / "out"))
    split_manifest(split_config(manifest, tmp_path / "out", overwrite=True))


def test_an_earlier_split_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    manifest, output = photographs(tmp_path, 60), tmp_path / "out"
    split_manifest(split_config(manifest, output, folds=4, by="patient"))
    with pytest.raises(OutputError, match="--overwrite"):
        split_manifest(split_config(manifest, output, folds=2, by="patient"))
    with pytest.raises(ManifestError, match="'site'"):
        split_manifest(split_config(manifest, output, folds=2, by="site", overwrite=True))
    assert len(list(output.iterdir())) == 4
    split_manifest(split_config(manifest, output, folds=2, by="patient", overwrite=True))
    assert sorted(path.name for path in output.iterdir()) == ["fold-0", "fold-1"]


def test_a_manifest_that_the_output_would_replace_is_refused(tmp_path: Path) -> None:
    manifest = photographs(tmp_path, 60)
    for output, part, more in (
        (tmp_path / "parts", "train.parquet", {}),
        (tmp_path / "folds", "fold-0/train.parquet", {"folds": 4}),
        (tmp_path / "fewer", "fold-3/train.parquet", {"folds": 4}),
    ):
        split_manifest(split_config(manifest, output, by="patient", **more))
        before = rows_of(output) if not more else pq.read_table(output / part)
        again = more | ({"folds": 2} if output.name == "fewer" else {})
        with pytest.raises(OutputError, match=rf"--overwrite would remove .*{part}"):
            split_manifest(
                split_config(output / part, output, by="patient", overwrite=True, **again)
            )
        assert (rows_of(output) if not more else pq.read_table(output / part)) == before


def test_a_manifest_without_a_row_is_refused(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [], ("path", "label"))
    with pytest.raises(ManifestError, match="has no rows"):
        split_manifest(split_config(manifest, tmp_path / "out"))


def test_the_row_without_a_group_is_named(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "p" if i != 20_000 else "") for i in range(20_010)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "patient"))
    with pytest.raises(ManifestError, match="row 20,000 has no value in column 'patient'"):
        split_manifest(split_config(manifest, tmp_path / "out", by="patient"))


def test_spellings_of_one_class_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"{i}.png", "cat" if i % 3 else "Cat ", str(i)) for i in range(30)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "label", "group"))
    split_manifest(split_config(manifest, tmp_path / "out", by="group"))
    assert "'Cat ' (10 rows) and 'cat' (20 rows)" in capsys.readouterr().out


CLASSES = {"common": 0.5, "usual": 0.2, "rare": 0.02}


def label_sets(folder: Path, count: int = 1000) -> Path:
    """A manifest with a column of lists; images and groups of two rows."""
    rng = np.random.default_rng(0)
    labels = [[name for name, rate in CLASSES.items() if rng.random() < rate] for _ in range(count)]
    table = {
        "path": [f"gone/{i}.png" for i in range(count)],
        "digest": [f"{i // 2:032x}" for i in range(count)],
        "label": [None if i % 50 == 0 else each for i, each in enumerate(labels)],
    }
    pq.write_table(pa.table(table), folder / "m.parquet")
    return folder / "m.parquet"


def count_labels(output: Path) -> dict[str, Counter[str]]:
    return {
        file.stem: Counter(
            name for row in pq.read_table(file)["label"].to_pylist() for name in row or []
        )
        for file in output.glob("*.parquet")
    }


def test_each_class_of_several_has_its_share_in_each_part(tmp_path: Path) -> None:
    manifest = label_sets(tmp_path)
    rows = split_manifest(split_config(manifest, tmp_path / "out"))
    counts = count_labels(tmp_path / "out")
    total = sum(counts.values(), Counter())
    for part, share in SHARES.items():
        assert abs(rows[part] - 1000 * share) < 20
        for name in CLASSES:
            assert abs(counts[part][name] - share * total[name]) <= 2
    parts: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "out").values():
        parts.setdefault(row["digest"], set()).add(row["part"])
    assert all(len(each) == 1 for each in parts.values())
    split_manifest(split_config(manifest, tmp_path / "hashed", stratify=False))
    by_hash = count_labels(tmp_path / "hashed")
    assert any(abs(by_hash["test"][name] - 0.1 * total[name]) > 2 for name in CLASSES)


def test_a_stratified_split_depends_on_the_seed_and_not_on_the_order_of_rows(
    tmp_path: Path,
) -> None:
    manifest = label_sets(tmp_path, 300)
    table = pq.read_table(manifest)
    pq.write_table(table.take(list(range(299, -1, -1))), tmp_path / "reversed.parquet")
    found = []
    for name, seed in (("m", 0), ("reversed", 0), ("m", 1)):
        output = tmp_path / f"{name}{seed}"
        split_manifest(split_config(tmp_path / f"{name}.parquet", output, seed=seed))
        found.append({path: row["part"] for path, row in rows_of(output).items()})
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_class_columns_and_folds_are_stratified(tmp_path: Path) -> None:
    rows = [(f"{i}.png", f"{i:032x}", str(int(i < 5)), "" if i % 3 else "1") for i in range(60)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "digest", "rare", "other"))
    config = split_config(manifest, tmp_path / "out", folds=5)
    labels = {"label_columns": ["rare", "other"]}
    split_manifest(
        config.model_copy(update={"manifest": config.manifest.model_copy(update=labels)})
    )
    for number in range(5):
        held = pq.read_table(tmp_path / "out" / f"fold-{number}" / "val.parquet")
        assert held["rare"].to_pylist().count("1") == 1
        assert held["other"].to_pylist().count("1") == 4
        assert held.num_rows == 12


def test_one_label_per_image_is_stratified_on_request(tmp_path: Path) -> None:
    rows = [(f"{i}.png", f"{i:032x}", "rare" if i < 5 else "common") for i in range(50)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "digest", "label"))
    split_manifest(split_config(manifest, tmp_path / "out", folds=5, stratify=True))
    for number in range(5):
        held = pq.read_table(tmp_path / "out" / f"fold-{number}" / "val.parquet")
        assert held["label"].to_pylist().count("rare") == 1
    unlabeled = write_manifest(tmp_path / "u.csv", [("a.png",)], ("path",))
    with pytest.raises(ConfigError, match="has no labels; name their column"):
        split_manifest(split_config(unlabeled, tmp_path / "u", stratify=True))
