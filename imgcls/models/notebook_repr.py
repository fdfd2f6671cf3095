"""Predictions as a notebook shows them: each picture with the bars of its best labels."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from imgcls.data import decode, filesystem
from imgcls.data.pixels import to_rgb
from imgcls.models.sources import Source

SIDE = 128


def card(
    source: Source | None, labels: Sequence[str], scores: Sequence[float], accepted: bool
) -> str:
    """HTML of one image: the picture where it can still be had, and its labels with their bars."""
    picture = _picture(source)
    shown = f'<img src="{picture}" alt="" style="max-height:{SIDE}px">' if picture else ""
    bars = "".join(
        f'<div style="display:flex;gap:8px"><span style="flex:1">{html.escape(label)}</span>'
        f"<span>{score:.1%}</span></div>"
        f'<progress max="1" value="{score:.4f}" style="width:100%"></progress>'
        for label, score in zip(labels, scores, strict=True)
    )
    word = "accepted" if accepted else "abstained"
    return _framed(f"{shown}<div><b>{html.escape(labels[0])}</b> {word}</div>{bars}", source)


def failed_card(source: Source | None, error: str) -> str:
    """HTML of one image that could not be used: why."""
    return _framed(f"<div><b>no prediction</b></div><div>{html.escape(error)}</div>", source)


def _framed(inner: str, source: Source | None) -> str:
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    return (
        '<div style="display:inline-block;vertical-align:top;width:190px;margin:4px;padding:8px;'
        'border:1px solid #8888;border-radius:8px;font:13px sans-serif">'
        f"{inner}"
        f'<div style="opacity:.6;overflow-wrap:anywhere">{html.escape(name)}</div></div>'
    )


def _picture(source: Source | None) -> str | None:
    if source is None:
        return None
    try:
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)
        if isinstance(source, Image.Image):
            small = to_rgb(source).copy()
            small.thumbnail((SIDE, SIDE))
        elif isinstance(source, (str, os.PathLike)):
            small = decode.picture(filesystem.read_image(os.fspath(source)), SIDE).image
        else:
            small = decode.picture(bytes(source), SIDE).image
    except Exception:  # noqa: BLE001  a notebook shows the answer without its picture
        return None
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
