"""Shards of fetched images: Parquet files, or WebDataset archives with a table of all rows.

part-000000.parquet  rows with the column `image`; with archives, rows without it
part-000000.tar      files of the ok rows: NNNNNNNNN.jpg, .json, and .cls or .txt if labeled with
                     one class; several are a list in .json

The bytes depend on nothing but the rows and the images. The table is written last: a shard without
a table is not complete.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.curation.config import ShardFormat
from imgcls.curation.fetched_columns import (
    FACT_FIELDS,
    IMAGE_COLUMN,
    IMAGE_TYPE,
    ROW_COLUMN,
    STATUS_COLUMN,
    build_columns,
    read_columns,
)
from imgcls.curation.fetched_images import FetchedImage
from imgcls.data import formats
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.storage import filesystem
from imgcls.errors import OK, OutputError

MAX_GROUP_BYTES = 64_000_000
"""Size of the images of a row group from which on the next one starts."""
MAX_GROUP_ROWS = 1000

_HUGGING_FACE = json.dumps({"info": {"features": {IMAGE_COLUMN: {"_type": "Image"}}}})
"""Metadata by which Hugging Face datasets decode the column `image`."""
_SUFFIXES = {each.mime_types[0]: each.suffixes[0] for each in formats.IMAGE_FORMATS}
_OWN_FILES = re.compile(r"part-\d{6,}\.(parquet|tar)")

FetchedRow = tuple[FetchedImage, bytes | None]
"""The result of a row, and the bytes of an ok one."""


class ShardStore:
    """The shards in an output folder.

    schema: of the manifest rows, as they are written
    label:  column of class names
    labels: columns of several classes per image; of a column of text, archives have lists
    """

    def __init__(
        self,
        output: str,
        format: ShardFormat,
        schema: pa.Schema,
        label: str | None,
        labels: LabelColumns | None = None,
    ) -> None:
        self._output, self._format, self._label, self._labels = output, format, label, labels
        image = [pa.field(IMAGE_COLUMN, IMAGE_TYPE)] if format == "parquet" else []
        fields = [*schema, *image, *FACT_FIELDS]
        self._schema = pa.schema(fields, {"huggingface": _HUGGING_FACE} if image else None)

    def list_complete(self) -> set[int]:
        """The numbers of the complete shards."""
        names = filesystem.list_names(self._output)
        return {
            int(name.partition(".")[0].removeprefix("part-"))
            for name in names
            if _OWN_FILES.fullmatch(name) and name.endswith(".parquet")
        }

    def read_statuses(self, shard: int) -> list[str]:
        """The status of each row of a complete shard."""
        with filesystem.open_read(self._get_url(shard, "parquet")) as stream:
            column = pq.ParquetFile(stream).read([STATUS_COLUMN]).column(0)
        statuses: list[str] = column.to_pylist()
        return statuses

    def read_rows(self, shard: int) -> tuple[pa.Table, list[FetchedImage]]:
        """The manifest rows of a complete shard, and their results."""
        names = [name for name in self._schema.names if name != IMAGE_COLUMN]
        with filesystem.open_read(self._get_url(shard, "parquet")) as stream:
            table = pq.ParquetFile(stream).read(names)
        facts = table.select([field.name for field in FACT_FIELDS])
        rows = table.drop_columns(facts.schema.names)
        return rows, [read_columns(each) for each in facts.to_pylist()]

    def iter_images(self, shard: int) -> Iterator[bytes]:
        """The bytes of the ok rows of a complete shard, in order."""
        if self._format == "parquet":
            yield from self._iter_parquet_images(shard)
        else:
            yield from self._iter_tar_images(shard)

    def write(self, shard: int, rows: pa.Table, start: int, results: Iterable[FetchedRow]) -> None:
        """Write a shard, atomically.

        start:   manifest row of the first of `rows`
        results: one per row, in order
        """
        if self._format == "parquet":
            with self._open_table(shard) as writer:
                for group, facts, images in _group_rows(rows, start, results):
                    column = pa.array(images, IMAGE_TYPE)
                    writer.write_table(self._build_table(group, facts, column))
            return
        found: list[dict[str, object]] = []
        with filesystem.open_write(self._get_url(shard, "tar")) as stream:
            named = _convert_label_lists(rows, self._labels)
            found += _write_tar(stream, named, start, results, self._label)
        with self._open_table(shard) as writer:
            writer.write_table(self._build_table(rows, found, None))

    def list_own_files(self) -> list[str]:
        """The names of the files of all shards, also of incomplete ones."""
        return [name for name in filesystem.list_names(self._output) if _OWN_FILES.fullmatch(name)]

    def _get_url(self, shard: int, suffix: str) -> str:
        return filesystem.join(self._output, f"part-{shard:06d}.{suffix}")

    @contextlib.contextmanager
    def _open_table(self, shard: int) -> Iterator[pq.ParquetWriter]:
        url = self._get_url(shard, "parquet")
        with (
            filesystem.open_write(url) as stream,
            pq.ParquetWriter(
                stream, self._schema, compression="zstd", write_statistics=self._list_plain(),
                use_dictionary=self._list_plain(),
            ) as writer,
        ):  # fmt: skip
            yield writer

    def _list_plain(self) -> list[str]:
        """The columns other than the image, whose values are long and all different."""
        return [field.name for field in self._schema if field.name != IMAGE_COLUMN]

    def _build_table(
        self, rows: pa.Table, facts: Sequence[dict[str, object]], image: pa.Array | None
    ) -> pa.Table:
        columns = list(rows.columns)
        if image is not None:
            columns.append(image)
        columns += [pa.array([row[f.name] for row in facts], f.type) for f in FACT_FIELDS]
        return pa.table(columns, schema=self._schema)

    def _iter_parquet_images(self, shard: int) -> Iterator[bytes]:
        with filesystem.open_read(self._get_url(shard, "parquet")) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, [IMAGE_COLUMN, STATUS_COLUMN])
                for row in table.to_pylist():
                    if row[STATUS_COLUMN] == OK:
                        yield row[IMAGE_COLUMN]["bytes"]

    def _iter_tar_images(self, shard: int) -> Iterator[bytes]:
        """An interrupted retry may have left an archive with more images than its table has."""
        url = self._get_url(shard, "tar")
        with filesystem.open_read(self._get_url(shard, "parquet")) as stream:
            table = pq.ParquetFile(stream).read([ROW_COLUMN, STATUS_COLUMN])
        wanted = [row[ROW_COLUMN] for row in table.to_pylist() if row[STATUS_COLUMN] == OK]
        with filesystem.open_read(url) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = iter(tar)
            for row in wanted:
                name = f"{format_key(row)}.jpg"
                member = next((each for each in members if each.name == name), None)
                body = None if member is None else tar.extractfile(member)
                if body is None:
                    raise OutputError(
                        f"{url}: has no {name}, which its table lists as ok; remove "
                        f"{self._get_url(shard, 'parquet')} and rerun to fetch the shard again"
                    )
                yield body.read()


def format_key(row: int) -> str:
    """The name of a row's files, without suffix."""
    return f"{row:09d}"


def _group_rows(
    rows: pa.Table, start: int, results: Iterable[FetchedRow]
) -> Iterator[tuple[pa.Table, list[dict[str, object]], list[dict[str, object] | None]]]:
    """Row groups of a Parquet shard: manifest rows, facts, and images, bounded in bytes."""
    facts: list[dict[str, object]] = []
    images: list[dict[str, object] | None] = []
    size = done = 0
    for row, (image, data) in enumerate(results, start):
        facts.append(build_columns(row, image))
        name = format_key(row) + _SUFFIXES.get(image.type or "", "")
        images.append(None if data is None else {"bytes": data, "path": name})
        size += len(data or b"")
        if size >= MAX_GROUP_BYTES or len(facts) >= MAX_GROUP_ROWS:
            yield rows.slice(done, len(facts)), facts, images
            done += len(facts)
            facts, images, size = [], [], 0
    if facts:
        yield rows.slice(done), facts, images


def _convert_label_lists(rows: pa.Table, labels: LabelColumns | None) -> pa.Table:
    """Rows with lists in place of text with several class names, as JSON can have them."""
    if labels is None or labels.lists is None:
        return rows
    index = rows.schema.get_field_index(labels.lists)
    return rows.set_column(index, labels.lists, labels.read_names(rows))


def _write_tar(
    stream: IO[bytes], rows: pa.Table, start: int, results: Iterable[FetchedRow], label: str | None
) -> list[dict[str, object]]:
    """Write the archive of a shard; returns the facts of all its rows."""
    facts = []
    format_label = _choose_label_format(rows, label)
    # all images are named .jpg: readers such as Hugging Face datasets refuse samples whose suffixes
    # differ, and decoders look at the bytes
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for index, (image, data) in enumerate(results):
            row = start + index
            facts.append(build_columns(row, image))
            if data is None:
                continue
            columns = rows.slice(index, 1).to_pylist()[0] | facts[-1]
            body = json.dumps(_to_json(columns), ensure_ascii=False).encode()
            files = {"jpg": data, "json": body, **format_label(index)}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{format_key(row)}.{suffix}")  # of mode 644 and time 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return facts


def _choose_label_format(rows: pa.Table, label: str | None) -> Callable[[int], dict[str, bytes]]:
    """The label file of a row, by index: .cls for integers, else .txt with the class name.

    A row without a class name has an empty .txt, since all samples need the same suffixes.
    """
    if label is None:
        return lambda index: {}
    column = rows.column(label)
    texts = normalize_labels(column).to_pylist()
    if pa.types.is_integer(column.type):
        return lambda index: {} if texts[index] is None else {"cls": texts[index].encode()}
    return lambda index: {"txt": (texts[index] or "").encode()}


def _to_json(value: Any) -> Any:
    """A value of an Arrow table as JSON has it: bytes in base64, times in ISO 8601, NaN as null."""
    if isinstance(value, dict):
        return {str(name): _to_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
