"""Class lists in text files: one name per line, or an error with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.errors import BundleError
from imgcls.models.class_list import parse_class_list, read_class_list


def test_a_class_list_is_one_name_per_line() -> None:
    assert parse_class_list("cat\ndog\n", "f") == ["cat", "dog"]
    assert parse_class_list("cat\r\n dog \r\n\r\n\n", "f") == ["cat", "dog"]
    assert parse_class_list("ünï→猫\n007", "f") == ["ünï→猫", "007"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", "f, line 2: is blank"),
        ("\ncat", "f, line 1: is blank"),
        ("cat\ndog\ncat\n", "f, line 3: 'cat' is also on line 1"),
        ("", "f: has no class names"),
        ("\n\n", "f: has no class names"),
    ],
)
def test_a_class_list_with_a_blank_or_doubled_name_is_refused_by_its_line(
    text: str, message: str
) -> None:
    with pytest.raises(BundleError) as caught:
        parse_class_list(text, "f")
    assert str(caught.value).startswith(message)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\ndog\r\n".encode())
    assert read_class_list(str(tmp_path / "names.txt")) == ["cat", "dog"]
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"classes: .*; pass a text file with one name per line"):
        read_class_list(str(tmp_path / "names.txt"))
