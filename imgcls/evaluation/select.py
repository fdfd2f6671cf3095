"""Selection of the rows of a run that are most useful to label next.

One pass over the run keeps the most uncertain rows as candidates; a second one reads their columns
and embeddings, and chooses rows that are no near-duplicates of each other. Memory is bounded by the
number of candidates. No model runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.config import requested
from imgcls.data import image_files
from imgcls.data.annotations.exports import write_tasks
from imgcls.data.decoding import open_image
from imgcls.data.decoding.image_features import HASH_BITS, compute_features
from imgcls.data.manifests.image_urls import read_urls, resolve_urls
from imgcls.data.manifests.label_columns import UNKNOWN
from imgcls.data.manifests.manifest import normalize_labels, open_manifest, resolve_paths
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import OK, BundleError, ImageError, OutputError, RequestError, StorageError
from imgcls.evaluation.aggregate import TopRows, read_piece
from imgcls.evaluation.config import SelectConfig
from imgcls.evaluation.diversity import ClassCap, choose_first, choose_spread
from imgcls.evaluation.labeling_tasks import build_tasks
from imgcls.evaluation.row_lookup import read_rows
from imgcls.evaluation.row_pairs import check_pairing, iter_row_pairs
from imgcls.evaluation.uncertainty import MEASURES, compute_disagreement
from imgcls.formatting import format_count
from imgcls.metrics.columns import Floats, Ints
from imgcls.models.bundle import read_description
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run
from imgcls.runs.schema import list_prediction_columns
from imgcls.runs.table_counts import TableCounter

MANIFEST_FILE = "manifest.parquet"
_CANDIDATES_PER_ROW, _DIVERSE_CANDIDATES_PER_ROW = 10, 5
_MAX_HASH_DISTANCE = 40
"""Bits of two perceptual hashes (of 256) that may differ between near-duplicates."""


@dataclass(frozen=True)
class Selection:
    """Result of a selection.

    Attributes
    ----------
    output : str
        Folder with `manifest.parquet` (the manifest columns of the rows, paths absolute),
        `selection.parquet` (also their predictions, `selection_rank` from 1 and
        `selection_value`) and `summary.json`; with `format`, also the tasks for that tool.
    rows : pyarrow.Table
        The rows of `selection.parquet`, in their order.
    candidates : int
        Number of rows that they were chosen from.
    """

    output: str
    rows: pa.Table
    candidates: int

    def __repr__(self) -> str:
        return f"<Selection of {format_count(self.rows.num_rows, 'row')}: {self.output}>"


def select(config: SelectConfig | None = None, /, **settings: object) -> Selection:
    """Select the rows of a run that are most useful to label next.

    Parameters
    ----------
    config : SelectConfig, optional
        The whole request, instead of `settings`.
    **settings
        The keys of `imgcls select`. `run` and `output` are required.

    Returns
    -------
    Selection
        The selected rows, and the folder that they were written to.

    Raises
    ------
    RequestError
        If the run does not have the columns that `by` needs, or no row can be selected.
    OutputError
        If the run is not committed, or the output has a selection.

    Examples
    --------
    >>> import imgcls
    >>> imgcls.select(run="out", count=100, output="next")  # doctest: +SKIP
    <Selection of 100 rows: next>
    """
    return _select(requested(SelectConfig, config, settings, 'select(run="out", output="next")'))


@with_config_storage
def _select(config: SelectConfig) -> Selection:
    run = open_run(config.run)
    run.check_predictions()
    output = filesystem.absolute(config.output)
    layout.check_no_run(output)
    if filesystem.exists(filesystem.join(output, layout.SELECTION_FILE)) and not config.overwrite:
        raise OutputError(
            f"output {output}: already has a selection; pass --overwrite to replace it"
        )
    other = _check_request(config, run)
    top = _find_candidates(config, run, other)
    candidates = read_rows(run, top.file, top.position, _list_read_columns(run))
    chosen = _choose(config, run, candidates)
    rows = candidates.take(pa.array(chosen))
    if "embedding" in rows.schema.names:
        rows = rows.drop_columns(["embedding"])
    rows = _make_paths_absolute(run, rows)
    rows = rows.append_column("selection_rank", pa.array(np.arange(1, len(chosen) + 1), pa.int32()))
    rows = rows.append_column("selection_value", pa.array(top.value[chosen]))
    if len(chosen) < config.count:
        log.emit(
            "note",
            f"{format_count(len(chosen), 'row')} selected, not {config.count:,}: the others are "
            "labeled already, near-duplicates, or beyond --per-class-cap",
        )
    files = []
    if config.format is not None:
        files = write_tasks(config.format, output, build_tasks(run, rows, config.image_root))
    _write(config, run, output, rows, len(top.value))
    log.show(f"selected  {format_count(len(chosen), 'row')} of {run.rows:,} by {config.by}")
    log.show(f"manifest  {filesystem.join(output, MANIFEST_FILE)}")
    for file in files:
        log.show(f"tasks     {file}")
    return Selection(output, rows, len(top.value))


def _check_request(config: SelectConfig, run: CommittedRun) -> CommittedRun | None:
    """The other run of `--by disagreement`; raises RequestError for a request that cannot work."""
    other = None
    if config.by == "disagreement":
        if config.other_run is None:
            raise RequestError("by disagreement: needs the run of another model; pass --other-run")
        if run.merged_runs:
            raise RequestError(
                f"{run.url}: is a history of several runs, which --by disagreement does not take; "
                "pass one of them"
            )
        other = open_run(config.other_run)
        check_pairing(run, other, config.on)
        names, other_names = (normalize_labels(pa.array(each.classes)) for each in (run, other))
        if other.task != run.task or other_names != names:
            raise RequestError(
                f"{other.url}: has other classes than {run.url}; compare models of the same classes"
            )
        for each in (run, other):
            if not each.has_scores:
                raise RequestError(each.describe_missing_scores("--by disagreement"))
    else:
        if config.other_run is not None:
            raise RequestError("other_run: has no effect without --by disagreement; remove it")
        measure = MEASURES[config.by][run.task]
        missing = [name for name in measure.columns if name not in run.schema.names]
        if not missing and "scores" in measure.columns and not run.has_scores:
            raise RequestError(run.describe_missing_scores(f"--by {config.by}"))
        if missing or (config.by == "margin" and run.task == "single_label" and run.top_k < 2):
            name = missing[0] if missing else "topk_scores with two classes"
            raise RequestError(
                f"{run.url}: has no column {name}, which --by {config.by} needs; {measure.remedy}"
            )
    if config.diverse and "embedding" not in run.schema.names:
        raise RequestError(
            f"{run.url}: has no embeddings, which --diverse needs; predict again with "
            "--embeddings float16"
        )
    return other


def _find_candidates(
    config: SelectConfig, run: CommittedRun, other: CommittedRun | None
) -> TopRows:
    """The most uncertain rows that may be selected, the most uncertain first."""
    per_row = _DIVERSE_CANDIDATES_PER_ROW if config.diverse else _CANDIDATES_PER_ROW
    size = config.candidates or per_row * config.count
    cap = config.per_class_cap
    groups: dict[str, TopRows] = {}
    group_size = size if cap is None else min(size, per_row * cap)
    excluded, counter = _read_excluded(config), run.create_counter()
    names = [run.path_column, "status", *counter.label_names, *_group_columns(run)]
    for table, value, file, position in _iter_values(config, run, other, names):
        keep = _find_selectable(config, run, counter, table, excluded) & np.isfinite(value)
        group = _name_groups(table) if cap is not None else pa.nulls(len(value), pa.string())
        encoded = group.fill_null("").dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        for code, name in enumerate(encoded.dictionary.to_pylist()):
            rows = keep & (codes == code)
            top = groups.setdefault(name, TopRows(group_size))
            top.add(value[rows], file[rows], position[rows])
    total = TopRows(size)
    for top in groups.values():
        total.add(top.value, top.file, top.position)
    if not len(total.value):
        raise RequestError(
            f"{run.url}: has no row to select: every row is labeled (--include-labeled takes these "
            "too), excluded, or has no prediction"
        )
    return total


def _iter_values(
    config: SelectConfig, run: CommittedRun, other: CommittedRun | None, names: Sequence[str]
) -> Iterator[tuple[pa.Table, Floats, Ints, Ints]]:
    """Rows of the run with their values, files and positions in these.

    names: columns to read, besides those that the values need
    """
    if other is not None:
        ends = np.cumsum([0, *_count_rows(run)])
        left = list(dict.fromkeys([*names, "scores", "row"]))
        right = ["status", "scores", *(["predicted_labels"] if run.task == "multilabel" else [])]
        for a, b in iter_row_pairs(run, other, left, right, config.on):
            ok = _is_ok(a) & _is_ok(b)
            value = np.full(a.num_rows, np.nan)
            places = pa.array(np.flatnonzero(ok))
            value[ok] = compute_disagreement(a.take(places), b.take(places))
            row = a["row"].to_numpy()
            file = np.searchsorted(ends, row, side="right") - 1
            yield a, value, file, row - ends[file]
        return
    measure, thresholds = MEASURES[config.by][run.task], _find_thresholds(run)
    columns = list(dict.fromkeys([*names, *measure.columns]))
    for piece in run.split_row_groups(10**9):
        start = piece.first_row
        for table in read_piece(run, piece, columns):
            ok = _is_ok(table)
            value = np.full(table.num_rows, np.nan)
            value[ok] = measure.compute(table.take(pa.array(np.flatnonzero(ok))), thresholds)
            position = start + np.arange(table.num_rows)
            yield table, value, np.full(table.num_rows, piece.file), position
            start += table.num_rows


def _count_rows(run: CommittedRun) -> list[int]:
    counts = [0] * len(run.files)
    for piece in run.split_row_groups(10**9):
        counts[piece.file] += piece.rows
    return counts


def _is_ok(table: pa.Table) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = pc.equal(table["status"].cast(pa.string()), OK).to_numpy()
    return found


def _find_thresholds(run: CommittedRun) -> list[float]:
    """Thresholds of the classes: of the bundle that made the run, if it can be read."""
    threshold = run.run_record["identity"]["settings"]["threshold"]
    if run.task == "multilabel":
        try:
            bundle = read_description(run.provenance["config"]["model"])
        except (BundleError, StorageError):
            bundle = None
        if bundle is not None and run.is_made_by(bundle.sha256):
            override = run.provenance["config"].get("threshold")
            return bundle.spec.resolve_thresholds(override)
        log.emit(
            "note",
            f"the bundle of {run.url} cannot be read, or did not make all of its rows; the margin "
            f"is that from a threshold of {threshold:g} for every class",
        )
    return [float(threshold)] * len(run.classes)


def _group_columns(run: CommittedRun) -> list[str]:
    return ["topk_labels"] if run.task == "multilabel" else ["predicted_label"]


def _name_groups(table: pa.Table) -> pa.Array:
    """The predicted class of each row, of multilabel the best one."""
    if "predicted_label" in table.schema.names:
        return table["predicted_label"].cast(pa.string()).combine_chunks()
    return pc.list_element(table["topk_labels"].combine_chunks(), 0).cast(pa.string())


def _find_selectable(
    config: SelectConfig,
    run: CommittedRun,
    counter: TableCounter,
    table: pa.Table,
    excluded: pa.Array | None,
) -> npt.NDArray[np.bool_]:
    """Whether each row may be selected: it is not labeled and not excluded."""
    may = np.ones(table.num_rows, bool)
    if not config.include_labeled and counter.label_columns is not None:
        may &= (counter.label_columns.encode(table, run.classes).targets == UNKNOWN).any(1)
    elif not config.include_labeled and counter.label_column is not None:
        labels = normalize_labels(table[counter.label_column])
        may &= labels.is_null().to_numpy(zero_copy_only=False)
    if excluded is not None:
        paths = resolve_urls(table[run.path_column], run.root)
        may &= ~pc.is_in(paths, value_set=excluded).to_numpy()
    return may


def _read_excluded(config: SelectConfig) -> pa.Array | None:
    """Absolute paths of the images in `exclude`."""
    if config.exclude is None:
        return None
    manifest = open_manifest(config.exclude, keys=KeyNames("exclude"))
    parts = (read_urls(manifest, batch) for batch in manifest.batches())
    return pc.unique(pa.chunked_array(parts, pa.large_string()))


def _list_read_columns(run: CommittedRun) -> list[str]:
    return [name for name in run.schema.names if name != "scores"]


def _choose(config: SelectConfig, run: CommittedRun, candidates: pa.Table) -> Ints:
    """Indices of the selected candidates, in the order of their choice."""
    groups = _name_groups(candidates).fill_null("").to_pylist()
    cap, rows = ClassCap(groups, config.per_class_cap), candidates.num_rows
    count = min(config.count, rows)
    if "embedding" not in candidates.schema.names:
        limit = 1 - 2 * _MAX_HASH_DISTANCE / HASH_BITS
        return choose_first(_iter_hashes(run, candidates, cap), count, limit, cap)
    column = candidates["embedding"].combine_chunks()
    width = column.type.list_size
    vectors = np.zeros((rows, width), np.float32)
    has_vector = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors[has_vector] = normalize_embeddings(values.reshape(-1, width))
    if config.diverse:
        return choose_spread(vectors, count, config.max_similarity, cap)
    return choose_first(vectors, count, config.max_similarity, cap)


def _iter_hashes(
    run: CommittedRun, candidates: pa.Table, cap: ClassCap
) -> Iterator[npt.NDArray[np.float32]]:
    """Perceptual hashes of the candidates as vectors of length 1; 0 for an unreadable image.

    Images are read as the vectors are taken, a few ahead, and not where `cap` has no room.

    The cosine of two of them is 1 - 2 d / 256, where d is the number of bits that differ.
    """
    log.emit(
        "note",
        f"{run.url} has no embeddings: near-duplicates are found by perceptual hashes, for which "
        "the images are read",
    )
    paths = resolve_paths(candidates[run.path_column], run.root).to_pylist()
    wanted = (path if cap.has_room(row) else None for row, path in enumerate(paths))
    for data in image_files.read_ahead(wanted):
        vector = np.zeros(HASH_BITS, np.float32)
        if isinstance(data, bytes):
            with contextlib.suppress(ImageError):
                features = compute_features(data, max_pixels=open_image.MAX_PIXELS)
                bits = np.unpackbits(features.hash).astype(np.float32)
                vector = (2 * bits - 1) / np.sqrt(HASH_BITS)
        yield vector


def _make_paths_absolute(run: CommittedRun, rows: pa.Table) -> pa.Table:
    index = rows.schema.get_field_index(run.path_column)
    paths = resolve_paths(rows[run.path_column], run.root).cast(pa.string())
    return rows.set_column(index, run.path_column, paths)


def _write(
    config: SelectConfig, run: CommittedRun, output: str, rows: pa.Table, candidates: int
) -> None:
    added = {*list_prediction_columns(run.schema), "selection_rank", "selection_value"}
    own = [name for name in rows.schema.names if name not in added]
    layout.write_table(filesystem.join(output, MANIFEST_FILE), rows.select(own))
    layout.write_table(filesystem.join(output, layout.SELECTION_FILE), rows)
    summary = {
        "run": run.url,
        "bundle_sha256": run.bundle_sha256,
        "by": config.by,
        "diverse": config.diverse,
        "per_class_cap": config.per_class_cap,
        "rows": rows.num_rows,
        "candidates": candidates,
        "run_rows": run.rows,
    }
    data = (json.dumps(summary, indent=2) + "\n").encode()
    filesystem.write(filesystem.join(output, layout.SUMMARY_FILE), data)
