"""The final layer of a bundle's network alone: scores from embeddings, without images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import Bundle, load_bundle_weights
from imgcls.models.head import HeadNetwork
from imgcls.models.precision import RunPrecision, choose_float_dtype
from imgcls.models.torch_engine import load_network

_CPU = torch.device("cpu")
_REMEDY = "label the images with `imgcls predict`"
_TOLERANCE = 1e-4
"""Largest relative difference between a network's logits and those of its final layer."""


def load_linear_head(bundle: Bundle, precision: RunPrecision = "fp32") -> nn.Linear:
    """The layer that computes a network's logits from its embedding, in float32 on the CPU.

    precision: of the run whose scores it is to give; its weights are rounded as there
    Raises BundleError for a network whose logits are no linear function of its embedding, such as
    SqueezeNet's, whose final layer is a convolution before a ReLU and the average over space.
    """
    network = load_network(bundle, _CPU, torch.float32)
    name, layer = zoo.find_head(network)
    problem = f"bundle {bundle.url}: the logits of {bundle.spec.architecture.name} are not computed"
    if not isinstance(layer, nn.Linear) or len(zoo.find_heads(network)) > 1:
        raise BundleError(f"{problem} by one linear layer; {_REMEDY}")
    crop = bundle.spec.preprocess.crop
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((2, 3, crop, crop), generator=generator)
    weights = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.inference_mode():
        for parameter in layer.parameters():  # that of a backbone is 0, which shows nothing
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        logits, features = HeadNetwork(network, in_fp32=False)(inputs)
        again = F.linear(features, layer.weight, layer.bias)
    layer.load_state_dict(weights)
    if logits.shape != again.shape or not torch.allclose(logits, again, _TOLERANCE, _TOLERANCE):
        raise BundleError(f"{problem} by layer {name} alone; {_REMEDY}")
    # as in `HeadNetwork`, which multiplies the rounded weights in float32
    return layer.to(choose_float_dtype(precision, _CPU)).float()


def check_same_embeddings(bundle: Bundle, source: Bundle) -> None:
    """Raise BundleError unless both bundles compute the same embedding of every image.

    Compared are the architecture, the preprocessing (how JPEGs are decoded excepted), and every
    weight but those of the heads, bit for bit.
    """
    start = f"bundle {bundle.url}: its embeddings are not those of {source.url}"
    ours, theirs = bundle.spec, source.spec
    if ours.architecture.name != theirs.architecture.name:
        names = f"{ours.architecture.name}, not {theirs.architecture.name}"
        raise BundleError(f"{start}: its network is {names}; {_REMEDY}")
    if ours.architecture != theirs.architecture:
        raise BundleError(f"{start}: the options of {ours.architecture.name} differ; {_REMEDY}")
    same_route = {"decode": theirs.preprocess.decode}
    if ours.preprocess.model_copy(update=same_route) != theirs.preprocess:
        raise BundleError(f"{start}: the preprocessing differs; {_REMEDY}")
    network = zoo.build_network(ours.architecture, ours.num_outputs)
    heads = tuple(f"{name}." for name in zoo.list_head_names(network))  # auxiliary ones, too
    weights, others = load_bundle_weights(bundle), load_bundle_weights(source)
    for name in sorted({*weights, *others}):
        if name.startswith(heads):
            continue
        one, other = weights.get(name), others.get(name)
        if one is None or other is None or not torch.equal(one, other):
            raise BundleError(f"{start}: weight {name} differs, as after fine-tuning; {_REMEDY}")
