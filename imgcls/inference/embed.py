"""The job of `imgcls embed`: a run of `imgcls predict` that writes embeddings alone."""

from __future__ import annotations

from typing import Any

from imgcls.config import requested
from imgcls.inference.config import EmbedConfig as EmbedConfig
from imgcls.inference.config import EmbeddingRunConfig
from imgcls.inference.predict import predict
from imgcls.inference.result import PredictResult


def embed(config: EmbedConfig | None = None, /, **settings: Any) -> PredictResult:
    """Compute the embeddings of the images of a manifest and commit the table.

    Parameters
    ----------
    config : EmbedConfig, optional
        The whole request, instead of `settings`.
    **settings
        The keys of `imgcls embed`, nested or dotted. `manifest`, `model` and `output` are required;
        the model may be a classifier or a backbone without classes.

    Returns
    -------
    PredictResult
        Where the table is. Its column `embedding` is the input of the network's final layer, null
        for an image that cannot be used.

    Raises
    ------
    RequestError, TooManyErrors, RunFailed
        As `predict`.

    Examples
    --------
    >>> import imgcls
    >>> imgcls.embed(manifest="photos.csv", model="backbone", output="out")  # doctest: +SKIP
    """
    config = requested(
        EmbedConfig, config, settings, 'embed(manifest="photos.csv", model="bundle", output="out")'
    )
    return predict(EmbeddingRunConfig.from_request(config))
