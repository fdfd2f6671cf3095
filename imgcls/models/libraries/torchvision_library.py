"""Classifiers of torchvision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.data.decoding.preprocess import Interpolation, Preprocess
from imgcls.errors import BundleError
from imgcls.models.bundle import Architecture
from imgcls.models.libraries.base import PRETRAINED, NetworkLibrary

_DEFAULT = (PRETRAINED, "torchvision")
"""Names of the default weights of a network."""


class TorchvisionLibrary(NetworkLibrary):
    """Classifiers of torchvision, whose names have no prefix."""

    source = "torchvision"

    def list_names(self) -> list[str]:
        return list(torchvision.models.list_models(module=torchvision.models))

    def check_name(self, name: str) -> None:
        """Names without a prefix are checked by the zoo."""

    def build(self, name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
        given = dict(options)
        if name in ("inception_v3", "googlenet"):
            given.setdefault("init_weights", True)
        head_relu = given.pop("head_relu", True) if _is_squeezenet(name) else True
        network: Any = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, **given
        )
        if not head_relu:
            network.classifier[2] = nn.Identity()
        built: nn.Module = network
        return built

    def get_preprocess(self, architecture: Architecture, weights: str | None) -> Preprocess:
        """That of these weights; for another file, of the first weights of the network."""
        known = torchvision.models.get_model_weights(architecture.name)
        name = "DEFAULT" if weights in _DEFAULT else weights
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

    def list_weights(self, name: str) -> tuple[str, ...]:
        return (PRETRAINED, *torchvision.models.get_model_weights(name).__members__)

    def load_weights(self, name: str, weights: str) -> dict[str, torch.Tensor] | None:
        known = torchvision.models.get_model_weights(name)
        if weights not in _DEFAULT and weights not in known.__members__:
            return None
        member = known.DEFAULT if weights in _DEFAULT else known[weights]
        try:
            return dict(member.get_state_dict(progress=False, check_hash=True))
        except Exception as error:
            raise BundleError(
                f"model.weights {weights}: torchvision could not download them ({error}); pass the "
                "path of a weights file"
            ) from error

    def adapt_for_training(self, architecture: Architecture) -> Architecture:
        """Remove the ReLU after SqueezeNet's head, unless the option `head_relu` is set.

        With it, a class whose logit is below 0 for all images has no gradient, and a linear probe
        is not possible.
        """
        if not _is_squeezenet(architecture.name):
            return architecture
        options = {"head_relu": False, **architecture.options}
        return architecture.model_copy(update={"options": options})

    def get_pretrained_options(
        self, architecture: Architecture, weights: str | None
    ) -> dict[str, Any]:
        if architecture.name in ("inception_v3", "googlenet"):
            return {"transform_input": True, "aux_logits": True}
        if architecture.name.startswith("vit_"):
            return {"image_size": self.get_preprocess(architecture, weights).crop}
        return {}

    def find_size_option(self, architecture: Architecture, size: int) -> str | None:
        return "image_size" if architecture.name.startswith("vit_") else None

    def convert_weights(
        self, network: nn.Module, state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """Interpolate the position embeddings of a vision transformer, as torchvision does."""
        from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

        if not isinstance(network, VisionTransformer):
            return None
        kept = OrderedDict(state)
        try:
            return dict(interpolate_embeddings(network.image_size, network.patch_size, kept))
        except ValueError:
            return None


def _is_squeezenet(name: str) -> bool:
    return name.startswith("squeezenet")
