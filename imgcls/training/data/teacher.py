"""Images that a teacher has labeled, as training examples: distillation and self-training.

The teacher is a committed run. With soft targets its scores are the targets, with hard ones its
accepted predictions are labels. No image of the validation or of `teacher.exclude` becomes one to
train on, whatever its path: images are compared by their bytes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.data.manifests.image_urls import normalize_urls, read_urls
from imgcls.data.manifests.manifest import open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ConfigError, RequestError
from imgcls.formatting import format_count, format_counts, format_lines
from imgcls.models.bundle import TaskName
from imgcls.runs.committed import CommittedRun
from imgcls.training.config import Strategy, TeacherConfig, TrainConfig
from imgcls.training.data.examples import DataSource, Examples, TeacherRecord, index_label_sets
from imgcls.training.data.leaks import ContentMatches, find_same_content
from imgcls.training.data.targets import NO_LABEL, TeacherTargets
from imgcls.training.data.teacher_run import (
    LABELED_ALREADY,
    TeacherRows,
    describe_no_rows,
    open_teacher_run,
    read_teacher_rows,
)
from imgcls.training.sampler import Int64Array

DEFAULT_TEMPERATURE, DEFAULT_WEIGHT = 2.0, 0.9
_SHOWN_PATHS = 3


def add_teacher_rows(examples: Examples, config: TrainConfig, strategy: Strategy) -> Examples:
    """The examples with the rows of the run `teacher.path`.

    An image that has a label keeps it, and gets the soft targets of the teacher too. An image that
    was held out of `data.train` is left out.

    Raises RequestError when the run does not fit the training, when one of its images is also in
    `data.val` or `teacher.exclude` (unless `teacher.leaks` is drop), or when no row can be used.
    """
    teacher = config.teacher
    assert teacher is not None
    check_teacher_settings(config)
    check_teacher_keys(teacher, examples.targets.task, strategy)
    run = open_teacher_run(teacher)
    classes: Sequence[str] = run.classes
    if run.merged_runs:  # rows with a class of another bundle are left out
        own = set(examples.classes)
        classes = [name for name in classes if unicodedata.normalize("NFC", name) in own]
    check_teacher_classes(run.url, run.task, classes, examples)
    rows = _drop_leaks(read_teacher_rows(run, examples.classes, teacher), examples, config, run)
    if teacher.mode == "hard":
        return _add_labels(examples, rows, run)
    has_temperature = examples.targets.task == "single_label" and strategy != "probe"
    return _add_soft_targets(examples, rows, teacher, run, has_temperature=has_temperature)


def check_teacher_settings(config: TrainConfig) -> None:
    """Raise RequestError where a training cannot have a teacher."""
    if config.data.embeddings is not None:
        raise RequestError(
            "teacher: needs images; data.embeddings fits a head alone. Remove one of the two "
            "settings"
        )


def check_teacher_keys(teacher: TeacherConfig, task: TaskName, strategy: Strategy) -> None:
    """Raise ConfigError for keys that have no effect."""
    if strategy == "probe" and teacher.temperature is not None:
        raise ConfigError(
            "teacher.temperature: has no effect on a linear probe, which is fitted to the scores "
            "themselves; remove it, or pass another --strategy"
        )
    if teacher.mode == "hard":
        for name in ("temperature", "weight"):
            if getattr(teacher, name) is not None:
                raise ConfigError(f"teacher.{name}: is for teacher.mode soft; remove it")
    if task == "multilabel":
        if teacher.temperature is not None:
            raise ConfigError("teacher.temperature: is for one label per image; remove it")
        if teacher.min_confidence:
            raise ConfigError(
                "teacher.min_confidence: is for one label per image; raise the thresholds of the "
                "teacher's bundle instead"
            )


def check_teacher_classes(
    teacher: str, task: TaskName, classes: Sequence[str], examples: Examples
) -> None:
    """Raise RequestError unless teacher and student have the same task and classes.

    Class names are compared in Unicode NFC, in which those of the training are.

    teacher: its run or bundle, for the message
    """
    if task != examples.targets.task:
        raise RequestError(
            f"teacher.path {teacher}: is {task}, the training {examples.targets.task}; pass a "
            "teacher of the same task, or set --task"
        )
    if {unicodedata.normalize("NFC", name) for name in classes} != set(examples.classes):
        raise RequestError(
            f"teacher.path {teacher}: has other classes than the training.\n"
            f"  teacher:  {_list_names(classes)}\n  training: {_list_names(examples.classes)}\n"
            "Rename the labels, add images of the missing classes, or pass another teacher"
        )


def describe_teacher(examples: Examples) -> str:
    """A line of the log about the teacher; empty without one."""
    record = examples.teacher
    if record is None:
        return ""
    labeled = f", {record.labeled:,} of them with a label too" if record.labeled else ""
    return (
        f"teacher: {format_count(record.images, 'image')} of {record.run} (bundle "
        f"{record.bundle_sha256[:12]}){labeled}; {record.describe_targets()}; left out: "
        f"{format_counts(record.left_out)}\n"
    )


def _list_names(names: Sequence[str]) -> str:
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(sorted(names)[:10]) + more


# ------------------------------------------------------------------ leaks


def _drop_leaks(
    rows: TeacherRows, examples: Examples, config: TrainConfig, run: CommittedRun
) -> TeacherRows:
    """The rows that are neither validated on nor in `teacher.exclude`.

    Images that were held out of `data.train` are left out, because no user has chosen them. Raises
    RequestError for others unless `teacher.leaks` is drop, and for images of `teacher.exclude` that
    cannot be read.
    """
    teacher = config.teacher
    assert teacher is not None
    held = _list_urls(examples.rows.filter(examples.rows.column("held")).column("url"))
    excluded = _read_excluded(teacher)
    log.show(
        f"teacher: comparing {format_count(len(rows.urls), 'image')} with {len(held):,} validation "
        f"and {len(excluded):,} test images"
    )
    tests = _find_leaks(rows.urls, excluded, config.data.max_bytes)
    _check_excluded(excluded, tests, teacher)
    validation = _find_leaks(rows.urls, held, config.data.max_bytes)
    left_out, refused = validation.same, tests.same
    if config.data.val is not None:
        left_out, refused = {}, validation.same | tests.same
    refused = {at: refused[at] for at in sorted(refused) if at not in left_out}
    if refused and teacher.leaks == "refuse":
        raise RequestError(_describe_leaks(rows, refused, run))
    is_left, is_refused = _mark(left_out, len(rows.urls)), _mark(refused, len(rows.urls))
    rows = rows.drop(is_left, "validation images")
    rows = rows.drop(is_refused[~is_left], "images of data.val or teacher.exclude")
    if not len(rows.urls):
        raise RequestError(describe_no_rows(run, rows.left_out))
    return replace(rows, not_compared=_count_unreadable(tests, validation))


def _describe_leaks(rows: TeacherRows, found: Mapping[int, str], run: CommittedRun) -> str:
    pairs = (f"{rows.urls[at].as_py()} is {url}" for at, url in found.items())
    listed = format_lines(pairs, _SHOWN_PATHS)
    return (
        f"teacher.path {run.url}: has {format_count(len(found), 'image')} that data.val or "
        f"teacher.exclude also has (same path or content):{listed}\nRemove them from the "
        "teacher's images, or pass --teacher.leaks drop to leave them out"
    )


def _list_urls(urls: pa.ChunkedArray) -> list[str]:
    found: list[str] = pc.unique(normalize_urls(urls.drop_null())).to_pylist()
    return found


def _read_excluded(teacher: TeacherConfig) -> list[str]:
    """URLs of the test images, each once."""
    if teacher.exclude is None:
        return []
    manifest = open_manifest(teacher.exclude, keys=KeyNames("teacher.exclude"))
    parts = (read_urls(manifest, batch) for batch in manifest.batches())
    return _list_urls(pa.chunked_array(parts, pa.large_string()))


def _check_excluded(excluded: Sequence[str], tests: ContentMatches, teacher: TeacherConfig) -> None:
    """Raise RequestError for test images that cannot be read: nothing would equal them."""
    lost = [url for url in excluded if url in tests.unreadable_protected]
    if lost:
        assert teacher.exclude is not None
        raise RequestError(
            f"teacher.exclude {teacher.exclude.path}: {len(lost):,} of {len(excluded):,} images "
            f"cannot be read, so they cannot be compared with those of the teacher:"
            f"{format_lines(lost, _SHOWN_PATHS)}\n"
            "Correct the paths or teacher.exclude.root, or remove the rows"
        )


def _count_unreadable(tests: ContentMatches, validation: ContentMatches) -> dict[str, int]:
    """Number of other images that were not compared, by kind; logs a note for any."""
    counts = {
        "images of the teacher": len(tests.unreadable | validation.unreadable),
        "validation images": len(validation.unreadable_protected),
    }
    counts = {kind: count for kind, count in counts.items() if count}
    if counts:
        log.emit(
            "note",
            f"teacher: {format_counts(counts)} cannot be read, and were not compared by content",
        )
    return counts


def _find_leaks(urls: pa.Array, protected: Sequence[str], max_bytes: int) -> ContentMatches:
    """Images that are protected ones, by path or by content."""
    if not protected:
        return ContentMatches({})
    at = pc.index_in(urls, value_set=pa.array(protected, urls.type))
    found = {
        index: protected[place] for index, place in enumerate(at.to_pylist()) if place is not None
    }
    matches = find_same_content(urls.to_pylist(), protected, max_bytes=max_bytes)
    return replace(matches, same=matches.same | found)


def _mark(found: Mapping[int, str], count: int) -> npt.NDArray[np.bool_]:
    marked = np.zeros(count, bool)
    marked[list(found)] = True
    return marked


# ------------------------------------------------------------------ examples


def _add_soft_targets(
    examples: Examples,
    rows: TeacherRows,
    teacher: TeacherConfig,
    run: CommittedRun,
    *,
    has_temperature: bool,
) -> Examples:
    """Rows with scores as targets; a labeled image gets those of its path.

    has_temperature: whether the temperature has an effect
    """
    place = _find_in_teacher(examples, rows)
    is_paired = place >= 0
    codes = examples.rows.column("label").to_numpy().copy()
    is_new = np.ones(len(rows.urls), bool)
    is_new[place[is_paired]] = False
    first, paired, new = examples.targets.num_label_codes, int(is_paired.sum()), int(is_new.sum())
    taught = TeacherTargets(
        scores=np.concatenate([rows.scores[place[is_paired]], rows.scores[is_new]]),
        labels=np.concatenate([codes[is_paired], np.full(new, NO_LABEL, np.int64)]),
        temperature=DEFAULT_TEMPERATURE if teacher.temperature is None else teacher.temperature,
        weight=DEFAULT_WEIGHT if teacher.weight is None else teacher.weight,
    )
    codes[is_paired] = first + np.arange(paired)
    index = examples.rows.schema.get_field_index("label")
    table = examples.rows.set_column(index, "label", pa.array(codes, pa.int64()))
    new_urls, new_codes = rows.urls.filter(pa.array(is_new)), first + paired + np.arange(new)
    record = TeacherRecord(
        **_describe_run(run, rows),
        mode="soft",
        images=paired + new,
        labeled=paired,
        temperature=taught.temperature if has_temperature else None,
        weight=taught.weight,
    )
    return replace(
        examples,
        rows=_append_rows(table, new_urls, new_codes),
        targets=replace(examples.targets, teacher=taught),
        sources=_add_source(examples, record, rows),
        teacher=record,
    )


def _add_labels(examples: Examples, rows: TeacherRows, run: CommittedRun) -> Examples:
    """Rows with the predicted labels as labels; a labeled image keeps its own."""
    place = _find_in_teacher(examples, rows)
    is_labeled = np.zeros(len(rows.urls), bool)
    is_labeled[place[place >= 0]] = True
    rows = rows.drop(is_labeled, LABELED_ALREADY)
    if not len(rows.urls):
        raise RequestError(describe_no_rows(run, rows.left_out))
    targets = examples.targets
    if targets.label_sets is None:
        codes = rows.scores.argmax(1).astype(np.int64)
    else:
        sets, codes = index_label_sets(rows.scores.astype(np.int8))
        codes = codes + len(targets.label_sets)
        targets = replace(targets, label_sets=np.concatenate([targets.label_sets, sets]))
    record = TeacherRecord(
        **_describe_run(run, rows), mode="hard", images=len(rows.urls), labeled=0
    )
    return replace(
        examples,
        rows=_append_rows(examples.rows, rows.urls, codes),
        targets=targets,
        sources=_add_source(examples, record, rows),
        teacher=record,
    )


def _find_in_teacher(examples: Examples, rows: TeacherRows) -> Int64Array:
    """(N,) int64: index of each example in the teacher's rows; -1 without one or if held out."""
    urls = normalize_urls(examples.rows.column("url"))
    place = pc.index_in(urls, value_set=rows.urls).cast(pa.int64()).fill_null(-1).to_numpy().copy()
    place[examples.rows.column("held").to_numpy()] = -1
    found: Int64Array = place
    return found


def _append_rows(rows: pa.Table, urls: pa.Array, codes: Int64Array) -> pa.Table:
    """The rows and then those of the teacher, which are numbered after those of the manifests."""
    start = (pc.max(rows.column("row")).as_py() or 0) + 1
    added = {
        "row": pa.array(np.arange(start, start + len(urls)), pa.int64()),
        "url": urls.cast(pa.string()),
        "label": pa.array(codes, pa.int64()),
        "held": pa.array(np.zeros(len(urls), bool)),
    }
    return pa.concat_tables([rows, pa.table(added).select(rows.schema.names).cast(rows.schema)])


def _describe_run(run: CommittedRun, rows: TeacherRows) -> dict[str, Any]:
    left_out = {reason: count for reason, count in rows.left_out.items() if count}
    return {
        "run": run.url,
        "bundle_sha256": run.bundle_sha256,
        "left_out": left_out,
        "not_compared": rows.not_compared,
    }


def _add_source(
    examples: Examples, record: TeacherRecord, rows: TeacherRows
) -> dict[str, DataSource]:
    """The sources and the run, whose fingerprint is that of the images and scores in use."""
    digest = hashlib.blake2b(digest_size=16)
    for url in rows.urls.to_pylist():
        digest.update(url.encode() + b"\0")
    digest.update(np.ascontiguousarray(rows.scores).tobytes())
    source = DataSource(record.run, digest.hexdigest(), record.images)
    return {**examples.sources, "teacher.path": source}
