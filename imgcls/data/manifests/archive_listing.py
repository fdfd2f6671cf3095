"""Rows of an archive: the samples of a WebDataset shard, or the images of a zip by class folder.

Sources: base_plus_ext and group_by_keys of the package webdataset. Unlike there, the members of a
sample need not be next to each other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from imgcls.data.containers.archive import TEXT_SUFFIXES, Archive
from imgcls.data.containers.members import MemberUrl
from imgcls.data.formats import IMAGE_SUFFIXES, is_hidden_name
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError, one_line
from imgcls.formatting import format_count

_SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_COLUMN_OF_SUFFIX = {".cls": "label", ".txt": "text", ".json": "json"}


ArchiveValue = str | list[str] | None
"""A value of a row; a list of texts only for a field of JSON with several labels."""


@dataclass(frozen=True)
class ArchiveOptions:
    """Columns of a manifest of archives, as the user named them.

    label_column:  None for the usual one, `label`
    label_columns: fields of JSON, one per class
    """

    path_column: str
    label_column: str | None
    keys: KeyNames
    label_columns: tuple[str, ...] = ()


@dataclass
class ArchiveRows:
    """The rows of one archive, and its members that are in no row.

    columns: by name, all of one length; the first one has the paths, which are member URLs
    fields:  names of the fields in the JSON texts that may be labels, when one was looked for
    skipped: members that are no images, by suffix
    notes:   what else a user should know
    """

    columns: dict[str, list[ArchiveValue]]
    fields: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(slots=True)
class _Sample:
    """The members of a WebDataset sample.

    images:   with a plain suffix, as in 1.jpg
    compound: images with more than a suffix, as in 1.mask.png
    texts:    (suffix, member)
    others:   suffixes of its other members
    """

    # tuples, because there may be a million samples
    images: tuple[str, ...] = ()
    compound: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()

    def find_text(self, suffix: str) -> str | None:
        """The member with the text of a suffix, the last one; None for none."""
        return next((name for each, name in reversed(self.texts) if each == suffix), None)


def list_webdataset(archive: Archive, options: ArchiveOptions) -> ArchiveRows:
    """One row per image of a WebDataset shard, in the order in which its samples begin.

    The columns are path, key and, where the shard has such members, label (.cls), text (.txt) and
    json (.json). A sample with a .cls and no image is a row too, whose image is missing.
    Raises ManifestError for a text that cannot be read, and StorageError.
    """
    rows = ArchiveRows({options.path_column: []})
    samples = [
        (key, sample, images)
        for key, sample in _group_samples(archive, rows.skipped).items()
        if (images := _choose_images(key, sample, rows.skipped))
    ]
    suffixes = [
        suffix for suffix in TEXT_SUFFIXES if any(s.find_text(suffix) for _, s, _ in samples)
    ]
    names = ["key", *(_COLUMN_OF_SUFFIX[suffix] for suffix in suffixes)]
    wanted = [options.label_column] if options.label_column else options.label_columns
    fields = [name for name in wanted if name not in names and ".json" in suffixes]
    if options.path_column in (*names, *fields):
        raise ManifestError(
            f"manifest {archive.url}: {options.keys.option('path_column')} "
            f"{options.path_column!r} is also the name of another column; name it differently"
        )
    rows.columns |= {name: [] for name in (*names, *fields)}
    found: set[str] = set()
    for key, sample, images in samples:
        values: list[ArchiveValue] = [key]
        for suffix in suffixes:
            member = sample.find_text(suffix)
            values.append(None if member is None else archive.read_text(member))
        if fields:
            values += _read_fields(archive, sample.find_text(".json"), fields, found)
        for image in images:
            row = [build_member_path(archive, image), *values]
            for column, value in zip(rows.columns.values(), row, strict=True):
                column.append(value)
    rows.fields = sorted(found)
    _add_index_notes(archive, rows)
    return rows


def _group_samples(archive: Archive, skipped: Counter[str]) -> dict[str, _Sample]:
    """The samples by key, in the order in which they begin."""
    samples: dict[str, _Sample] = {}
    for member in archive.index.iter_members():
        if _is_hidden(member.name):
            continue
        found = _SAMPLE_NAME.fullmatch(member.name)
        if found is None:
            skipped["(no suffix)"] += 1
            continue
        key, suffix = found[1], "." + found[2].lower()
        sample = samples.setdefault(key, _Sample())
        last = "." + suffix.rpartition(".")[2]
        if suffix in IMAGE_SUFFIXES:
            sample.images += (member.name,)
        elif last in IMAGE_SUFFIXES:
            sample.compound += (member.name,)
        elif suffix in _COLUMN_OF_SUFFIX:
            sample.texts += ((suffix, member.name),)
        else:
            sample.others += (last,)
    return samples


def _choose_images(key: str, sample: _Sample, skipped: Counter[str]) -> tuple[str, ...]:
    """The members of a sample's rows; counts its members that are in no row."""
    skipped.update(sample.others)
    if sample.images:
        skipped.update("." + name.rpartition("/")[2].partition(".")[2] for name in sample.compound)
    images = sample.images or sample.compound
    if not images and sample.find_text(".cls") is not None:
        return (key,)  # there is no such member: the row is missing
    if not images:
        skipped.update(suffix for suffix, _ in sample.texts)
    return images


def build_member_path(archive: Archive, member: str) -> str:
    """The member URL of a row."""
    return str(MemberUrl(archive.kind, archive.url, member))


def _read_fields(
    archive: Archive, member: str | None, names: Sequence[str], found: set[str]
) -> list[ArchiveValue]:
    """Fields of a sample's JSON as text or lists of text; None where one is null or missing.

    found: the names of all fields that may be labels are added to it
    """
    if member is None:
        return [None] * len(names)
    place = f"manifest {archive.url}: member {member!r}"
    try:
        # numbers stay as they are written
        values = json.loads(
            archive.read_text(member), parse_int=str, parse_float=str, parse_constant=_read_constant
        )
    except ValueError as error:
        raise ManifestError(f"{place} is not JSON ({one_line(error)}); correct it") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{place} is not a JSON object; correct it")
    found.update(key for key, value in values.items() if _may_be_label(value))
    return [_convert_field(values.get(name), name, place) for name in names]


def _read_constant(name: str) -> str | None:
    """The value of NaN or an infinity: pandas writes NaN for a missing value."""
    return None if name == "NaN" else name


def _may_be_label(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return not isinstance(value, dict)


def _convert_field(value: Any, name: str, place: str) -> ArchiveValue:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, str):
        return value
    if not _may_be_label(value):
        raise ManifestError(
            f"{place} has {name!r} as an object, or as a list of other than texts; expected one "
            "label or a list of labels"
        )
    return list(value)


def list_zip(archive: Archive, options: ArchiveOptions) -> ArchiveRows:
    """One row per image of a zip archive, in its order, with the columns path and label.

    The label is the first folder of an image below the folder that holds all images; without such
    folders, the images have no label and there is no column for it.
    Raises ManifestError where images are next to class folders.
    """
    images, rows = [], ArchiveRows({options.path_column: []})
    for member in archive.index.iter_members():
        if _is_hidden(member.name):
            continue
        suffix = get_member_suffix(member.name)
        if suffix in IMAGE_SUFFIXES:
            images.append(member.name)
        else:
            rows.skipped[suffix or "(no suffix)"] += 1
    rows.columns[options.path_column] = [build_member_path(archive, name) for name in images]
    common = _find_common_folder(images)
    start = len(common)
    folders = [name[start:].partition("/") for name in images]
    if any(separator for _, separator, _ in folders):
        label_column = options.label_column or "label"
        if label_column == options.path_column:
            raise ManifestError(
                f"manifest {archive.url}: {options.keys.option('path_column')} and "
                f"{options.keys.option('label_column')} are both {label_column!r}; name two columns"
            )
        for name, (_, separator, _) in zip(images, folders, strict=True):
            if not separator:
                raise ManifestError(
                    f"manifest {archive.url}: {name!r} is next to the class folders; write the "
                    "archive again with the image in one of them, or list the images in a CSV as "
                    f"{build_member_path(archive, name)}"
                )
        rows.columns[label_column] = [folder for folder, _, _ in folders]
    elif common:
        rows.notes.append(
            f"manifest {archive.url}: all images are in the folder {common.rstrip('/')!r}, which "
            "is not read as a label; class folders are two or more"
        )
    _add_index_notes(archive, rows)
    return rows


def _find_common_folder(names: Iterable[str]) -> str:
    """The deepest folder that holds all members, with a slash at its end; empty for none."""
    common: list[str] | None = None
    for name in names:
        folders = name.split("/")[:-1]
        if common is None:
            common = folders
        else:
            same = (a == b for a, b in zip(common, folders, strict=False))
            common = common[: next((i for i, equal in enumerate(same) if not equal), len(folders))]
            common = common[: len(folders)]
    return "".join(f"{folder}/" for folder in common or [])


def get_member_suffix(name: str) -> str:
    """The suffix of a member in lower case with its dot; empty for none."""
    base, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and base else ""


def _is_hidden(name: str) -> bool:
    return any(is_hidden_name(part) for part in name.split("/") if part not in (".", ".."))


def _add_index_notes(archive: Archive, rows: ArchiveRows) -> None:
    if archive.index.note:
        rows.notes.append(f"manifest {archive.url}: {archive.index.note}")
    if replaced := archive.index.replaced_count:
        rows.notes.append(
            f"manifest {archive.url}: {format_count(replaced, 'member')} replaced by a later one "
            "of the same name, as tar extracts them"
        )
