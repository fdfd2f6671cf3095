from __future__ import annotations

import base64
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data import image_files
from imgcls.data.containers import parquet_images
from imgcls.data.containers.load_cache import LoadCache
from imgcls.data.containers.parquet_images import ParquetImages
from imgcls.data.storage import filesystem
from imgcls.data.storage.readahead import UNLIMITED, BudgetFull, ByteBudget, ReadAllowance
from imgcls.errors import NotAnImage, StorageError, StorageMissing, StorageTooLarge

Values = list[bytes | None]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "_decoded", LoadCache(1 << 20, parquet_images._count_bytes))


def read(images: ParquetImages, name: str, row: int) -> bytes:
    return images.read(f"{name}/{row}/{images.get_version(name)}", UNLIMITED)


def read_or_none(images: ParquetImages, name: str, row: int) -> bytes | None:
    try:
        return read(images, name, row)
    except StorageMissing as error:
        return None if "is null" in str(error) else b"another error"


def draw_values(rng: random.Random) -> Values:
    """Few to many values, short to longer than a page, unique or repeated, with nulls or not."""
    rows, longest = rng.choice([1, 10, 300, 2000]), rng.choice([0, 10, 500, 4000])
    pool = [rng.randbytes(rng.randint(0, longest)) for _ in range(5)]
    share, is_repeated = rng.choice([0, 0, 0.2, 1]), rng.random() < 0.5

    def draw() -> bytes | None:
        if rng.random() < share:
            return None
        return rng.choice(pool) if is_repeated else rng.randbytes(rng.randint(0, longest))

    return [draw() for _ in range(rows)]


def draw_column(rng: random.Random, values: Values) -> pa.Array:
    kind = rng.choice(["binary", "large_binary", "struct"])
    if kind != "struct":
        return pa.array(values, kind)
    rows = [
        None if each is None and rng.random() < 0.5 else {"bytes": each, "path": "a.jpg"}
        for each in values
    ]
    return pa.array(rows, STRUCT)


def write_by_arrow(rng: random.Random, table: pa.Table, path: Path) -> None:
    options: dict[str, Any] = {"use_dictionary": rng.random() < 0.6}
    if not options["use_dictionary"] and rng.random() < 0.5:
        leaf = "a/b.bytes" if pa.types.is_struct(table.schema.field("a/b").type) else "a/b"
        options["column_encoding"] = {leaf: "DELTA_LENGTH_BYTE_ARRAY"}
    pq.write_table(
        table,
        path,
        compression=rng.choice(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        data_page_version=rng.choice(["1.0", "2.0"]),
        data_page_size=rng.choice([100, 10_000, 1 << 20]),
        write_batch_size=rng.choice([1, 16, 1024]),
        row_group_size=rng.choice([50, 1000, 1 << 20]),
        dictionary_pagesize_limit=rng.choice([1000, 100_000, 1 << 20]),
        write_page_index=rng.random() < 0.4,
        write_page_checksum=rng.random() < 0.5,
        **options,
    )


def write_by_duckdb(rng: random.Random, table: pa.Table, path: Path) -> None:
    options = {
        "compression": rng.choice(["uncompressed", "snappy", "gzip", "zstd", "lz4_raw"]),
        "row_group_size": rng.choice([2048, 100_000]),
        "parquet_version": rng.choice(["v1", "v2"]),
    }
    written = ", ".join(f"{name} {value}" for name, value in options.items())
    with duckdb.connect() as connection:
        connection.register("source", table)
        connection.execute(f"copy source to '{path}' (format parquet, {written})")


def write_by_polars(rng: random.Random, table: pa.Table, path: Path) -> None:
    polars = pytest.importorskip("polars")
    polars.from_arrow(table).write_parquet(
        path,
        compression=rng.choice(["uncompressed", "snappy", "gzip", "zstd", "lz4"]),
        row_group_size=rng.choice([50, 1000, None]),
        data_page_size=rng.choice([100, 10_000, None]),
    )


@pytest.mark.parametrize(("writer", "tables"), [("pyarrow", 60), ("duckdb", 12), ("polars", 12)])
def test_any_table_has_the_values_that_were_written(
    writer: str, tables: int, tmp_path: Path
) -> None:
    write = {"pyarrow": write_by_arrow, "duckdb": write_by_duckdb, "polars": write_by_polars}[
        writer
    ]
    rng = random.Random(7)
    for number in range(tables):
        values = draw_values(rng)
        path = tmp_path / f"{number}.parquet"
        table = pa.table({"label": range(len(values)), "a/b": draw_column(rng, values)})
        write(rng, table, path)
        images = ParquetImages(str(path))
        for row in [*range(0, len(values), 37), *rng.choices(range(len(values)), k=20)]:
            assert read_or_none(images, "a/b", row) == values[row], (number, row)
        assert images.find_null_rows("a/b").tolist() == [each is None for each in values], number


def write(path: Path, values: Any, **options: Any) -> ParquetImages:
    pq.write_table(pa.table({"image": values}), path, **options)
    return ParquetImages(str(path))


def test_many_threads_read_right_values_in_any_order(tmp_path: Path) -> None:
    rng = random.Random(1)
    values = [rng.randbytes(rng.randint(1000, 9000)) for _ in range(300)]
    images = write(tmp_path / "a.parquet", values, data_page_size=50_000, write_batch_size=4)
    rows = rng.choices(range(300), k=500)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: read(images, "image", row), rows)) == [
            values[row] for row in rows
        ]


def test_a_small_page_that_repeats_a_large_value_takes_little_memory(tmp_path: Path) -> None:
    large = bytes(1_000_000)
    images = write(tmp_path / "a.parquet", [large] * 100)
    before = pa.total_allocated_bytes()
    assert read(images, "image", 99) == large
    assert pa.total_allocated_bytes() - before < 10_000_000


def test_a_limit_holds_before_an_image_is_copied(tmp_path: Path) -> None:
    images = write(tmp_path / "a.parquet", [b"x" * 100, b"y" * 10])
    version = images.get_version("image")
    with pytest.raises(StorageTooLarge, match="column 'image', row 0: has 100 bytes, more than"):
        images.read(f"image/0/{version}", ReadAllowance(99))
    assert images.read(f"image/1/{version}", ReadAllowance(99)) == b"y" * 10
    assert images.get_size(f"image/1/{version}") == 10
    budget = ByteBudget(50)
    budget.try_reserve(0, 50)
    with pytest.raises(BudgetFull):
        images.read(f"image/0/{version}", ReadAllowance(1000, budget, read=1))


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(b"\xff\xfe image"),
        base64.urlsafe_b64encode(b"\xff\xfe image").rstrip(b"="),
        base64.encodebytes(b"\xff\xfe image").replace(b"i", b"\ti"),
    ],
    ids=["standard", "URL-safe without padding", "with spaces"],
)
def test_text_is_decoded_as_base64(tmp_path: Path, text: bytes) -> None:
    images = write(tmp_path / "a.parquet", [text.decode()])
    assert read(images, "image", 0) == b"\xff\xfe image"


@pytest.mark.parametrize("text", ["photos/1.jpg?", "ab=c", "a", "a+_b", "aGVsbG8=junk", "é"])
def test_other_text_is_not_an_image(tmp_path: Path, text: str) -> None:
    images = write(tmp_path / "a.parquet", [text])
    with pytest.raises(NotAnImage, match="column 'image', row 0: the text is not base64"):
        read(images, "image", 0)
    url = f"parquet://{tmp_path}/a.parquet#image/0/{images.get_version('image')}"
    [outcome] = image_files.read_ahead([url])
    assert isinstance(outcome, NotAnImage)


@pytest.mark.parametrize("member", ["image/9/{version}", "image/-1/{version}", "image/x/0", "a"])
def test_a_row_that_is_not_in_the_file_is_missing(tmp_path: Path, member: str) -> None:
    images = write(tmp_path / "a.parquet", [b"x"])
    with pytest.raises(StorageMissing):
        images.read(member.format(version=images.get_version("image")), UNLIMITED)


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("checksum", [False, True])
def test_a_damaged_file_gives_errors_and_no_other_image(
    tmp_path: Path, dictionary: bool, checksum: bool
) -> None:
    rng = random.Random(3)
    path = tmp_path / "a.parquet"
    values = [rng.randbytes(200) for _ in range(50)]
    options: dict[str, Any] = {"data_page_size": 1000, "write_batch_size": 5}
    write(path, values, use_dictionary=dictionary, write_page_checksum=checksum, **options)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    wrong = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(4, len(whole) - footer)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        images = ParquetImages(str(path))
        for row in (0, 20, 49):
            try:
                wrong += read(images, "image", row) != values[row]
            except StorageError as error:
                assert str(path) in str(error)  # noqa: PT017 it may also succeed
    # without checksums a damaged byte within an image is not seen
    assert wrong == 0 if checksum else wrong < 150 * 3


def test_a_file_that_is_no_parquet_file_is_an_error(tmp_path: Path) -> None:
    for data in (b"", b"PAR1", b"x" * 100, b"PAR1" + bytes(4) + b"\xff\xff\xff\x7fPAR1"):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(StorageError):
            ParquetImages(str(tmp_path / "a.parquet")).get_version("image")


def test_pages_in_use_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write(tmp_path / "a.parquet", [bytes([row]) * 1000 for row in range(100)])
    decode, calls = parquet_images.decode_segment, []
    together = threading.Barrier(4)

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return decode(*arguments)

    def read_rows(rows: range) -> list[bytes]:
        together.wait()
        return [read(images, "image", row) for row in rows]

    monkeypatch.setattr(parquet_images, "decode_segment", count)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(read_rows, [range(start, 100, 4) for start in range(4)])
        assert [len(part) for part in parts] == [25] * 4
    assert len(calls) == 1


@pytest.mark.parametrize("index", [False, True])
def test_a_store_gets_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: bool
) -> None:
    """Pages are read together; without an index, a small request per page finds them."""
    values = [np.random.default_rng(row).bytes(100_000) for row in range(300)]
    write(tmp_path / "a.parquet", values, data_page_size=1 << 20, write_batch_size=1,
          use_dictionary=False, write_page_index=index)  # fmt: skip
    monkeypatch.setattr(filesystem, "is_local", lambda url: False)
    monkeypatch.setattr(parquet_images, "open_ranges", lambda url: CountingFile(Path(url)))
    images = ParquetImages(str(tmp_path / "a.parquet"))
    assert [read(images, "image", row) for row in range(300)] == values
    file = images._file
    assert isinstance(file, CountingFile)
    large = [size for size in file.requests if size > 1 << 20]
    assert len(large) <= 30_000_000 // (4 << 20) + 1
    assert len(file.requests) - len(large) <= (2 if index else 32)


class CountingFile:
    """Parts of a file, as a store gives them."""

    version = "1"

    def __init__(self, path: Path) -> None:
        self.url, self._data = str(path), path.read_bytes()
        self.size = len(self._data)
        self.requests: list[int] = []

    def read(self, start: int, end: int) -> bytes:
        self.requests.append(end - start)
        return self._data[start:end]
