from __future__ import annotations

import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.discovery import find_manifest_files
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError

REPOSITORY = "hf://datasets/owner/name"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of a repository, instead of the Hub's answer."""
    files: list[str] = []
    monkeypatch.setattr(filesystem, "is_folder", lambda url: True)
    monkeypatch.setattr(filesystem, "list_names", lambda url: [f for f in files if "/" not in f])
    monkeypatch.setattr(filesystem, "walk", lambda url: iter(files))
    monkeypatch.setattr(filesystem, "iter_pages", lambda url, deep: iter(()))
    return files


def test_the_tables_of_a_repository_with_one_split_are_read(files: list[str]) -> None:
    files += ["README.md", *(f"data/train-{n:05}-of-00002.parquet" for n in (1, 0))]
    found = find_manifest_files(REPOSITORY, "auto")
    assert found.format == "parquet"
    assert found.files == tuple(f"{REPOSITORY}/data/train-{n:05}-of-00002.parquet" for n in (0, 1))


def test_a_repository_with_several_splits_is_refused_with_their_globs(files: list[str]) -> None:
    files += ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    files += ["data/test-00000-of-00001.parquet", "extra.json"]
    with pytest.raises(ManifestError) as refused:
        find_manifest_files(REPOSITORY, "parquet")
    assert str(refused.value).endswith(
        f"pass one of them: {REPOSITORY}/data/test-*.parquet, {REPOSITORY}/data/train-*.parquet"
    )


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (["data-00000-of-00001.arrow", "dataset_info.json", "state.json"], "load_from_disk("),
        (["dataset_dict.json"], "[SPLIT].to_parquet("),
    ],
)
def test_a_data_set_saved_to_disk_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, names: list[str], command: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ManifestError, match="save_to_disk of Hugging Face datasets") as refused:
        find_manifest_files(str(tmp_path), "auto")
    assert command in str(refused.value)


def test_the_command_converts_a_saved_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    data = pa.table({"path": ["a.jpg"], "label": ["cat"]})
    datasets.Dataset(data).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ManifestError) as refused:
        find_manifest_files(str(tmp_path / "saved"), "auto")
    monkeypatch.chdir(tmp_path)
    code = str(refused.value).partition("python -c ")[2]
    exec(shlex.split(code)[0])
    assert pq.read_table(tmp_path / "dataset.parquet").to_pydict() == data.to_pydict()
