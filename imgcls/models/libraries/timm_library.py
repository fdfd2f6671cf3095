"""Networks of timm, if it is installed: by name, with the preprocessing of their weights.

The only module that imports timm.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from imgcls.data.decoding.preprocess import Interpolation, Preprocess, ResizeMode
from imgcls.errors import BundleError, first_line
from imgcls.formatting import suggest_names
from imgcls.models.bundle import Architecture
from imgcls.models.libraries.base import (
    PRETRAINED,
    NetworkLibrary,
    Snapshot,
    import_library,
)

TIMM_PREFIX = "timm:"
_RESIZE_MODES: dict[str, ResizeMode] = {"center": "crop", "squash": "squash", "border": "pad"}


class TimmLibrary(NetworkLibrary):
    """Networks of timm."""

    source = "timm"
    prefix = TIMM_PREFIX

    def check_name(self, name: str) -> None:
        """Raise a BundleError with the nearest names if timm does not have this name."""
        timm = _import_timm()
        known = timm.list_models()
        base, _, tag = name.partition(".")
        if base in known:
            tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
            if tag and tag not in tags:
                raise BundleError(
                    f"model {TIMM_PREFIX}{name}: timm {timm.__version__} has no weights {tag!r} of "
                    f"{base} ({', '.join(tags) or 'none at all'}); omit the tag, or pass one of "
                    "these"
                )
            return
        hint = suggest_names(base, known, "see timm.list_models()", form=f"{TIMM_PREFIX}{{}}")
        raise BundleError(
            f"model {TIMM_PREFIX}{name}: timm {timm.__version__} has no such network; {hint}"
        )

    def build(self, name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
        """Raises BundleError for a network without a classifier."""
        create = _import_timm().create_model
        network: Any = create(name, pretrained=False, num_classes=num_classes, **options)
        if not hasattr(network, "get_classifier"):
            raise BundleError(
                f"model {TIMM_PREFIX}{name}: is an encoder without a classifier, which cannot be "
                "trained; choose another network"
            )
        several = _find_class_layers(network, num_classes)
        if len(several) > 1:
            # a hidden layer may have `num_classes` outputs, too: only heads change with this number
            with torch.device("meta"):
                other = create(name, pretrained=False, num_classes=num_classes + 1, **options)
            network.class_heads = tuple(
                layer
                for layer in several
                if network.get_submodule(layer).weight.shape
                != other.get_submodule(layer).weight.shape
            )
        made: nn.Module = network
        return made

    def get_preprocess(self, architecture: Architecture, weights: str | None) -> Preprocess:
        """That of the default weights."""
        known = _import_timm().get_pretrained_cfg(architecture.name)
        return _resolve_preprocess(architecture.name, known.to_dict() if known is not None else {})

    def list_weights(self, name: str) -> tuple[str, ...]:
        return (PRETRAINED,)

    def load_weights(self, name: str, weights: str) -> dict[str, torch.Tensor] | None:
        if weights not in (PRETRAINED, "timm"):
            return None
        try:
            return dict(_import_timm().create_model(name, pretrained=True).state_dict())
        except Exception as error:
            raise BundleError(
                f"model.weights timm: {name} could not be loaded ({first_line(error)}); pass the "
                "path of a weights file"
            ) from error

    def find_size_option(self, architecture: Architecture, size: int) -> str | None:
        """Networks of a fixed input size take `img_size`, except at the size of their weights."""
        config = _import_timm().get_pretrained_cfg(architecture.name)
        if config is None or not config.fixed_input_size or config.input_size[-1] == size:
            return None
        return "img_size"

    def convert_weights(
        self, network: nn.Module, state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """Convert weights as published by their authors, by timm's own function."""
        module = sys.modules[type(network).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        if convert is None or not module.__name__.startswith("timm."):
            return None
        try:
            return dict(convert(dict(state), network))
        except Exception:  # noqa: BLE001  made for other weights; the caller reports keys that do not match
            return None

    def read_snapshot(self, url: str, config: Mapping[str, Any]) -> Snapshot | None:
        name, arguments = config.get("architecture"), config.get("model_args") or {}
        if not isinstance(name, str):
            return None
        described = config.get("pretrained_cfg")
        # older files have its keys at the top
        described = described if isinstance(described, dict) else config
        return Snapshot(
            url=url,
            source=self.source,
            name=TIMM_PREFIX + name,
            options={key: value for key, value in arguments.items() if key != "num_classes"},
            load_preprocess=partial(_resolve_preprocess, name, described),
        )


def _find_class_layers(network: Any, num_classes: int) -> list[str]:
    """Names of the layers in timm's classifiers with `num_classes` outputs."""
    classifiers = network.get_classifier()
    parts = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    inside = {id(module) for part in parts for module in part.modules()}
    return [
        name
        for name, module in network.named_modules()
        if id(module) in inside
        and isinstance(module, (nn.Linear, nn.Conv2d))
        and len(module.weight) == num_classes
    ]


def _resolve_preprocess(name: str, pretrained: Mapping[str, Any]) -> Preprocess:
    """Preprocessing of weights by timm's description of them.

    Raises a BundleError if `Preprocess` cannot express it.
    """
    _import_timm()
    from timm.data import resolve_data_config

    settings = resolve_data_config({}, pretrained_cfg=dict(pretrained))
    crop = int(settings["input_size"][-1])
    mode = _RESIZE_MODES[settings["crop_mode"]]
    if mode != "crop" and settings["crop_pct"] < 1:
        raise BundleError(
            f"model {TIMM_PREFIX}{name}: its weights require images padded or stretched to "
            f"{int(crop / settings['crop_pct'])} pixels and then cropped to {crop}, which is not "
            "supported; choose another network"
        )
    interpolation: Interpolation = (
        "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
    )
    return Preprocess(
        resize=max(crop, int(crop / settings["crop_pct"])),
        crop=crop,
        interpolation=interpolation,
        mode=mode,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )


def _import_timm() -> ModuleType:
    return import_library("timm", TIMM_PREFIX, "timm")
