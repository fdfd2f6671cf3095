"""HTML of predictions for notebooks: thumbnail, label and a bar per class."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence

from imgcls.data.encode_image import encode_data_uri
from imgcls.models.sources import ImageSource, load_preview

REPR_SIDE = 128


def render_prediction(
    source: ImageSource | None,
    labels: Sequence[str],
    scores: Sequence[float],
    accepted: bool,
    predicted: Sequence[str] | None = None,
) -> str:
    """HTML of one prediction, with the thumbnail if the image can be read.

    labels, scores: the top k
    predicted:      predicted labels of a multi-label model; None for one label per image
    """
    thumbnail = _encode_thumbnail(source)
    image = f'<img src="{thumbnail}" alt="" style="max-height:{REPR_SIDE}px">' if thumbnail else ""
    bars = "".join(
        f'<div style="display:flex;gap:8px"><span style="flex:1">{html.escape(label)}</span>'
        f"<span>{score:.1%}</span></div>"
        f'<progress max="1" value="{score:.4f}" style="width:100%"></progress>'
        for label, score in zip(labels, scores, strict=True)
    )
    shown = labels[:1] if predicted is None else predicted
    names = ", ".join(f"<b>{html.escape(label)}</b>" for label in shown)
    verdict = "accepted" if accepted else "abstained"
    heading = f"{names} {verdict}" if names else "<b>no label</b>"
    return render_frame(f"{image}<div>{heading}</div>{bars}", source)


def render_failed_prediction(source: ImageSource | None, error: str) -> str:
    """HTML of one image without a prediction, with its error."""
    return render_frame(f"<div><b>no prediction</b></div><div>{html.escape(error)}</div>", source)


def render_frame(inner: str, source: ImageSource | None) -> str:
    """A frame around the HTML of one image, with the image's name if it has one."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    return (
        '<div style="display:inline-block;vertical-align:top;width:190px;margin:4px;padding:8px;'
        'border:1px solid #8888;border-radius:8px;font:13px sans-serif">'
        f"{inner}"
        f'<div style="opacity:.6;overflow-wrap:anywhere">{html.escape(name)}</div></div>'
    )


def _encode_thumbnail(source: ImageSource | None) -> str | None:
    if source is None:
        return None
    try:
        small, _ = load_preview(source, REPR_SIDE)
    except Exception:  # noqa: BLE001  show the prediction without a thumbnail
        return None
    return encode_data_uri(small)
