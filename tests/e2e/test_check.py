"""`manifest check`, `stats` and `build` by their commands, with Ray, on S3 where storage matters.

On disk the same commands run in `test_pages.py`, and the functions in `tests/curation`.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem
from tests.browser import opened
from tests.conftest import save, write_manifest
from tests.curation.pictures import picture
from tests.processes import RayCluster, imgcls, run_here, started, wait_for

pytestmark = pytest.mark.timeout(600)


ON_S3 = pytest.mark.parametrize("place", ["s3"], indirect=True)


def data_set(folder: Path) -> tuple[Path, Path]:
    """Train and test manifests with known faults: 44 and 10 images."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    train = []
    for i in range(40):
        save(picture(i), images / f"{i}.jpg", quality=90)
        train.append((f"images/{i}.jpg", "even" if i % 2 == 0 else "odd"))
    (images / "copy.jpg").write_bytes((images / "0.jpg").read_bytes())
    save(picture(1), images / "resaved.jpg", quality=40)
    (images / "cut.jpg").write_bytes((images / "2.jpg").read_bytes()[:2000])
    save(Image.new("RGB", (320, 240)), images / "black.jpg")
    train += [(f"images/{name}.jpg", "even") for name in ("copy", "resaved", "cut", "black")]
    test = []
    for i in range(100, 109):
        save(picture(i), images / f"{i}.jpg", quality=90)
        test.append((f"images/{i}.jpg", "odd"))
    save(picture(7).resize((160, 120)), images / "leaked.jpg", quality=80)
    test.append(("images/leaked.jpg", "odd"))
    header = ("path", "label")
    return write_manifest(folder / "train.csv", train, header), write_manifest(
        folder / "test.csv", test, header
    )


def issues_in(output: Path) -> dict[str, list[int]]:
    with (output / "issues.parquet").open("rb") as stream:
        table = pq.read_table(stream)
    found: dict[str, list[int]] = {}
    for row in table.to_pylist():
        if row["manifest"].endswith("train.csv"):
            found.setdefault(row["issue"], []).append(row["row"])
    return {issue: sorted(rows) for issue, rows in found.items()}


@ON_S3
def test_a_check_finds_what_is_wrong_shows_it_and_writes_a_manifest_without_it(
    place: Path, joined: None, placed_bundle: Path, tmp_path: Path
) -> None:
    train, test = data_set(place)
    clean = place / "clean.parquet"
    done = run_here(
        *("manifest", "check", train, "--against", test, "--output", clean),
        *("--drop", "exact-duplicates,unreadable,leakage", "--fail-on", "leakage"),
        *("--model", placed_bundle),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "1 images with leakage, such as " in done.stderr
    assert "layout  this job has no stage for GPUs" in done.stdout
    found = issues_in(place / "clean")
    assert {issue: rows for issue, rows in found.items() if issue not in BY_MODEL} == {
        "exact-duplicates": [0, 40],
        "near-duplicates": [1, 7, 41],
        "leakage": [7],
        "label-conflict": [1, 41],
        "unreadable": [42],
        "near-black": [43],
    }
    assert "label-error" in found
    check_clean_manifest(clean)
    check_page(place / "clean" / "report.html", tmp_path)


BY_MODEL = ("similar", "label-error", "outlier")
"""Issues that need a model."""


def check_clean_manifest(clean: Path) -> None:
    """The manifest has the other images, by paths that every command resolves."""
    manifest = open_manifest(ManifestConfig(path=str(clean)))
    paths = [
        path for batch in manifest.batches() for path in batch[manifest.path_column].to_pylist()
    ]
    assert len(paths) == 41
    assert manifest.label_column == "label"
    assert not [path for path in paths if path.endswith(("/7.jpg", "/copy.jpg", "/cut.jpg"))]
    for path in paths:
        assert (path.endswith(f"images/{Path(path).name}") and "://" in path) or path[0] == "/"
        assert filesystem.exists(manifest.resolve(path))


def check_page(report: Path, folder: Path) -> None:
    """The page, saved to disk, shows the issues and requests nothing."""
    saved = folder / "report.html"
    saved.write_bytes(report.read_bytes())
    with opened(saved.as_uri()) as page:
        text = page.page.inner_text("main")
        for words in ("44 rows checked", "near-duplicates", "leakage", "label-error", "unreadable"):
            assert words in text
        assert page.page.locator("#leakage ~ ul img").first.get_attribute("src")
        page.screenshot("check")
        assert page.errors == []
        assert all(url.startswith(("file:", "data:")) for url in page.requests)


@pytest.mark.slow
def test_a_killed_check_resumes(tmp_path: Path, cluster: RayCluster) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        save(picture(i).resize((2400, 1800)), images / f"{i}.png")
    rows = [(f"images/{i % 8}.png",) for i in range(400)]
    manifest, output = write_manifest(tmp_path / "m.csv", rows, ("path",)), tmp_path / "out"
    order = ("manifest", "check", manifest, "--output", output)
    staged = "_looks/0/_staging/part-*/chunk-*"
    with started(*order, env=cluster.environment()) as driver:
        wait_for(lambda: len(list(output.glob(staged))) >= 2, 120)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    there = sum(pq.read_metadata(file).num_rows for file in output.glob(staged))
    assert not (output / "issues.parquet").exists()
    done = imgcls(*order, env=cluster.environment())
    assert done.returncode == 0, done.stderr
    kept = re.search(r"(\d+) of 400 rows are done", done.stdout)
    assert kept is not None, done.stdout
    assert 0 < there <= int(kept[1])
    assert issues_in_all(output, "exact-duplicates") == 400
    # a finished check starts over when it is run again: the images may have been fixed
    assert not (output / "_looks").exists()


def issues_in_all(output: Path, issue: str) -> int:
    return json.loads((output / "summary.json").read_text())["issues"][issue]


def test_a_data_set_is_described_in_numbers_and_pictures(tmp_path: Path, joined: None) -> None:
    train, _ = data_set(tmp_path)
    output = tmp_path / "stats"
    done = run_here("manifest", "stats", train, "--output", output)
    assert done.returncode == 0, done.stderr
    stats = json.loads((output / "stats.json").read_text())
    assert stats["status"] == {"ok": 43, "truncated": 1}
    assert stats["classes"] == {"even": 24, "odd": 20}
    assert stats["formats"] == {"JPEG": 43}
    assert stats["width"]["50"] == 320
    with opened(f"file://{output}/stats.html") as page:
        assert page.page.locator("h2", has_text="even").count() == 1
        assert page.page.locator("ul.gallery img").count() == 24
        page.screenshot("stats")
        assert page.errors == []


@ON_S3
def test_a_manifest_is_built_with_what_its_images_are(place: Path, joined: None) -> None:
    data_set(place)
    output = place / "built"
    done = run_here(
        *("manifest", "build", place / "images", "--output", output),
        *("--contents", "--perceptual"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (output / "manifest.parquet").open("rb") as stream:
        rows = {Path(row["path"]).name: row for row in pq.read_table(stream).to_pylist()}
    assert len(rows) == 54
    assert rows["0.jpg"]["digest"] == rows["copy.jpg"]["digest"] != rows["1.jpg"]["digest"]
    assert (rows["0.jpg"]["format"], rows["0.jpg"]["width"], rows["0.jpg"]["height"]) == (
        "JPEG", 320, 240,
    )  # fmt: skip
    assert (rows["cut.jpg"]["status"], rows["cut.jpg"]["width"]) == ("truncated", None)
    assert len(rows["0.jpg"]["hash"]) == 64
    assert sorted(path.name for path in output.iterdir()) == ["manifest.parquet"]
    done = run_here("manifest", "split", output, "--output", place / "split")
    assert done.returncode == 0, done.stderr


def test_a_table_in_another_shape_becomes_a_manifest(tmp_path: Path) -> None:
    rows = [("a.jpg", "cat", "x"), ("b.jpg", "dog", "y")]
    table = write_manifest(tmp_path / "t.csv", rows, ("file", "species", "site"))
    output = tmp_path / "out"
    done = run_here(
        *("manifest", "build", table, "--path-column", "file", "--label-column", "species"),
        *("--output", output),
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(output / "manifest.parquet").to_pylist() == [
        {"path": str(tmp_path / name), "label": label, "site": site} for name, label, site in rows
    ]
