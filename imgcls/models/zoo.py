"""Model zoo: the networks of all libraries, by name.

Builds networks with a head of the required size, loads weights from files or libraries, and has
their preprocessing. Weights either match or are rejected with the keys that do not.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, StorageError, request_error
from imgcls.formatting import suggest_names
from imgcls.models.bundle import Architecture
from imgcls.models.finite import check_finite_tensors
from imgcls.models.libraries.base import PRETRAINED, Snapshot
from imgcls.models.libraries.registry import LIBRARIES, find_library
from imgcls.models.snapshots import (
    check_weights,
    find_folder,
    find_snapshot_of_weights,
    find_weights,
    load_snapshot,
)
from imgcls.models.weight_files import MatchedWeights, list_body_keys, match_keys, read_state_dict


def list_architectures() -> list[str]:
    """All names of architectures without the prefix of a library."""
    return [name for library in LIBRARIES for name in library.list_names()]


def resolve_architecture(name: str, options: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a name; raises BundleError with the nearest names if it is unknown."""
    given = dict(options or {})
    for library in LIBRARIES:
        if library.prefix and name.startswith(library.prefix):
            own = name.removeprefix(library.prefix)
            library.check_name(own)
            return Architecture(source=library.source, name=own, options=given)
    for library in LIBRARIES:
        if name in library.list_names():
            return Architecture(source=library.source, name=name, options=given)
    hint = suggest_names(name, list_architectures(), "see `imgcls model list`")
    raise BundleError(f"model {name!r}: no such architecture; {hint}")


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
        weights = find_weights(snapshot)
    return snapshot.name, weights, {**_take_options(snapshot, image_size), **options}


def _take_options(snapshot: Snapshot, image_size: int | None) -> dict[str, Any]:
    """The options of the network in a snapshot, without its input size if another is set."""
    if image_size is None:
        return dict(snapshot.options)
    architecture = resolve_architecture(snapshot.name)
    option = find_library(architecture).find_size_option(architecture, image_size)
    return {k: v for k, v in snapshot.options.items() if k not in ("img_size", option)}


def build_network(architecture: Architecture, num_classes: int) -> nn.Module:
    """Build a network with `num_classes` outputs and random weights.

    Raises BundleError if the name or an option is unknown.
    """
    library = find_library(architecture)
    try:
        return library.build(architecture.name, num_classes, architecture.options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise BundleError(f"model {architecture.name}: {error}; check model.options") from error


def adapt_for_training(architecture: Architecture) -> Architecture:
    """Set options of an architecture that training requires, such as SqueezeNet's head."""
    return find_library(architecture).adapt_for_training(architecture)


def get_default_preprocess(architecture: Architecture, weights: str | None = None) -> Preprocess:
    """Preprocessing that a network's weights were trained with.

    weights: as for `load_weights`; a file of a snapshot has its own; for another file, the first
        weights of torchvision and open_clip, or the default ones of timm, are assumed
    """
    library, snapshot = find_library(architecture), find_snapshot_of_weights(weights)
    if snapshot is not None and snapshot.source == library.source:
        return snapshot.load_preprocess()
    return library.get_preprocess(architecture, weights)


def add_pretrained_options(
    architecture: Architecture, weights: str | None = None, image_size: int | None = None
) -> Architecture:
    """Add the options that the weights of an architecture were trained with.

    weights:    as for `get_default_preprocess`; a file of a snapshot with this architecture has its
        options there, and with another one of the library its input size
    image_size: input size, in place of that in the snapshot
    """
    library, snapshot = find_library(architecture), find_snapshot_of_weights(weights)
    if snapshot is None or snapshot.source != library.source:
        options = library.get_pretrained_options(architecture, weights)
    elif _remove_tag(snapshot.name) == _remove_tag(library.prefix + architecture.name):
        options = _take_options(snapshot, image_size)
    else:
        if image_size is None:
            architecture = set_image_size(architecture, snapshot.load_preprocess().crop)
        options = library.get_pretrained_options(architecture, weights)
    return architecture.model_copy(update={"options": {**options, **architecture.options}})


def _remove_tag(name: str) -> str:
    """The name of an architecture without that of its weights in timm."""
    return name.partition(".")[0]


def set_image_size(architecture: Architecture, size: int) -> Architecture:
    """The architecture for inputs of `size` pixels, where the network has to know their size.

    Vision transformers have a position embedding for each patch of the image; convolutional
    networks take inputs of any size. A size that the options name is kept.
    """
    option = find_library(architecture).find_size_option(architecture, size)
    if option is None:
        return architecture
    return architecture.model_copy(update={"options": {option: size, **architecture.options}})


def load_weights(weights: str, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Load a state dict from a file (`.safetensors`, or `.pth` with weights_only) or a library.

    weights: path or URL; `pretrained` (or the name of the library) for the library's default; or a
        name such as `IMAGENET1K_V1`
    Raises BundleError if they cannot be loaded.
    """
    library = find_library(architecture)
    named = library.load_weights(architecture.name, weights)
    if named is not None:
        return named
    choices = library.list_weights(architecture.name)
    if weights == PRETRAINED and not choices:
        raise BundleError(f"model.weights {weights}: {architecture.name} has none; pass a file")
    try:
        data = filesystem.read(weights)
    except StorageError as error:
        also = f", or one of {', '.join(choices)}" if choices else ""
        raise request_error(
            BundleError, f"model.weights: {error}; pass a file{also}", error
        ) from error
    check_weights(weights, data)
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

    Prefixes are removed, other names converted and position embeddings of another input size
    interpolated, as the library of the network does.
    """
    own, heads = network.state_dict(), list_head_names(network)
    found = match_keys(own, heads, state)
    body = set(list_body_keys(own, heads))
    missing = body - found.state.keys()
    resized = [k for k in body - missing if found.state[k].shape != own[k].shape]
    extra = found.state.keys() - own.keys()
    if not missing and not resized and not extra:
        return found
    if resized and not all(_POSITIONS.search(key) for key in resized):
        return found  # of another network
    return _convert_weights(network, found, body, has_all=not missing and not resized)


_POSITIONS = re.compile(
    r"pos_embed|position_embedding|positional_embedding|position_bias|rel_pos|rope"
)
"""In the names of parameters with a row per position in the image."""


def _convert_weights(
    network: nn.Module, found: MatchedWeights, body: Set[str], *, has_all: bool
) -> MatchedWeights:
    """The weights as the network's library converts them; unchanged if fewer of them then fit.

    body:    keys of the network that weights must have
    has_all: whether all of them fit, and only other parts have to be left out
    """
    own = network.state_dict()
    for library in LIBRARIES:
        if has_all and not library.has_parts:
            continue
        converted = library.convert_weights(network, found.state)
        if converted is None:
            continue
        before, after = (
            sum(key in state and state[key].shape == own[key].shape for key in body)
            for state in (found.state, converted)
        )
        if after < before + (not has_all):
            return found
        shared = sorted(body & found.state.keys() & converted.keys())
        return replace(
            found,
            state=converted,
            interpolated_keys=tuple(
                key for key in shared if found.state[key].shape != converted[key].shape
            ),
            # a library that renames tensors does not list those that it leaves out
            unused_keys=tuple(sorted(found.state.keys() - converted.keys()))
            if converted.keys() <= found.state.keys()
            else found.unused_keys,
        )
    return found


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
