"""Parquet files as a stream of Arrow record batches, with errors that name the file and the fix."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data import csv_reader, filesystem
from imgcls.errors import ManifestError

READ_BATCH_ROWS = 16_384


def read_parquet_schema(file: str) -> pa.Schema:
    """The columns of a Parquet file; raises ManifestError where a type cannot be read."""
    parquet = _open_parquet(file)
    try:
        return parquet.schema_arrow.remove_metadata()
    except pa.ArrowException as error:
        raise ManifestError(
            f"manifest {file}: has a column of a type that cannot be read "
            f"({_one_line(error)}); leave "
            "it out, or write it as another type"
        ) from error


def read_parquet_batches(file: str) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, in order; raises ManifestError where it is damaged."""
    try:
        parquet = _open_parquet(file)
        _check_int96_range(file, parquet)
        for batch in parquet.iter_batches(batch_size=READ_BATCH_ROWS):
            if batch.num_rows:
                batch.validate(full=True)  # Parquet's readers let text pass that is not UTF-8
                yield batch
    except pa.ArrowNotImplementedError as error:
        raise ManifestError(_describe_unreadable(file, error)) from error
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"manifest {file}: {_one_line(error)}; the file is damaged") from error


def _check_int96_range(file: str, parquet: pq.ParquetFile) -> None:
    """Refuse INT96 times outside the years 1677 to 2262, which Arrow would read as other times."""
    columns = [parquet.schema.column(at) for at in range(len(parquet.schema))]
    names = [column.path for column in columns if column.physical_type == "INT96"]
    if not names:
        return
    precise = pq.ParquetFile(filesystem.open_read(file)).iter_batches(
        READ_BATCH_ROWS, columns=names
    )
    wide = pq.ParquetFile(
        filesystem.open_read(file), coerce_int96_timestamp_unit="us"
    ).iter_batches(READ_BATCH_ROWS, columns=names)
    for one, other in zip(precise, wide, strict=True):
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


def _describe_unreadable(file: str, error: pa.ArrowException) -> str:
    nested = [
        field.name
        for field in pq.read_schema(filesystem.open_read(file))
        if pa.types.is_nested(field.type) and "dictionary" in str(field.type)
    ]
    named = f", such as {nested[0]!r} (a dictionary inside a list, struct or map)" if nested else ""
    return (
        f"manifest {file}: has a column of a type that cannot be read{named} ({_one_line(error)}); "
        "leave it out, or write it as another type"
    )


def _open_parquet(file: str) -> pq.ParquetFile:
    stream = filesystem.open_read(file)
    with filesystem.translate_os_errors(file):
        head = stream.read(32)
        stream.seek(0)
    what = csv_reader.detect_foreign_format(head)
    if what is not None and not head.startswith(b"PAR1"):
        raise ManifestError(f"manifest {file}: is no Parquet file but {what}")
    try:
        return pq.ParquetFile(stream, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(
            f"manifest {file}: not a Parquet file, or a damaged one ({_one_line(error)}); if it is "
            "CSV, say --manifest.format csv"
        ) from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
