"""Absolute paths and URLs of images for joins: one text for each image.

A manifest may name one image as `a.jpg`, `./a.jpg`, `/data//a.jpg` or `file:///data/a.jpg`. Code
that compares images by path compares these texts.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.containers import members
from imgcls.data.manifests.manifest import Manifest, resolve_paths
from imgcls.data.storage import filesystem

_ALIAS = rf"^(({'|'.join(members.CONTAINER_KINDS)})://)?(file:/|/(.*/)?\.{{0,2}}(/|$))"
"""Texts that may name a file which has a shorter name."""


def normalize_url(url: str) -> str:
    """A path on a disk without `file:`, `.`, `..` and `//`; the same for the file of a member.

    >>> normalize_url("file:///data/./a.jpg"), normalize_url("tar://file:/data//0.tar#./a.jpg")
    ('/data/a.jpg', 'tar:///data/0.tar#./a.jpg')
    """
    member = members.find_member(url)
    if member is not None:
        return str(replace(member, file=normalize_url(member.file)))
    path = filesystem.local_path(url)
    return os.path.normpath("/" + path.lstrip("/")) if path.startswith("/") else url


def normalize_urls(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """`normalize_url` of a whole column, as large strings."""
    text = urls.cast(pa.large_string())
    is_alias = pc.fill_null(pc.match_substring_regex(text, _ALIAS), False)
    aliases = text.filter(is_alias).to_pylist()
    if not aliases:
        return text
    found = pa.array([normalize_url(each) for each in aliases], text.type)
    whole = pc.replace_with_mask(text.combine_chunks(), is_alias.combine_chunks(), found)
    return pa.chunked_array([whole])


def resolve_urls(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """Absolute paths and URLs of a column, each image by one text, as large strings."""
    return normalize_urls(resolve_paths(paths, root))


def read_urls(manifest: Manifest, batch: pa.RecordBatch) -> pa.Array:
    """Absolute paths and URLs of the rows of a manifest, each image by one text."""
    column = pa.chunked_array([batch.column(manifest.path_column)])
    return resolve_urls(column, manifest.root).combine_chunks()
