"""Checks of the columns of a manifest, with errors that name the fix."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pyarrow as pa

from imgcls import log
from imgcls.data.manifests.image_columns import is_pixel_struct, is_text
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError

if TYPE_CHECKING:
    from imgcls.data.manifests.manifest import ManifestConfig


def check_duplicate_columns(file: str, schema: pa.Schema) -> None:
    """Raise ManifestError where two columns of a table have one name."""
    names = schema.names
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ManifestError(
            f"manifest {file}: column {duplicates[0]!r} is in it twice; rename one of them"
        )


def check_columns(
    config: ManifestConfig,
    schema: pa.Schema,
    keys: KeyNames,
    *,
    any_key: bool,
    may_contain_images: bool,
) -> None:
    """Raise ManifestError where a configured column is missing, or that of paths is no text.

    any_key:            the path column is a key for a join, of any type
    may_contain_images: whether images are read from the format's columns
    """
    names = schema.names
    for key, name in (
        ("path_column", config.path_column),
        ("label_column", config.label_column),
    ):
        if name is not None:
            fix = _suggest_fix(name, names, keys)
            if key == "path_column" and may_contain_images and not any_key:
                fix = f"{_suggest_image_column(schema, keys)}{fix}"
            check_named_column(config, schema, name, keys.option(key), fix)
    type = schema.field(config.path_column).type
    if not any_key and not is_text(type):
        raise ManifestError(
            f"manifest {config.path}: column {config.path_column!r} is {type}, not text; "
            f"name the column of paths with {keys.option('path_column')}, or that of the images "
            f"themselves with {keys.option('image_column')}"
        )


def check_named_column(
    config: ManifestConfig, schema: pa.Schema, name: str, option: str, fix: str = ""
) -> None:
    """Raise ManifestError where a column that an option names is not in the table."""
    if name not in schema.names:
        raise ManifestError(
            f"manifest {config.path}: no column {name!r} (found: {_list_columns(schema)}); "
            f"name it with {option}{fix}"
        )


def find_label_column(config: ManifestConfig, schema: pa.Schema, keys: KeyNames) -> str | None:
    """The column of class names; None where the table has none."""
    if config.label_column is not None:
        return config.label_column
    if "label" in schema.names:
        return "label"
    option = keys.option("label_column")
    for name in schema.names:
        if name.strip() == "label":
            raise ManifestError(
                f"manifest {config.path}: {_describe_spaces(name)}; or pass {option} {name!r}"
            )
        if name.strip().lower() == "label":
            log.emit(
                "note",
                f"manifest {config.path}: column {name!r} is not read as labels; pass {option} "
                f"{name!r} if it contains them",
            )
    return None


def _suggest_image_column(schema: pa.Schema, keys: KeyNames) -> str:
    """A second fix where a table has neither a column of paths nor one of bytes."""
    for field in schema:
        if is_pixel_struct(field.type):
            return (
                f"; column {field.name!r} contains pixels, as Spark's image source decodes them: "
                "write the files themselves instead, by spark.read.format('binaryFile')"
            )
    if any(is_text(field.type) for field in schema):
        return f", or a column of images as base64 text with {keys.option('image_column')}"
    return ""


def _suggest_fix(name: str, names: list[str], keys: KeyNames) -> str:
    """A second fix for a missing column: another delimiter, or a name without spaces."""
    if len(names) == 1 and name in re.split(r"\W+", names[0]):
        return f", or the delimiter of {names[0]!r} with {keys.option('delimiter')}"
    spaced = next((each for each in names if each != name and each.strip() == name), None)
    return "" if spaced is None else f"; {_describe_spaces(spaced)}"


def _describe_spaces(name: str) -> str:
    return (
        f"the name {name!r} has spaces around it: remove the spaces next to the delimiters, in the "
        "header and in the rows"
    )


def _list_columns(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "none"
