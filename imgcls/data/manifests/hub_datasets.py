"""Folders that Hugging Face `datasets` and the Hub write, as manifests."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable

from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError
from imgcls.formatting import format_list

_SHARD = re.compile(r"(.+?)-\d+-of-\d+[^/]*\.parquet", re.IGNORECASE)


def refuse_saved_dataset(url: str, names: Iterable[str]) -> None:
    """Raise ManifestError for a folder of `Dataset.save_to_disk`, with the command to convert it.

    names: of the files in the folder
    """
    found = set(names)
    if "dataset_dict.json" in found:
        load, part = f"load_from_disk({json.dumps(url)})[SPLIT]", "each split of a DatasetDict of"
    elif {"state.json", "dataset_info.json"} <= found:
        load, part = f"load_from_disk({json.dumps(url)})", "the output of"
    else:
        return
    code = f'import datasets; datasets.{load}.to_parquet("dataset.parquet")'
    raise ManifestError(
        f"manifest {url}: is {part} save_to_disk of Hugging Face datasets; write it as Parquet: "
        f"python -c {shlex.quote(code)}"
    )


def find_repository_tables(url: str, paths: Iterable[str]) -> list[str]:
    """The Parquet files of one split in a repository of the Hub; none where it has no such file.

    paths: of all files in the repository, relative to it
    Raises ManifestError where it has several splits, with the globs to choose from.
    """
    splits: dict[str, list[str]] = {}
    for path in sorted(paths):
        if not path.lower().endswith(".parquet"):
            continue
        shard = _SHARD.fullmatch(path)
        splits.setdefault(f"{shard[1]}-*.parquet" if shard else path, []).append(path)
    if len(splits) > 1:
        shown = format_list((filesystem.join(url, each) for each in splits), 6)
        raise ManifestError(
            f"manifest {url}: contains {len(splits)} splits or tables; pass one of them: {shown}"
        )
    return [filesystem.join(url, path) for each in splits.values() for path in each]
