"""URLs are shown without credentials."""

from __future__ import annotations

import pytest

from imgcls.data.storage.credentials import hide_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:x@host/db", "postgresql://host/db"),
        ("postgresql://me:a@b@host/db", "postgresql://host/db"),
        ("postgresql://me:a/b@host/db", "postgresql://host/db"),
        ("no access to 'http://me@host/a' (x)", "no access to 'http://host/a' (x)"),
        ("https://h/a.csv?sig=s%3D; and more", "https://h/a.csv?... and more"),
        ("(https://h/a?X-Amz-Signature=s)", "(https://h/a?...)"),
        ("az://c/a.jpg?sig=s", "az://c/a.jpg?..."),
        ("https://me:p#w@host/a.jpg", "https://host/a.jpg"),
        ("zip://https://h/z.zip?sig=s#a b?.jpg", "zip://https://h/z.zip?...#a b?.jpg"),
        ("abfs://container@account.dfs.core.windows.net/a", None),
        ("sqlite:////srv/a@b.db", None),
        ("s3://bucket/a?b@c", None),
        ("hf://datasets/me/name@main/a", None),
        ("http://host:9000/a@b", None),
        ("me@host, a: b@c", None),
    ],
)
def test_no_user_no_password_and_no_signature_are_shown(text: str, shown: str | None) -> None:
    assert hide_credentials(text) == (text if shown is None else shown)
