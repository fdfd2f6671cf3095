"""Import of labels from a labeling tool onto a manifest: `imgcls labels import`.

The export is held in memory and the manifest is streamed twice: to find the images, and to write
the rows with their labels. The history is written before the manifest, so that a killed import is
repeated by the same command.
"""

from __future__ import annotations

import dataclasses
import difflib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls import log
from imgcls.config import requested
from imgcls.curation.config import LabelsImportConfig
from imgcls.curation.label_consensus import (
    Agreement,
    LabelDecision,
    LabelNames,
    decide,
    find_last_time,
    measure_agreement,
)
from imgcls.curation.label_history import (
    build_history_rows,
    extend_history,
    read_history,
    write_history,
)
from imgcls.curation.label_lookup import FoundImages, ImageLookup, iter_large_batches, read_paths
from imgcls.curation.label_merge import ImportedLabel, LabelMerger
from imgcls.data.annotations.annotation import Annotation, Export
from imgcls.data.annotations.exports import read_export
from imgcls.data.manifests.manifest import Manifest, log_label_variants, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import ConfigError, OutputError, RequestError
from imgcls.formatting import format_count, format_share

_SHOWN = 10
"""Images of a kind that a message lists."""


@dataclass(frozen=True)
class LabelImport:
    """Result of an import.

    Attributes
    ----------
    output : str
        The manifest that was written.
    history : str
        The history of labels next to it.
    labeled, replaced, confirmed, kept, added : int
        Rows that got their first label, another label, the same label; rows that kept another label
        (`existing`), and rows that were added.
    conflicts, undecided : int
        Images about which annotators disagree, and those of them that got no label.
    agreement : Agreement or None
        Agreement of the annotators; None if no image was labeled by two of them.
    """

    output: str
    history: str
    labeled: int
    replaced: int
    confirmed: int
    kept: int
    added: int
    conflicts: int
    undecided: int
    agreement: Agreement | None


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
    _check_output(config, output)
    manifest = open_manifest(config.onto, keys=KeyNames("onto"))
    several = _is_multilabel(config, manifest)
    export = read_export(
        config.export, config.format, several=several, skip_unchanged=config.skip_unchanged
    )
    images = (
        None if config.images is None else open_manifest(config.images, keys=KeyNames("images"))
    )
    found = _find_images(export, manifest, images)
    place = config.onto.path if config.images is None else config.images.path
    annotations = _resolve(export, found, place, several=several)
    decisions = _decide(config, annotations, several=several)
    _check_conflicts(config, decisions)
    labels = _collect_labels(decisions)
    _check_classes(config, found, [each.names for each in labels.values()])
    folder = filesystem.parent(output)
    history = extend_history(
        read_history(folder, several=several),
        build_history_rows(annotations, found.labels, _find_used(config, labels, found),
                           several=several),
    )  # fmt: skip
    keep = config.existing == "keep"
    merger = LabelMerger(manifest, labels, several=several, keep_existing=keep)
    url = write_history(folder, history)
    _write_manifest(output, manifest, images, merger)
    conflicts = [each for each in decisions.values() if each.is_conflict]
    counts = {name: merger.counts[name] for name in _COUNTS}
    done = LabelImport(
        output, url, **counts, conflicts=len(conflicts),
        undecided=sum(each.names is None for each in conflicts),
        agreement=measure_agreement(decisions, several=several),
    )  # fmt: skip
    _log_summary(done, export, annotations)
    return done


_COUNTS = ("labeled", "replaced", "confirmed", "kept", "added")


def _check_output(config: LabelsImportConfig, output: str) -> None:
    if not output.endswith(".parquet"):
        raise ConfigError(f"output {output}: must be a Parquet file; pass a name like new.parquet")
    if filesystem.exists(output) and not config.overwrite:
        raise OutputError(
            f"output {output}: exists; pass another --output, or --overwrite to replace it"
        )
    source = filesystem.absolute(config.onto.path)
    if filesystem.is_folder(source) and f"{output}/".startswith(f"{source.rstrip('/')}/"):
        raise OutputError(
            f"output {output}: is in the folder of the manifest {config.onto.path}, which would "
            "have its rows twice; pass an --output in another folder"
        )


def _is_multilabel(config: LabelsImportConfig, manifest: Manifest) -> bool:
    if config.multilabel and manifest.label_column is not None:
        raise ConfigError(
            f"multilabel: manifest {manifest.source} has one label per image, in column "
            f"{manifest.label_column!r}; remove the option"
        )
    return config.multilabel or manifest.label_columns is not None


def _find_images(export: Export, manifest: Manifest, images: Manifest | None) -> FoundImages:
    names = (each.path for each in export.annotations)
    lookup = ImageLookup(names, has_suffixes=export.has_suffixes)
    if images is not None:
        lookup.add_names(images)
    lookup.add_labels(manifest, has_names=images is None)
    return lookup.found


def _resolve(
    export: Export, found: FoundImages, manifest: str, *, several: bool
) -> list[Annotation]:
    """The annotations with absolute paths, and with as many labels as the manifest may have."""
    paths: dict[str, str] = {}
    resolved = []
    for each in export.annotations:
        if each.path not in paths:
            paths[each.path] = found.resolve(each.path, export.source, manifest)
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
        resolved.append(dataclasses.replace(each, path=paths[each.path], labels=labels))
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


def _check_conflicts(config: LabelsImportConfig, decisions: Mapping[str, LabelDecision]) -> None:
    conflicts = {path: each for path, each in decisions.items() if each.is_conflict}
    if not conflicts:
        return
    shown = conflicts
    if config.on_conflict != "error":
        shown = {path: each for path, each in conflicts.items() if each.names is None}
    lines = [f"  {path}: {_format_votes(each)}" for path, each in list(shown.items())[:_SHOWN]]
    if len(shown) > _SHOWN:
        lines.append(f"  and {len(shown) - _SHOWN:,} more")
    count = format_count(len(conflicts), "image")
    if config.on_conflict == "error":
        text = "\n".join(lines)
        raise RequestError(
            f"export {config.export}: annotators disagree about {count}. Correct "
            f"the labels in the tool, or pass --on-conflict majority, newest or skip:\n{text}"
        )
    log.emit(
        "note",
        f"annotators disagree about {count}; {len(conflicts) - len(shown):,} decided by "
        f"--on-conflict {config.on_conflict}, {len(shown):,} not changed",
    )
    for line in lines:
        log.show(line)


def _format_votes(decision: LabelDecision) -> str:
    return ", ".join(
        f"{' + '.join(each.labels or ()) or '(no class)'} ({each.annotator or 'unknown'})"
        for each in decision.votes
    )


def _collect_labels(decisions: Mapping[str, LabelDecision]) -> dict[str, ImportedLabel]:
    labels = {}
    for path, decision in decisions.items():
        if decision.names is not None:
            voters = decision.voters
            people = sorted({each.annotator for each in voters if each.annotator is not None})
            tools = sorted({each.tool for each in voters})
            labels[path] = ImportedLabel(
                decision.names, ", ".join(people) or None, find_last_time(voters), ", ".join(tools)
            )
    return labels


def _check_classes(
    config: LabelsImportConfig, found: FoundImages, labels: Sequence[LabelNames]
) -> None:
    """Refuse class names that the manifest has not; one without any label has no classes yet."""
    counts = Counter(name for names in labels for name in names)
    known = {unicodedata.normalize("NFC", name) for name in found.counts}
    unknown = sorted(set(counts) - known)
    if not unknown or not known:
        return
    if config.new_classes:
        log_label_variants(f"export {config.export}", counts, known)
        return
    name = unknown[0]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise RequestError(
        f"export {config.export}: class {name!r} ({format_count(counts[name], 'image')}){more} is "
        f"not among the {len(known)} of {config.onto.path}{hint}. Correct it in the tool, or pass "
        "--new-classes"
    )


def _find_used(
    config: LabelsImportConfig, labels: Mapping[str, ImportedLabel], found: FoundImages
) -> dict[str, LabelNames]:
    """The labels that the import writes, by path."""
    used = {path: each.names for path, each in labels.items()}
    if config.existing == "replace":
        return used
    return {path: names for path, names in used.items() if found.labels.get(path) in (None, names)}


def _write_manifest(
    output: str, manifest: Manifest, images: Manifest | None, merger: LabelMerger
) -> None:
    with (
        filesystem.open_write(output) as stream,
        pq.ParquetWriter(stream, merger.schema, compression="zstd") as writer,
    ):
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
        paths = read_paths(images, batch)
        rows = pc.indices_nonzero(pc.fill_null(pc.is_in(paths, value_set=wanted), False))
        tables.append(pa.Table.from_batches([batch.take(rows)]))
        parts.append(paths.take(rows))
    return pa.concat_tables(tables), pa.concat_arrays(parts)


def _log_summary(done: LabelImport, export: Export, annotations: Sequence[Annotation]) -> None:
    people = {each.annotator for each in annotations if each.annotator is not None}
    tools = ", ".join(sorted({each.tool for each in annotations}))
    skipped = sum(each.labels is None for each in annotations)
    log.show(
        f"labels    {format_count(len(annotations), 'annotation')} of "
        f"{format_count(len({each.path for each in annotations}), 'image')} from {tools}, by "
        f"{format_count(len(people), 'named annotator')}; {skipped:,} skipped, "
        f"{format_count(export.unlabeled, 'image')} without a label"
    )
    if export.unchanged:
        log.emit(
            "note",
            f"{format_count(export.unchanged, 'image')} with unchanged predictions; a "
            "person may have confirmed them, or not opened the image: --skip-unchanged leaves "
            "them out",
        )
    if done.agreement is not None:
        log.show(f"agreement {_format_agreement(done.agreement)}")
    log.show(
        f"merged    {done.labeled:,} rows labeled, {done.replaced:,} replaced, "
        f"{done.confirmed:,} confirmed, {done.kept:,} kept with another label, {done.added:,} added"
    )
    log.show(f"manifest  {done.output}")
    log.show(f"history   {done.history}")


def _format_agreement(agreement: Agreement) -> str:
    parts = [
        f"{format_share(agreement.agreed / agreement.images)} of "
        f"{format_count(agreement.images, 'image')} that several of {agreement.annotators} "
        "annotators labeled"
    ]
    for name, value in (
        ("Cohen's kappa", agreement.kappa),
        ("Krippendorff's alpha", agreement.alpha),
    ):
        if value is not None:
            parts.append(f"{name} {value:.3f}")
    return "; ".join(parts)
