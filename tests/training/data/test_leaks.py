"""Images of equal bytes are found under any path, and only files of equal sizes are read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgcls.errors import StorageUnavailable
from imgcls.training.data import leaks
from imgcls.training.data.leaks import find_same_content


@pytest.fixture
def files(tmp_path: Path) -> Path:
    contents = {"a": b"one", "b": b"two", "c": b"three", "copy": b"two", "other": b"longer still"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_copy_is_found_by_its_content(files: Path) -> None:
    urls = [str(files / name) for name in ("a", "b", "c", "missing")]
    protected = [str(files / name) for name in ("other", "copy", "gone")]
    found = find_same_content(urls, protected)
    assert found.same == {1: protected[1]}
    assert found.unreadable == {urls[3]}
    assert found.unreadable_protected == {protected[2]}
    assert find_same_content(urls, []).same == {}


@pytest.mark.parametrize("missing", [(), ("gone",)])
def test_files_of_other_sizes_are_not_read(
    files: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    read: list[str] = []
    compute = leaks._compute_digests

    def record(urls: list[str], max_bytes: int) -> list[bytes | None]:
        read.extend(Path(url).name for url in urls)
        return compute(urls, max_bytes)

    monkeypatch.setattr(leaks, "_compute_digests", record)
    urls = [str(files / name) for name in ("a", "b", "c")]
    protected = [str(files / name) for name in ("copy", "other", *missing)]
    assert find_same_content(urls, protected).same == {1: protected[0]}
    assert sorted(read) == ["a", "b", "copy"]


def test_files_that_are_too_large_or_lack_their_archive_are_named(files: Path) -> None:
    copy, member = str(files / "copy"), f"zip://{files}/gone.zip#b.jpg"
    found = find_same_content([str(files / "b")], [copy, member], max_bytes=2)
    assert found.same == {}
    assert found.unreadable == {str(files / "b")}
    assert found.unreadable_protected == {copy, member}


@pytest.mark.parametrize("name", ["get_size", "read_ahead"])
def test_a_store_that_does_not_answer_ends_the_comparison(
    files: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(urls: object, *_: object) -> Iterator[StorageUnavailable]:
        error = StorageUnavailable("no answer")
        if name == "get_size":
            raise error
        return iter([error])

    monkeypatch.setattr(leaks.image_files, name, fail)
    with pytest.raises(StorageUnavailable, match="no answer"):
        find_same_content([str(files / "b")], [str(files / "copy")])


def test_a_copy_in_an_archive_is_found(files: Path) -> None:
    with zipfile.ZipFile(files / "images.zip", "w") as archive:
        archive.write(files / "b", "b.jpg")
    member = f"zip://{files}/images.zip#b.jpg"
    assert find_same_content([member], [str(files / "copy")]).same == {0: str(files / "copy")}
    assert find_same_content([str(files / "copy")], [member]).same == {0: member}
