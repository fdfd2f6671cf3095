"""Labels of peers: as many as rows, and those of imgcls, or the peer has no rate."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import programs
from benchmarks.programs import PeerFailed, check_labels

EXPECTED = {f"{i}.jpg": i for i in range(100)}


def make_labels(wrong: int) -> list[tuple[str, int]]:
    return [(path, label + (label < wrong)) for path, label in EXPECTED.items()]


def test_the_share_of_equal_labels_is_reported() -> None:
    assert check_labels(make_labels(wrong=3), 100, EXPECTED) == pytest.approx(0.97)


def test_a_peer_with_other_labels_is_not_comparable() -> None:
    with pytest.raises(PeerFailed, match=r"94\.0% of the labels are those of imgcls"):
        check_labels(make_labels(wrong=6), 100, EXPECTED)


def test_rows_of_other_images_are_not_compared() -> None:
    found = [*make_labels(wrong=3), *((f"other {i}.jpg", 0) for i in range(100))]
    assert check_labels(found, 200, EXPECTED) == pytest.approx(0.97)


def test_a_peer_that_lost_rows_is_not_comparable() -> None:
    with pytest.raises(PeerFailed, match="99 rows written of 100"):
        check_labels(make_labels(wrong=0)[1:], 100, None)


def test_labels_of_other_weights_are_not_compared() -> None:
    assert check_labels(make_labels(wrong=100), 100, None) is None


def test_labels_are_read_from_either_kind_of_output(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("path,predicted\na.jpg,3\nb.jpg,5\n")
    (tmp_path / "many").mkdir()
    for name, row in (("1", ("a.jpg", 3)), ("2", ("b.jpg", 5))):
        table = pa.table({"path": [row[0]], "predicted": [row[1]]})
        pq.write_table(table, tmp_path / "many" / f"{name}.parquet")
    expected = [("a.jpg", 3), ("b.jpg", 5)]
    assert programs.read_peer_labels(tmp_path / "one.csv") == expected
    assert sorted(programs.read_peer_labels(tmp_path / "many")) == expected


def test_labels_of_known_images_are_read_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    paths, labels = ["a.jpg", "b.jpg", "c.jpg"], ["class 3", "class 12", "class 5"]
    table = pa.table({"path": paths, "predicted_label": labels})
    pq.write_table(table, tmp_path / "predictions" / "part-00000.parquet")
    known = [Path("a.jpg"), Path("b.jpg"), Path("not in the manifest.jpg")]
    assert programs.read_imgcls_labels(tmp_path, known) == {"a.jpg": 3, "b.jpg": 12}


def test_daft_without_its_packages_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="missing; run `make bench`, or pass one with --daft"):
        programs.measure_peer(
            "Daft, tuned", tmp_path, tmp_path, tmp_path, "fp32", {}, tmp_path / "missing"
        )


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("timm, tuned", "vit_b_16", True),
        ("timm", "resnet18", False),
        ("Daft", "vit_b_16", False),
    ],
)
def test_only_networks_with_other_names_have_weights_of_their_own(
    name: str, model: str, expected: bool, tmp_path: Path
) -> None:
    description = {
        "architecture": {"name": model},
        "preprocess": {
            "resize": 256, "crop": 224, "interpolation": "bilinear", "mean": [0], "std": [1]
        },
    }  # fmt: skip
    (tmp_path / "bundle.json").write_text(json.dumps(description))
    assert programs.peers.has_own_weights(name, tmp_path) is expected
