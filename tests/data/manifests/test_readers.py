"""The table of manifest formats and the configuration keys that errors name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.data.manifests.readers import MANIFEST_FORMATS, ManifestFormat
from imgcls.errors import ManifestError


def test_every_format_of_the_table_can_be_configured() -> None:
    assert get_args(ManifestFormat) == ("auto", *MANIFEST_FORMATS)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a,b\n", {}, "name it with --on"),
        ("path,b\n", {"label_column": "x"}, "name it with --data.train.label-column"),
        ("path,b\n1,\xe9\n", {}, "set --data.train.encoding"),
        ("PAR1", {}, "pass --data.train.format parquet"),
        ("path,b\n", {"delimiter": "::"}, "data.train.delimiter: '::' must be"),
    ],
)
def test_errors_name_the_keys_of_the_job(
    tmp_path: Path, text: str, options: dict[str, str], expected: str
) -> None:
    file = tmp_path / "m.csv"
    file.write_bytes(text.encode("latin-1"))
    keys = KeyNames("data.train", {"path_column": "on"})
    with pytest.raises(ManifestError) as caught:
        list(open_manifest(ManifestConfig(path=str(file), **options), keys=keys).batches())
    assert expected in str(caught.value)
