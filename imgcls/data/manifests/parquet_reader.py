"""Parquet reader: streams Arrow record batches; errors name the file and the fix."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data.manifests.class_labels import convert_class_labels, convert_label_types
from imgcls.data.manifests.foreign_formats import PARQUET_MAGIC, detect_foreign_format
from imgcls.data.manifests.image_columns import MemberColumn, is_image_struct
from imgcls.data.manifests.options import ImageColumns, KeyNames, ReadOptions
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, one_line

READ_BATCH_ROWS = 16_384


def read_parquet_schema(file: str, options: ReadOptions) -> pa.Schema:
    """The columns of a Parquet file; raises ManifestError where a type cannot be read.

    Columns of images are as in the file.
    """
    parquet = _open_parquet(file, options.keys)
    try:
        return convert_label_types(parquet.schema_arrow, options.list_labels).remove_metadata()
    except pa.ArrowException as error:
        raise _build_type_error(file, error) from error


def read_parquet_batches(file: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Stream the rows of a Parquet file, in order; raises ManifestError where it is damaged."""
    try:
        parquet = _open_parquet(file, options.keys)
        _check_int96_range(file, parquet)
        schema = parquet.schema_arrow
        converted = _ImageColumnReader(file, schema, options.images)
        for batch in parquet.iter_batches(READ_BATCH_ROWS, columns=converted.names):
            if batch.num_rows:
                batch.validate(full=True)  # Parquet readers do not check that text is UTF-8
                yield convert_class_labels(
                    converted.convert(batch), schema, f"manifest {file}", options.list_labels
                )
    except pa.ArrowNotImplementedError as error:
        raise _build_type_error(file, error, _describe_nested_dictionary(file)) from error
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"manifest {file}: {one_line(error)}; the file is damaged") from error


class _ImageColumnReader:
    """Reads a file without its columns of images, see `ImageColumns`.

    names: the columns to read from the file; None for all
    """

    def __init__(self, file: str, schema: pa.Schema, images: ImageColumns) -> None:
        self._images = images
        self._members: MemberColumn | None = None
        self.names: list[str] | None = None
        self._has_paths = False
        if not images.contained:
            return
        names = [name for name in schema.names if name not in images.left_out]
        if images.name is not None:
            self._members = MemberColumn(file, images.name)
            self._has_paths = is_image_struct(schema.field(images.name).type)
            at = names.index(images.name)
            names[at : at + 1] = [f"{images.name}.path"] if self._has_paths else []
        self.names = names
        self._schema = images.convert_schema(schema)

    def convert(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The columns of the manifest, for those that were read."""
        if self._members is None:
            return batch
        name, copy = self._images.name, self._images.path_copy
        paths = None
        if self._has_paths:
            paths = pc.struct_field(batch.column(name), "path").cast(pa.string())
        urls = self._members.build_next(paths, batch.num_rows)
        own = {name: urls, copy: paths}
        columns = [own[each] if each in own else batch.column(each) for each in self._schema.names]
        return pa.record_batch(columns, schema=self._schema)


def _check_int96_range(file: str, parquet: pq.ParquetFile) -> None:
    """Refuse INT96 times outside the years 1677 to 2262, which Arrow would read as other times."""
    columns = [parquet.schema.column(at) for at in range(len(parquet.schema))]
    names = [column.path for column in columns if column.physical_type == "INT96"]
    if not names:
        return
    nanoseconds = pq.ParquetFile(filesystem.open_read(file)).iter_batches(
        READ_BATCH_ROWS, columns=names
    )
    microseconds = pq.ParquetFile(
        filesystem.open_read(file), coerce_int96_timestamp_unit="us"
    ).iter_batches(READ_BATCH_ROWS, columns=names)
    for one, other in zip(nanoseconds, microseconds, strict=True):
        for name, nanos, micros in zip(one.schema.names, one.columns, other.columns, strict=True):
            if pa.types.is_nested(nanos.type):
                continue
            cut = nanos.cast(micros.type, safe=False).cast(pa.int64())
            gap = pc.abs(pc.subtract(cut, micros.cast(pa.int64())))
            if pc.any(pc.greater(gap, 1)).as_py():
                raise ManifestError(
                    f"manifest {file}: column {name!r} has times outside the years 1677 to 2262, "
                    "which INT96 timestamps cannot be read with; write them as TIMESTAMP_MICROS "
                    "(spark.sql.parquet.outputTimestampType)"
                )


def _build_type_error(file: str, error: Exception, example: str = "") -> ManifestError:
    return ManifestError(
        f"manifest {file}: has a column of a type that cannot be read{example} "
        f"({one_line(error)}); leave it out, or write it as another type"
    )


def _describe_nested_dictionary(file: str) -> str:
    """The first column with a dictionary inside a nested type, which Arrow cannot read."""
    for field in pq.read_schema(filesystem.open_read(file)):
        if pa.types.is_nested(field.type) and "dictionary" in str(field.type):
            return f", such as {field.name!r} (a dictionary inside a list, struct or map)"
    return ""


def _open_parquet(file: str, keys: KeyNames) -> pq.ParquetFile:
    stream = filesystem.open_read(file)
    with filesystem.translate_os_errors(file):
        head = stream.read(32)
        stream.seek(0)
    found = detect_foreign_format(head, keys)
    if found is not None and not head.startswith(PARQUET_MAGIC):
        raise ManifestError(f"manifest {file}: is not a Parquet file but {found}")
    try:
        return pq.ParquetFile(stream, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(
            f"manifest {file}: not a Parquet file, or a damaged one ({one_line(error)}); if it is "
            f"CSV, pass {keys.option('format')} csv"
        ) from error
