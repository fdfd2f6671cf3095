"""uint8 pixels to a network's input, on the device: the one place where pixels are normalised."""

from __future__ import annotations

import torch

from imgcls.data.images import Pixels
from imgcls.data.preprocess import Preprocess


class Normalise:
    """(x / 255 - mean) / std as one multiply and one add, on one device."""

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        self._device = device
        std = torch.tensor(preprocess.std, device=device)
        mean = torch.tensor(preprocess.mean, device=device)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1)
        self._shift = (-mean / std).view(1, 3, 1, 1)

    def __call__(self, batch: Pixels | torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8, a tensor on any device, to float32 on this one, channels last."""
        inputs = batch if isinstance(batch, torch.Tensor) else torch.from_numpy(batch)
        if self._device.type == "cuda" and inputs.device.type == "cpu":
            inputs = inputs.pin_memory().to(self._device, non_blocking=True)
        inputs = inputs.to(memory_format=torch.channels_last).to(torch.float32)
        return torch.addcmul(self._shift, inputs, self._scale)
