"""Options for reading the tables of a manifest, and the configuration keys that errors name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
class ReadOptions:
    """How the CSV files of a manifest are written, as far as the user set it.

    delimiter: one ASCII character; None detects it in the header line
    encoding:  text encoding of files without a byte order mark
    escape:    character before a quote inside a quoted value; None where quotes are doubled
               (RFC 4180)
    keys:      names of these options in error messages
    """

    delimiter: str | None = None
    encoding: str = "utf-8"
    escape: str | None = None
    keys: KeyNames = DEFAULT_KEYS
