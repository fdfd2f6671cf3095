"""Manifests built from tables: every value as the table has it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.curation.build import ManifestBuildConfig, _check_columns, build_manifest
from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.errors import ManifestError


def test_a_table_is_read_as_a_manifest_is(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes('file,kind\na.jpg,"fou\u00e9 \\"x\\"\r\ny"\n'.encode("latin-1"))
    asked = {"source": str(table), "output": str(tmp_path / "out"), "path_column": "file"}
    with pytest.raises(ManifestError, match=r"set --encoding$"):
        build_manifest(ManifestBuildConfig(**asked))
    with pytest.raises(ManifestError, match=r"pass --escape"):
        build_manifest(ManifestBuildConfig(**asked, encoding="latin-1"))
    assert build_manifest(ManifestBuildConfig(**asked, encoding="latin-1", escape="\\")) == 1
    assert pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist() == [
        {"path": f"{tmp_path}/a.jpg", "kind": 'fou\u00e9 "x"\r\ny'}
    ]


def test_facts_do_not_hide_a_column_of_another_case(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"], "Width": [3]}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    with pytest.raises(ManifestError, match="has a column 'Width', which --contents writes"):
        _check_columns(manifest, ["width", "height"])
