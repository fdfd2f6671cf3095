"""Import of labels from a labeling tool onto a manifest: `imgcls labels import`.

The export is held in memory. The manifest is streamed twice: to find the images, and to write the
rows with their labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.config import requested
from imgcls.curation.config import LabelsImportConfig
from imgcls.curation.label_checks import (
    check_class_names,
    check_conflicts,
    check_output_file,
    check_output_name,
    is_multilabel,
)
from imgcls.curation.label_consensus import (
    LabelDecision,
    decide,
    find_last_time,
    measure_agreement,
)
from imgcls.curation.label_history import (
    HashedStream,
    build_history_rows,
    extend_history,
    publish_history,
    read_history,
    recover_history,
    write_pending,
)
from imgcls.curation.label_lookup import ONTO_KEYS, FoundImages, find_images, iter_large_batches
from imgcls.curation.label_merge import ImportedLabel, LabelMerger
from imgcls.curation.label_summary import LabelImport, log_added, log_import
from imgcls.data.annotations.annotation import Annotation, Export
from imgcls.data.annotations.exports import read_export
from imgcls.data.manifests.image_urls import read_urls
from imgcls.data.manifests.manifest import Manifest, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import RequestError
from imgcls.formatting import format_count
from imgcls.runs.layout import check_output_writable
from imgcls.runs.lease import Lease

_TEMPORARY_FILE_AGE_S = 600
"""Minimum age of temporary files that are removed; a writer may be at work on younger ones."""
_COUNTS = ("labeled", "replaced", "confirmed", "kept", "added")


def import_labels(config: LabelsImportConfig | None = None, /, **settings: object) -> LabelImport:
    """Merge the labels that people gave in a labeling tool onto a manifest.

    Parameters
    ----------
    config : LabelsImportConfig, optional
        The whole request, instead of `settings`.
    **settings
        The keys of `imgcls labels import`. `export`, `onto` and `output` are required.

    Returns
    -------
    LabelImport
        The numbers of rows by what happened to them, and the files.

    Raises
    ------
    RequestError
        If the export cannot be read, annotators disagree (`on_conflict`), a class is unknown, or an
        image is not found.
    OutputError
        If the output exists or cannot be written.

    Examples
    --------
    >>> import imgcls
    >>> imgcls.import_labels(  # doctest: +SKIP
    ...     export="export.json", onto="train.parquet", output="train2.parquet"
    ... )
    """
    example = 'import_labels(export="export.json", onto="train.csv", output="new.parquet")'
    return _import(requested(LabelsImportConfig, config, settings, example))


@with_config_storage
def _import(config: LabelsImportConfig) -> LabelImport:
    output = filesystem.absolute(config.output)
    check_output_name(output)
    with _hold_folder(filesystem.parent(output)) as lease:
        recover_history(filesystem.parent(output))
        _remove_unfinished(filesystem.parent(output))
        return _import_held(config, output, lease)


def _remove_unfinished(folder: str) -> None:
    """Remove the temporary files of killed imports, where this is possible."""
    with contextlib.suppress(OSError):
        filesystem.remove_temporary_files(folder, older_than=_TEMPORARY_FILE_AGE_S)


@contextlib.contextmanager
def _hold_folder(folder: str) -> Iterator[Lease]:
    """Hold the lease on a folder, because imports into it share its history.

    A new folder is removed where nothing is written to it.
    """
    is_new = filesystem.is_local(folder) and not filesystem.exists(folder)
    try:
        check_output_writable(folder)
        lease = Lease.acquire(folder)
        try:
            yield lease
        finally:
            lease.release()
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _import_held(config: LabelsImportConfig, output: str, lease: Lease) -> LabelImport:
    manifest = open_manifest(config.onto, keys=ONTO_KEYS)
    check_output_file(config, output, manifest)
    several = is_multilabel(config, manifest)
    export = read_export(
        config.export, config.format, several=several, skip_unchanged=config.skip_unchanged
    )
    images = (
        None if config.images is None else open_manifest(config.images, keys=KeyNames("images"))
    )
    found = find_images(export, manifest, images, config.image_root)
    annotations = _resolve(export, found, several=several)
    decisions = _decide(config, annotations, several=several)
    check_conflicts(config, decisions)
    labels = _collect_labels(decisions)
    check_class_names(config, found, [each.names for each in labels.values()])
    if images is None:
        log_added([path for path in labels if path not in found.labels], config.onto.path)
    agreement = measure_agreement(decisions, several=several)
    history = read_history(filesystem.parent(output), several=several)
    merger = LabelMerger(manifest, labels, several=several, keep_existing=config.existing == "keep")
    with filesystem.open_write(output) as stream:
        hashed = HashedStream(stream)
        _write_manifest(hashed, manifest, images, merger)
        used = {path: labels[path].names for path in merger.find_written()}
        rows = build_history_rows(annotations, found.labels, used, several=several)
        history = extend_history(history, rows)
        lease.check()
        write_pending(output, hashed.hexdigest(), history)
    url = publish_history(filesystem.parent(output), history)
    conflicts = [each for each in decisions.values() if each.is_conflict]
    done = LabelImport(
        output, url, **{name: merger.counts[name] for name in _COUNTS}, conflicts=len(conflicts),
        undecided=sum(each.names is None for each in conflicts), agreement=agreement,
    )  # fmt: skip
    log_import(done, export, annotations)
    return done


def _resolve(export: Export, found: FoundImages, *, several: bool) -> list[Annotation]:
    """The annotations with absolute paths, and with as many labels as the manifest may have."""
    resolved = []
    for each in export.annotations:
        labels = each.labels
        if labels is not None and several:
            labels = tuple(dict.fromkeys(name.strip() for name in labels))
        elif labels is not None and len(labels) > 1:
            raise RequestError(
                f"export {export.source}: {each.path} has {len(labels)} labels "
                f"({', '.join(labels)}), and the manifest has one per image; merge onto one with "
                "lists of labels, or pass --multilabel for a manifest without labels"
            )
        elif labels is not None:
            labels = labels or None  # without a class, an image has no label
        resolved.append(dataclasses.replace(each, path=found.paths[each.path], labels=labels))
    return resolved


def _decide(
    config: LabelsImportConfig, annotations: Sequence[Annotation], *, several: bool
) -> dict[str, LabelDecision]:
    by_path: dict[str, list[Annotation]] = {}
    for each in annotations:
        by_path.setdefault(each.path, []).append(each)
    decisions = {
        path: decide(group, config.on_conflict, several=several) for path, group in by_path.items()
    }
    made = {path: each for path, each in decisions.items() if each is not None}
    if not made:
        raise RequestError(
            f"export {config.export}: has no label, its {format_count(len(decisions), 'image')} "
            "were skipped; label images, and export again"
        )
    return made


def _collect_labels(decisions: Mapping[str, LabelDecision]) -> dict[str, ImportedLabel]:
    labels = {}
    for path, decision in decisions.items():
        if decision.names is not None:
            voters = decision.voters
            people = sorted({each.annotator for each in voters if each.annotator is not None})
            sources = voters or decision.votes
            tools = sorted({each.tool for each in sources})
            labels[path] = ImportedLabel(
                decision.names, ", ".join(people) or None, find_last_time(sources), ", ".join(tools)
            )
    return labels


def _write_manifest(
    stream: HashedStream, manifest: Manifest, images: Manifest | None, merger: LabelMerger
) -> None:
    with pq.ParquetWriter(stream, merger.schema, compression="zstd") as writer:
        for batch in iter_large_batches(manifest):
            writer.write_table(merger.merge(batch))
        missing = merger.find_missing()
        if len(missing):
            rows, paths = _read_rows_of(images, missing)
            writer.write_table(merger.build_added_rows(rows, paths))


def _read_rows_of(images: Manifest | None, wanted: pa.Array) -> tuple[pa.Table, pa.Array]:
    """The rows of some images in a manifest, and their absolute paths."""
    if images is None:
        return pa.table({}), pa.array([], wanted.type)
    tables = [images.schema.empty_table()]
    parts = [pa.array([], wanted.type)]
    for batch in iter_large_batches(images):
        paths = read_urls(images, batch)
        rows = pc.indices_nonzero(pc.is_in(paths, value_set=wanted))
        tables.append(pa.Table.from_batches([batch.take(rows)]))
        parts.append(paths.take(rows))
    return pa.concat_tables(tables), pa.concat_arrays(parts)
