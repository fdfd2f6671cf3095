"""Model zoo: torchvision's and timm's classifiers and the small CNN, by name.

Builds networks with a head of the required size, loads weights from files or libraries, and has
their preprocessing. Weights either match or are rejected with the keys that do not.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.data.decoding.preprocess import Interpolation, Preprocess
from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, StorageError, request_error
from imgcls.models import timm_models
from imgcls.models.bundle import Architecture, NetworkSource
from imgcls.models.finite import check_finite_tensors
from imgcls.models.small_cnn import SmallCNN
from imgcls.models.snapshots import find_folder, find_snapshot_of_weights, load_snapshot
from imgcls.models.weight_files import MatchedWeights, list_body_keys, match_keys, read_state_dict

PRETRAINED = "pretrained"
"""Name of the weights that a library has for a network."""
_LIBRARY_DEFAULT = (PRETRAINED, "torchvision")

_SMALL_CNN_PREPROCESS = Preprocess(
    resize=32, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), mode="squash"
)


def list_architectures() -> list[str]:
    """All names of architectures, except those of timm."""
    return ["small_cnn", *torchvision.models.list_models(module=torchvision.models)]


def resolve_architecture(name: str, options: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a name; raises BundleError with the nearest names if it is unknown."""
    if name.startswith(timm_models.TIMM_PREFIX):
        own = name.removeprefix(timm_models.TIMM_PREFIX)
        timm_models.check_timm_name(own)
        return Architecture(source="timm", name=own, options=dict(options or {}))
    if name not in list_architectures():
        near = difflib.get_close_matches(name, list_architectures(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `imgcls model list`"
        raise BundleError(f"model {name!r}: no such architecture; {hint}")
    source: NetworkSource = "imgcls" if name == "small_cnn" else "torchvision"
    return Architecture(source=source, name=name, options=dict(options or {}))


def resolve_snapshot(
    name: str, weights: str | None, options: Mapping[str, Any], image_size: int | None
) -> tuple[str, str | None, dict[str, Any]]:
    """Name, weights and options of the network in a snapshot; others are returned unchanged.

    name:       see `snapshots.find_folder`; its weights are "pretrained"
    image_size: input size, in place of that in the snapshot
    Raises BundleError for a folder without a network.
    """
    folder = find_folder(name)
    if folder is None:
        return name, weights, dict(options)
    snapshot = load_snapshot(folder)
    if weights == PRETRAINED:
        weights = snapshot.find_weights()
    stored = dict(snapshot.options)
    if image_size is not None:
        stored.pop("img_size", None)
    return snapshot.name, weights, {**stored, **options}


def build_network(architecture: Architecture, num_classes: int) -> nn.Module:
    """Build a network with `num_classes` outputs and random weights.

    Raises BundleError if the name or an option is unknown.
    """
    options = dict(architecture.options)
    try:
        if architecture.source == "imgcls":
            return SmallCNN(num_classes, **options)
        if architecture.source == "timm":
            return timm_models.build_timm_network(architecture.name, num_classes, options)
        if _is_torchvision(architecture, "inception_v3", "googlenet"):
            options.setdefault("init_weights", True)
        head_relu = options.pop("head_relu", True) if _is_squeezenet(architecture) else True
        network: Any = torchvision.models.get_model(
            architecture.name, weights=None, num_classes=num_classes, **options
        )
        if not head_relu:
            network.classifier[2] = nn.Identity()
        built: nn.Module = network
        return built
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise BundleError(f"model {architecture.name}: {error}; check model.options") from error


def adapt_for_training(architecture: Architecture) -> Architecture:
    """Set options of an architecture that training requires.

    The published SqueezeNet ends in a ReLU: a class whose logit is below 0 for all images has no
    gradient, and a linear probe is not possible. It is trained without this ReLU, unless the option
    `head_relu` is set.
    """
    if not _is_squeezenet(architecture):
        return architecture
    options = {"head_relu": False, **architecture.options}
    return architecture.model_copy(update={"options": options})


def _is_squeezenet(architecture: Architecture) -> bool:
    return _is_torchvision(architecture, "squeezenet")


def _is_torchvision(architecture: Architecture, *beginnings: str) -> bool:
    return architecture.source == "torchvision" and architecture.name.startswith(beginnings)


def get_default_preprocess(architecture: Architecture, weights: str | None = None) -> Preprocess:
    """Preprocessing that a network's weights were trained with.

    weights: as for `load_weights`; a file of a snapshot has its own; for another file, the first
        weights of torchvision, or the default ones of timm, are assumed
    """
    if architecture.source == "imgcls":
        return _SMALL_CNN_PREPROCESS
    if architecture.source == "timm":
        snapshot = find_snapshot_of_weights(weights)
        described = None if snapshot is None else snapshot.pretrained
        return timm_models.resolve_preprocess(architecture.name, described)
    known = torchvision.models.get_model_weights(architecture.name)
    name = "DEFAULT" if weights in _LIBRARY_DEFAULT else weights
    member = known[name] if name in known.__members__ else next(iter(known))
    recipe = member.transforms()
    interpolation: Interpolation = (
        "bicubic" if "bicubic" in str(recipe.interpolation).lower() else "bilinear"
    )
    return Preprocess(
        resize=recipe.resize_size[0],
        crop=recipe.crop_size[0],
        interpolation=interpolation,
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
    )


def add_pretrained_options(architecture: Architecture, weights: str | None = None) -> Architecture:
    """Add the options that the ImageNet weights of an architecture were trained with.

    weights: as for `get_default_preprocess`
    """
    options: dict[str, Any] = {}
    if _is_torchvision(architecture, "inception_v3", "googlenet"):
        options = {"transform_input": True, "aux_logits": True}
    elif _is_torchvision(architecture, "vit_"):
        options = {"image_size": get_default_preprocess(architecture, weights).crop}
    return architecture.model_copy(update={"options": {**options, **architecture.options}})


def set_image_size(architecture: Architecture, size: int) -> Architecture:
    """The architecture for inputs of `size` pixels, where the network has to know their size.

    Vision transformers have a position embedding for each patch of the image; convolutional
    networks take inputs of any size. A size that the options name is kept.
    """
    option: str | None = None
    if architecture.source == "timm":
        option = timm_models.find_size_option(architecture.name, size)
    elif _is_torchvision(architecture, "vit_"):
        option = "image_size"
    if option is None:
        return architecture
    return architecture.model_copy(update={"options": {option: size, **architecture.options}})


def load_weights(weights: str, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Load a state dict from a file (`.safetensors`, or `.pth` with weights_only) or a library.

    weights: path or URL; `pretrained` (or the name of the library) for the library's default; or a
        name such as `IMAGENET1K_V1`
    Raises BundleError if they cannot be loaded.
    """
    if architecture.source == "imgcls" and weights == PRETRAINED:
        raise BundleError(f"model.weights {weights}: {architecture.name} has none; pass a file")
    if architecture.source == "timm" and weights in (PRETRAINED, "timm"):
        return timm_models.load_pretrained(architecture.name)
    known = (
        torchvision.models.get_model_weights(architecture.name)
        if architecture.source == "torchvision"
        else None
    )
    if known is not None and (weights in _LIBRARY_DEFAULT or weights in known.__members__):
        member = known.DEFAULT if weights in _LIBRARY_DEFAULT else known[weights]
        try:
            return dict(member.get_state_dict(progress=False, check_hash=True))
        except Exception as error:
            raise BundleError(
                f"model.weights {weights}: torchvision could not download them ({error}); pass the "
                "path of a weights file"
            ) from error
    try:
        data = filesystem.read(weights)
    except StorageError as error:
        own = [] if architecture.source == "imgcls" else [PRETRAINED]
        choices = ", ".join([*own, *(known.__members__ if known is not None else ())])
        also = f", or one of {choices}" if choices else ""
        raise request_error(
            BundleError, f"model.weights: {error}; pass a file{also}", error
        ) from error
    state = read_state_dict(weights, data)
    check_finite_tensors(state, f"model.weights {weights}")
    return state


def apply_weights(
    network: nn.Module, state: Mapping[str, torch.Tensor], *, replace_head: bool
) -> list[str]:
    """Load a state dict into a network.

    replace_head: keep the network's final layers (and auxiliary heads) if only the number of
        classes differs, or if the weights have no head, as those of a backbone
    Returns the keys that were not loaded.
    Raises BundleError with the keys that do not match.
    """
    own = network.state_dict()
    heads = list_head_names(network)
    state = match_weights(network, state).state
    resized = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    in_head = [key for key in resized if key.rpartition(".")[0] in heads]
    wrong = [key for key in resized if key not in in_head or not replace_head]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    absent = [key for key in missing if key.rpartition(".")[0] in heads]
    if replace_head and len(absent) == sum(key.rpartition(".")[0] in heads for key in own):
        missing = [key for key in missing if key not in absent]
    else:
        absent = []
    extra = [key for key in state if key not in own]
    lines = [
        f"{k}: shape {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the network"
        for k in wrong
    ]
    # alternate, so that keys of both sides are shown if all names differ
    both = itertools.zip_longest(
        [f"{key}: is missing in the file" for key in missing],
        [f"{key}: is missing in the network" for key in extra],
    )
    lines += [line for pair in both for line in pair if line is not None]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines[:12])
        more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
        backbone = (
            "\nthe weights are those of a backbone, without a head; train a head: "
            "imgcls train --model.weights FILE"
        )
        is_backbone = len(lines) == len(missing) and all(
            key.rpartition(".")[0] in heads for key in missing
        )
        raise BundleError(
            f"the weights do not match the network in {len(lines)} keys:\n{shown}{more}"
            f"{backbone if is_backbone else ''}"
        )
    kept = {key: value for key, value in state.items() if key not in in_head}
    network.load_state_dict(kept, strict=False)
    return in_head + absent


def match_weights(network: nn.Module, state: Mapping[str, torch.Tensor]) -> MatchedWeights:
    """Weights by the names of the network, with position embeddings of its input size.

    Prefixes are removed, names of timm's authors converted, and position embeddings of another
    input size interpolated, as torchvision and timm do.
    """
    own, heads = network.state_dict(), list_head_names(network)
    found = match_keys(own, heads, state)
    body = set(list_body_keys(own, heads))
    missing = body - found.state.keys()
    resized = [k for k in body - missing if found.state[k].shape != own[k].shape]
    if not missing and not resized:
        return found
    if resized and not all(_POSITIONS.search(key) for key in resized):
        return found  # of another network
    converted = _interpolate_positions(network, found.state)
    if converted is None:
        converted = timm_models.convert_checkpoint(network, found.state) or {}
    if any(key not in converted or converted[key].shape != own[key].shape for key in body):
        return found
    return replace(found, state=converted, interpolated_keys=tuple(sorted(resized)))


_POSITIONS = re.compile(r"pos_embed|position_bias|rel_pos|rope")
"""In the names of parameters with a row per position in the image."""


def _interpolate_positions(
    network: nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """Weights of a vision transformer of torchvision for its input size; None for others."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(network, VisionTransformer):
        return None
    kept = OrderedDict(state)
    try:
        return dict(interpolate_embeddings(network.image_size, network.patch_size, kept))
    except ValueError:
        return None


def list_head_names(network: nn.Module) -> set[str]:
    """Names of all heads, including auxiliary ones."""
    main = find_heads(network)
    width = _count_outputs(next(iter(main.values())))
    return {
        other
        for other, module in network.named_modules()
        if other in main or (other.lower().startswith("aux") and _count_outputs(module) == width)
    }


def find_heads(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers whose outputs are added to the logits, by name; the last is `find_head`'s.

    Most networks have one. Some of timm's have a second head for distillation, or one per branch.
    """
    names = getattr(network, "class_heads", None) or (find_head(network)[0],)
    return {name: cast("nn.Linear | nn.Conv2d", network.get_submodule(name)) for name in names}


def find_head(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the final layer: a Linear, or SqueezeNet's 1x1 convolution.

    Its input, averaged over spatial dimensions, is the network's embedding.
    """
    several: tuple[str, ...] = getattr(network, "class_heads", ())
    if several:
        return several[-1], network.get_submodule(several[-1])
    candidates = [
        (name, module)
        for name, module in network.named_modules()
        if _count_outputs(module) is not None and not name.lower().startswith("aux")
    ]
    if not candidates:
        raise BundleError(f"{type(network).__name__}: no final linear or convolution layer found")
    return candidates[-1]


def get_embedding_width(network: nn.Module) -> int:
    """E, the length of the network's embedding."""
    return get_input_width(find_head(network)[1])


def get_input_width(layer: nn.Module) -> int:
    """Number of input features of a head."""
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return cast(int, width)


def _count_outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    return None
