"""Data sets on Hugging Face as a target: one commit per run, through huggingface_hub.

A run is a folder of Parquet files whose name has the run id and the number of the run's commit, so
the files themselves are the record. The commit names the one before it: if another writer came
first, the server refuses it and the folders are listed again. A run that was committed again, after
`--retry-errors`, replaces its folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.data.optional_packages import import_package
from imgcls.errors import ImgclsError, RequestError, StorageError, request_error
from imgcls.publishing.rows import RunRows
from imgcls.publishing.sink import Publication, Sink, TransactionConflict, retry_conflicts
from imgcls.publishing.table_types import build_table_schema

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_DATA_FOLDER = "data"
_CONFLICT = 412


class HubSink(Sink):
    """A data set on Hugging Face, or on the server that HF_ENDPOINT names; it must exist."""

    prefix = "hf"
    syntax = "hf:datasets/OWNER/NAME"

    def __init__(self, name: str) -> None:
        kind, _, repo = name.partition("/")
        owner, _, rest = repo.partition("/")
        if kind != "datasets" or not owner or not rest or "/" in rest:
            raise RequestError(f"publish hf:{name}: pass {self.syntax}")
        super().__init__(name)
        self._repo = repo

    def check(self, schema: pa.Schema, place: str) -> None:
        import_package("huggingface_hub", "HfApi", "publish", "hf")
        build_table_schema(schema, place, has_times=True)
        try:
            self._read_head()
        except StorageError as error:
            raise request_error(RequestError, str(error), error) from error

    def find(self, rows: RunRows) -> Publication | None:
        head, folders = self._read_head()
        return Publication("unchanged", head) if _name_folder(rows) in folders else None

    def publish(self, rows: RunRows) -> Publication:
        stored = build_table_schema(rows.schema, rows.run.url, has_times=True)
        with tempfile.TemporaryDirectory(prefix="imgcls-publish-") as folder:
            files: list[CommitOperationAdd] = []
            return retry_conflicts(
                self.target, lambda: self._publish_once(rows, stored, Path(folder), files)
            )

    def _publish_once(
        self, rows: RunRows, stored: pa.Schema, folder: Path, files: list[CommitOperationAdd]
    ) -> Publication:
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        head, folders = self._read_head()
        if _name_folder(rows) in folders:
            return Publication("unchanged", head)
        if not files:
            files += _write_files(rows, stored, folder)
        earlier = [each for each in folders if each.startswith(f"{_DATA_FOLDER}/{rows.run_id}-")]
        removed = [CommitOperationDelete(f"{each}/", is_folder=True) for each in earlier]
        rows.check_unchanged()
        with self._translate_errors():
            try:
                done = self._open_api().create_commit(
                    self._repo,
                    [*removed, *files],
                    commit_message=f"imgcls run {rows.run_id}",
                    commit_description=f"{rows.run.url}, committed {rows.committed}",
                    repo_type="dataset",
                    parent_commit=head,
                )
            except HfHubHTTPError as error:
                if error.response.status_code == _CONFLICT:
                    raise TransactionConflict from error
                raise
        return Publication("replaced" if removed else "published", done.oid)

    def _open_api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(library_name="imgcls")

    def _read_head(self) -> tuple[str, set[str]]:
        """The newest commit, and the folders of the runs in it."""
        from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

        api = self._open_api()
        with self._translate_errors():
            try:
                head = str(api.repo_info(self._repo, repo_type="dataset").sha)
            except RepositoryNotFoundError as error:
                raise RequestError(
                    f"{self.target}: there is no such data set, or no access to it. Create it with "
                    f"`hf repos create {self._repo} --repo-type dataset`, and log in with "
                    "`hf auth login` or set HF_TOKEN"
                ) from error
            try:
                entries = list(
                    api.list_repo_tree(self._repo, _DATA_FOLDER, revision=head, repo_type="dataset")
                )
            except RemoteEntryNotFoundError:
                entries = []
        return head, {entry.path for entry in entries}

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (ImgclsError, TransactionConflict):
            raise
        except Exception as error:
            raise translate_table_error(self.target, error) from error


def _name_folder(rows: RunRows) -> str:
    return f"{_DATA_FOLDER}/{rows.run_id}-{rows.commit_id:016x}"


def _write_files(rows: RunRows, stored: pa.Schema, folder: Path) -> list[CommitOperationAdd]:
    """The parts of a run as files of the data set; they stay on this disk until the commit."""
    from huggingface_hub import CommitOperationAdd

    files = []
    for part in rows.run.files:
        name = part.rpartition("/")[2]
        with pq.ParquetWriter(folder / name, stored, compression="zstd") as writer:
            for table in rows.iter_tables(part, stored):
                writer.write_table(table)
        files.append(CommitOperationAdd(f"{_name_folder(rows)}/{name}", folder / name))
    return files
