"""Configuration of `imgcls export` and of `imgcls model import`, `zero-shot` and `list`.

It is checked without torch and Ray, so that a wrong key is refused at once.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, PositiveInt

from imgcls.config import Section, names
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.models.bundle import TaskName

ExportFormat = Literal["onnx", "program", "torchscript"]


class ExportConfig(Section):
    """Write a bundle as files that run without imgcls."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """Bundle to export."""
    output: str
    """Folder to write."""
    formats: Annotated[list[ExportFormat], BeforeValidator(names)] = ["onnx"]
    """onnx: ONNX Runtime and others. program: torch.export. torchscript: older PyTorch."""
    images: ManifestConfig | None = None
    """Images for the comparison of scores (default: synthetic images)."""
    max_images: PositiveInt = 64
    """Maximum number of images for the comparison, from the start of the manifest."""
    overwrite: bool = False
    """Replace an existing export."""
    storage: StorageConfig = StorageConfig()


class ImportConfig(Section):
    """Make a bundle from a weights file and a list of classes, or of a backbone."""

    arch: str
    """Architecture, e.g. squeezenet1_0 (`imgcls model list`), timm:NAME, open_clip:NAME, or a
    folder or hf://OWNER/NAME of timm or transformers."""
    weights: str
    """State dict, .pth or .safetensors (path or URL), pretrained, or e.g. IMAGENET1K_V1."""
    output: str
    """Bundle folder to write."""
    classes: str | None = None
    """Text file with one class name per line, in the order of the network's outputs. Default: none,
    the bundle is a backbone for `imgcls embed`."""
    task: TaskName = "single_label"
    """single_label: exactly one class per image (softmax). multilabel: any number of classes
    (sigmoid), each with a score of at least 0.5."""
    options: dict[str, Any] = {}
    """Keyword arguments of the architecture's constructor."""
    resize: PositiveInt | None = None
    """Length of the shorter side after resizing, in pixels (default: of the architecture)."""
    crop: PositiveInt | None = None
    """Side of the model's square input, in pixels (default: of the architecture)."""
    decode: DecodeMode = "exact"
    """exact: decode JPEGs at full size. fast: decode large JPEGs at 1/2, 1/4 or 1/8."""
    overwrite: bool = False
    """Replace an existing bundle."""
    storage: StorageConfig = StorageConfig()


class ZeroShotConfig(Section):
    """Make a classifier from the names of its classes, with a model of open_clip."""

    arch: str
    """Model of open_clip with its text tower, e.g. open_clip:ViT-B-32."""
    weights: str
    """State dict of both towers, .pth or .safetensors (path or URL), or e.g. laion2b_s34b_b79k."""
    classes: Annotated[list[str], BeforeValidator(names)]
    """Class names, separated by commas; or one text file (*.txt) with a name per line."""
    templates: str = "imagenet"
    """Texts in which {} stands for the class: imagenet (80 texts), or a file with one per line."""
    output: str
    """Bundle folder to write."""
    decode: DecodeMode = "exact"
    """exact: decode JPEGs at full size. fast: decode large JPEGs at 1/2, 1/4 or 1/8."""
    overwrite: bool = False
    """Replace an existing bundle."""
    storage: StorageConfig = StorageConfig()


class ListModelsConfig(Section):
    """List the architectures."""

    contains: str = ""
    """Substring that the names must contain (default: list all)."""
