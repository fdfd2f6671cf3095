"""Class activation maps (Grad-CAM): image regions that contribute to the score of a class.

Computed in float32 by plain PyTorch from the weights of a bundle, whatever engine and precision
predict with. Nothing here runs unless an explanation is requested.

Source of the formula: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization, ICCV 2017, section 3, equations 1 and 2.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from imgcls.data.decoding.decode import Pixels
from imgcls.errors import NotExplainable
from imgcls.models.bundle import Bundle, check_has_classes
from imgcls.models.normalize import Normalizer
from imgcls.models.target_layer import TargetLayer, find_target_layer
from imgcls.models.torch_engine import load_plain_network

ClassMaps = npt.NDArray[np.float32]


class Explainer:
    """Computes class activation maps of the network of a bundle; may be used by several threads.

    Parameters
    ----------
    bundle
        The bundle. Its weights are loaded a second time, in float32.
    device
        Where the network runs.

    Raises
    ------
    BundleError
        If the bundle has no classes, or its weights are missing or do not fit.
    NotExplainable
        If its network has no feature map over the image.

    Examples
    --------
    >>> from imgcls.models.bundle import load_bundle
    >>> from imgcls.models.explain import Explainer
    >>> explainer = Explainer(load_bundle("demo/bundle"))  # doctest: +SKIP
    >>> explainer.compute_class_maps(batch, [3]).shape  # doctest: +SKIP
    (1, 32, 32)
    """

    def __init__(self, bundle: Bundle, device: torch.device | str = "cpu") -> None:
        check_has_classes(bundle)
        self.classes = bundle.spec.classes
        self.preprocess = bundle.spec.preprocess
        self._lock = threading.Lock()
        try:
            # tensors that are made in inference mode can have no gradients
            with torch.inference_mode(False):
                self._network = load_plain_network(bundle).to(device).requires_grad_(False)
                self._normalize = Normalizer(self.preprocess, torch.device(device))
                self._target = find_target_layer(self._network, self.preprocess.crop)
        except NotExplainable as error:
            raise NotExplainable(f"bundle {bundle.url}: {error}") from error

    def compute_class_maps(
        self, batch: Pixels | torch.Tensor, classes: Sequence[int] | None = None
    ) -> ClassMaps:
        """Map of one class for each image of a batch.

        Parameters
        ----------
        batch
            (N, 3, crop, crop) uint8 RGB.
        classes
            (N,) class indices. Default: the class with the highest logit.

        Returns
        -------
        ndarray of float32, shape (N, crop, crop)
            0 to 1; all 0 where no region of the image increases the score of the class.
        """
        # the hook on the network belongs to one call
        with self._lock, torch.inference_mode(False):
            inputs = self._normalize(batch)
            return compute_class_maps(self._network, self._target, inputs, classes)


def compute_class_maps(
    network: nn.Module,
    target: TargetLayer,
    inputs: torch.Tensor,
    classes: Sequence[int] | None = None,
) -> ClassMaps:
    """Grad-CAM of one class for each image, at the size of the input.

    network: in eval mode, in float32
    target:  as `find_target_layer` returns it
    inputs:  (N, 3, H, W) float32, normalized
    classes: (N,) class indices; None for the class with the highest logit
    The weight of a channel is the mean over space of the gradient of the class's logit; the map is
    the positive part of the weighted sum of the channels. It is scaled to 0 to 1 before and after
    it is resized bilinearly.
    Returns (N, H, W) float32 in [0, 1]; all 0 if no region increases the score of the class.
    """
    with torch.enable_grad(), target.keep_output(network) as kept:
        logits = network(inputs)
        wanted = logits.argmax(1) if classes is None else torch.tensor(classes).to(logits.device)
        chosen = logits.gather(1, wanted[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, kept[0])
    channels, slopes = target.to_map(kept[0].detach()), target.to_map(gradient)
    weights = slopes.mean((2, 3), keepdim=True)
    maps = F.relu((weights * channels).sum(1, keepdim=True))
    resized = F.interpolate(_rescale(maps), inputs.shape[-2:], mode="bilinear", align_corners=False)
    found: ClassMaps = _rescale(resized)[:, 0].float().cpu().numpy()
    return found


def _rescale(maps: torch.Tensor) -> torch.Tensor:
    """(N, 1, h, w) with the minimum of each image at 0 and its maximum at 1."""
    shifted = maps - maps.amin((2, 3), keepdim=True)
    largest = shifted.amax((2, 3), keepdim=True)
    return shifted / largest.where(largest > 0, 1)
