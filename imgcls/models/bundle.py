"""Bundle: folder with weights, classes, preprocessing, temperature and threshold, checked by hash.

Loading runs no code (safetensors and JSON). A bundle with any changed byte is rejected.
`bundle.json` is written last. Reading the description needs no torch; only the weights do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, FiniteFloat, ValidationError, field_validator, model_validator

from imgcls.config import Section, UnitFloat
from imgcls.data.decoding.preprocess import DecodeMode, Preprocess
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.errors import BundleError, OutputError, RequestError, StorageError, request_error
from imgcls.models.acceptance import NEVER_ACCEPT, AcceptanceThreshold
from imgcls.models.bundle_card import render_minimal_card
from imgcls.models.finite import check_finite_safetensors
from imgcls.models.label_sets import LabelSets
from imgcls.models.ood import OodDetector, OodSpec

if TYPE_CHECKING:
    import torch

    from imgcls.models.mlflow_registry import RegisteredModel

TaskName = Literal["single_label", "multilabel"]
FORMAT_VERSIONS: dict[TaskName, Literal[1, 2]] = {"single_label": 1, "multilabel": 2}
"""Format version of the bundles of each task; versions of imgcls without multilabel refuse 2."""
BUNDLE_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
INT8_FILE = "int8.openvino.zip"
"""The network as OpenVINO's XML and weights, if it is quantized for this engine."""
OOD_FILE = "ood.safetensors"
"""Arrays of the out-of-distribution detector, if the bundle has one."""
MODEL_CARD_FILE = "README.md"
REGISTRY_PREFIX = "models:/"
"""Start of the URI of a bundle in the MLflow model registry; see `mlflow_registry`."""

NetworkSource = Literal["torchvision", "timm", "imgcls", "transformers", "open_clip"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
EngineName = Literal["auto", "torch", "openvino"]


class Architecture(Section):
    """Architecture of a network, without its weights."""

    source: NetworkSource = "torchvision"
    """Library that defines the network."""
    name: str
    """Name in this library, e.g. resnet18, inception_v3, vit_b_16, small_cnn."""
    options: dict[str, Any] = {}
    """Keyword arguments of the constructor."""


class VectorScaling(Section):
    """Vector scaling: log score of each class times its scale plus its bias."""

    scale: list[FiniteFloat]
    bias: list[FiniteFloat]


class Int8Calibration(Section):
    """Data for int8 in one engine, and its measured accuracy."""

    engine: Literal["torch", "openvino"] = "torch"
    """Engine that the network is quantized for."""
    model_sha256: str | None = None
    """Hash of the file with the quantized network, for openvino."""
    has_vnni: bool = True
    """Whether the accuracy was measured on a CPU with VNNI or AMX, where no sum overflows."""
    ranges: dict[str, dict[str, tuple[FiniteFloat, FiniteFloat]]]
    """(minimum, maximum) of the tensors at each convolution, for torch; see `models.int8`."""
    calibration_images: int
    """Number of images that the ranges were measured on."""
    judged_images: int
    """Number of other images, for the accuracy."""
    agreement: UnitFloat | None = None
    """Fraction of these with the same predicted label as in fp32; for multilabel, with exactly the
    same predicted labels. None where the bundle was calibrated since and decides otherwise."""
    accuracy: UnitFloat | None = None
    """Accuracy in int8 on the labeled ones; for multilabel, the fraction of the known classes of
    all images that the thresholds decide correctly."""
    accuracy_fp32: UnitFloat | None = None
    """Accuracy in fp32 on the same images."""

    def describe_cost(self, accuracy: str = "accuracy") -> str:
        """Text about the accuracy in int8.

        accuracy: what the accuracy is called
        """
        if self.agreement is None:
            return (
                "its accuracy is not known since `imgcls calibrate` changed the decisions; run "
                "`imgcls evaluate --precision int8` to measure it"
            )
        text = f"{self.agreement:.1%} of {self.judged_images:,} images labeled as in fp32"
        if self.accuracy is not None and self.accuracy_fp32 is not None:
            text += f"; {accuracy} {self.accuracy:.1%}, in fp32 {self.accuracy_fp32:.1%}"
        return text


class BundleSpec(Section):
    """Content of `bundle.json`."""

    format_version: Literal[1, 2] = 1
    task: TaskName = "single_label"
    """multilabel: any number of classes per image; not written for single_label."""
    architecture: Architecture
    classes: list[str]
    """Class names in the order of the outputs; none for a backbone."""
    preprocess: Preprocess
    temperature: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    """Divisor of the logits before the softmax, or the sigmoid of multilabel."""
    vector_scaling: VectorScaling | None = None
    """Vector scaling of the log-softmax, followed by another softmax; of the logits for multilabel.
    Default: none."""
    threshold: AcceptanceThreshold = 0.0
    """Minimum confidence to accept a prediction; 2 accepts none. For multilabel, minimum score of
    each predicted label."""
    thresholds: dict[str, AcceptanceThreshold] = {}
    """Thresholds of single predicted classes, instead of `threshold`."""
    label_sets: LabelSets | None = None
    """Conformal label sets, written by `imgcls calibrate --coverage`."""
    ood: OodSpec | None = None
    """Out-of-distribution detector, written by `imgcls calibrate --max-ood-rate`."""
    int8: Int8Calibration | None = None
    """Data for `precision int8`, written by `imgcls model quantize`."""
    provenance: dict[str, Any] = {}
    metrics: dict[str, float] = {}

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: list[str]) -> list[str]:
        if len(set(classes)) < len(classes):
            doubled = min(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"class {doubled!r} is listed twice; remove one of the two")
        return classes

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.format_version != FORMAT_VERSIONS[self.task]:
            raise ValueError(f"format_version {self.format_version} is not that of {self.task}")
        if self.task == "multilabel" and self.label_sets is not None:
            raise ValueError("label_sets: are for one label per image, not for multilabel")
        return self

    @model_validator(mode="after")
    def _check_per_class(self) -> Self:
        unknown = sorted(set(self.thresholds) - set(self.classes))
        if unknown:
            raise ValueError(f"thresholds: {unknown[0]!r} is not a class")
        scaling = self.vector_scaling
        sizes = {len(scaling.scale), len(scaling.bias)} if scaling is not None else set()
        if sizes - {len(self.classes)}:
            raise ValueError("vector_scaling: one scale and one bias per class required")
        sets = self.label_sets
        if sets is not None and len(sets.thresholds) not in {1, len(self.classes)}:
            raise ValueError("label_sets: one threshold for all classes, or one per class required")
        return self

    @property
    def num_outputs(self) -> int:
        """Outputs of the network. That of a backbone has one, which is always 0."""
        return max(1, len(self.classes))

    def resolve_thresholds(self, threshold: float | None = None) -> list[float]:
        """Threshold of each predicted class, in class order.

        threshold: overrides all thresholds of the bundle
        """
        if threshold is not None:
            return [threshold] * len(self.classes)
        return [self.thresholds.get(name, self.threshold) for name in self.classes]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Parameters
    ----------
    url
        Path or URL of the folder.
    spec
        Its description.
    weights_sha256
        Hex digest of the weights.
    sha256
        Hex digest of the description, which includes that of the weights: it identifies the model.
    """

    url: str
    spec: BundleSpec
    weights_sha256: str
    sha256: str
    storage: StorageConfig = field(default_factory=current_settings, compare=False, repr=False)
    """Storage settings that the bundle was loaded with; its weights are read with them."""
    registered: RegisteredModel | None = field(default=None, compare=False, repr=False)
    """Version in the model registry that the bundle was found by; `url` is its folder."""
    unsaved_int8: bytes | None = field(default=None, compare=False, repr=False)
    """Content of `INT8_FILE` of a bundle that is not written yet."""

    def with_decode(self, decode: DecodeMode | None) -> Bundle:
        """The same bundle with another decode route for JPEGs; unchanged for None."""
        if decode is None:
            return self
        if decode not in get_args(DecodeMode):
            raise RequestError(
                f"decode: {decode!r} is not one of {', '.join(get_args(DecodeMode))}"
            )
        preprocess = self.spec.preprocess.model_copy(update={"decode": decode})
        return replace(self, spec=self.spec.model_copy(update={"preprocess": preprocess}))


def is_registry_uri(url: str) -> bool:
    """Whether a bundle is named by its version or alias in the MLflow model registry."""
    return url.startswith(REGISTRY_PREFIX)


def check_bundle_output(url: str, *, overwrite: bool, source: str | None = None) -> None:
    """Check that writing a bundle would not replace one that may be in use.

    source: URL of the bundle that the new one is made from
    Raises RequestError if this is the output itself, OutputError if a bundle exists there.
    """
    if source and filesystem.is_same(url, source):
        raise RequestError(
            "output: is the input bundle, which may be in use; pass another --output"
        )
    if filesystem.exists(filesystem.join(url, BUNDLE_FILE)) and not overwrite:
        raise OutputError(f"output {url}: already has a bundle; pass --overwrite to replace it")


def load_bundle(
    url: str | os.PathLike[str],
    *,
    storage: StorageConfig | Mapping[str, Any] | None = None,
    needs_classes: bool = True,
) -> Bundle:
    """Load a bundle and verify every byte of its description and weights.

    Parameters
    ----------
    url
        Path or URL of the bundle folder, or `models:/NAME/VERSION` or `models:/NAME@ALIAS` in the
        MLflow model registry.
    storage
        Storage settings of the bundle, e.g. `{"endpoint_url": "http://localhost:9000"}`.
    needs_classes
        Refuse the bundle of a backbone, which has no classes.

    Returns
    -------
    Bundle
        The description; `Classifier` loads the weights.

    Raises
    ------
    BundleError
        If a file is missing or damaged, the format is unknown, or a tensor has NaN or infinity.
    """
    with use_settings(storage):
        bundle = read_description(os.fspath(url))
        if needs_classes:
            check_has_classes(bundle)
        read_verified_weights(bundle)
        load_int8_model(bundle)
        load_ood_detector(bundle)
    return bundle


def check_has_classes(bundle: Bundle) -> None:
    """Raise BundleError for the bundle of a backbone."""
    if not bundle.spec.classes:
        raise BundleError(
            f"bundle {bundle.url}: has no classes; compute embeddings with `imgcls embed`, then "
            "train a head with `imgcls train --data.embeddings`"
        )


def load_int8_model(bundle: Bundle) -> bytes | None:
    """Content of `INT8_FILE`; None if the bundle has none.

    Raises BundleError if it is missing or damaged.
    """
    expected = None if bundle.spec.int8 is None else bundle.spec.int8.model_sha256
    if expected is None or bundle.unsaved_int8 is not None:
        return bundle.unsaved_int8
    with use_settings(bundle.storage):
        return _read_verified(bundle, INT8_FILE, expected)


def load_ood_arrays(bundle: Bundle) -> bytes | None:
    """Content of `OOD_FILE`; None if the bundle has none.

    Raises BundleError if it is missing or damaged.
    """
    if bundle.spec.ood is None:
        return None
    with use_settings(bundle.storage):
        return _read_verified(bundle, OOD_FILE, bundle.spec.ood.arrays_sha256)


def load_ood_detector(bundle: Bundle) -> OodDetector | None:
    """The out-of-distribution detector of a bundle, if it has one.

    Raises BundleError if its file is missing or damaged.
    """
    data = load_ood_arrays(bundle)
    if data is None or bundle.spec.ood is None:
        return None
    try:
        return OodDetector.load(bundle.spec.ood, data)
    except (ValueError, KeyError) as error:
        raise BundleError(f"bundle {bundle.url}: {OOD_FILE}: {error}") from error


def resolve_int8_engine(wanted: EngineName, bundle: Bundle) -> Literal["torch", "openvino"]:
    """The engine that a bundle is quantized for.

    Raises BundleError if it is not quantized, or for another engine than the one wanted.
    """
    engine = require_int8(bundle).engine
    if wanted not in ("auto", engine):
        raise BundleError(
            f"bundle {bundle.url}: is quantized for {engine}, not for {wanted}; use --engine "
            f"{engine}, or quantize it again with --engine {wanted}"
        )
    return engine


def require_int8(bundle: Bundle) -> Int8Calibration:
    """The int8 data of a bundle; raises BundleError if it has none."""
    if bundle.spec.int8 is None:
        raise BundleError(
            f"bundle {bundle.url}: is not prepared for int8; prepare it with "
            f"`imgcls model quantize --model {bundle.url} --manifest FILE --output NEW`"
        )
    return bundle.spec.int8


def load_bundle_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The bundle's state dict; raises BundleError as `load_bundle` does for the weights."""
    from safetensors.torch import load

    with use_settings(bundle.storage):
        return dict(load(read_verified_weights(bundle)))


def save_bundle(
    url: str,
    spec: BundleSpec,
    state: Mapping[str, torch.Tensor],
    card: str | None = None,
    int8_model: bytes | None = None,
    ood_arrays: bytes | None = None,
) -> Bundle:
    """Write a bundle folder, the description last.

    card:       text of README.md (default: `render_minimal_card`)
    int8_model: content of `INT8_FILE`, if the description has its hash
    ood_arrays: content of `OOD_FILE`, if the description has its hash
    Raises BundleError if a tensor has NaN or infinity, or a file is not the one of the description;
    StorageError if the folder cannot be written.
    """
    from safetensors.torch import save

    found = None if int8_model is None else hashlib.sha256(int8_model).hexdigest()
    if found != (None if spec.int8 is None else spec.int8.model_sha256):
        raise BundleError(f"bundle {url}: lacks the quantized network that the description names")
    found = None if ood_arrays is None else hashlib.sha256(ood_arrays).hexdigest()
    if found != (None if spec.ood is None else spec.ood.arrays_sha256):
        raise BundleError(f"bundle {url}: lacks the OOD detector that the description names")
    # safetensors refuses tensors that share memory, as layers of timm's CoaT do
    data = save({key: value.detach().cpu().contiguous().clone() for key, value in state.items()})
    check_finite_safetensors(data, f"bundle {url}: weights to write")
    filesystem.write(filesystem.join(url, WEIGHTS_FILE), data)
    if int8_model is not None:
        filesystem.write(filesystem.join(url, INT8_FILE), int8_model)
    if ood_arrays is not None:
        filesystem.write(filesystem.join(url, OOD_FILE), ood_arrays)
    unwritten = {"task"} if spec.task == "single_label" else set()  # as in earlier versions
    body = spec.model_dump(mode="json", exclude=unwritten)
    body["weights_sha256"] = hashlib.sha256(data).hexdigest()
    body["sha256"] = _compute_digest(body)
    text = render_minimal_card(spec) if card is None else card
    filesystem.write(filesystem.join(url, MODEL_CARD_FILE), text.encode())
    filesystem.write(filesystem.join(url, BUNDLE_FILE), _render_json(body))
    return read_description(url)


def read_description(url: str) -> Bundle:
    """Read the description alone, verified by its own digest."""
    if is_registry_uri(url):
        from imgcls.models import mlflow_registry

        registered = mlflow_registry.resolve_registered(url)
        bundle = read_description(registered.url)
        registered = mlflow_registry.verify_registered(registered, bundle.sha256)
        return replace(bundle, registered=registered)
    place = f"bundle {url}"
    try:
        raw = filesystem.read(filesystem.join(url, BUNDLE_FILE))
    except StorageError as error:
        raise request_error(
            BundleError,
            f"{place}: {error}; pass a folder written by `imgcls train` or `imgcls model import`",
            error,
        ) from error
    try:
        body = json.loads(raw)
        stated, weights_sha256 = body.pop("sha256"), body["weights_sha256"]
        whole = _render_json(body | {"sha256": stated}) == raw and _compute_digest(body) == stated
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise BundleError(
            f"{place}: {BUNDLE_FILE} was modified (its digest differs); copy the bundle again, "
            "or write a new one instead of editing it"
        )
    if body.get("format_version") not in FORMAT_VERSIONS.values():
        raise BundleError(
            f"{place}: has format version {body.get('format_version')!r}, this imgcls reads "
            f"{max(FORMAT_VERSIONS.values())} and lower; install the imgcls that made it"
        )
    try:
        spec = BundleSpec.model_validate({k: v for k, v in body.items() if k != "weights_sha256"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key}: {first['msg']}" if key else first["msg"]
        raise BundleError(
            f"{place}: {BUNDLE_FILE}: {reason}; use the version of imgcls that wrote it"
        ) from error
    spec = _restore_never_accept(spec)
    return Bundle(url=url, spec=spec, weights_sha256=weights_sha256, sha256=stated)


def _restore_never_accept(spec: BundleSpec) -> BundleSpec:
    """Replace thresholds of 1.0 that calibration wrote by `NEVER_ACCEPT`.

    Older versions wrote 1.0 for classes that never reach the target precision, but a confidence of
    exactly 1 reaches it. No other class has 1.0: the grid of thresholds ends below it.
    """
    made_by = spec.provenance.get("calibration")
    if not isinstance(made_by, dict) or made_by.get("target_precision") is None:
        return spec
    chosen = {
        name: NEVER_ACCEPT if value == 1.0 else value for name, value in spec.thresholds.items()
    }
    return spec.model_copy(update={"thresholds": chosen})


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file is a Git LFS pointer, not the file itself."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def read_verified_weights(bundle: Bundle) -> bytes:
    """The weights' file; raises BundleError if it is missing, damaged, or not finite."""
    data = _read_verified(bundle, WEIGHTS_FILE, bundle.weights_sha256)
    check_finite_safetensors(data, f"bundle {bundle.url}: {WEIGHTS_FILE}")
    return data


def _read_verified(bundle: Bundle, name: str, sha256: str) -> bytes:
    """Content of a file of weights with this hash."""
    try:
        data = filesystem.read(filesystem.join(bundle.url, name))
    except StorageError as error:
        raise request_error(BundleError, f"bundle {bundle.url}: {error}", error) from error
    if is_lfs_pointer(data):
        raise BundleError(
            f"bundle {bundle.url}: {name} is a Git LFS pointer, not the weights; fetch them with "
            "`git lfs pull`"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BundleError(
            f"bundle {bundle.url}: {name} has SHA-256 {found[:12]}..., expected "
            f"{sha256[:12]}...; the file is damaged, copy the bundle again"
        )
    return data


def _render_json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def _compute_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
