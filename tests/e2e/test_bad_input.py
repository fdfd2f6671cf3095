"""Everything that real folders hold, in one real run: a row each, with the reason or the answer."""

from __future__ import annotations

import csv
import io
import os
import socket
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from upath import UPath

from imgcls.models import zoo as networks
from imgcls.models.bundle import BundleSpec, save_bundle
from tests.conftest import copied, draw
from tests.e2e.outputs import assert_exactly_once, parquet, success
from tests.processes import ALONE, REPOSITORY, run_here
from tests.s3 import REAL

LONGEST = {True: "a" * 251, False: "a" * 150}
"""A disk's names end at 255 bytes; Ceph over objects in memory refuses keys of 260."""

WRITE_ONLY = Path("/proc/sys/vm/drop_caches")
"""The kernel refuses to read it even to root, whom file modes do not bind."""


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds nothing of it."""

    def block(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", b"") + block(b"IEND", b"")


def save_untrained(folder: Path, classes: list[str], temperature: float = 1.0) -> Path:
    architecture = networks.resolve_architecture("small_cnn", {"width": 8})
    torch.manual_seed(0)
    spec = BundleSpec(
        architecture=architecture,
        classes=classes,
        preprocess=networks.get_default_preprocess(architecture),
        temperature=temperature,
    )
    save_bundle(str(folder), spec, networks.build_network(architecture, len(classes)).state_dict())
    return folder


@pytest.fixture(scope="module")
def sharp_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network so cold that even untrained it separates images."""
    folder = tmp_path_factory.mktemp("sharp") / "bundle"
    return save_untrained(folder, ["red", "green", "blue"], temperature=0.01)


@pytest.fixture(scope="module")
def digit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "bundle"
    return save_untrained(folder, [str(digit) for digit in range(10)])


@dataclass
class Zoo:
    """A folder of files, and the expected status of each of its rows."""

    folder: Path
    rows: list[tuple[str | None, str]] = field(default_factory=list)
    alike: dict[int, tuple[int, float]] = field(default_factory=dict)

    def add(
        self, path: str | None, status: str = "ok", *, like: int = -1, within: float = 0
    ) -> int:
        """A row; `like` is the row whose scores it must have, up to `within`."""
        self.rows.append((path, status))
        if like >= 0:
            self.alike[len(self.rows) - 1] = (like, within)
        return len(self.rows) - 1

    def save(
        self,
        image: Image.Image,
        name: str,
        *,
        like: int = -1,
        within: float = 0,
        **options: Any,
    ) -> int:
        self.put(name, encoded(image, Path(name).suffix, **options))
        return self.add(name, like=like, within=within)

    def write(self, name: str, data: bytes, status: str) -> int:
        self.put(name, data)
        return self.add(name, status)

    def put(self, name: str, data: bytes) -> None:
        """A file of exactly this name."""
        if self.on_disk:
            file = Path(self.folder, name)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        else:
            folder = UPath(self.folder)
            folder.fs.pipe_file(f"{folder.path}/{name}", data)

    @property
    def on_disk(self) -> bool:
        return isinstance(self.folder, os.PathLike)


def encoded(image: Image.Image, suffix: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, Image.registered_extensions()[suffix], **options)
    return sink.getvalue()


def fill_with_odd_but_good(zoo: Zoo) -> None:
    """Images in many formats, each with the plain PNG that it must equal."""
    red, blue = draw("red", seed=1), draw("blue", seed=2)
    first = zoo.save(red, "red.png")
    original = encoded(red, ".png")
    for name in (
        "фото 🐈.png", "e\u0301.png", "\u00e9.png", "spa ce.png", " lead and trail ",
        "per%20cent.png", "100%.png", "ha#sh.png", "que?ry=1&x.png", "st*r.png", "[bracket].png",
        "com,ma.png", 'quo"te.png', "new\nline.png", "back\\slash.png", "-dash.png", "~tilde",
        "$HOME.png", "semi;colon.png", LONGEST[zoo.on_disk] + ".png", "no extension", "wrong.txt",
        ".hidden.png", "s3:/not a url.png",
    ):  # fmt: skip
        if "\n" in name and not zoo.on_disk and REAL is None:
            continue  # moto takes no such key; real stores do
        zoo.put(name, original)
        zoo.add(name, like=first)
    for path in ("red.png", "red.png", str(zoo.folder / "red.png")):
        zoo.add(path, like=first)
    if zoo.on_disk:
        (zoo.folder / "deep" / "er").mkdir(parents=True)
        (zoo.folder / "link.png").symlink_to(zoo.folder / "red.png")
        for path in ("./red.png", "deep/../red.png", "link.png", f"file://{zoo.folder}/red.png"):
            zoo.add(path, like=first)

    zoo.save(red, "red.bmp", like=first)
    zoo.save(red, "red.tiff", like=first)
    zoo.save(red, "lossless.webp", lossless=True, like=first)
    zoo.save(red.convert("CMYK"), "cmyk.tiff", like=first)
    zoo.save(red.convert("RGBA"), "opaque.png", like=first)
    upright = Image.Exif()
    upright[0x0112] = 6
    turned = red.transpose(Image.Transpose.ROTATE_90)
    zoo.save(turned, "turned by exif.png", exif=upright, like=first)
    zoo.save(red.convert("CMYK"), "cmyk.jpg", quality=98, like=first, within=1e-3)
    zoo.save(turned, "turned by exif.jpg", quality=98, exif=upright, like=first, within=1e-3)
    zoo.save(red, "progressive.jpg", quality=98, progressive=True, like=first, within=1e-3)

    few = blue.quantize(4)
    fourth = zoo.save(few.convert("RGB"), "four colors.png")
    zoo.save(few, "palette.png", like=fourth)
    zoo.save(few, "animated.gif", save_all=True, append_images=[red.quantize(4)], like=fourth)
    index = np.asarray(few)
    over_white = np.asarray(few.convert("RGB")).copy()
    over_white[index == 1] = 255
    white = zoo.save(Image.fromarray(over_white), "over white.png")
    zoo.save(few, "palette with transparency.png", transparency=1, like=white)

    grey = np.asarray(blue.convert("L"))
    grey_row = zoo.save(Image.fromarray(grey), "grey.png")
    zoo.save(Image.fromarray(grey.astype(np.uint16) * 257), "sixteen bits.png", like=grey_row)

    zoo.save(Image.new("RGB", (1, 1), (200, 10, 10)), "1x1.png")
    zoo.save(Image.new("RGB", (20_000, 1), (200, 10, 10)), "20000x1.png")
    zoo.save(Image.new("RGB", (1, 20_000), (200, 10, 10)), "1x20000.jpg")


def fill_with_bad(zoo: Zoo) -> None:
    good, jpeg, webp = (encoded(draw("green"), suffix) for suffix in (".png", ".jpg", ".webp"))
    zoo.add("nowhere.jpg", "missing")
    zoo.add("red.png/below a file.png", "unreadable" if zoo.on_disk else "missing")
    zoo.add(None, "missing")
    zoo.add("per cent.png", "missing")  # `per%20cent.png` is another name
    zoo.write("empty.jpg", b"", "empty")
    zoo.write("cut.jpg", jpeg[: len(jpeg) // 2], "truncated")
    zoo.write("cut.png", good[: len(good) // 2], "truncated")
    zoo.write("cut.webp", webp[: len(webp) // 2], "truncated")
    zoo.write("page.jpg", b"<!DOCTYPE html><title>404</title>" * 50, "not_an_image")
    zoo.write("table.png", b"path,label\n", "not_an_image")
    zoo.write("zeros.jpg", bytes(10_000), "not_an_image")
    zoo.write("bomb.png", png_header(50_000, 50_000), "too_large")
    zoo.add("foo://x", "unreadable")
    zoo.add("http://[", "unreadable")
    zoo.add("data:,", "empty")
    if zoo.on_disk:
        fill_with_what_only_disks_hold(zoo, good)


def fill_with_what_only_disks_hold(zoo: Zoo, good: bytes) -> None:
    zoo.add(".", "unreadable")
    zoo.add("deep", "unreadable")
    zoo.add("b" * 300, "unreadable")
    (zoo.folder / "dangling.png").symlink_to(zoo.folder / "gone.png")
    zoo.add("dangling.png", "missing")
    (zoo.folder / "loop.png").symlink_to(zoo.folder / "loop.png")
    zoo.add("loop.png", "unreadable")
    os.mkfifo(zoo.folder / "fifo.png")  # no writer: opening it would block
    zoo.add("fifo.png", "unreadable")
    for device in ("/dev/zero", "/dev/random", "/dev/null"):
        zoo.add(device, "unreadable")
    with (zoo.folder / "sparse.png").open("wb") as stream:
        stream.truncate(10 << 30)
    zoo.add("sparse.png", "too_large")
    zoo.add("/proc/self/maps", "not_an_image")
    if WRITE_ONLY.exists():
        zoo.add(str(WRITE_ONLY), "forbidden")
    (zoo.folder / "locked.png").write_bytes(good)
    (zoo.folder / "locked.png").chmod(0)
    zoo.add("locked.png", "ok" if os.geteuid() == 0 else "forbidden")


def scores(row: dict[str, object]) -> dict[str, float]:
    labels, values = row["topk_labels"], row["topk_scores"]
    assert isinstance(labels, list)
    assert isinstance(values, list)
    return dict(zip(labels, values, strict=True))


def test_everything_that_folders_hold_is_a_row_with_its_reason_or_its_answer(
    joined: None, sharp_bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo(place / "zoo")
    zoo.folder.mkdir()
    fill_with_odd_but_good(zoo)
    fill_with_bad(zoo)
    if zoo.on_disk:
        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(zoo.folder)  # a socket's path must be short
            listener.bind("socket.png")
        zoo.add("socket.png", "unreadable")
    with (zoo.folder / "m.parquet").open("wb") as stream:
        pq.write_table(pa.table({"path": [path for path, _ in zoo.rows]}), stream)
    output = place / "out"
    bundle = copied(sharp_bundle, place / "bundle")
    done = run_here(
        *("predict", "--manifest", zoo.folder / "m.parquet", "--model", bundle),
        *("--output", output, "--precision", "fp32", "--max-error-rate", 0.9, "--top-k", 3, *ALONE),
    )
    assert done.returncode == 0, done.stderr
    rows = assert_exactly_once(output, len(zoo.rows)).to_pylist()
    assert [(row["path"], row["status"]) for row in rows] == zoo.rows
    for row in rows:
        assert (row["error"] is None) == (row["status"] == "ok")
        assert (row["predicted_label"] is None) == (row["status"] != "ok")
    for row, (like, within) in zoo.alike.items():
        found, wanted = rows[row], rows[like]
        assert found["predicted_label"] == wanted["predicted_label"], found["path"]
        assert scores(found) == pytest.approx(scores(wanted), abs=within or 5e-5), found["path"]
        assert (found["width"], found["height"]) == (64, 48), found["path"]
    # the comparison above means something: pictures that differ get scores that differ
    plain = sorted({rows[like]["confidence"] for like, _ in zoo.alike.values()})
    assert min(np.diff(plain)) > 1e-4

    failed = [(row["row"], row["path"], row["status"]) for row in rows if row["status"] != "ok"]
    listed = parquet(output / "metrics" / "errors.parquet").to_pylist()
    assert [(row["row"], row["path"], row["status"]) for row in listed] == failed
    assert success(output)["status"] == {
        status: sum(1 for _, s in zoo.rows if s == status) for status in {s for _, s in zoo.rows}
    }


DIRTY = {
    "missing": "missing",
    "null path": "missing",
    "a folder": "unreadable",
    "empty": "empty",
    "truncated PNG": "truncated",
    "truncated JPEG": "truncated",
    "a web page named .jpg": "not_an_image",
    "50,000 x 50,000 pixels announced": "too_large",
    "damaged bytes": "unreadable",
}


def test_the_committed_dirty_manifest_shows_every_status_it_promises(
    joined: None, digit_bundle: Path, place: Path
) -> None:
    manifest = copied(REPOSITORY / "manifests", place / "manifests") / "dirty.csv"
    with manifest.open(newline="", encoding="utf-8") as stream:
        notes = [row["note"] for row in csv.DictReader(stream)]
    assert set(DIRTY) < set(notes)
    output = place / "out"
    bundle = copied(digit_bundle, place / "bundle")
    done = run_here(
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--max-error-rate", 0.5),
    )
    assert done.returncode == 0, done.stderr
    assert "1 label not among the classes of the model ('one')" in done.stdout
    rows = assert_exactly_once(output, len(notes)).to_pylist()
    promised = DIRTY if isinstance(place, os.PathLike) else DIRTY | {"a folder": "missing"}
    assert {row["note"]: row["status"] for row in rows} == {
        note: promised.get(note, "ok") for note in notes
    }
