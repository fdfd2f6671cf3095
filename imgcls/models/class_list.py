"""Lists of class names in text files, one name per line."""

from __future__ import annotations

from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, StorageError, request_error


def read_class_list(url: str) -> list[str]:
    """Class names of a text file in UTF-8. Raises BundleError as `parse_class_list` does."""
    return parse_class_list(read_text(url, "classes", "name"), url)


def parse_class_list(text: str, source: str) -> list[str]:
    """Parse class names, one per line; blank lines at the end are ignored.

    source: file name for messages
    Raises BundleError with the line of a blank or repeated name.
    """
    names = [line.strip() for line in text.rstrip().splitlines()]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise BundleError(f"{source}, line {number}: is blank; write one class name per line")
        if name in seen:
            raise BundleError(
                f"{source}, line {number}: {name!r} is also on line {seen[name]}; class names "
                "must be unique"
            )
        seen[name] = number
    if not names:
        raise BundleError(f"{source}: has no class names")
    return names


def read_text(url: str, key: str, entry: str) -> str:
    """A text file in UTF-8; raises BundleError with the configuration key and what a line holds."""
    try:
        return filesystem.read(url).decode("utf-8-sig")
    except (StorageError, UnicodeDecodeError) as error:
        raise request_error(
            BundleError, f"{key}: {error}; pass a text file with one {entry} per line", error
        ) from error
