"""Signatures of file formats that are often passed as a table by mistake."""

from __future__ import annotations

from imgcls.data.manifests.options import KeyNames

PARQUET_MAGIC = b"PAR1"

_SIGNATURES = {
    PARQUET_MAGIC: "a Parquet file; pass {format_option} parquet",
    b"PARE": "an encrypted Parquet file; decrypt it first",
    b"ARROW1": "an Arrow IPC (Feather) file; convert it to Parquet",
    b"\xff\xff\xff\xff": "an Arrow IPC stream; convert it to Parquet",
    b"ORC": "an ORC file; convert it to Parquet",
    b"Obj\x01": "an Avro file; convert it to Parquet",
    b"\x89HDF": "an HDF5 file; convert it to Parquet",
    b"SQLite format 3\0": "an SQLite database; export the table as CSV or Parquet",
    b"PK\x03\x04": "a ZIP archive (or an Excel workbook); extract it, or export it as CSV",
    b"7z\xbc\xaf": "a 7-Zip archive; extract it first",
    b"\x04\x22\x4d\x18": "compressed with LZ4; decompress it first, or use gzip or zstd",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; export it as CSV",
    b"\x80\x04\x95": "a Python pickle; write it as CSV or Parquet",
    b"\x80\x05\x95": "a Python pickle; write it as CSV or Parquet",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to fetch the file",
}


def detect_foreign_format(head: bytes, keys: KeyNames) -> str | None:
    """Name of a file's format by its first bytes, with the fix; None for an unknown signature."""
    for magic, description in _SIGNATURES.items():
        if head.startswith(magic):
            return description.format(format_option=keys.option("format"))
    return None
