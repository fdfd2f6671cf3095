"""Image classifiers and encoders of transformers, if it is installed.

The only module that imports transformers. A network is built from the configuration of its
repository, which the bundle keeps as the options of the architecture.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from imgcls.data.decoding.preprocess import Interpolation, Preprocess, ResizeMode
from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, StorageError, one_line, request_error
from imgcls.models.bundle import Architecture
from imgcls.models.libraries.base import NetworkLibrary, Snapshot, import_library

TRANSFORMERS_PREFIX = "transformers:"
PREPROCESSOR_FILE = "preprocessor_config.json"
_UNUSED_KEYS = (
    *("model_type", "architectures", "transformers_version", "text_config"),
    *("num_labels", "id2label", "label2id", "dtype", "torch_dtype"),
)
"""Of a configuration, which the network does not depend on, or `num_classes` sets."""
_CODE_KEYS = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config")
"""Of a configuration, which can name code in a repository, and others by an underscore."""
_FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers, which the preprocessing of transformers uses."""
_PROCESSORS = (
    *("ViTImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"),
    *("ConvNextImageProcessor", "DINOv3ViTImageProcessor", "BeitImageProcessor"),
)
"""Image processors that resize, crop and normalize. Others also flip the channels (MobileViT),
normalize twice (EfficientNet) or resize to another size than they name (LeViT)."""
_SQUASH_FROM = 384
"""ConvNeXt's preprocessing does not crop from this size, in pixels."""


class TransformersLibrary(NetworkLibrary):
    """Networks of transformers; the name is the `model_type` of their configuration."""

    source = "transformers"
    prefix = TRANSFORMERS_PREFIX
    has_parts = True

    def check_name(self, name: str) -> None:
        """Raise a BundleError for a type that transformers does not have."""
        transformers = _import_transformers()
        if name not in transformers.CONFIG_MAPPING:
            raise BundleError(
                f"model {self.prefix}{name}: transformers {transformers.__version__} has no such "
                "model type; pass hf://OWNER/NAME, or the model_type of a config.json"
            )

    def build(self, name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
        """Raises BundleError for a network that does not take images of (N, 3, H, W)."""
        config = _build_config(name, options)
        config.num_labels = num_classes
        return TransformersNetwork(config, num_classes)

    def get_preprocess(self, architecture: Architecture, weights: str | None) -> Preprocess:
        """That of the type's image processor, for the input size of the configuration."""
        _import_transformers()
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

        place = f"model {self.prefix}{architecture.name}"
        names = IMAGE_PROCESSOR_MAPPING_NAMES.get(architecture.name, {})
        processor = _find_processor(names.get("torchvision", ""))
        if processor is None:
            raise BundleError(
                f"{place}: its preprocessing is not known; pass the folder of the weights, with "
                f"its {PREPROCESSOR_FILE}"
            )
        preprocess = _convert_processor(place, processor())
        config = _build_config(architecture.name, architecture.options)
        size = getattr(getattr(config, "vision_config", config), "image_size", None)
        if not isinstance(size, int) or size == preprocess.crop:
            return preprocess
        ratio = preprocess.resize / preprocess.crop
        return preprocess.model_copy(update={"crop": size, "resize": round(size * ratio)})

    def convert_weights(
        self, network: nn.Module, state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """Convert the weights of any model with this network, by transformers' own loader."""
        if not isinstance(network, TransformersNetwork):
            return None
        return network.convert_weights(state)

    def read_snapshot(self, url: str, config: Mapping[str, Any]) -> Snapshot | None:
        kind = config.get("model_type")
        if not isinstance(kind, str):
            return None
        return Snapshot(
            url=url,
            source=self.source,
            name=TRANSFORMERS_PREFIX + kind,
            options={
                key: value for key, value in _remove_code(config).items() if key not in _UNUSED_KEYS
            },
            load_preprocess=partial(_read_preprocess, url),
        )


class TransformersNetwork(nn.Module):
    """A network of transformers that returns logits.

    Types with an image classifier have its pooling and head; for others, a linear layer on their
    `pooler_output` is added. Position embeddings are interpolated for images of another size.
    """

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()
        transformers = _import_transformers()
        self.classifier: nn.Linear | None = None
        if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            self.model = transformers.AutoModelForImageClassification.from_config(
                config, trust_remote_code=False
            )
        else:
            config = getattr(config, "vision_config", config)
            self.model = transformers.AutoModel.from_config(config, trust_remote_code=False)
            self.classifier = nn.Linear(_get_width(config), num_classes)
        parameters = inspect.signature(self.model.forward).parameters
        if "pixel_values" not in parameters or "pixel_attention_mask" in parameters:
            raise BundleError(
                f"model {TRANSFORMERS_PREFIX}{config.model_type}: does not take a batch of images "
                "as (N, 3, height, width); choose another network"
            )
        self._interpolates = "interpolate_pos_encoding" in parameters
        size = getattr(getattr(config, "vision_config", config), "image_size", None)
        self._image_size = size if isinstance(size, int) else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        options = {}
        if self._interpolates and images.shape[-1] != self._image_size:
            options["interpolate_pos_encoding"] = True
        output = self.model(pixel_values=images, **options)
        logits: torch.Tensor
        if self.classifier is None:
            logits = output.logits
        else:
            logits = self.classifier(output.pooler_output.flatten(1))
        return logits

    def convert_weights(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint that belong to this network, by its names."""
        with _silence():
            loaded, info = type(self.model).from_pretrained(
                None,
                config=self.model.config,
                state_dict=dict(state),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        resized = [key for key, *_ in info["mismatched_keys"]]
        absent = {*info["missing_keys"], *resized}
        found = {key: value for key, value in loaded.state_dict().items() if key not in absent}
        found.update({key: state[key] for key in resized if key in state})
        return {f"model.{key}": value for key, value in found.items()}


def _remove_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration without those that make transformers load code."""
    return {
        key: _remove_code(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in _CODE_KEYS and not key.startswith("_")
    }


def _build_config(name: str, options: Mapping[str, Any]) -> Any:
    """The configuration of a type; raises BundleError for options that it does not take."""
    transformers = _import_transformers()
    try:
        with _silence():
            return transformers.AutoConfig.for_model(name, **_remove_code(options))
    except Exception as error:
        raise BundleError(
            f"model {TRANSFORMERS_PREFIX}{name}: {one_line(error)}; check model.options"
        ) from error


def _get_width(config: Any) -> int:
    """Length of `pooler_output`."""
    width: int | None = getattr(config, "hidden_size", None)
    return config.hidden_sizes[-1] if width is None else width


def _find_processor(name: str) -> Any:
    """The class of an image processor, also by its names in older versions; None if unknown."""
    name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    transformers = _import_transformers()
    return getattr(transformers, name, None) if name.endswith("ImageProcessor") else None


def _read_preprocess(url: str) -> Preprocess:
    """Preprocessing of a folder with weights of transformers. Raises BundleError."""
    place = filesystem.join(url, PREPROCESSOR_FILE)
    try:
        settings = json.loads(filesystem.read(place))
    except (StorageError, ValueError) as error:
        raise request_error(
            BundleError, f"model {url}: {error}; the preprocessing of the weights is there", error
        ) from error
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    found = _find_processor(kind)
    if found is None:
        raise BundleError(
            f"model {place}: its type {kind!r} is no image processor of transformers; choose "
            "another network"
        )
    return _convert_processor(f"model {place}", found.from_dict(settings))


def _convert_processor(place: str, processor: Any) -> Preprocess:
    """An image processor as `Preprocess`, which resizes by Pillow's filters.

    Raises BundleError if it does something else.
    """
    name = type(processor).__name__
    if name not in _PROCESSORS:
        raise BundleError(
            f"{place}: the preprocessing of {name} is not supported; choose a network with one of "
            f"{', '.join(_PROCESSORS)}"
        )
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    shortest, height = size.get("shortest_edge"), size.get("height")
    share = getattr(processor, "crop_pct", None)
    mode: ResizeMode = "crop"
    resize: int | None
    target: int | None
    if share is not None and shortest is not None:  # ConvNeXt
        resize, target = (int(shortest / share), shortest)
        if shortest >= _SQUASH_FROM:
            mode, resize = "squash", shortest
    elif processor.do_center_crop and shortest is not None:
        resize, target = shortest, crop.get("height")
    else:
        mode, resize = "squash", height
        target = crop.get("height") if processor.do_center_crop else height
    scale = processor.rescale_factor if processor.do_rescale else None
    is_square = size.get("width") == height and crop.get("width") == crop.get("height")
    if (
        not processor.do_resize
        or resize is None
        or target is None
        or not is_square
        or resize < target
        or (mode == "squash" and resize != target)
        or scale is None
        or abs(255 * scale - 1) > 1e-3
        or int(processor.resample) not in _FILTERS
    ):
        raise BundleError(
            f"{place}: its preprocessing (size {size}, crop {crop}, rescale factor {scale}, filter "
            f"{processor.resample}) is not supported; choose another network"
        )
    normalizes = processor.do_normalize
    return Preprocess(
        resize=resize,
        crop=target,
        interpolation=_FILTERS[int(processor.resample)],
        mode=mode,
        mean=tuple(processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalizes else (1.0, 1.0, 1.0),
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without transformers' own progress bars and reports: the zoo reports keys that differ."""
    logging = _import_transformers().utils.logging
    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _import_transformers() -> ModuleType:
    return import_library("transformers", TRANSFORMERS_PREFIX, "transformers")
