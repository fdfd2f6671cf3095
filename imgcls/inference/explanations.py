"""Explanations of some rows of a committed run: `predict --explain`.

Runs in the driver, after the commit, on the CPU, and holds the lease of the run. The rows are the
labeled ones with the most confident mistakes; of an unlabeled run, those with the lowest
confidence. The predictions and their counts do not change. The name of a picture is derived from
its row, so a run that was interrupted is resumed, and doing it twice writes the same files.

out/_explanations/000000042-0f3a5c917d2e.jpg
out/_explanations/explanations.parquet        written last
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.cluster.interrupts import Interruption
from imgcls.data.formats import EXPLANATIONS_FOLDER
from imgcls.data.manifests.label_columns import NEGATIVE, LabelColumns
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.storage import filesystem
from imgcls.errors import Interrupted, RequestError, RunFailed, StorageError
from imgcls.formatting import format_count
from imgcls.metrics.columns import Bools, limit_batch_rows, read_ok_rows, take_scores
from imgcls.metrics.multilabel import read_multilabel_rows
from imgcls.models.bundle import Bundle
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, iter_tables, open_run
from imgcls.runs.explained_rows import build_explainer, explain_rows
from imgcls.runs.lease import DEFAULT_TERM_S, Lease
from imgcls.runs.table_counts import TableCounter

TABLE_NAME = "explanations.parquet"
_PICTURE_NAME = re.compile(r"\d{9,}-[0-9a-f]{12}\.jpg")
_MAX_BATCH_ROWS = 65_536
_MAX_LEASE_CHECK_AGE_S = 1.0
_ORDERS = {"mistakes": "descending", "uncertain": "ascending"}
_SCHEMA = pa.schema(
    [("row", pa.int64()), ("path", pa.string()), ("label", pa.string()), ("score", pa.float32())]
)


def explain_runs(
    bundle: Bundle,
    outputs: Sequence[str],
    count: int,
    interruption: Interruption,
    lease_s: float = DEFAULT_TERM_S,
) -> None:
    """Explain rows of the committed runs of a command.

    outputs: the folders that it worked on or found committed
    count:   maximum number of rows of each run; 0 explains none
    lease_s: term of the lease on each run, in seconds
    Raises RunFailed or StorageError, with a hint that the run is committed.
    """
    if not count:
        return
    for url in dict.fromkeys(outputs):
        if layout.is_committed(url):
            with _add_commit_hint(url):
                lease = Lease.acquire(url, lease_s)
                try:
                    _explain_run(open_run(url), bundle, count, interruption, lease)
                finally:
                    lease.release()


@contextlib.contextmanager
def _add_commit_hint(url: str) -> Iterator[None]:
    """Turn the errors of the block into those of a run whose table is committed."""
    hint = f"{url} is committed, but not all of its explanations are written"
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{error}; {hint}; rerun the same command for the rest") from None
    except StorageError as error:
        raise type(error)(f"{hint}: {error}; rerun the same command for the rest") from error
    except RequestError as error:
        raise RunFailed(f"{hint}: {error}; rerun the same command for the rest") from error


def _explain_run(
    run: CommittedRun, bundle: Bundle, count: int, interruption: Interruption, lease: Lease
) -> None:
    if run.bundle_sha256 != bundle.sha256:
        log.emit("note", f"{run.url}: was made by another bundle; its rows are not explained")
        return
    rows = select_rows(run, count)
    folder = filesystem.join(run.url, EXPLANATIONS_FOLDER)
    filesystem.remove_temporary_files(folder)
    names = [_name_file(run, row) for row in rows.to_pylist()]
    present = set(filesystem.list_names(folder))
    if not present.issuperset(names):
        missing = [at for at, name in enumerate(names) if name not in present]
        wanted = [(row["path"], [row["label"]]) for row in rows.take(missing).to_pylist()]
        found = explain_rows(build_explainer(run, bundle), run, wanted)
        for at, explanations in zip(missing, found, strict=True):
            interruption.check()
            lease.check(_MAX_LEASE_CHECK_AGE_S)
            for one in explanations:
                filesystem.write(filesystem.join(folder, names[at]), one.encode_jpeg())
                present.add(names[at])
    files = pa.array([name if name in present else None for name in names], pa.string())
    lease.check()
    layout.write_table(filesystem.join(folder, TABLE_NAME), rows.append_column("file", files))
    for name in sorted(present.difference(names)):
        if _PICTURE_NAME.fullmatch(name):  # of another request
            filesystem.remove(filesystem.join(folder, name))
    drawn = len(files) - files.null_count
    log.emit("explained", f"{format_count(drawn, 'row')}: {folder}", rows=drawn)


def select_rows(run: CommittedRun, count: int) -> pa.Table:
    """The rows to explain, with the class of each, the most important first.

    With labels: mistakes, of which the highest score is the first; of a multilabel run the wrong
    label with the highest score in each row. Without: the rows whose best score is the lowest.
    Returns row, path, label (the class to explain), score.
    """
    found = {name: _SCHEMA.empty_table() for name in _ORDERS}
    is_labeled = False
    counter = run.create_counter()
    names = ["row", run.path_column, "topk_labels", "topk_scores"]
    names += counter.select_columns(run.schema)
    if run.task == "multilabel":
        names.append("scores")
    batch_rows = limit_batch_rows(len(run.classes), _MAX_BATCH_ROWS)
    for table in iter_tables(run, list(dict.fromkeys(names)), batch_rows):
        best = _read_best(run, table)
        mistakes, has_labels = _find_mistakes(run, counter, table, best)
        is_labeled = is_labeled or has_labels
        for name, new in (("mistakes", mistakes), ("uncertain", best)):
            order = [("score", _ORDERS[name]), ("row", "ascending")]
            found[name] = pa.concat_tables([found[name], new]).sort_by(order).slice(0, count)
    return found["mistakes" if is_labeled else "uncertain"].combine_chunks()


def _find_mistakes(
    run: CommittedRun, counter: TableCounter, table: pa.Table, best: pa.Table
) -> tuple[pa.Table, bool]:
    """The wrong rows of a batch, and whether any row has a label.

    best: the rows with a prediction, as `_read_best` returns them
    """
    if counter.label_columns is not None:
        return _find_wrong_labels(run, counter.label_columns, table)
    if counter.label_column is None:
        return _SCHEMA.empty_table(), False
    place = table.schema.get_field_index(counter.label_column)
    text = normalize_labels(table.column(place))
    table = table.set_column(place, counter.label_column, text)
    rows = read_ok_rows(table, label_column=counter.label_column, classes=run.classes)
    is_wrong = (rows.label >= 0) & (rows.label != rows.predicted)
    return best.filter(pa.array(is_wrong)), bool((rows.label >= 0).any())


def _find_wrong_labels(
    run: CommittedRun, columns: LabelColumns, table: pa.Table
) -> tuple[pa.Table, bool]:
    rows = read_multilabel_rows(table, classes=run.classes)
    targets = columns.encode(table, run.classes).targets[rows.position]
    wrong: Bools = rows.predicted & (targets == NEGATIVE)
    scores = np.where(wrong, take_scores(table["scores"], rows.position), -1)
    worst = scores.argmax(axis=1)
    ok = table.take(rows.position)
    found = _build_rows(
        run,
        ok,
        pa.array(run.classes, pa.string()).take(pa.array(worst)),
        pa.array(scores[np.arange(len(scores)), worst], pa.float32()),
    )
    return found.filter(pa.array(wrong.any(axis=1))), bool((targets >= 0).any())


def _read_best(run: CommittedRun, table: pa.Table) -> pa.Table:
    """The rows of a batch with a prediction, with their best class."""
    ok = table.filter(pc.equal(table["status"].cast(pa.string()), "ok"))
    label, score = (pc.list_element(ok[name], 0) for name in ("topk_labels", "topk_scores"))
    return _build_rows(run, ok, label, score)


def _build_rows(run: CommittedRun, table: pa.Table, label: pa.Array, score: pa.Array) -> pa.Table:
    columns = [table["row"], table[run.path_column].cast(pa.string()), label, score]
    return pa.table(dict(zip(_SCHEMA.names, columns, strict=True))).cast(_SCHEMA)


def _name_file(run: CommittedRun, row: dict[str, object]) -> str:
    """Name of the picture of a row, by the bundle, the path and the class that it shows."""
    text = "\0".join((run.bundle_sha256, str(row["path"]), str(row["label"])))
    return f"{row['row']:09d}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jpg"
