"""Interface of a library of networks, and its networks in folders."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import BundleError
from imgcls.models.bundle import Architecture, NetworkSource

PRETRAINED = "pretrained"
"""Name of the weights that a library has for a network."""


@dataclass(frozen=True)
class Snapshot:
    """A network in a folder, with its weights.

    url:             of the folder
    source:          of the network's library
    name:            of the architecture, as `model.name` takes it
    options:         arguments of its constructor, without the number of classes
    load_preprocess: gives the preprocessing of the weights; raises BundleError
    """

    url: str
    source: NetworkSource
    name: str
    options: Mapping[str, Any]
    load_preprocess: Callable[[], Preprocess]


class NetworkLibrary(ABC):
    """Networks of one package, by name. A new library is a subclass and a line in `registry`.

    source:    its name in `bundle.json`
    prefix:    of its names in `model.name`; "" for names without one
    has_parts: whether its checkpoints have other parts, such as text towers, which
               `convert_weights` leaves out
    """

    source: NetworkSource
    prefix: str = ""
    has_parts: bool = False

    def list_names(self) -> list[str]:
        """The names that `imgcls model list` shows."""
        return []

    @abstractmethod
    def check_name(self, name: str) -> None:
        """Raise BundleError for an unknown name, without the prefix."""

    @abstractmethod
    def build(self, name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
        """A network of (N, 3, H, W) float32 images with (N, num_classes) logits, random weights.

        Raises BundleError, or the package's own error for a wrong option.
        """

    @abstractmethod
    def get_preprocess(self, architecture: Architecture, weights: str | None) -> Preprocess:
        """Preprocessing of weights that are not in a folder with their own."""

    def list_weights(self, name: str) -> tuple[str, ...]:
        """Names of the weights that the package has for a network."""
        return ()

    def load_weights(self, name: str, weights: str) -> dict[str, torch.Tensor] | None:
        """State dict of weights by name, downloaded if not cached; None for any other name.

        Raises BundleError if they cannot be loaded.
        """
        return None

    def adapt_for_training(self, architecture: Architecture) -> Architecture:
        """Set the options that training requires."""
        return architecture

    def get_pretrained_options(
        self, architecture: Architecture, weights: str | None
    ) -> dict[str, Any]:
        """Options that the pretrained weights require."""
        return {}

    def find_size_option(self, architecture: Architecture, size: int) -> str | None:
        """The option for the input size; None if the network does not have to know it."""
        return None

    def convert_weights(
        self, network: nn.Module, state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """Weights in another form, or for another input size, by the names of `network`.

        None for a network of another library, or if there is no conversion.
        """
        return None

    def read_snapshot(self, url: str, config: Mapping[str, Any]) -> Snapshot | None:
        """The network of a folder with this `config.json`; None if another library wrote it."""
        return None


def import_library(package: str, prefix: str, extra: str) -> ModuleType:
    """Import the package of a library; raises BundleError with the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BundleError(
            f"model {prefix}...: requires {package}; run: pip install 'imgcls[{extra}]'"
        ) from error
