"""Which files a manifest consists of: tables, partitioned tables, or images in folders.

Decides the format of a path, a folder or a glob from names alone. What is ambiguous is refused with
the option that settles it; files that are passed over are counted by suffix and logged.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

from imgcls.data import filesystem
from imgcls.data.formats import LISTING_DONE_FILE, LISTING_FILE, has_image_suffix, is_hidden_name
from imgcls.errors import ManifestError
from imgcls.log import tell

_TABLE_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_DATE_NAME = re.compile(r"(19|20)\d\d[-_.](W?\d\d)([-_.]\d\d)?([-_.T ].*)?")  # 2026-01-31, 2026_01
_DATE_DIGITS = re.compile(r"(19|20)\d\d((0[1-9]|1[0-2])([0-3]\d)?)?")  # 2026, 202601, 20260131


@dataclass(frozen=True)
class ManifestFiles:
    """The files of a manifest.

    format:     csv, parquet, tree or images
    files:      the tables, or the images that a glob matches; none for a folder of images
    folder:     the folder that was given, where relative paths of partitioned tables start
    partitions: for each table, the values in its folder names such as year=2026, null allowed
    """

    format: str
    files: tuple[str, ...] = ()
    folder: str | None = None
    partitions: dict[str, dict[str, str | None]] = field(default_factory=dict)


def find_manifest_files(url: str, format: str) -> ManifestFiles:
    """The files of a manifest given as a file, folder or glob.

    format: auto, csv, parquet, tree or images
    Raises ManifestError where nothing is found, or where what is found is ambiguous.
    """
    if filesystem.is_folder(url):
        return _find_in_folder(url, format)
    if format == "tree":
        raise ManifestError(f"manifest {url}: is no folder; a tree is a folder with one per class")
    if filesystem.exists(url):
        return ManifestFiles(_detect_format(url, format, [url]), (url,))
    if re.search(r"[*?\[]", url):
        matched = filesystem.glob(url)
        pattern = url.rpartition("/")[2]
        files = [file for file in matched if _is_data_file(file, pattern)]
        if not files:
            raise ManifestError(
                f"manifest {url}: no file matches; check the pattern"
                + (" (only files whose names begin with _ or . match)" if matched else "")
            )
        return ManifestFiles(_detect_format(url, format, files), tuple(files))
    where = (
        f"relative to {os.getcwd()}" if filesystem.is_local(url) and not os.path.isabs(url) else ""
    )
    raise ManifestError(
        f"manifest {url}: no such file or folder {where}".rstrip()
        + "; give a CSV or Parquet file, a glob, or a folder of images"
    )


def walk_images(url: str, skipped: Counter[str]) -> Iterator[str]:
    """Images in a folder and below it, as paths relative to it, in sorted order.

    skipped: counts, by suffix, the files that are passed over
    The plots of a model bundle are no images of a data set.
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
    """The images among the files of a glob; `skipped` as in `images_below`."""
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
    total = skipped.total()
    more = [] if len(skipped) <= 8 else [f"{len(skipped) - 8} other suffixes"]
    return f"{total:,} {'file' if total == 1 else 'files'}: {', '.join(shown + more)}"


def log_skipped_files(url: str, skipped: Counter[str], wanted: str) -> None:
    """Log which files of a manifest's folder were not read."""
    if skipped:
        tell("note", f"manifest {url}: passed over {format_suffix_counts(skipped)}; {wanted}")


def _is_data_file(file: str, pattern: str) -> bool:
    """Whether a match of a glob is no temporary table, as Spark and Arrow decide it."""
    name = file.rpartition("/")[2]
    if pattern[:1] in ("_", ".") or detect_table_format(name) is None:
        return True
    return not name.startswith(("_", "."))


def detect_table_format(path: str) -> str | None:
    """csv or parquet by a file's suffix; None for any other."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]  # a signed URL
    base, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSION_SUFFIXES:
        inner = _TABLE_SUFFIXES.get(os.path.splitext(base)[1])
        return inner if inner == "csv" else None
    return _TABLE_SUFFIXES.get(suffix)


def _find_in_folder(url: str, format: str) -> ManifestFiles:
    if format in ("tree", "images"):
        return ManifestFiles(format, folder=url)
    here = filesystem.list_names(url)
    if LISTING_FILE in here and LISTING_DONE_FILE not in here:
        raise ManifestError(
            f"manifest {url}: its listing was broken off; run `imgcls manifest build` again, which "
            "goes on where it stopped"
        )
    folders = _list_folders(url)
    if "_delta_log" in folders:
        raise ManifestError(
            f"manifest {url}: is a Delta Lake table, whose files may hold deleted rows; export its "
            "rows to Parquet, and give the exported files"
        )
    tables = group_tables(here)
    if format == "auto":
        _check_mixed_content(url, here, tables)
    chosen = format if format != "auto" else next(iter(tables), None)
    if chosen is not None and chosen in tables:
        rest = Counter(get_suffix(n) for n in here if n not in tables[chosen] and _is_visible(n))
        log_skipped_files(url, rest, f"only {chosen} files are read")
        return ManifestFiles(
            chosen, tuple(filesystem.join(url, name) for name in tables[chosen]), url
        )
    partitioned = _find_partitioned(url, folders, format)
    if partitioned is not None:
        return partitioned
    if format != "auto":
        below = _find_first(url, lambda path: detect_table_format(path) == format)
        raise ManifestError(
            f"manifest {url}: the folder holds no {format} file"
            + (f"; some lie below it ({below!r}): give a glob, such as {url}/**/*" if below else "")
        )
    return ManifestFiles(_detect_image_layout(url, here, folders), folder=url)


def _list_folders(url: str) -> list[str]:
    found = []
    for page in filesystem.iter_pages(url, deep=False):
        found += [folder.rstrip("/").rpartition("/")[2] for folder in page.folders]
        if filesystem.is_local(url):
            break  # the other pages are files, which need not be looked at
    return [name for name in found if not is_hidden_name(name)]


def group_tables(names: Iterable[str]) -> dict[str, list[str]]:
    """Table files by format; a .txt file in a folder may be anything."""
    tables: dict[str, list[str]] = {}
    for name in names:
        kind = detect_table_format(name)
        if kind is not None and _is_visible(name) and ".txt" not in name.lower():
            tables.setdefault(kind, []).append(name)
    # .pq files are read where they are all there is, or by a glob
    full = [name for name in tables.get("parquet", []) if name.lower().endswith(".parquet")]
    if full:
        tables["parquet"] = full
    return tables


def _is_visible(name: str) -> bool:
    """Whether readers of partitioned tables (Spark, Arrow, DuckDB) would read a file."""
    return not name.startswith(("_", "."))


def _check_mixed_content(url: str, here: list[str], tables: dict[str, list[str]]) -> None:
    if len(tables) > 1:
        one, other = (tables[kind][0] for kind in ("csv", "parquet"))
        raise ManifestError(
            f"manifest {url}: holds CSV files ({one!r}) and Parquet files ({other!r}); pass "
            "--manifest.format csv or parquet to read only those, or give a glob"
        )
    if not tables:
        return
    kind, names = next(iter(tables.items()))
    image = _find_first(url, has_image_suffix)
    if image is not None:
        raise ManifestError(
            f"manifest {url}: holds a table ({names[0]!r}) and images ({image!r}); for the rows of "
            f"the table pass {filesystem.join(url, names[0])} or --manifest.format {kind}, for the "
            "images --manifest.format tree (a folder per class) or --manifest.format images "
            "(unlabeled)"
        )
    below = _find_first(
        url, lambda path: "/" in path and kind in group_tables([path.rpartition("/")[2]])
    )
    if below is not None:
        tell(
            "note",
            f"manifest {url}: the tables in its folders are not read ({below!r}); to read them, "
            f"give a glob such as {url}/**/*",
        )


def _find_first(url: str, wanted: Callable[[str], object]) -> str | None:
    """The first file in a folder or below it that is wanted; a bucket is listed only that far.

    wanted: asked with the path relative to the folder
    """
    return next((path for path in _walk_files(url) if wanted(path)), None)


def _walk_files(url: str) -> Iterator[str]:
    """The files below a folder, as paths relative to it, as they come."""
    if filesystem.is_local(url):
        yield from filesystem.walk(url)
        return
    prefix = url.rstrip("/") + "/"
    for page in filesystem.iter_pages(url, deep=True):
        for file in page.files:
            path = file.path.removeprefix(prefix)
            if not any(is_hidden_name(part) for part in path.split("/")):
                yield path


def _find_partitioned(url: str, folders: list[str], format: str) -> ManifestFiles | None:
    """The tables below folders such as year=2026/month=01; None where there are none."""
    if not any(re.fullmatch(r"[^=]+=.*", name) for name in folders):
        return None
    files: list[str] = []
    partitions: dict[str, dict[str, str | None]] = {}
    kinds: set[str] = set()
    for path in filesystem.walk(url):
        *above, name = path.split("/")
        kind = detect_table_format(name)
        if kind is None or not all(map(_is_visible, [*above, name])):
            continue
        file = filesystem.join(url, path)
        if format in ("auto", kind):
            kinds.add(kind)
            files.append(file)
            partitions[file] = _parse_partition_values(url, path, above)
    if not files:
        return None
    image = _find_first(url, has_image_suffix) if format == "auto" else None
    if len(kinds) > 1 or image is not None:
        raise ManifestError(
            f"manifest {url}: its partitions hold "
            + (f"tables and images ({image!r})" if image else "CSV and Parquet files")
            + "; pass --manifest.format csv, parquet, tree or images to read only those"
        )
    keys = list(partitions[files[0]])
    for file in files:
        if list(partitions[file]) != keys:
            raise ManifestError(
                f"manifest {file}: is in partitions {list(partitions[file])}, and {files[0]} in "
                f"{keys}; give a glob of the files that belong together"
            )
    return ManifestFiles(kinds.pop(), tuple(files), url, partitions)


def _parse_partition_values(url: str, path: str, above: list[str]) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for name in above:
        key, separator, value = name.partition("=")
        if not separator or not key or key in values:
            raise ManifestError(
                f"manifest {url}: {path!r} lies in a folder {name!r} that is no partition such as "
                "year=2026; give a glob of the tables that belong together"
            )
        values[unquote(key)] = None if value == _NULL_PARTITION else unquote(value)
    return values


def _detect_image_layout(url: str, here: list[str], folders: list[str]) -> str:
    top = next((name for name in here if has_image_suffix(name) and not is_hidden_name(name)), None)
    if top is not None:
        below = next((p for p in walk_images(url, Counter()) if "/" in p), None)
        if below is not None:
            raise ManifestError(
                f"manifest {url}: has images beside its folders ({top!r}) and in them ({below!r}); "
                "say --manifest.format images to take all of them, unlabelled, or move those "
                "beside the folders into one for --manifest.format tree"
            )
        return "images"
    days = [name for name in folders if _DATE_NAME.fullmatch(name) or "=" in name]
    # a few of many numbers may look like a date by chance
    if not days and folders and all(_DATE_DIGITS.fullmatch(name) for name in folders):
        days = folders
    if days:
        raise ManifestError(
            f"manifest {url}: its folders look like dates or partitions, not classes "
            f"({days[0]!r}); pass --manifest.format images to take all images, "
            "unlabeled, or --manifest.format tree if the folder names are the classes"
        )
    return "tree"


def _detect_format(url: str, format: str, files: list[str]) -> str:
    if format != "auto":
        return format
    formats = {detect_table_format(file) for file in files}
    if formats == {"csv"} or formats == {"parquet"}:
        return str(formats.pop())
    if all(has_image_suffix(file) for file in files):
        return "images"
    suffixes = ", ".join(sorted({get_suffix(file) for file in files}))
    raise ManifestError(
        f"manifest {url}: cannot tell the format from {suffixes!r}; say --manifest.format csv, "
        "parquet or images"
        + ("" if len(files) == 1 else ", or narrow the pattern to files of one kind")
    )
