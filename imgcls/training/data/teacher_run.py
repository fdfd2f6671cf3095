"""Rows of a committed run that can teach: their images and scores, or their predicted labels."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifests.image_urls import resolve_urls
from imgcls.data.storage import filesystem
from imgcls.errors import OK, RequestError
from imgcls.formatting import format_counts
from imgcls.models.bundle import BUNDLE_FILE, is_registry_uri
from imgcls.runs.committed import CommittedRun, iter_tables, open_run
from imgcls.training.config import TeacherConfig
from imgcls.training.data.targets import NO_LABEL, Float16Matrix, compute_log_scores
from imgcls.training.sampler import Int64Array

LABELED_ALREADY = "labeled already"
"""Reason to leave out a row with a hard label, whose image has a label."""
_BATCH_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Rows of a run that can be used.

    urls:    (M,) large string, each once
    scores:  (M, C) float16 in the order of the student's classes, as in `TeacherTargets`; for hard
             targets 1 where the class is predicted, else 0
    left_out: number of other rows, by reason
    not_compared: see `TeacherRecord`
    """

    urls: pa.Array
    scores: Float16Matrix
    left_out: Counter[str]
    not_compared: dict[str, int] = field(default_factory=dict)

    def drop(self, is_dropped: npt.NDArray[np.bool_], reason: str) -> TeacherRows:
        """The other rows."""
        left_out = self.left_out + Counter({reason: int(is_dropped.sum())})
        is_kept = ~is_dropped
        urls = self.urls.filter(pa.array(is_kept))
        return replace(self, urls=urls, scores=self.scores[is_kept], left_out=left_out)


def is_teacher_bundle(teacher: TeacherConfig) -> bool:
    """Whether the teacher is a bundle, not a run."""
    return is_registry_uri(teacher.path) or filesystem.exists(
        filesystem.join(filesystem.absolute(teacher.path), BUNDLE_FILE)
    )


def open_teacher_run(teacher: TeacherConfig) -> CommittedRun:
    """The run of the teacher; raises RequestError where it has not what the mode needs."""
    if is_teacher_bundle(teacher):
        raise RequestError(
            f"teacher.path {teacher.path}: is a bundle. Predict the images with it first: "
            f"`imgcls predict IMAGES --model {teacher.path} --output RUN --scores`; then pass "
            "--teacher RUN"
        )
    if teacher.manifest is not None:
        raise RequestError(
            f"teacher.manifest: has no effect with {teacher.path}, which is a run with its own "
            "images; remove it"
        )
    run = open_run(teacher.path)
    run.check_predictions()
    if run.merged_runs and teacher.mode == "soft":
        raise RequestError(
            f"teacher.path {run.url}: is a history of several runs, whose scores can be of "
            "different bundles; pass one of these runs, label them again with `imgcls predict "
            "--scores`, or pass --teacher.mode hard"
        )
    if not run.has_scores and teacher.mode == "soft":
        raise RequestError(
            f"teacher.path {run.url}: has no scores of all classes; label it with `imgcls predict "
            "--scores`, or pass --teacher.mode hard"
        )
    return run


def read_teacher_rows(
    run: CommittedRun, classes: Sequence[str], teacher: TeacherConfig
) -> TeacherRows:
    """The rows that have what the mode needs."""
    left_out: Counter[str] = Counter()
    parts = [
        (urls, scores) for urls, scores in _iter_rows(run, classes, teacher, left_out) if len(urls)
    ]
    if not parts:
        raise RequestError(describe_no_rows(run, left_out))
    urls = pa.concat_arrays([each for each, _ in parts])
    scores = np.concatenate([each for _, each in parts])
    codes = urls.dictionary_encode().indices.to_numpy()
    # the newest rows of a history are its last ones
    step = -1 if run.merged_runs else 1
    kept = np.arange(len(codes))[::step][np.unique(codes[::step], return_index=True)[1]]
    is_repeated = np.ones(len(urls), bool)
    is_repeated[kept] = False
    return TeacherRows(urls, scores, left_out).drop(is_repeated, "repeated paths")


def _iter_rows(
    run: CommittedRun, classes: Sequence[str], teacher: TeacherConfig, left_out: Counter[str]
) -> Iterator[tuple[pa.Array, Float16Matrix]]:
    is_hard, is_single = teacher.mode == "hard", run.task == "single_label"
    values = "scores" if not (is_hard and is_single) else "predicted_label"
    if is_hard and not is_single:
        values = "predicted_labels"
    names = [run.path_column, "status", "accepted", values]
    names += ["is_ood"] if run.has_ood else []
    names += ["confidence"] if is_single else []
    known = [unicodedata.normalize("NFC", name) for name in run.classes]
    order = np.array([known.index(name) for name in classes])
    for table in iter_tables(run, list(dict.fromkeys(names)), _BATCH_ROWS):
        rules = {"not ok": pc.not_equal(table["status"].cast(pa.string()), OK)}
        if run.has_ood:
            rules["out of distribution"] = table["is_ood"]
        if is_hard:
            rules["not accepted"] = pc.invert(table["accepted"])
        if teacher.min_confidence:
            rules["below teacher.min_confidence"] = pc.less(
                table["confidence"],
                pa.scalar(teacher.min_confidence, table.schema.field("confidence").type),
            )
        rules["without scores"] = table[values].is_null()
        is_left = np.ones(table.num_rows, bool)
        for reason, matches in rules.items():
            is_match = is_left & pc.fill_null(matches, False).to_numpy()
            left_out[reason] += int(is_match.sum())
            is_left &= ~is_match
        kept = table.filter(pa.array(is_left))
        column = kept[values].combine_chunks()
        if values == "scores":
            scores = _read_scores(column, order, is_log=is_single)
        else:
            scores = _read_labels(column, classes)
        is_finite = np.isfinite(scores).all(1)
        left_out["without scores"] += int((~is_finite).sum())
        urls = resolve_urls(kept[run.path_column], run.root).combine_chunks()
        yield urls.filter(pa.array(is_finite)), scores[is_finite]


def _read_scores(values: pa.Array, order: Int64Array, *, is_log: bool) -> Float16Matrix:
    """(M, C) float16 scores or their logarithms.

    order: (C,) index of each class in a row of scores
    """
    flat = values.flatten().to_numpy(zero_copy_only=False)
    scores = flat.reshape(-1, len(order))[:, order]
    return compute_log_scores(scores) if is_log else scores.astype(np.float16)


def _read_labels(values: pa.Array, classes: Sequence[str]) -> Float16Matrix:
    """(M, C) float16: 1 for each predicted label; NaN in a row with a label of another bundle."""
    found = np.zeros((len(values), len(classes)), np.float16)
    rows, names = np.arange(len(values)), values
    if pa.types.is_list(values.type):
        rows, names = pc.list_parent_indices(values).to_numpy(), values.flatten()
    names = pc.utf8_normalize(names.cast(pa.string()), form="NFC")
    codes = pc.index_in(names, value_set=pa.array(classes, pa.string()))
    index = codes.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
    found[rows, index] = 1
    # a history of several bundles can have labels of others
    found[rows[index == NO_LABEL]] = np.nan
    return found


def describe_no_rows(run: CommittedRun, left_out: Mapping[str, int]) -> str:
    """The message of a run whose rows are all left out."""
    remedy = "Lower teacher.min_confidence, or label other images"
    if left_out.get(LABELED_ALREADY) == max(left_out.values(), default=0) > 0:
        remedy = "Hard labels are for images without labels: pass a run of other images"
    return (
        f"teacher.path {run.url}: no row can be used; left out: {format_counts(left_out)}. {remedy}"
    )
