"""Manifests with anything in any column, images with any damage: one real run, a row for each.

The short form runs in `make test`; the long form is marked `chaos`. Both draw from a seed that is
printed, so that a failure can be run again.
"""

from __future__ import annotations

import datetime
import decimal
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import draw
from tests.e2e.outputs import assert_exactly_once
from tests.processes import run_here

ROWS = 2000
ALPHABETS = (
    "abc ", "0123456789.-+eE", ",;\t|", "\"'`\\", "\r\n", "\0\x01\x1f\x7f", "äßéñ", "日本語字",
    "\u202e\u200b\ufeff\u2028\x85", "🐈🏳️‍🌈", "%#?&*[]{}$~:/", "Nonaull",
)  # fmt: skip
WORDS = (
    "",
    "null",
    "NULL",
    "NaN",
    "None",
    "007",
    "1e5",
    "true",
    "NA",
    "#N/A",
    "-",
    " ",
    '"',
    "\ufffd",
)


def text(rng: random.Random) -> str:
    """Any text that UTF-8 can hold; short, since a manifest has thousands."""
    match rng.randrange(4):
        case 0:
            return rng.choice(WORDS)
        case 1:
            return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randrange(12)))
        case 2:
            points = (rng.randrange(0x110000) for _ in range(rng.randrange(8)))
            return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        case _:
            return f"value {rng.randrange(100)}"


def damaged_images(folder: Path, rng: random.Random, count: int) -> list[str]:
    """Writes image files, a third of them whole; their names."""
    sound: list[tuple[str, bytes]] = []
    for format in ("jpeg", "png", "gif", "webp", "bmp"):
        sink = io.BytesIO()
        draw("red", (40, 30), seed=len(sound)).save(sink, format)
        sound.append((format, sink.getvalue()))
    names = []
    for number in range(count):
        suffix, data = rng.choice(sound)
        body = bytearray(data)
        for _ in range(rng.randrange(3)):
            at = rng.randrange(min(len(body), rng.choice([20, 200, len(body)])) or 1)
            if rng.random() < 0.3:
                del body[at:]
            else:
                body[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))
        name = f"{number:04d}.{suffix}"
        (folder / name).write_bytes(body)
        names.append(name)
    return names


def paths(rng: random.Random, names: list[str]) -> list[str | None]:
    found: list[str | None] = []
    for _ in range(ROWS):
        if rng.random() < 0.7:
            found.append(rng.choice(names))
            continue
        path = text(rng)
        # nothing of the network, and no way out of the folder
        found.append(None if "://" in path or path.startswith(("/", "..")) else path)
    return found


def write_csv(path: Path, delimiter: str, columns: dict[str, list[Any]]) -> None:
    """By hand: Python's writer cannot distinguish an empty text from none."""

    def cell(value: str | None) -> str:
        return "" if value is None else '"' + value.replace('"', '""') + '"'

    with path.open("w", newline="", encoding="utf-8") as stream:
        stream.write(delimiter.join(cell(name) for name in columns) + "\n")
        for row in zip(*columns.values(), strict=True):
            stream.write(delimiter.join(cell(value) for value in row) + "\n")


def csv_manifest(folder: Path, rng: random.Random, names: list[str]) -> Path:
    # as the last column, a label: a row of nulls alone would be an empty line
    columns: dict[str, list[Any]] = {
        name: [text(rng) if rng.random() < 0.9 else None for _ in range(ROWS)]
        for name in ("note", "status.x", "row.", "sp ace", "ünï", 'quo"te', "new\nline", "a.b.c")
    }
    columns["path"] = paths(rng, names)
    columns["label"] = [rng.choice(["red", "green", text(rng)]) for _ in range(ROWS)]
    write_csv(folder / "m.csv", rng.choice(",;\t|"), columns)
    pq.write_table(
        pa.table({k: pa.array(v, pa.string()) for k, v in columns.items()}), folder / "wanted"
    )
    return folder / "m.csv"


def parquet_manifest(folder: Path, rng: random.Random, names: list[str]) -> Path:
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    kinds: dict[str, tuple[pa.DataType, Callable[[], Any]]] = {
        "note": (pa.string(), lambda: text(rng)),
        "large": (pa.large_string(), lambda: text(rng)),
        "bytes": (pa.binary(), lambda: rng.randbytes(rng.randrange(9))),
        "int": (pa.int64(), lambda: rng.randrange(-(2**63), 2**63)),
        "tiny": (pa.uint8(), lambda: rng.randrange(256)),
        "float": (pa.float64(), lambda: rng.choice([float("inf"), -0.0, rng.random()])),
        "bool": (pa.bool_(), lambda: rng.random() < 0.5),
        "time": (
            pa.timestamp("us", "UTC"),
            lambda: moment + datetime.timedelta(rng.random() * 9999),
        ),
        "day": (pa.date32(), moment.date),
        "money": (pa.decimal128(20, 3), lambda: decimal.Decimal(rng.randrange(10**15)).scaleb(-3)),
        "category": (pa.dictionary(pa.int32(), pa.string()), lambda: text(rng)),
        "nothing": (pa.null(), lambda: None),
        "status.x": (pa.string(), lambda: text(rng)),
        "meta": (
            pa.struct([("status", pa.string()), ("tags", pa.list_(pa.string()))]),
            lambda: {"status": text(rng), "tags": [text(rng) for _ in range(rng.randrange(3))]},
        ),
        "vector": (pa.list_(pa.float32(), 2), lambda: [rng.randrange(9), 0.5]),
        "map": (pa.map_(pa.string(), pa.int32()), lambda: [(text(rng), rng.randrange(9))]),
    }
    columns = {
        name: pa.array([make() if rng.random() < 0.9 else None for _ in range(ROWS)], kind)
        for name, (kind, make) in kinds.items()
    }
    columns["path"] = pa.array(paths(rng, names))
    columns["label"] = pa.array(
        [rng.choice(["red", "green", None, text(rng)]) for _ in range(ROWS)]
    )
    pq.write_table(pa.table(columns), folder / "m.parquet", row_group_size=rng.randrange(100, 900))
    pq.write_table(pa.table(columns), folder / "wanted")
    return folder / "m.parquet"


def check(format: str, seed: int, bundle: Path, folder: Path) -> None:
    print(f"{format} from seed {seed}")
    rng = random.Random(seed)
    folder.mkdir()
    names = damaged_images(folder, rng, 200)
    make = csv_manifest if format == "csv" else parquet_manifest
    manifest, output = make(folder, rng, names), folder / "out"
    done = run_here(
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--max-error-rate", 1, "--max-pixels", 1_000_000, "--chunk-rows", rng.choice([64, 100])),
        *("--scale.workers", 1),
        *("--part-rows", rng.choice([640, 1000, 5000])),
    )
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, ROWS)
    wanted = pq.read_table(folder / "wanted")
    assert found.select(wanted.schema.names).schema.equals(wanted.schema)
    for name in wanted.schema.names:
        assert found[name].to_pylist() == wanted[name].to_pylist(), name
    statuses = set(found["status"].to_pylist())
    assert {"ok", "missing", "truncated", "unreadable"} <= statuses
    good = [status == "ok" for status in found["status"].to_pylist()]
    assert [label is not None for label in found["predicted_label"].to_pylist()] == good


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_any_manifest_of_any_images_comes_back_row_for_row(
    format: str, joined: None, color_bundle: Path, tmp_path: Path
) -> None:
    check(format, random.randrange(10**6), color_bundle, tmp_path / format)


@pytest.mark.chaos
@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_any_manifest_of_any_images_comes_back_row_for_row_again_and_again(
    format: str, joined: None, color_bundle: Path, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    for number in range(10):
        check(format, seed + number, color_bundle, tmp_path / f"{format}-{number}")
