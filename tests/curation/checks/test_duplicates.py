"""Duplicates by bytes, perceptual hashes and embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_digits

from imgcls.curation.check import find_dropped
from imgcls.curation.checks import duplicates
from imgcls.curation.checks.duplicates import find_similar_pairs
from imgcls.curation.config import DuplicatesConfig
from imgcls.models.embeddings import normalize_embeddings
from tests.curation.pictures import Row, clusters, images_of, indices_by_issue, jpeg, picture
from tests.data.pictures import encoded


def test_duplicates_are_found_by_bytes_and_by_hash(tmp_path: Path) -> None:
    originals = [picture(i) for i in range(12)]
    rows: list[Row] = [(f"{i}.jpg", jpeg(image), None) for i, image in enumerate(originals)]
    rows += [("copy.jpg", jpeg(originals[0]), None)]
    rows += [
        ("resaved.jpg", jpeg(originals[1], 40), None),
        ("small.jpg", jpeg(originals[2].resize((160, 120))), None),
        ("mirrored.jpg", jpeg(ImageOps.mirror(originals[3])), None),
        ("copy of resaved.jpg", jpeg(originals[1], 40), None),
    ]
    rows += [("broken.jpg", b"\xff\xd8\xff", None), ("broken too.jpg", b"\xff\xd8\xff", None)]
    found = {
        f.issue: f
        for f in duplicates.find_duplicates(images_of(tmp_path, rows), DuplicatesConfig())
    }
    exact, near = found["exact-duplicates"], found["near-duplicates"]
    assert dict(zip(exact.indices.tolist(), exact.group.tolist(), strict=True)) == {  # type: ignore[union-attr]
        0: 0, 12: 0, 13: 13, 16: 13,
    }  # fmt: skip
    assert dict(zip(near.indices.tolist(), near.group.tolist(), strict=True)) == {  # type: ignore[union-attr]
        1: 1, 13: 1, 16: 1, 2: 2, 14: 2, 3: 3, 15: 3,
    }  # fmt: skip
    assert "1 of 3 images in its group; the first is " in near.details[0]
    assert not len(found["leakage"].indices)
    assert not len(found["label-conflict"].indices)


def test_plain_pictures_are_no_duplicates(tmp_path: Path) -> None:
    rows: list[Row] = [
        (f"{i}.png", encoded(Image.new("RGB", (64, 64), (i, 2 * i, 90)), "PNG"), None)
        for i in range(10)
    ]
    assert (
        indices_by_issue(duplicates.find_duplicates(images_of(tmp_path, rows), DuplicatesConfig()))
        == {}
    )


def test_an_image_in_another_manifest_is_a_leak(tmp_path: Path) -> None:
    train: list[Row] = [(f"a{i}.jpg", jpeg(picture(i)), "x") for i in range(8)]
    test: list[Row] = [("b0.jpg", jpeg(picture(3)), "x"), ("b1.jpg", jpeg(picture(5), 50), "y")]
    test += [("b2.jpg", jpeg(picture(20)), "x"), ("b3.jpg", jpeg(picture(20)), "x")]
    found = {
        f.issue: f
        for f in duplicates.find_duplicates(images_of(tmp_path, train, test), DuplicatesConfig())
    }
    leak = found["leakage"]
    assert leak.indices.tolist() == [3, 5]
    assert leak.details[0] == f"also in {tmp_path}/m1.csv: {tmp_path}/b0.jpg"
    # the same picture as x and as y
    assert found["label-conflict"].indices.tolist() == [5, 9]
    assert "'x', among duplicates labeled x, y" in found["label-conflict"].details[0]


def scene(steps: int) -> list[Image.Image]:
    """Frames of which each is like the next, and the first unlike the last."""
    first, last = picture(0), picture(1)
    return [Image.blend(first, last, step / (steps - 1)) for step in range(steps)]


def test_a_leak_requires_two_similar_frames_of_a_scene(tmp_path: Path) -> None:
    frames = [(f"{i}.jpg", jpeg(frame), "x") for i, frame in enumerate(scene(9))]
    images = images_of(tmp_path, frames[:8], [("end.jpg", frames[8][1], "y")])
    found = {f.issue: f for f in duplicates.find_duplicates(images, DuplicatesConfig())}
    assert found["near-duplicates"].indices.tolist() == list(range(9))
    leaked = found["leakage"].indices.tolist()
    assert 7 in leaked
    assert 0 not in leaked
    assert found["label-conflict"].indices.tolist() == [*leaked, 8]


def test_dissimilar_frames_of_a_scene_are_kept(tmp_path: Path) -> None:
    frames = [(f"{i}.jpg", jpeg(frame), None) for i, frame in enumerate(scene(9))]
    images = images_of(tmp_path, frames)
    findings = list(duplicates.find_duplicates(images, DuplicatesConfig()))
    gone = find_dropped(images, findings, ["near-duplicates"])
    kept = np.flatnonzero(~gone)
    (near,) = (f for f in findings if f.issue == "near-duplicates")
    assert near.is_duplicate is not None
    assert 2 <= len(kept) < 9
    assert near.is_duplicate(kept, kept).sum() == len(kept)
    assert near.is_duplicate(np.flatnonzero(gone), kept).any(axis=1).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_vectors_have_no_similar_pair(rows: int) -> None:
    unit = np.ones((rows, 1), np.float32)
    assert len(find_similar_pairs(unit, DuplicatesConfig())) == 0


def test_small_images_are_duplicates_by_bytes_only(tmp_path: Path) -> None:
    digits = load_digits().images[:200].astype(np.uint8) * 16
    rows: list[Row] = [
        (f"{i}.png", encoded(Image.fromarray(digit), "PNG"), None) for i, digit in enumerate(digits)
    ]
    found = indices_by_issue(
        duplicates.find_duplicates(images_of(tmp_path, rows, [rows[3]]), DuplicatesConfig())
    )
    assert found == {"exact-duplicates": [3, 200], "leakage": [3]}


def test_recompressed_symmetric_drawings_are_found(tmp_path: Path) -> None:
    drawings = []
    for kind in ("ellipse", "rectangle", "line"):
        image = Image.new("RGB", (400, 400), "white")
        shape = getattr(ImageDraw.Draw(image), kind)
        shape((100, 140, 300, 260), fill="navy", **({"width": 40} if kind == "line" else {}))
        drawings.append(image)
    rows: list[Row] = [
        (f"{i}.png", encoded(image, "PNG"), None) for i, image in enumerate(drawings)
    ]
    rows += [
        (f"{i}.jpg", jpeg(image.resize((200, 200)), 50), None) for i, image in enumerate(drawings)
    ]
    found = {
        f.issue: f
        for f in duplicates.find_duplicates(images_of(tmp_path, rows), DuplicatesConfig())
    }
    near = found["near-duplicates"]
    assert dict(zip(near.indices.tolist(), near.group.tolist(), strict=True)) == {  # type: ignore[union-attr]
        0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2,
    }  # fmt: skip


def test_similar_embeddings_are_found(tmp_path: Path) -> None:
    vectors, _ = clusters(0, 400, classes=400)
    vectors[300] = 1.001 * vectors[5]
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), None) for i in range(400)]
    images = images_of(tmp_path, rows, embeddings=vectors)
    found = indices_by_issue(duplicates.find_duplicates(images, DuplicatesConfig(min_cosine=0.97)))
    assert found == {"similar": [5, 300]}


def test_similar_pairs_are_found_among_many_similar_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((8, 64))
    vectors = (centers[np.arange(400) % 8] + 0.33 * rng.standard_normal((400, 64))) * 3
    vectors[200:220] = vectors[:20] + 0.05 * rng.standard_normal((20, 64))
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), None) for i in range(400)]
    images = images_of(tmp_path, rows, embeddings=vectors)
    (finding,) = [
        f
        for f in duplicates.find_duplicates(images, DuplicatesConfig(min_cosine=0.99))
        if len(f.indices)
    ]
    groups = dict(zip(finding.indices.tolist(), finding.group.tolist(), strict=True))  # type: ignore[union-attr]
    together = [groups.get(i) == groups.get(200 + i) is not None for i in range(20)]
    assert sum(together) >= 18


@pytest.mark.parametrize(("cosine", "wanted"), [(0.955, 0.9), (0.97, 0.95), (0.99, 0.99)])
def test_pairs_near_the_limit_are_found_with_a_common_component(
    cosine: float, wanted: float
) -> None:
    rng = np.random.default_rng(0)
    common = np.zeros(256)
    common[0] = 1
    own = rng.standard_normal((2000, 256))
    own[:, 0] = 0
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    apart = rng.standard_normal((2000, 256))
    apart[:, 0] = 0
    apart -= (apart * own).sum(axis=1, keepdims=True) * own
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    turn = np.arccos(2 * cosine - 1)  # half of the length is common to all
    vectors = np.concatenate([common + own, common + np.cos(turn) * own + np.sin(turn) * apart])
    found = find_similar_pairs(normalize_embeddings(vectors), DuplicatesConfig(min_cosine=0.95))
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(pairs & {(i, 2000 + i) for i in range(2000)}) >= wanted * 2000


def conflicts_of(tmp_path: Path, labels: list[str | None]) -> dict[int, str]:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(0)), each) for i, each in enumerate(labels)]
    images = images_of(tmp_path, rows, delimiter=";")
    found = {f.issue: f for f in duplicates.find_duplicates(images, DuplicatesConfig())}
    conflict = found["label-conflict"]
    return dict(zip(conflict.indices.tolist(), conflict.details, strict=True))


def test_a_conflict_names_the_classes_in_which_duplicates_differ(tmp_path: Path) -> None:
    found = conflicts_of(tmp_path, ["cat;dog", "dog;cat", "cat;fox", None])
    assert found == {
        0: "positive here and negative in a duplicate: 'dog'; negative here and positive in a "
        "duplicate: 'fox'",
        1: "positive here and negative in a duplicate: 'dog'; negative here and positive in a "
        "duplicate: 'fox'",
        2: "positive here and negative in a duplicate: 'fox'; negative here and positive in a "
        "duplicate: 'dog'",
    }
    assert conflicts_of(tmp_path, ["cat;dog", "dog;cat", None]) == {}
    assert set(conflicts_of(tmp_path, ["cat", ";"])) == {0, 1}


def test_an_unknown_class_is_no_conflict(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(0)), "a;b") for i in range(3)]
    images = images_of(tmp_path, rows, delimiter=";")
    for targets, expected in (
        ([[1, 0], [-1, 0], [1, -1]], []),
        ([[1, 0], [-1, 1], [1, -1]], [0, 1]),
        ([[-1, -1], [1, 1], [0, 1]], [1, 2]),
    ):
        changed = replace(images, targets=np.array(targets, np.int8))
        found = {f.issue: f for f in duplicates.find_duplicates(changed, DuplicatesConfig())}
        assert found["label-conflict"].indices.tolist() == expected
