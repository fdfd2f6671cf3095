"""Checks of an import of labels, before anything is written."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from imgcls import log
from imgcls.curation.config import LabelsImportConfig
from imgcls.curation.label_consensus import LabelDecision, LabelNames
from imgcls.curation.label_history import HISTORY_FILE, PENDING_FILE
from imgcls.curation.label_lookup import FoundImages
from imgcls.curation.outputs import check_not_read_again
from imgcls.data.manifests.manifest import Manifest, log_label_variants
from imgcls.data.storage import filesystem
from imgcls.errors import ConfigError, OutputError, RequestError
from imgcls.formatting import format_count, suggest_names

_SHOWN = 10
"""Images of a kind that a message lists."""


def check_output_name(output: str) -> None:
    """Refuse an output that is no Parquet file, or has the name of the history."""
    if not output.endswith(".parquet"):
        raise ConfigError(f"output {output}: must be a Parquet file; pass a name like new.parquet")
    if output.rpartition("/")[2] in (HISTORY_FILE, PENDING_FILE):
        raise ConfigError(
            f"output {output}: the import writes the history of labels to this file; pass another "
            "--output, such as new.parquet"
        )


def check_output_file(config: LabelsImportConfig, output: str, manifest: Manifest) -> None:
    """Refuse an output that exists or is a part of an input, and a manifest that is the history."""
    if filesystem.exists(output) and not config.overwrite:
        raise OutputError(
            f"output {output}: exists; pass another --output, or --overwrite to replace it"
        )
    check_not_read_again([config.output], manifest)
    target = filesystem.resolve_links(output)
    history = filesystem.join(filesystem.parent(target), HISTORY_FILE)
    if history in map(filesystem.resolve_links, manifest.files):
        raise OutputError(
            f"onto {config.onto.path}: is the history of labels of the folder of --output, which "
            "the import replaces; pass a manifest, or an --output in another folder"
        )
    inputs = {"export": config.export}
    if config.images is not None:
        inputs["images"] = config.images.path
    for key, url in inputs.items():
        resolved = filesystem.resolve_links(url)
        if resolved == target:
            raise OutputError(f"output {output}: is the file of {key}; pass another --output")
        if key == "export" and filesystem.parent(target) == resolved.rstrip("/"):
            raise OutputError(
                f"output {output}: is in the folder of export, whose tables the next import reads; "
                "pass an --output in another folder"
            )


def is_multilabel(config: LabelsImportConfig, manifest: Manifest) -> bool:
    """Whether images may have several labels; refuses the option for a manifest with one each."""
    if config.multilabel and manifest.label_column is not None:
        raise ConfigError(
            f"multilabel: manifest {manifest.source} has one label per image, in column "
            f"{manifest.label_column!r}; remove the option"
        )
    return config.multilabel or manifest.label_columns is not None


def check_conflicts(config: LabelsImportConfig, decisions: Mapping[str, LabelDecision]) -> None:
    """Refuse or list the images about which annotators disagree."""
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


def check_class_names(
    config: LabelsImportConfig, found: FoundImages, labels: Sequence[LabelNames]
) -> None:
    """Refuse class names that are not in the manifest; without any label in it, accept all."""
    counts = Counter(name for names in labels for name in names)
    known = {unicodedata.normalize("NFC", name) for name in found.counts}
    unknown = sorted(set(counts) - known)
    if not unknown or not known:
        return
    if config.new_classes:
        log_label_variants(f"export {config.export}", counts, known)
        return
    name = unknown[0]
    near = suggest_names(name, known, form="{!r}", limit=1)
    hint = f" ({near})" if near else ""
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise RequestError(
        f"export {config.export}: class {name!r} ({format_count(counts[name], 'image')}){more} is "
        f"not one of the {len(known)} classes of {config.onto.path}{hint}. Correct it in the tool, "
        "or pass --new-classes"
    )
