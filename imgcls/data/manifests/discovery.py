"""Discovery of the files of a manifest: tables, partitioned tables, or images in folders.

Detects the format of a path, folder or glob from names alone. An ambiguous folder is refused with
the option that settles it; skipped files are counted by suffix and logged.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

from imgcls import log
from imgcls.data.containers.parquet_images import hash_without_images
from imgcls.data.formats import (
    EXPLANATIONS_FOLDER,
    LISTING_DONE_FILE,
    LISTING_FILE,
    has_image_suffix,
    is_hidden_name,
)
from imgcls.data.manifests import fingerprint
from imgcls.data.manifests.file_lists import expand_braces
from imgcls.data.manifests.hub_datasets import find_repository_tables, refuse_saved_dataset
from imgcls.data.manifests.options import DEFAULT_KEYS, KeyNames
from imgcls.data.manifests.readers import (
    FILE_FORMATS,
    MANIFEST_FORMATS,
    TABLE_FORMATS,
    ArchiveFormat,
    ListingFormat,
    detect_archive_format,
    detect_table_format,
    suggest_formats,
)
from imgcls.data.manifests.table_version import TableVersion
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError
from imgcls.formatting import format_count

_DELTA_LOG = "_delta_log"
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_DATE_NAME = re.compile(r"(19|20)\d\d[-_.](W?\d\d)([-_.]\d\d)?([-_.T ].*)?")  # 2026-01-31, 2026_01
_DATE_DIGITS = re.compile(r"(19|20)\d\d((0[1-9]|1[0-2])([0-3]\d)?)?")  # 2026, 202601, 20260131


@dataclass(frozen=True)
class ManifestFiles:
    """The files of a manifest.

    format:     a key of MANIFEST_FORMATS
    files:      the tables, the archives, or the images that a glob matches; empty for a folder of
                images
    folder:     the folder that was passed, where relative paths of partitioned tables start
    partitions: for each table, the values in its folder names such as year=2026, null allowed
    version:    for a table with versions, the one that is read
    """

    format: str
    files: tuple[str, ...] = ()
    folder: str | None = None
    partitions: dict[str, dict[str, str | None]] = field(default_factory=dict)
    version: TableVersion | None = None

    @property
    def version_name(self) -> str | None:
        """The version or snapshot that is read; None for files."""
        return None if self.version is None else self.version.version

    def compute_fingerprint(self, image_columns: Collection[str]) -> str:
        """BLAKE2b of the bytes of the tables, or of a table's id and version.

        image_columns: columns of Parquet files whose bytes are not read
        """
        if self.version is not None:
            return self.version.fingerprint
        if image_columns:
            return hash_without_images(self.files, image_columns)
        return fingerprint.hash_files(self.files)


def find_manifest_files(url: str, format: str, keys: KeyNames = DEFAULT_KEYS) -> ManifestFiles:
    """Find the files of a manifest passed as a file, folder or glob.

    format: "auto", or a key of MANIFEST_FORMATS
    Raises ManifestError where nothing is found, or where the format is ambiguous.
    """
    name = _detect_prefix(url)
    if name is not None:
        return _pin_table(name, url)
    if format == "iceberg":
        raise ManifestError(f"manifest {url}: pass iceberg:CATALOG.NAMESPACE.TABLE")
    if format == "delta":
        return _pin_table("delta", f"delta:{url}")
    # to a web server the question costs a download of the whole file
    is_web_archive = url.startswith(("http://", "https://")) and detect_archive_format(url)
    if not is_web_archive and filesystem.is_folder(url):
        return _find_in_folder(url, format, keys)
    if format == "tree":
        raise ManifestError(
            f"manifest {url}: is not a folder; a tree is a folder with one folder per class"
        )
    if filesystem.exists(url):
        return ManifestFiles(_detect_format(url, format, [url], keys), (url,))
    listed = expand_braces(url)
    if len(listed) > 1:
        return ManifestFiles(_detect_format(url, format, listed, keys), tuple(listed))
    if re.search(r"[*?\[]", url):
        matches = filesystem.glob(url)
        pattern = url.rpartition("/")[2]
        files = [file for file in matches if _is_data_file(file, pattern)]
        if not files:
            raise ManifestError(
                f"manifest {url}: no file matches; check the pattern"
                + (" (only files whose names begin with _ or . match)" if matches else "")
            )
        return ManifestFiles(_detect_format(url, format, files, keys), tuple(files))
    is_relative = filesystem.is_local(url) and not os.path.isabs(url)
    where = f" relative to {os.getcwd()}" if is_relative else ""
    raise ManifestError(
        f"manifest {url}: no such file or folder{where}; pass a CSV or Parquet file, a glob, or a "
        "folder of images"
    )


def resolve_source(url: str) -> str:
    """The path of a manifest for other processes: absolute, and a table at its current version."""
    name = _detect_prefix(url)
    if name is not None:
        return _pin_table(name, url).files[0]
    url = filesystem.absolute(url)
    if filesystem.is_folder(filesystem.join(url, _DELTA_LOG)):
        return _pin_table("delta", f"delta:{url}").files[0]
    return url


def _detect_prefix(url: str) -> str | None:
    """The format whose prefix a manifest has, as in `delta:PATH`."""
    prefix = url.partition(":")[0]
    format = TABLE_FORMATS.get(prefix)
    return prefix if format is not None and format.pin and url != prefix else None


def _pin_table(format: str, name: str) -> ManifestFiles:
    pin = TABLE_FORMATS[format].pin
    assert pin is not None
    version = pin(name)
    return ManifestFiles(format, (version.name,), version.folder, version=version)


def walk_images(url: str, skipped: Counter[str]) -> Iterator[str]:
    """Images in a folder and below it, as paths relative to it, in sorted order.

    skipped: counts the files that are not images, by suffix
    The plots of a model bundle are skipped too.
    """
    plots: str | None = None
    for path in filesystem.walk(url):
        folder, _, name = path.rpartition("/")
        if name == "bundle.json":
            plots = f"{folder}/plots/" if folder else "plots/"
        if has_image_suffix(path) and not (plots and path.startswith(plots)):
            yield path
        else:
            skipped[get_suffix(path)] += 1


def filter_images(files: Iterable[str], skipped: Counter[str]) -> Iterator[str]:
    """The images among the files of a glob; `skipped` as in `walk_images`."""
    for file in files:
        if has_image_suffix(file):
            yield file
        else:
            skipped[get_suffix(file)] += 1


def get_suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "(no suffix)"


def format_suffix_counts(skipped: Counter[str]) -> str:
    """Counts by suffix as text: `12 files: 8 .heic, 4 (no suffix)`."""
    shown = [f"{count:,} {suffix}" for suffix, count in skipped.most_common(8)]
    more = [] if len(skipped) <= 8 else [f"{len(skipped) - 8} other suffixes"]
    return f"{format_count(skipped.total(), 'file')}: {', '.join(shown + more)}"


def log_skipped_files(url: str, skipped: Counter[str], reason: str) -> None:
    """Log the files in a manifest's folder that were not read."""
    if skipped:
        log.emit("note", f"manifest {url}: skipped {format_suffix_counts(skipped)}; {reason}")


def _is_data_file(file: str, pattern: str) -> bool:
    """Whether a match of a glob is no temporary table, by the rule of Spark and Arrow.

    Nor a picture of `predict --explain`.
    """
    *folders, name = file.split("/")
    if EXPLANATIONS_FOLDER in folders[-1:] and has_image_suffix(name):
        return False
    if pattern[:1] in ("_", ".") or detect_table_format(name) is None:
        return True
    return _is_visible(name)


def _find_in_folder(url: str, format: str, keys: KeyNames) -> ManifestFiles:
    if isinstance(MANIFEST_FORMATS.get(format), ListingFormat):
        return ManifestFiles(format, folder=url)
    names = filesystem.list_names(url)
    if LISTING_FILE in names and LISTING_DONE_FILE not in names:
        raise ManifestError(
            f"manifest {url}: its listing is not complete; rerun `imgcls manifest build` to resume "
            "it"
        )
    folders = _list_folders(url)
    if _DELTA_LOG in folders:
        if format != "auto":
            raise ManifestError(
                f"manifest {url}: is a Delta Lake table, whose files may contain deleted rows; "
                f"leave out {keys.option('format')} {format}, or set it to delta"
            )
        return _pin_table("delta", f"delta:{url}")
    refuse_saved_dataset(url, names)
    if isinstance(MANIFEST_FORMATS.get(format), ArchiveFormat):
        return _find_archives(url, format, names, keys)
    tables = group_tables(names)
    if not tables and format in ("auto", "parquet") and url.startswith("hf://"):
        found = find_repository_tables(url, filesystem.walk(url))
        if found:
            return ManifestFiles("parquet", tuple(found), url)
    if format == "auto":
        _check_mixed_content(url, tables, [n for n in names if _is_archive(n)], keys)
    chosen = format if format != "auto" else next(iter(tables), None)
    if chosen is not None and chosen in tables:
        rest = Counter(get_suffix(n) for n in names if n not in tables[chosen] and _is_visible(n))
        log_skipped_files(url, rest, f"only {chosen} files are read")
        files = tuple(filesystem.join(url, name) for name in tables[chosen])
        return ManifestFiles(chosen, files, url)
    partitioned = _find_partitioned(url, folders, format, keys)
    if partitioned is not None:
        return partitioned
    if format != "auto":
        below = _find_first(url, lambda path: detect_table_format(path) == format)
        fix = f"; it has some in subfolders ({below!r}): pass a glob, such as {url}/**/*"
        raise ManifestError(
            f"manifest {url}: the folder contains no {format} file" + (fix if below else "")
        )
    if any(map(_is_archive, names)) and _find_first(url, has_image_suffix) is None:
        return _find_archives(url, format, names, keys)
    return ManifestFiles(_detect_image_layout(url, names, folders, keys), folder=url)


def _find_archives(url: str, format: str, names: list[str], keys: KeyNames) -> ManifestFiles:
    """The archives that are directly in a folder."""
    found: dict[str, list[str]] = {}
    for name in names:
        each = detect_archive_format(name)
        if each is not None and format in ("auto", each) and not is_hidden_name(name):
            found.setdefault(each, []).append(filesystem.join(url, name))
    if len(found) > 1:
        raise ManifestError(
            f"manifest {url}: contains {' and '.join(found)} archives; pass "
            f"{suggest_formats(keys, tuple(found))} to read only those"
        )
    if not found:
        raise ManifestError(f"manifest {url}: the folder contains no {format} archive; pass a glob")
    ((chosen, files),) = found.items()
    rest = Counter(get_suffix(n) for n in names if not detect_archive_format(n) and _is_visible(n))
    log_skipped_files(url, rest, f"only {chosen} archives are read")
    return ManifestFiles(chosen, tuple(files), url)


def _list_folders(url: str) -> list[str]:
    found = []
    for page in filesystem.iter_pages(url, deep=False):
        found += [folder.rstrip("/").rpartition("/")[2] for folder in page.folders]
        if filesystem.is_local(url):
            break  # the other pages contain files only
    return [name for name in found if not is_hidden_name(name)]


def group_tables(names: Iterable[str]) -> dict[str, list[str]]:
    """The table files of a folder by format, without explicit suffixes and needless fallbacks."""
    tables: dict[str, list[str]] = {}
    for name in names:
        format = detect_table_format(name)
        if format is None or not _is_visible(name):
            continue
        if not any(suffix in name.lower() for suffix in TABLE_FORMATS[format].explicit_suffixes):
            tables.setdefault(format, []).append(name)
    for format, files in tables.items():
        fallback = TABLE_FORMATS[format].fallback_suffixes
        tables[format] = [n for n in files if not n.lower().endswith(fallback)] or files
    return tables


def _is_visible(name: str) -> bool:
    """Whether readers of partitioned tables (Spark, Arrow, DuckDB) would read a file."""
    return not name.startswith(("_", "."))


def _is_archive(name: str) -> bool:
    return detect_archive_format(name) is not None and not is_hidden_name(name)


def _check_mixed_content(
    url: str, tables: dict[str, list[str]], archives: list[str], keys: KeyNames
) -> None:
    """Refuse a folder with tables of two formats, or with tables and archives or images."""
    if len(tables) > 1:
        found = " and ".join(
            f"{TABLE_FORMATS[format].title} files ({tables[format][0]!r})"
            for format in TABLE_FORMATS
            if format in tables
        )
        raise ManifestError(
            f"manifest {url}: contains {found}; pass {suggest_formats(keys, tuple(FILE_FORMATS))} "
            "to read only those, or pass a glob"
        )
    if not tables:
        return
    format, names = next(iter(tables.items()))
    if archives:
        other = detect_archive_format(archives[0])
        option = keys.option("format")
        raise ManifestError(
            f"manifest {url}: contains a table ({names[0]!r}) and an archive ({archives[0]!r}); "
            f"pass {option} {format} for the rows of the tables, or {option} {other} for the "
            "images in the archives"
        )
    image = _find_first(url, has_image_suffix)
    if image is not None:
        option = keys.option("format")
        raise ManifestError(
            f"manifest {url}: contains a table ({names[0]!r}) and images ({image!r}); for the rows "
            f"of the table pass {filesystem.join(url, names[0])} or {option} {format}, for the "
            f"images {option} tree (a folder per class) or {option} images (unlabeled)"
        )
    below = _find_first(
        url, lambda path: "/" in path and format in group_tables([path.rpartition("/")[2]])
    )
    if below is not None:
        log.emit(
            "note",
            f"manifest {url}: the tables in its subfolders are not read ({below!r}); to read them, "
            f"pass a glob such as {url}/**/*",
        )


def _find_first(url: str, matches: Callable[[str], object]) -> str | None:
    """The first file in or below a folder that matches; a bucket is listed no further.

    matches: called with the path relative to the folder
    """
    return next((path for path in _walk_files(url) if matches(path)), None)


def _walk_files(url: str) -> Iterator[str]:
    """The files below a folder as relative paths, in the order of the listing."""
    if filesystem.is_local(url):
        yield from filesystem.walk(url)
        return
    prefix = url.rstrip("/") + "/"
    for page in filesystem.iter_pages(url, deep=True):
        for file in page.files:
            path = file.path.removeprefix(prefix)
            if not any(is_hidden_name(part) for part in path.split("/")):
                yield path


def _find_partitioned(
    url: str, folders: list[str], format: str, keys: KeyNames
) -> ManifestFiles | None:
    """The tables below folders such as year=2026/month=01; None where there are none."""
    if not any(re.fullmatch(r"[^=]+=.*", name) for name in folders):
        return None
    files: list[str] = []
    partitions: dict[str, dict[str, str | None]] = {}
    found: set[str] = set()
    for path in filesystem.walk(url):
        *above, name = path.split("/")
        table_format = detect_table_format(name)
        if table_format is None or not all(map(_is_visible, [*above, name])):
            continue
        file = filesystem.join(url, path)
        if format in ("auto", table_format):
            found.add(table_format)
            files.append(file)
            partitions[file] = _parse_partition_values(url, path, above)
    if not files:
        return None
    image = _find_first(url, has_image_suffix) if format == "auto" else None
    if len(found) > 1 or image is not None:
        titles = " and ".join(t.title for name, t in TABLE_FORMATS.items() if name in found)
        raise ManifestError(
            f"manifest {url}: its partitions contain "
            + (f"tables and images ({image!r})" if image else f"{titles} files")
            + f"; pass {suggest_formats(keys)} to read only those"
        )
    names = list(partitions[files[0]])
    for file in files:
        if list(partitions[file]) != names:
            raise ManifestError(
                f"manifest {file}: is in partitions {list(partitions[file])}, and {files[0]} in "
                f"{names}; pass a glob of the files that belong together"
            )
    return ManifestFiles(found.pop(), tuple(files), url, partitions)


def _parse_partition_values(url: str, path: str, above: list[str]) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for name in above:
        key, separator, value = name.partition("=")
        if not separator or not key or key in values:
            raise ManifestError(
                f"manifest {url}: {path!r} is in a folder {name!r} that is not a partition such as "
                "year=2026; pass a glob of the tables that belong together"
            )
        values[unquote(key)] = None if value == _NULL_PARTITION else unquote(value)
    return values


def _detect_image_layout(url: str, names: list[str], folders: list[str], keys: KeyNames) -> str:
    option = keys.option("format")
    top = next((n for n in names if has_image_suffix(n) and not is_hidden_name(n)), None)
    if top is not None:
        below = next((p for p in walk_images(url, Counter()) if "/" in p), None)
        if below is not None:
            raise ManifestError(
                f"manifest {url}: has images next to its folders ({top!r}) and in them ({below!r}"
                f"); pass {option} images to take all of them, unlabeled, or move the images next "
                f"to the folders into one of them for {option} tree"
            )
        return "images"
    dates = [name for name in folders if _DATE_NAME.fullmatch(name) or "=" in name]
    # of many numbers as class names, a few may look like a date by chance
    if not dates and folders and all(_DATE_DIGITS.fullmatch(name) for name in folders):
        dates = folders
    if dates:
        raise ManifestError(
            f"manifest {url}: its folders look like dates or partitions, not classes "
            f"({dates[0]!r}); pass {option} images to take all images, unlabeled, or {option} tree "
            "if the folder names are the classes"
        )
    return "tree"


def _detect_format(url: str, format: str, files: list[str], keys: KeyNames) -> str:
    if format != "auto":
        return format
    formats = {detect_table_format(file) or detect_archive_format(file) for file in files}
    if len(formats) == 1 and (found := formats.pop()) is not None:
        return found
    if all(has_image_suffix(file) for file in files):
        return "images"
    suffixes = ", ".join(sorted({get_suffix(file) for file in files}))
    raise ManifestError(
        f"manifest {url}: cannot detect the format from {suffixes!r}; pass "
        + suggest_formats(keys, (*FILE_FORMATS, "images", "webdataset", "zip"))
        + ("" if len(files) == 1 else ", or narrow the pattern to files of one kind")
    )
