"""Options for reading the tables of a manifest, and the configuration keys that errors name."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class KeyNames:
    """Configuration keys of a manifest, as error messages name them to the user.

    section: dotted key of the manifest in the job's configuration, such as "data.train"; empty
             where the fields of the manifest are keys of the job itself
    renamed: dotted keys of the fields that the job calls by another name
    """

    section: str = "manifest"
    renamed: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """Dotted key of a field of ManifestConfig: `format` is "manifest.format"."""
        if name in self.renamed:
            return self.renamed[name]
        return f"{self.section}.{name}" if self.section else name

    def option(self, name: str) -> str:
        """Command-line option of a field: `path_column` is "--manifest.path-column"."""
        return "--" + self.key(name).replace("_", "-")


DEFAULT_KEYS = KeyNames()


@dataclass(frozen=True)
class ImageColumns:
    """The columns of a Parquet table that contain images.

    name:      the one that becomes the column of paths; None where the table has paths
    path_copy: the column that gets the paths of a struct<bytes, path>; None without one
    left_out:  the others
    """

    name: str | None = None
    path_copy: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def contained(self) -> tuple[str, ...]:
        """All columns of images."""
        return self.left_out if self.name is None else (self.name, *self.left_out)

    def convert_schema(self, schema: pa.Schema) -> pa.Schema:
        """The columns of the manifest, for those of its files."""
        fields: list[pa.Field] = []
        for each in schema:
            if each.name == self.name:
                names = [each.name] if self.path_copy is None else [each.name, self.path_copy]
                fields += [pa.field(name, pa.string()) for name in names]
            elif each.name not in self.left_out:
                fields.append(each)
        return pa.schema(fields)


@dataclass(frozen=True)
class ReadOptions:
    """How the tables of a manifest are read.

    delimiter: one ASCII character; None detects it in the header line
    encoding:  text encoding of files without a byte order mark
    escape:    character before a quote inside a quoted value; None where quotes are doubled
               (RFC 4180)
    keys:      names of these options in error messages
    images:    the columns of images of Parquet files
    list_labels: columns that may have lists of labels, whose codes become names

    The first three are for CSV files.
    """

    delimiter: str | None = None
    encoding: str = "utf-8"
    escape: str | None = None
    keys: KeyNames = DEFAULT_KEYS
    images: ImageColumns = ImageColumns()
    list_labels: tuple[str, ...] = ()

    def list_csv_options(self) -> tuple[tuple[str, str], ...]:
        """The first three, those without their default value, by name."""
        try:
            encoding = codecs.lookup(self.encoding).name
        except LookupError:  # not read, as for a file with a byte order mark
            encoding = self.encoding
        given = {
            "delimiter": self.delimiter,
            "encoding": None if encoding in ("utf-8", "utf-8-sig") else encoding,
            "escape": self.escape,
        }
        return tuple((name, value) for name, value in given.items() if value is not None)


def read_csv_options(run_record: Mapping[str, Any], format: str) -> tuple[tuple[str, str], ...]:
    """The options with which a stored run has read its manifest, as `ReadOptions` lists them.

    Runs of earlier versions have them in their configuration alone.
    """
    identity = run_record["identity"]["manifest"]
    names = ("delimiter", "encoding", "escape")
    stored = tuple((name, identity[name]) for name in names if name in identity)
    given = run_record.get("provenance", {}).get("config", {}).get("manifest")
    if stored or format != "csv" or not isinstance(given, Mapping):
        return stored
    return ReadOptions(
        given.get("delimiter"), given.get("encoding", "utf-8"), given.get("escape")
    ).list_csv_options()
