"""Explanations of rows of a run, with the decoding and the limits that the run was made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from imgcls.data import image_files
from imgcls.data.decoding.open_image import MAX_PIXELS
from imgcls.data.manifests.manifest import resolve_path
from imgcls.errors import ImageError
from imgcls.models.bundle import Bundle
from imgcls.runs.committed import CommittedRun

if TYPE_CHECKING:
    from imgcls.models.explain import Explainer
    from imgcls.models.explanation import Explanation


def build_explainer(run: CommittedRun, bundle: Bundle) -> Explainer:
    """The explainer of the bundle that made a run; raises as `Explainer` does."""
    from imgcls.models.explain import Explainer

    settings = run.run_record["identity"]["settings"]
    return Explainer(bundle.with_decode(settings.get("decode")))


def explain_rows(
    explainer: Explainer,
    run: CommittedRun,
    rows: Sequence[tuple[str | None, Sequence[str]]],
    side: int | None = None,
) -> Iterator[list[Explanation]]:
    """Explanations of each row, in order; none if its image cannot be read or decoded any more.

    rows: path of each image, and the classes to explain
    side: maximum width and height of a picture. Default: that of `explain_file`
    """
    from imgcls.models.explanation import MAX_SIDE, explain_file

    settings = run.run_record["identity"]["settings"]
    max_pixels = settings.get("max_pixels", MAX_PIXELS)
    max_bytes = settings.get("max_bytes", image_files.MAX_IMAGE_BYTES)
    urls = [resolve_path(path, run.root) for path, _ in rows]
    images = image_files.read_ahead(urls, max_bytes=max_bytes)
    for data, (_, classes) in zip(images, rows, strict=True):
        if not isinstance(data, bytes):
            yield []
            continue
        codes = [explainer.classes.index(name) for name in classes]
        try:
            yield explain_file(explainer, data, codes, side=side or MAX_SIDE, max_pixels=max_pixels)
        except ImageError:
            yield []
