"""Final layers for inference: float32 logits, batch-size independent scores, and features.

`HeadNetwork` replaces the final layers of a network once, after it is loaded. Its forward pass
returns (logits, features); no hook is registered per batch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

from imgcls.models import zoo

MIN_ROWS = 4
"""Smallest number of rows that a Linear head multiplies; smaller batches are padded."""


class HeadNetwork(nn.Module):
    """A network that returns its logits together with the input of its final layer.

    network: in eval mode; its final layers are replaced in place. Called alone, it gives the logits
    in_fp32: compute the final layers in float32, for a network of 16-bit floats. Logits rounded to
        bfloat16 tie and flip labels:
        SqueezeNet on 334 ImageNet photographs differs from fp32 in 9 top-1 labels with them and in
        6 without.
    """

    def __init__(self, network: nn.Module, *, in_fp32: bool) -> None:
        super().__init__()
        self.network = network
        self.embedding_width = zoo.get_embedding_width(network)
        last, _ = zoo.find_head(network)
        heads = {
            name: _Head(layer, in_fp32=in_fp32) for name, layer in zoo.find_heads(network).items()
        }
        for name, head in heads.items():
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, head)
        self._last = heads[last]

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C) logits and (N, E) features, averaged over space where they have any."""
        with self._last.keep_input() as kept:
            logits = self.network(inputs)
        features = kept[-1]
        return logits, features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


class _Head(nn.Module):
    """A final layer: a Linear, or SqueezeNet's 1x1 convolution."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, in_fp32: bool) -> None:
        super().__init__()
        self._is_linear = isinstance(layer, nn.Linear)
        self._in_fp32 = in_fp32
        # a Linear costs nothing in fp32; a convolution keeps its bf16 products, and the average of
        # its outputs over space is computed in fp32
        self.layer = layer.float() if in_fp32 and self._is_linear else layer
        self._kept: dict[int, list[torch.Tensor]] = {}

    @contextlib.contextmanager
    def keep_input(self) -> Iterator[list[torch.Tensor]]:
        """Collect the inputs of this thread's calls; other threads may run the same network."""
        kept = self._kept[threading.get_ident()] = []
        try:
            yield kept
        finally:
            del self._kept[threading.get_ident()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_linear and self._in_fp32:
            x = x.float()
        if not torch.compiler.is_compiling() and threading.get_ident() in self._kept:
            self._kept[threading.get_ident()].append(x)
        output: torch.Tensor = self._multiply_padded(x) if self._is_linear else self.layer(x)
        return output.float() if self._in_fp32 else output

    def _multiply_padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Linear layer over at least `MIN_ROWS` rows, the last ones of zeros.

        Three rows or fewer take another path through the matrix product, with another order of
        summation: the last bit of an image's scores would depend on the size of its batch. The
        padding ends here, so that the outputs of several heads can be added.
        """
        if rows.dim() != 2 or len(rows) >= MIN_ROWS:
            logits: torch.Tensor = self.layer(rows)
            return logits
        logits = self.layer(nn.functional.pad(rows, (0, 0, 0, MIN_ROWS - len(rows))))
        return logits[: len(rows)]
