"""Vision towers of open_clip, if it is installed.

The only module that imports open_clip. A network is the vision tower of a CLIP or SigLIP model with
a linear layer on its normalized features: the class vectors of a zero-shot classifier, or a trained
head. The text tower is needed only to compute class vectors.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from imgcls.data.decoding.preprocess import Interpolation, Preprocess, ResizeMode
from imgcls.errors import BundleError, one_line
from imgcls.formatting import suggest_names
from imgcls.models.bundle import Architecture
from imgcls.models.libraries.base import NetworkLibrary, import_library

OPEN_CLIP_PREFIX = "open_clip:"
_SIZE_OPTION = "image_size"
_VISUAL = "visual."
"""Prefix of the vision tower's weights in a checkpoint of both towers."""
_RESIZE_MODES: dict[str, ResizeMode] = {"shortest": "crop", "squash": "squash", "longest": "pad"}


class OpenClipLibrary(NetworkLibrary):
    """Vision towers of open_clip by the name of the model, such as ViT-B-32."""

    source = "open_clip"
    prefix = OPEN_CLIP_PREFIX
    has_parts = True

    def check_name(self, name: str) -> None:
        """Raise a BundleError with the nearest names if open_clip does not have this name."""
        known = _import_open_clip().list_models()
        if name in known:
            return
        hint = suggest_names(name, known, "see open_clip.list_models()", form=f"{self.prefix}{{}}")
        raise BundleError(f"model {self.prefix}{name}: open_clip has no such model; {hint}")

    def build(self, name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
        return OpenClipNetwork(name, num_classes, **options)

    def get_preprocess(self, architecture: Architecture, weights: str | None) -> Preprocess:
        """That of these weights; for another file, of the first weights of the model."""
        open_clip = _import_open_clip()
        tags = open_clip.list_pretrained_tags_by_model(architecture.name)
        tag = weights if weights in tags else (tags[0] if tags else None)
        settings = {} if tag is None else open_clip.get_pretrained_cfg(architecture.name, tag)
        crop = _read_config(architecture.name, architecture.options)["vision_cfg"]["image_size"]
        if not isinstance(crop, int):
            raise BundleError(
                f"model {self.prefix}{architecture.name}: its images of {crop} pixels are not "
                "square; choose another network"
            )
        interpolation: Interpolation = (
            "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic"
        )
        return Preprocess(
            resize=crop,
            crop=crop,
            interpolation=interpolation,
            mode=_RESIZE_MODES[settings.get("resize_mode") or "shortest"],
            mean=tuple(settings.get("mean") or open_clip.OPENAI_DATASET_MEAN),
            std=tuple(settings.get("std") or open_clip.OPENAI_DATASET_STD),
        )

    def list_weights(self, name: str) -> tuple[str, ...]:
        return tuple(_import_open_clip().list_pretrained_tags_by_model(name))

    def load_weights(self, name: str, weights: str) -> dict[str, torch.Tensor] | None:
        if weights not in self.list_weights(name):
            return None
        _check_activation(name, weights)
        return dict(load_both_towers(name, weights).state_dict())

    def find_size_option(self, architecture: Architecture, size: int) -> str | None:
        return _SIZE_OPTION

    def convert_weights(
        self, network: nn.Module, state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """The vision tower of a checkpoint of both towers, for the input size of the network."""
        if not isinstance(network, OpenClipNetwork):
            return None
        _import_open_clip()
        from open_clip.model import resize_pos_embed

        own = (_VISUAL, "head.")
        kept = {key: value for key, value in state.items() if key.startswith(own)}
        resize_pos_embed(kept, network)
        return kept


def _check_activation(name: str, weights: str) -> None:
    """Raise BundleError for weights trained with QuickGELU for a model without it.

    open_clip only warns, and the features are then slightly wrong.
    """
    open_clip = _import_open_clip()
    has_quick = [
        each.get("quick_gelu", False)
        for each in (open_clip.get_pretrained_cfg(name, weights), open_clip.get_model_config(name))
    ]
    if has_quick == [True, False]:
        raise BundleError(
            f"model.weights {weights}: were trained with QuickGELU, which {name} does not have; "
            f"pass {OPEN_CLIP_PREFIX}{name}-quickgelu"
        )


class OpenClipNetwork(nn.Module):
    """The vision tower of a model of open_clip, with a linear head on its normalized features."""

    def __init__(self, name: str, num_classes: int, **options: Any) -> None:
        super().__init__()
        _import_open_clip()
        # open_clip 3 builds a tower alone only by this function
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        config = _read_config(name, options)
        width: int = config["embed_dim"]
        vision = CLIPVisionCfg(**config["vision_cfg"])
        self.visual = _build_vision_tower(width, vision, config.get("quick_gelu", False))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.visual(images)
        if isinstance(features, tuple):  # CoCa's tower also returns its tokens
            features = features[0]
        normalized = F.normalize(features.float(), dim=-1).to(features.dtype)
        logits: torch.Tensor = self.head(normalized)
        return logits


def load_both_towers(name: str, weights: str | Mapping[str, torch.Tensor]) -> Any:
    """A model of open_clip with both towers, in eval mode.

    weights: a name of open_clip's weights, or a state dict
    Raises BundleError if they cannot be loaded or do not fit.
    """
    open_clip = _import_open_clip()
    logging.disable(logging.WARNING)  # it logs that a model starts with random weights
    try:
        tag = weights if isinstance(weights, str) else None
        model = open_clip.create_model(name, pretrained=tag)
        if not isinstance(weights, str):
            state = dict(weights)
            open_clip.model.resize_pos_embed(state, model)
            model.load_state_dict(state)
    except Exception as error:
        raise BundleError(
            f"model {OPEN_CLIP_PREFIX}{name}: its weights could not be loaded "
            f"({one_line(error)}); pass a file with the state dict of both towers"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return model.eval()


def compute_class_head(
    model: Any, name: str, classes: Sequence[str], templates: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C, E) and bias (C,) of the head of a zero-shot classifier, float32.

    A class vector is the mean of the normalized embeddings of its texts, normalized (Radford et
    al., ICML 2021, "Learning transferable visual models from natural language supervision").
    model:     as `load_both_towers` returns it
    templates: texts with {} for the class name
    Raises BundleError if the tokenizer of the model is not available.
    """
    open_clip = _import_open_clip()
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise BundleError(
            f"model {OPEN_CLIP_PREFIX}{name}: its tokenizer could not be loaded "
            f"({one_line(error)}); run the command once with access to the Hugging Face Hub, or "
            "choose a model with open_clip's own tokenizer, such as ViT-B-32"
        ) from error
    with torch.no_grad():
        vectors = open_clip.build_zero_shot_classifier(
            model, tokenizer, classnames=list(classes), templates=list(templates)
        )
        weight = model.logit_scale.exp() * vectors.T
        shift = getattr(model, "logit_bias", None)
    bias = torch.zeros(len(classes)) if shift is None else shift.detach().expand(len(classes))
    return weight.float().contiguous(), bias.float().contiguous()


def list_imagenet_templates() -> list[str]:
    """The 80 texts that CLIP's authors used for ImageNet, with {} for the class name."""
    return [each("{}") for each in _import_open_clip().OPENAI_IMAGENET_TEMPLATES]


def _read_config(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a model, whose only option is `image_size`; BundleError for others."""
    unknown = sorted(set(options) - {_SIZE_OPTION})
    if unknown:
        raise BundleError(
            f"model {OPEN_CLIP_PREFIX}{name}: has no option {unknown[0]!r}; check model.options "
            f"(valid: {_SIZE_OPTION})"
        )
    config: dict[str, Any] = copy.deepcopy(_import_open_clip().get_model_config(name))
    config["vision_cfg"] = {"image_size": 224, **config["vision_cfg"], **options}
    return config


def _import_open_clip() -> ModuleType:
    return import_library("open_clip", OPEN_CLIP_PREFIX, "open-clip")
