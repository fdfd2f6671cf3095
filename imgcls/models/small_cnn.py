"""Small convolutional network for small images; trains from scratch in a minute on a CPU."""

from __future__ import annotations

import itertools

import torch
from torch import nn


class SmallCNN(nn.Module):
    """Three convolutional stages (batch norm, ReLU, pooling, dropout) and a fully connected head.

    Input (N, 3, H, W) with H and W at least 8; output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        self.features = nn.Sequential(
            *(self._build_stage(a, b, dropout) for a, b in itertools.pairwise(channels))
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(4 * channels[-1], 4 * width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4 * width, num_classes),
        )

    @staticmethod
    def _build_stage(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Dropout2d(dropout / 2),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.pool(self.features(images)))
        return logits
