"""Quantization for OpenVINO by NNCF: int8 on x86 CPUs with AVX2, as one file of a bundle.

Weights have a scale per output channel. On CPUs with AVX2 but without VNNI sums of two products can
overflow, unless weights have 7 bits, which costs accuracy too. Labels as in fp32 there, of 167
photographs: SqueezeNet 94.6% with 7 bits in the first layer only, 86.8% in all layers;
EfficientNet-Lite0 94.6% and 98.2%. So both are tried.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable
from importlib import util
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imgcls.data.decoding.decode import Pixels
from imgcls.errors import BundleError, RequestError
from imgcls.models.bundle import Bundle, BundleSpec
from imgcls.models.head import HeadNetwork
from imgcls.models.openvino_engine import (
    compile_network,
    convert_network,
    pack_model,
    summarize_error,
)
from imgcls.models.precision import has_int8_instructions
from imgcls.models.task import ScoreScaling
from imgcls.models.tasks import find_task
from imgcls.models.torch_engine import load_network

_ATTENTION = "ScaledDotProductAttention"


def quantize_for_openvino(bundle: Bundle, batches: Iterable[Pixels]) -> bytes:
    """The quantized network of a bundle, as the content of its `INT8_FILE`.

    batches: (N, 3, crop, crop) uint8 RGB, to measure the ranges of activations
    Raises RequestError without the package nncf, BundleError if the network cannot be quantized.
    """
    if util.find_spec("nncf") is None:
        raise RequestError(
            "engine openvino: the package nncf, which quantizes for it, is not installed; run: pip "
            "install 'imgcls[int8]', or use --engine torch"
        )
    network = load_network(bundle, torch.device("cpu"), torch.float32)
    images = [np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) for batch in batches]
    try:
        model = convert_network(HeadNetwork(network, in_fp32=False).eval(), bundle.spec.preprocess)
        model = _quantize_for_this_cpu(model, images, bundle.spec)
    except Exception as error:
        raise BundleError(
            f"bundle {bundle.url}: OpenVINO cannot quantize its network: {summarize_error(error)}; "
            "use --engine torch"
        ) from error
    return pack_model(model)


def _quantize_for_this_cpu(model: Any, images: list[Pixels], spec: BundleSpec) -> Any:
    """The quantized model with the most labels of the images as before."""
    fixes = ["first_layer_only"] if has_int8_instructions() else ["first_layer_only", "enable"]
    made = [_quantize(model.clone(), images, fix) for fix in fixes]
    if len(made) == 1:
        return made[0]
    exact = _predict_labels(model, images, spec)
    return max(made, key=lambda each: int((_predict_labels(each, images, spec) == exact).sum()))


def _predict_labels(model: Any, images: list[Pixels], spec: BundleSpec) -> npt.NDArray[Any]:
    """(N,) class indices; for multilabel (N, C), whether each class is predicted."""
    compiled = compile_network(model, "fp32")
    logits = np.concatenate([compiled(batch)[0] for batch in images])
    if spec.task == "single_label":
        return np.asarray(logits.argmax(1))
    task = find_task(spec)
    scores = task.compute_scores(torch.from_numpy(logits), ScoreScaling.from_spec(spec)).numpy()
    is_predicted = task.decide(scores, spec.resolve_thresholds(), 1).is_predicted
    assert is_predicted is not None
    return is_predicted


def _quantize(model: Any, images: list[Pixels], overflow_fix: str) -> Any:
    """overflow_fix: a value of `nncf.OverflowFix`, the layers whose weights have 7 bits"""
    import nncf

    nncf.set_log_level(logging.ERROR)
    has_attention = any(step.get_type_name() == _ATTENTION for step in model.get_ops())
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix(overflow_fix)
            ),
        )
