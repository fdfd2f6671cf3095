"""The bundle: weights, classes, preprocessing, temperature and threshold, verified by hash.

Owns the folder's layout. Promises that loading runs no code (safetensors and JSON), that a bundle
with any byte changed is refused, and that `bundle.json` is written last. Reading the description
needs no torch; only the weights do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from imgcls.config import Section, UnitFloat
from imgcls.data import filesystem
from imgcls.data.preprocess import DecodeMode, Preprocess
from imgcls.data.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.errors import BundleError, OutputError, RequestError, StorageError, request_error
from imgcls.models.finite import check_finite_safetensors

if TYPE_CHECKING:
    import torch

BUNDLE_FORMAT_VERSION = 1
NEVER_ACCEPT = 2.0
"""The threshold of a class whose predictions are never accepted: above any confidence, rounding
included, and a plain number, so that whoever compares `score >= threshold` gets it right."""
BUNDLE_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_CARD_FILE = "README.md"

NetworkSource = Literal["torchvision", "timm", "imgcls"]
Precision = Literal["auto", "fp32", "bf16", "int8"]


class Architecture(Section):
    """Which network, without its weights."""

    source: NetworkSource = "torchvision"
    """Where the code of the network is."""
    name: str
    """Its name there, e.g. resnet18, inception_v3, vit_b_16, small_cnn."""
    options: dict[str, Any] = {}
    """Keyword arguments of its constructor."""


class VectorScaling(Section):
    """Calibration of each class apart: of the log of each score, times scale plus bias."""

    scale: list[FiniteFloat]
    bias: list[FiniteFloat]


class Int8Calibration(Section):
    """What running in int8 needs and costs."""

    ranges: dict[str, dict[str, tuple[FiniteFloat, FiniteFloat]]]
    """The least and the largest value seen by each convolution; see `models.quantise`."""
    calibration_images: int
    """Images that they were seen on."""
    judged_images: int
    """Other images, that the cost is told on."""
    agreement: UnitFloat
    """Share of these whose label is the same as in fp32."""
    accuracy: UnitFloat | None = None
    """Share of the labelled ones that are right."""
    accuracy_fp32: UnitFloat | None = None
    """The same in fp32."""

    def describe_cost(self) -> str:
        """What int8 changes, in words."""
        words = f"{self.agreement:.1%} of {self.judged_images:,} images labelled as in fp32"
        if self.accuracy is not None and self.accuracy_fp32 is not None:
            words += f"; accuracy {self.accuracy:.1%}, in fp32 {self.accuracy_fp32:.1%}"
        return words


def _check_threshold(value: float) -> float:
    if not (0 <= value <= 1 or value == NEVER_ACCEPT):
        raise ValueError(f"{value:g} is not between 0 and 1, nor {NEVER_ACCEPT:g} (never accept)")
    return value


AcceptanceThreshold = Annotated[float, AfterValidator(_check_threshold)]


class BundleSpec(Section):
    """What `bundle.json` says."""

    format_version: Literal[1] = 1
    architecture: Architecture
    classes: list[str]
    preprocess: Preprocess
    temperature: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    """Logits are divided by this before the softmax."""
    vector_scaling: VectorScaling | None = None
    """Done to the log of the softmax, if at all, and another softmax to that."""
    threshold: AcceptanceThreshold = 0.0
    """A prediction is accepted when its confidence is at least this; `NEVER` accepts none."""
    thresholds: dict[str, AcceptanceThreshold] = {}
    """In place of `threshold`, for predictions of these classes."""
    int8: Int8Calibration | None = None
    """For `precision int8`; made by `imgcls model quantise`."""
    provenance: dict[str, Any] = {}
    metrics: dict[str, float] = {}

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: list[str]) -> list[str]:
        if not classes:
            raise ValueError("the class list is empty")
        doubled = (
            sorted({name for name in classes if classes.count(name) > 1})
            if len(set(classes)) < len(classes)
            else []
        )
        if doubled:
            raise ValueError(f"class {doubled[0]!r} stands there twice; class names must differ")
        return classes

    @model_validator(mode="after")
    def _check_per_class(self) -> Self:
        unknown = sorted(set(self.thresholds) - set(self.classes))
        if unknown:
            raise ValueError(f"thresholds: {unknown[0]!r} is no class")
        scaling = self.vector_scaling
        sizes = {len(scaling.scale), len(scaling.bias)} if scaling is not None else set()
        if sizes - {len(self.classes)}:
            raise ValueError("vector_scaling: needs a scale and a bias for every class")
        return self

    def resolve_thresholds(self, threshold: float | None = None) -> list[float]:
        """What each class's predictions must reach, in class order.

        threshold: takes the place of all that the bundle says
        """
        if threshold is not None:
            return [threshold] * len(self.classes)
        return [self.thresholds.get(name, self.threshold) for name in self.classes]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found whole: its description and where it lies.

    sha256: hex digest of the description, which holds the digest of the weights: it names the model
    """

    url: str
    spec: BundleSpec
    weights_sha256: str
    sha256: str
    storage: StorageConfig = field(default_factory=current_settings, compare=False, repr=False)
    """How its store was reached, to read the weights again."""

    def with_decode(self, decode: DecodeMode | None) -> Bundle:
        """The same bundle with another decode route for JPEGs; with None its own."""
        if decode is None:
            return self
        preprocess = self.spec.preprocess.model_copy(update={"decode": decode})
        return replace(self, spec=self.spec.model_copy(update={"preprocess": preprocess}))


def check_bundle_output(url: str, *, overwrite: bool, source: str | None = None) -> None:
    """Refuse a place for a bundle where one is that others may be using.

    source: the bundle that the new one is made from
    Raises RequestError when that is the place itself, OutputError when a bundle is there already.
    """
    if source is not None and filesystem.absolute(url) == filesystem.absolute(source):
        raise RequestError(
            "output: is the bundle itself, which others may be using; name a new one"
        )
    if filesystem.exists(filesystem.join(url, BUNDLE_FILE)) and not overwrite:
        raise OutputError(f"output {url}: holds a bundle already; say --overwrite to replace it")


def load_bundle(url: str, *, storage: StorageConfig | Mapping[str, Any] | None = None) -> Bundle:
    """Read a bundle's description and verify every byte of it and of the weights.

    storage: how to reach its store, as in `{"endpoint_url": "http://localhost:9000"}`

    Raises BundleError that names what is missing, damaged or unknown, or the tensor that holds NaN
    or infinity.
    """
    with use_settings(storage):
        bundle = read_description(url)
        _read_verified_weights(bundle)
    return bundle


def require_int8(bundle: Bundle) -> Int8Calibration:
    """What running a bundle in int8 needs; raises BundleError when that was not prepared."""
    if bundle.spec.int8 is None:
        raise BundleError(
            f"bundle {bundle.url}: has not been prepared for int8; make one that is with "
            f"`imgcls model quantise --model {bundle.url} --manifest FILE --output NEW`"
        )
    return bundle.spec.int8


def load_bundle_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The bundle's state dict; raises BundleError as `load_bundle` does for the weights."""
    from safetensors.torch import load

    with use_settings(bundle.storage):
        return dict(load(_read_verified_weights(bundle)))


def save_bundle(
    url: str, spec: BundleSpec, state: Mapping[str, torch.Tensor], card: str | None = None
) -> Bundle:
    """Write a bundle folder, the description last.

    card: the text of README.md; the plain `model_card` if none
    Raises BundleError when a tensor holds NaN or infinity, StorageError when the folder cannot be
    written.
    """
    from safetensors.torch import save

    data = save({key: value.detach().cpu().contiguous() for key, value in state.items()})
    check_finite_safetensors(data, f"bundle {url}: the weights to write")
    filesystem.write(filesystem.join(url, WEIGHTS_FILE), data)
    body = spec.model_dump(mode="json") | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    body["sha256"] = _compute_digest(body)
    text = render_minimal_card(spec) if card is None else card
    filesystem.write(filesystem.join(url, MODEL_CARD_FILE), text.encode())
    filesystem.write(filesystem.join(url, BUNDLE_FILE), _render_json(body))
    return read_description(url)


def read_description(url: str) -> Bundle:
    """The description alone, verified against its own digest."""
    place = f"bundle {url}"
    try:
        raw = filesystem.read(filesystem.join(url, BUNDLE_FILE))
    except StorageError as error:
        raise request_error(
            BundleError,
            f"{place}: {error}; give a folder made by `imgcls train` or `imgcls model import`",
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
            f"{place}: {BUNDLE_FILE} is not as it was written (its digest differs); copy the "
            "bundle again, or make a new one rather than editing it"
        )
    if body.get("format_version") != BUNDLE_FORMAT_VERSION:
        raise BundleError(
            f"{place}: has format version {body.get('format_version')!r}, this imgcls reads "
            f"{BUNDLE_FORMAT_VERSION}; install the imgcls that made it"
        )
    try:
        spec = BundleSpec.model_validate({k: v for k, v in body.items() if k != "weights_sha256"})
    except ValidationError as error:
        raise BundleError(f"{place}: {error.errors()[0]['msg']}") from error
    spec = _restore_never_accept(spec)
    return Bundle(url=url, spec=spec, weights_sha256=weights_sha256, sha256=stated)


def _restore_never_accept(spec: BundleSpec) -> BundleSpec:
    """A spec whose classes that never reach their target precision are never accepted.

    `calibrate` used to give them 1.0, which a confidence of exactly 1 reaches. It never chose 1.0
    for any other class: the grid of thresholds ends below.
    """
    made_by = spec.provenance.get("calibration")
    if not isinstance(made_by, dict) or made_by.get("target_precision") is None:
        return spec
    chosen = {
        name: NEVER_ACCEPT if value == 1.0 else value for name, value in spec.thresholds.items()
    }
    return spec.model_copy(update={"thresholds": chosen})


def parse_class_list(text: str, source: str) -> list[str]:
    """Class names, one per line; blank lines at the end are dropped.

    Raises BundleError naming the line of a blank or repeated name.
    """
    names = [line.strip() for line in text.rstrip().splitlines()]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise BundleError(f"{source}, line {number}: is blank; give one class name per line")
        if name in seen:
            raise BundleError(
                f"{source}, line {number}: {name!r} also stands on line {seen[name]}; class names "
                "must differ"
            )
        seen[name] = number
    if not names:
        raise BundleError(f"{source}: holds no class name")
    return names


def render_minimal_card(spec: BundleSpec) -> str:
    """The bundle's README where nothing is known of how the weights were made."""
    lines = [f"# {render_card_title(spec)}", "", *render_card_description(spec)]
    if spec.metrics:
        lines += ["", "| metric | value |", "| --- | --- |"]
        lines += [
            f"| {escape_markdown(name)} | {value:.4f} |" for name, value in spec.metrics.items()
        ]
    lines += ["", *render_card_usage(), ""]
    return "\n".join(lines)


def render_card_title(spec: BundleSpec) -> str:
    """Markdown: the network and how many classes it knows."""
    return f"{escape_markdown(spec.architecture.name)}, {len(spec.classes):,} classes"


def render_card_description(spec: BundleSpec, most_classes: int = 20) -> list[str]:
    """Lines of Markdown: the classes, the first of them by name, and what is done to an image."""
    shown = ", ".join(escape_markdown(name) for name in spec.classes[:most_classes])
    beyond = len(spec.classes) - most_classes
    more = f" and {beyond:,} more" if beyond > 0 else ""
    pre = spec.preprocess
    return [
        f"Classes: {shown}{more}.",
        "",
        f"Input: {pre.crop}x{pre.crop} RGB, {pre.mode} from {pre.resize}, {pre.interpolation}; "
        f"mean {list(pre.mean)}, std {list(pre.std)}.",
        f"{_describe_calibration(spec)}, acceptance threshold {_describe_acceptance(spec)}.",
    ]


def _describe_calibration(spec: BundleSpec) -> str:
    scaled = "" if spec.vector_scaling is None else "Vector scaling, "
    return f"{scaled}{'t' if scaled else 'T'}emperature {spec.temperature:g}"


def _describe_acceptance(spec: BundleSpec, most_classes: int = 20) -> str:
    chosen = dict(zip(spec.classes, spec.resolve_thresholds(), strict=True))
    reached = [value for value in chosen.values() if value < NEVER_ACCEPT]
    never = [escape_markdown(name) for name, value in chosen.items() if value == NEVER_ACCEPT]
    if not reached:
        return "none: no prediction is accepted"
    text = f"{spec.threshold:g}"
    if spec.thresholds:
        text = f"per class, {min(reached):g} to {max(reached):g}"
    if never:
        beyond = len(never) - most_classes
        more = f" and {beyond:,} more" if beyond > 0 else ""
        text += f"; never accepted: {', '.join(never[:most_classes])}{more}"
    return text


def render_card_usage() -> list[str]:
    """Lines of Markdown: how the model is put to work."""
    return ["    imgcls predict --model THIS_FOLDER --manifest IMAGES --output OUT"]


def escape_markdown(text: str, longest: int = 80) -> str:
    """Markdown that shows `text` as it is, on one line, cut where it is very long."""
    text = " ".join(text.split()) or "(blank)"
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    # an underscore within a word means nothing
    return re.sub(r"([\\`*{}\[\]<>#|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file is the pointer that Git LFS leaves in place of one that was not fetched."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def _read_verified_weights(bundle: Bundle) -> bytes:
    try:
        data = filesystem.read(filesystem.join(bundle.url, WEIGHTS_FILE))
    except StorageError as error:
        raise request_error(BundleError, f"bundle {bundle.url}: {error}", error) from error
    if is_lfs_pointer(data):
        raise BundleError(
            f"bundle {bundle.url}: {WEIGHTS_FILE} is a Git LFS pointer, not the weights; fetch "
            "them "
            "with `git lfs pull`"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != bundle.weights_sha256:
        raise BundleError(
            f"bundle {bundle.url}: {WEIGHTS_FILE} has SHA-256 {found[:12]}..., expected "
            f"{bundle.weights_sha256[:12]}...; the file is damaged, copy the bundle again"
        )
    check_finite_safetensors(data, f"bundle {bundle.url}: {WEIGHTS_FILE}")
    return data


def _render_json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def _compute_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
