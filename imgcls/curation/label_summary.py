"""Result of an import of labels, and its lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imgcls import log
from imgcls.curation.label_consensus import MAX_LABEL_SETS, Agreement
from imgcls.data.annotations.annotation import Annotation, Export
from imgcls.formatting import format_count, format_list, format_share

_SHOWN_ADDED = 3
"""Added images that a note lists."""


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


def log_import(done: LabelImport, export: Export, annotations: Sequence[Annotation]) -> None:
    """Log the summary of an import."""
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


def log_added(paths: Sequence[str], source: str) -> None:
    """Note the images that are not in the manifest, and that no other manifest confirms."""
    if paths:
        shown = format_list(paths, _SHOWN_ADDED)
        log.emit(
            "note",
            f"{format_count(len(paths), 'image')} not in {source} will be added: {shown}; pass the "
            "manifest of the labeled images as --images to check their paths",
        )


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
    if agreement.alpha is None and agreement.label_sets > MAX_LABEL_SETS:
        parts.append(
            f"no Krippendorff's alpha of {agreement.label_sets:,} different sets of labels (at "
            f"most {MAX_LABEL_SETS:,})"
        )
    return "; ".join(parts)
