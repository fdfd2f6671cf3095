"""README of a bundle: its classes, preprocessing and calibration, in Markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from imgcls.models.acceptance import NEVER_ACCEPT

if TYPE_CHECKING:
    from imgcls.models.bundle import BundleSpec


MULTILABEL_TEXT = (
    "Any number of classes per image: the score of each class is the sigmoid of its logit, and the "
    "labels of an image are all classes whose score reaches their threshold."
)


def render_minimal_card(spec: BundleSpec) -> str:
    """README of a bundle without information about the training."""
    lines = [f"# {render_card_title(spec)}", "", *render_card_description(spec)]
    if spec.metrics:
        lines += ["", "| metric | value |", "| --- | --- |"]
        lines += [
            f"| {escape_markdown(name)} | {value:.4f} |" for name, value in spec.metrics.items()
        ]
    lines += ["", *render_card_usage("predict" if spec.classes else "embed"), ""]
    return "\n".join(lines)


def render_card_title(spec: BundleSpec) -> str:
    """Markdown title: the network and its number of classes."""
    number = f"{len(spec.classes):,} classes" if spec.classes else "a backbone"
    return f"{escape_markdown(spec.architecture.name)}, {number}"


def render_card_description(spec: BundleSpec, max_classes: int = 20) -> list[str]:
    """Markdown lines: classes, preprocessing, calibration, thresholds and label sets."""
    shown = ", ".join(escape_markdown(name) for name in spec.classes[:max_classes])
    hidden = len(spec.classes) - max_classes
    more = f" and {hidden:,} more" if hidden > 0 else ""
    pre = spec.preprocess
    size = (
        f"Input: {pre.crop}x{pre.crop} RGB, {pre.mode} from {pre.resize}, {pre.interpolation}; "
        f"mean {list(pre.mean)}, std {list(pre.std)}."
    )
    if not spec.classes:
        return ["No classes: the network computes embeddings.", "", size]
    kind = "label" if spec.task == "multilabel" else "acceptance"
    decisions = f"{_describe_calibration(spec)}, {kind} threshold {_describe_acceptance(spec)}."
    lines = [f"Classes: {shown}{more}.", "", size, decisions]
    if spec.task == "multilabel":
        lines[1:1] = ["", MULTILABEL_TEXT]
    if spec.label_sets is not None:
        lines.append(f"Label sets include the label with probability {spec.label_sets.coverage:g}.")
    if spec.ood is not None:
        lines.append(
            f"Out-of-distribution detector ({spec.ood.method}): flags {spec.ood.max_rate:.1%} of "
            "images like the held-out ones."
        )
    return lines


def _describe_calibration(spec: BundleSpec) -> str:
    scaled = "" if spec.vector_scaling is None else "Vector scaling, "
    return f"{scaled}{'t' if scaled else 'T'}emperature {spec.temperature:g}"


def _describe_acceptance(spec: BundleSpec, max_classes: int = 20) -> str:
    chosen = dict(zip(spec.classes, spec.resolve_thresholds(), strict=True))
    reached = [value for value in chosen.values() if value < NEVER_ACCEPT]
    never = [escape_markdown(name) for name, value in chosen.items() if value == NEVER_ACCEPT]
    is_multilabel = spec.task == "multilabel"
    if not reached:
        return "none: no " + ("label is predicted" if is_multilabel else "prediction is accepted")
    text = f"{spec.threshold:g}"
    if spec.thresholds:
        text = f"per class, {min(reached):g} to {max(reached):g}"
    if never:
        hidden = len(never) - max_classes
        more = f" and {hidden:,} more" if hidden > 0 else ""
        verb = "predicted" if is_multilabel else "accepted"
        text += f"; never {verb}: {', '.join(never[:max_classes])}{more}"
    return text


def render_card_usage(command: str = "predict") -> list[str]:
    """Markdown lines: the command that runs the model."""
    return [f"    imgcls {command} --model THIS_FOLDER --manifest IMAGES --output OUT"]


def escape_markdown(text: str, max_length: int = 80) -> str:
    """Escape `text` for Markdown, on one line, cut to `max_length` characters."""
    text = " ".join(text.split()) or "(blank)"
    text = text if len(text) <= max_length else text[: max_length - 3] + "..."
    # an underscore within a word has no meaning in Markdown
    return re.sub(r"([\\`*{}\[\]<>#|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", text)
