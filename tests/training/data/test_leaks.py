"""Images of equal bytes are found under any path, and only files of equal sizes are read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

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
    assert find_same_content(urls, protected) == {1: protected[1]}
    assert find_same_content(urls, []) == {}


def test_files_of_other_sizes_are_not_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    compute = leaks._compute_digests

    def record(urls: list[str], max_bytes: int) -> list[bytes | None]:
        read.extend(Path(url).name for url in urls)
        return compute(urls, max_bytes)

    monkeypatch.setattr(leaks, "_compute_digests", record)
    urls = [str(files / name) for name in ("a", "b", "c")]
    find_same_content(urls, [str(files / "copy"), str(files / "other")])
    assert sorted(read) == ["a", "b", "copy"]


def test_a_copy_in_an_archive_is_found(files: Path) -> None:
    with zipfile.ZipFile(files / "images.zip", "w") as archive:
        archive.write(files / "b", "b.jpg")
    member = f"zip://{files}/images.zip#b.jpg"
    assert find_same_content([member], [str(files / "copy")]) == {0: str(files / "copy")}
    assert find_same_content([str(files / "copy")], [member]) == {0: member}
