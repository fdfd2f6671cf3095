"""Normalization of uint8 pixels on the device of the network."""

from __future__ import annotations

import torch

from imgcls.data.cuda import PinnedUploader
from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.preprocess import Preprocess


class Normalizer:
    """(x / 255 - mean) / std as one multiply and one add, on one device."""

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        self._device = device
        std = torch.tensor(preprocess.std, device=device)
        mean = torch.tensor(preprocess.mean, device=device)
        self._scale = 1 / (255 * std)
        self._shift = -mean / std
        self._uploads = PinnedUploader(device) if device.type == "cuda" else None

    def upload(self, batch: Pixels | torch.Tensor) -> torch.Tensor:
        """Copy (N, 3, H, W) uint8, an array or a tensor on any device, to this device."""
        pixels = batch if isinstance(batch, torch.Tensor) else torch.from_numpy(batch)
        if self._uploads is None or pixels.device.type != "cpu":
            return pixels.to(self._device)
        return self._uploads(pixels)

    def __call__(self, batch: Pixels | torch.Tensor) -> torch.Tensor:
        """Normalize (N, 3, H, W) uint8 to float32 on this device, channels last."""
        inputs = self.upload(batch).contiguous(memory_format=torch.channels_last)
        count, channels, height, width = inputs.shape
        # one row of pixels at a time: three channels alone cannot be vectorized
        rows = inputs.permute(0, 2, 3, 1).reshape(count * height, width * channels)
        scale, shift = self._scale.repeat(width), self._shift.repeat(width)
        normalized = torch.addcmul(shift, rows.to(torch.float32), scale)
        return normalized.view(count, height, width, channels).permute(0, 3, 1, 2)
