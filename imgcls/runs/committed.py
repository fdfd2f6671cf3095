"""Committed runs: open one, and read its files, classes and columns.

Only committed runs are opened, so that no number describes half a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.manifests.image_columns import has_bytes
from imgcls.data.manifests.label_columns import LabelColumns, read_label_columns
from imgcls.data.manifests.schemas import conform_table, widen_types
from imgcls.data.storage import filesystem
from imgcls.errors import (
    BundleError,
    OutputError,
    RequestError,
    StorageError,
    StorageMissing,
    request_error,
)
from imgcls.models.bundle import Bundle, TaskName, load_bundle
from imgcls.runs import layout
from imgcls.runs.schema import list_prediction_columns
from imgcls.runs.table_counts import TableCounter


@dataclass(frozen=True, eq=False)
class RowGroupRange:
    """Some row groups of a file, as the input of one task.

    file:       index of the file in `CommittedRun.files`
    row_groups: indices of the groups in the file
    first_row:  number of the file's rows before these groups
    rows:       number of rows in these groups
    """

    file: int
    row_groups: tuple[int, ...]
    first_row: int
    rows: int


@dataclass(frozen=True, eq=False)
class CommittedRun:
    """A committed run.

    files:   URLs of its parts, in row order
    classes: the class names of the bundle that made it, in its order
    label_columns: columns of the labels of a manifest with any number of them per image
    task: of the bundle
    schema:  of the predictions, manifest columns included
    success_record, run_record: `_SUCCESS` and `_run.json` as they were written
    """

    url: str
    files: tuple[str, ...]
    rows: int
    classes: tuple[str, ...]
    path_column: str
    label_column: str | None
    label_columns: LabelColumns | None
    task: TaskName
    root: str
    top_k: int
    bundle_sha256: str
    manifest_fingerprint: str
    schema: pa.Schema
    provenance: dict[str, Any]
    success_record: dict[str, Any]
    run_record: dict[str, Any]

    @property
    def merged_runs(self) -> tuple[str, ...]:
        """The runs that a compacted history was made of; empty for a single run."""
        return tuple(self.run_record["identity"].get("merged", ()))

    @property
    def has_same_classes(self) -> bool:
        """Whether all rows were predicted by bundles with the same classes in the same order.

        Unknown, and so False, for a history that an earlier version compacted.
        """
        return not self.merged_runs or bool(self.run_record.get("same_classes"))

    @property
    def has_scores(self) -> bool:
        """Whether the scores of all classes of this run were written.

        False for a compacted history of bundles with different classes, or with the same in another
        order: which class a score is for depends on the row.
        """
        if "scores" not in self.schema.names or not self.has_same_classes:
            return False
        kind = self.schema.field("scores").type
        return bool(pa.types.is_fixed_size_list(kind) and kind.list_size == len(self.classes))

    @property
    def has_label_sets(self) -> bool:
        """Whether it has conformal label sets."""
        return "label_set" in list_prediction_columns(self.schema)

    @property
    def has_ood(self) -> bool:
        """Whether it has out-of-distribution scores."""
        return {"ood_score", "is_ood"} <= set(list_prediction_columns(self.schema))

    @property
    def has_predictions(self) -> bool:
        """Whether this is a run of `imgcls predict`, not of `imgcls embed`."""
        return not {"predicted_label", "predicted_labels"}.isdisjoint(self.schema.names)

    def create_counter(self) -> TableCounter:
        """The counter of its rows."""
        columns, column = self.label_columns, self.label_column
        if self.task == "single_label":
            return TableCounter(self.classes, column)
        if columns is None and column is not None:
            columns = LabelColumns(column)
        return TableCounter(self.classes, None, columns, self.task)

    def check_single_label(self, command: str) -> None:
        """Raise RequestError for a multilabel run, which a command does not take."""
        if self.task != "single_label":
            raise RequestError(
                f"{self.url}: was labeled by a multilabel bundle; `imgcls {command}` is for one "
                "label per image"
            )

    def check_predictions(self) -> None:
        """Raise RequestError for a run of `imgcls embed`."""
        if not self.has_predictions:
            raise RequestError(
                f"{self.url}: has embeddings alone, no predictions; label it with `imgcls relabel "
                f"{self.url} --model BUNDLE`, and pass that run"
            )

    def check_columns(self, names: Sequence[str], option: str) -> None:
        """Raise RequestError when a column that `option` names is missing."""
        missing = [name for name in names if name not in self.schema.names]
        if missing:
            raise RequestError(
                f"{option}: {self.url} has no column {missing[0]!r} (found: "
                f"{', '.join(self.schema.names)})"
            )

    def check_slices(self, names: Sequence[str]) -> None:
        """Raise RequestError when a column to slice by is missing or has no scalar values."""
        self.check_columns(names, "slice_by")
        for name in names:
            self._check_scalar_column(
                name, "slice_by", "slices need scalar values such as a camera"
            )

    def check_key(self, name: str) -> None:
        """Raise RequestError when a column to join by is missing or has no scalar values."""
        self.check_columns([name], "on")
        self._check_scalar_column(
            name, "on", "rows are joined by scalar values such as a path or a number"
        )

    def _check_scalar_column(self, name: str, option: str, use: str) -> None:
        kind = self.schema.field(name).type
        if not is_scalar_type(kind):
            raise RequestError(
                f"{option}: {self.url}: column {name!r} is {kind}; {use}. Pass another column"
            )

    def check_embeddings(self) -> None:
        """Raise RequestError when this is no single run that has kept its embeddings."""
        if "embedding" not in self.schema.names:
            raise RequestError(
                f"{self.url}: has no embeddings; label it with "
                "`imgcls predict --embeddings float16`"
            )
        if self.merged_runs:
            raise RequestError(f"{self.url}: is a history of several runs; pass one of them")

    def check_bundle(self, bundle: Bundle) -> None:
        """Raise RequestError when another bundle made these predictions, or some of them."""
        if self.is_made_by(bundle.sha256):
            return
        if self.merged_runs:
            raise RequestError(
                f"{self.url}: is a history of runs, not all of which {bundle.url} made; pass one "
                "of them"
            )
        raise RequestError(
            f"{self.url}: was made by another bundle ({self.bundle_sha256[:12]}) than "
            f"{bundle.url} ({bundle.sha256[:12]}); pass the bundle that made it, or run "
            "`imgcls predict` with this one first"
        )

    def is_made_by(self, bundle_sha256: str) -> bool:
        """Whether this bundle made all rows; of a history, a column of the table is read."""
        if self.merged_runs:
            return set(self._read_bundle_hashes()) == {bundle_sha256}
        return self.bundle_sha256 == bundle_sha256

    def describe_missing_scores(self, use: str) -> str:
        """The error message where `has_scores` is false; use: what needs the scores."""
        if self.merged_runs and "scores" in self.schema.names:
            return (
                f"{self.url}: is a history whose scores {use} cannot use: its bundles had "
                "different classes, or an earlier version compacted it; compact it again, or pass "
                "one of its runs"
            )
        return (
            f"{self.url}: has no column 'scores', which {use} needs; label the images again with "
            "`imgcls predict --scores`"
        )

    def _read_bundle_hashes(self) -> list[str]:
        """Hashes of the bundles that made the rows of a history."""
        found: set[str] = set()
        for url in self.files:
            with filesystem.open_read(url) as stream:
                column = pq.read_table(stream, columns=["bundle_sha256"])["bundle_sha256"]
            found.update(column.unique().cast(pa.string()).to_pylist())
        return sorted(found)

    def split_row_groups(self, rows: int) -> list[RowGroupRange]:
        """Split the table into pieces of about `rows` rows, each within one part."""
        pieces = []
        for file, url in enumerate(self.files):
            with filesystem.open_read(url) as stream:
                about = pq.ParquetFile(stream, pre_buffer=False).metadata
                sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            groups: list[int] = []
            start = held = 0
            for group, size in enumerate(sizes):
                groups.append(group)
                held += size
                if held >= rows or group == len(sizes) - 1:
                    pieces.append(RowGroupRange(file, tuple(groups), start, held))
                    start, held, groups = start + held, 0, []
        return pieces


def load_source_bundle(run: CommittedRun, url: str | None, option: str) -> Bundle:
    """The bundle that made a run.

    url:    its folder; None for the one that the run names
    option: of the command that sets `url`
    Raises RequestError if it cannot be read, or is another bundle.
    """
    try:
        bundle = load_bundle(url or run.provenance["config"]["model"], needs_classes=False)
    except BundleError as error:
        raise RequestError(
            f"{run.url}: the bundle that made it cannot be read ({error}); pass its folder as "
            f"--{option}"
        ) from error
    run.check_bundle(bundle)
    return bundle


def is_scalar_type(kind: pa.DataType) -> bool:
    """Whether a type is text, a number or a time, by which rows can be grouped and joined."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (has_bytes(kind) or pa.types.is_nested(kind) or pa.types.is_interval(kind))


def cast_views(table: pa.Table) -> pa.Table:
    """Cast views of text and bytes to plain types, see `widen_types`."""
    return conform_table(table, widen_types(table.schema), "the predictions")


def iter_tables(
    run: CommittedRun, names: Sequence[str], batch_rows: int = 262_144
) -> Iterator[pa.Table]:
    """Iterate over columns of a run in row order, batch by batch."""
    for url in run.files:
        with filesystem.open_read(url) as opened:
            file = pq.ParquetFile(opened)
            for batch in file.iter_batches(batch_rows, columns=list(names)):
                yield cast_views(pa.Table.from_batches([batch]))


def _read_success(url: str) -> Any:
    """The content of `_SUCCESS`; raises OutputError where it is damaged, missing or empty."""
    try:
        data = filesystem.read(filesystem.join(url, layout.SUCCESS_FILE))
    except StorageMissing:
        data = b""
    if not data:  # see `layout.is_committed`
        raise OutputError(
            f"{url}: is not committed (no {layout.SUCCESS_FILE}); rerun the same "
            "`imgcls predict` command, which resumes the run"
        )
    try:
        return json.loads(data)
    except ValueError as error:
        raise OutputError(layout.damaged_success_message(url, str(error))) from error


def open_run(url: str) -> CommittedRun:
    """Open the output folder of `imgcls predict`.

    Raises OutputError when there is no run, or none that was committed.
    """
    url = filesystem.absolute(url)
    described = layout.load_run(url)
    if described is None:
        raise OutputError(
            f"{url}: holds no labeling run (no {layout.RUN_FILE}); pass the --output folder of "
            "`imgcls predict`"
        )
    success = _read_success(url)
    listed = success.get("files") if isinstance(success, dict) else None
    # earlier versions listed files of other programs, too
    names = sorted(filter(layout.is_part_name, listed or ()))
    if not names:
        raise OutputError(layout.damaged_success_message(url, "it names no files"))
    folder = filesystem.join(url, layout.PREDICTIONS_FOLDER)
    missing = sorted(set(names) - set(filesystem.list_names(folder)))
    if missing:
        raise OutputError(
            f"{url}: lacks {missing[0]}, which it had when it was committed; restore it"
        )
    files = tuple(filesystem.join(folder, name) for name in names)
    if "classes" not in described:
        raise OutputError(f"{url}: was written before class names were stored; label it again")
    try:
        with filesystem.open_read(files[0]) as stream:
            schema = pq.ParquetFile(stream, pre_buffer=False).schema_arrow.remove_metadata()
    except (pa.ArrowException, StorageError) as error:
        raise request_error(OutputError, f"{files[0]}: cannot be read ({error})", error) from error
    identity = described["identity"]
    return CommittedRun(
        url=url,
        files=files,
        rows=success["rows"],
        classes=tuple(described["classes"]),
        path_column=identity["manifest"]["path_column"],
        label_column=identity["manifest"]["label_column"],
        label_columns=read_label_columns(identity["manifest"]),
        task=described.get("task", "single_label"),
        root=identity["manifest"]["root"],
        top_k=identity["settings"]["top_k"],
        bundle_sha256=success["bundle_sha256"],
        manifest_fingerprint=success["manifest_fingerprint"],
        schema=schema,
        provenance=described["provenance"],
        success_record=success,
        run_record=described,
    )
