"""Class activation maps of mistakes, for the report.

The only part of an evaluation that runs the model, and only on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imgcls.data.encode_image import encode_data_uri
from imgcls.evaluation.config import EvaluationOptions
from imgcls.models.bundle import load_bundle
from imgcls.runs.committed import CommittedRun, load_source_bundle
from imgcls.runs.explained_rows import build_explainer, explain_rows

if TYPE_CHECKING:
    from imgcls.models.explain import Explainer

OVERLAY_SIDE = 264
"""Maximum width and height of an overlay in the report, in pixels."""

Overlays = Mapping[tuple[str, int, str], str]
"""Overlays as data URIs, by path, row and class: several rows of a history have one number."""


def open_explainer(run: CommittedRun, config: EvaluationOptions) -> Explainer | None:
    """The explainer of the bundle that made a run; None unless requested.

    Raises RequestError if it cannot be read or is another bundle, and BundleError if its network
    has no feature map over the image.
    """
    if not config.explain:
        return None
    return build_explainer(run, load_source_bundle(run, config.explain_model, "explain-model"))


def check_explainable(model: str) -> None:
    """Raise BundleError for a bundle whose network has no feature map over the image."""
    from imgcls.models.explain import Explainer

    Explainer(load_bundle(model))


def explain_mistakes(explainer: Explainer, run: CommittedRun, mistakes: pa.Table) -> Overlays:
    """Overlays of mistakes: of the predicted class and of the label, if it is a class.

    mistakes: as in `RunEvaluation`; those of a multilabel run are explained for their class alone
    An image that cannot be read any more has none.
    """
    wanted, known = mistakes.to_pylist(), set(explainer.classes)
    rows = [(each["path"], _list_classes(each, known)) for each in wanted]
    found = explain_rows(explainer, run, rows, OVERLAY_SIDE)
    return {
        (each["path"], each["row"], one.label): encode_data_uri(one.overlay())
        for each, explanations in zip(wanted, found, strict=True)
        for one in explanations
    }


def select_most_confident(mistakes: pa.Table, count: int) -> pa.Table:
    """The `count` most confident mistakes of `RunEvaluation.mistakes`, of which the worst first.

    Those of a multilabel run are ranked by the distance of the score from that of the label.
    """
    if "given" not in mistakes.schema.names:
        return mistakes.slice(0, count)
    score, given = mistakes["score"].to_numpy(), mistakes["given"].to_numpy()
    order = np.argsort(-np.where(given, 1 - score, score), kind="stable")
    return mistakes.take(order[:count])


def list_overlays(overlays: Overlays, row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The overlays of a row for the gallery of the report."""
    names = dict.fromkeys(row.get(key) for key in ("predicted_label", "label"))
    image = row["path"], row["row"]
    return [
        {
            "label": name,
            "image": overlays[*image, name],
            "alt": f"{row['path']}, image regions that contribute to the score of {name}",
        }
        for name in names
        if name is not None and (*image, name) in overlays
    ]


def _list_classes(mistake: Mapping[str, Any], known: set[str]) -> tuple[str, ...]:
    """The predicted class of a mistake, and its label if it is a class."""
    names = dict.fromkeys(mistake.get(key) for key in ("predicted_label", "label"))
    return tuple(name for name in names if name in known)
