"""Export a bundle to run without imgcls: ONNX, a `torch.export` program, TorchScript.

An exported model takes pixels and returns calibrated scores: normalization and calibration are part
of it. A description, a model card and an example are written next to it. Each file is run once, and
its difference from the classifier's scores is recorded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import yaml
from torch import nn

from imgcls import log
from imgcls.data import image_files
from imgcls.data.decoding import decode
from imgcls.data.decoding.decode import Pixels
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import (
    BundleError,
    ImageError,
    OutputError,
    RequestError,
    RunFailed,
    StorageMissing,
    first_line,
)
from imgcls.models.bundle import (
    BUNDLE_FILE,
    MODEL_CARD_FILE,
    Bundle,
    BundleSpec,
    TaskName,
    load_bundle,
)
from imgcls.models.bundle_card import render_minimal_card
from imgcls.models.classifier import Classifier
from imgcls.models.config import ExportConfig, ExportFormat
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import ScoreScaling, Task
from imgcls.models.tasks import find_task
from imgcls.models.torch_engine import load_network

EXPORT_FILES: dict[ExportFormat, str] = {
    "onnx": "model.onnx",
    "program": "model.pt2",
    "torchscript": "model.ts",
}
EXPORT_DESCRIPTION_FILE = "model.json"
EXAMPLE_FILE = "example.py"
SYNTHETIC_IMAGES = 16
"""Number of synthetic images for the comparison if no images are configured."""
CLEAR_MARGIN = 0.01
"""Minimum lead of the best score over the next at which labels must be equal. For multilabel,
minimum distance of a score from its threshold."""


class PortableNetwork(nn.Module):
    """A bundle's network from pixels to scores, in float32."""

    scale: torch.Tensor
    shift: torch.Tensor
    class_scale: torch.Tensor
    class_bias: torch.Tensor

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        spec = bundle.spec
        std = torch.tensor(spec.preprocess.std).view(1, 3, 1, 1)
        mean = torch.tensor(spec.preprocess.mean).view(1, 3, 1, 1)
        self.network = load_network(bundle, torch.device("cpu"), torch.float32)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.task = find_task(spec)
        scaling = ScoreScaling.from_spec(spec)
        self.temperature = scaling.temperature
        self.has_vector_scaling = scaling.scale is not None
        self.register_buffer("class_scale", scaling.scale)
        self.register_buffer("class_bias", scaling.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, crop, crop) uint8 RGB to (N, C) float32 scores."""
        logits = self.network(pixels.to(torch.float32) * self.scale + self.shift)
        scaling = ScoreScaling(self.temperature)
        if self.has_vector_scaling:
            scaling = ScoreScaling(self.temperature, self.class_scale, self.class_bias)
        return self.task.activate(logits, scaling)


@with_config_storage
def export_bundle(config: ExportConfig) -> dict[str, Any]:
    """Write a bundle in other formats; returns the content of model.json.

    Raises RequestError if a package is not installed, BundleError if the bundle is damaged or its
    network gives NaN, OutputError if the folder is not empty, RunFailed if a format cannot express
    the network or gives other labels.
    """
    bundle = load_bundle(config.model)
    _check_packages(config.formats)
    output = filesystem.absolute(config.output)
    _check_output(output, overwrite=config.overwrite)
    pixels = _load_comparison_images(bundle, config)
    scored = Classifier(bundle, precision="fp32", device="cpu").classify(pixels)
    if not scored.is_finite.all():
        raise BundleError(
            f"bundle {config.model}: its network outputs NaN or infinity for "
            f"{int((~scored.is_finite).sum())} of {len(scored.is_finite)} images in fp32; "
            "train it again"
        )
    expected = scored.scores
    portable = PortableNetwork(bundle).eval()
    files: dict[str, Any] = {}
    contents: dict[str, bytes] = {}
    for format in config.formats:
        data, run = _EXPORTERS[format](portable, bundle.spec.preprocess.crop)
        result = compare_scores(
            format, expected, run(pixels), portable.task, bundle.spec.resolve_thresholds()
        )
        files[EXPORT_FILES[format]], contents[EXPORT_FILES[format]] = result, data
        log.show(
            f"{EXPORT_FILES[format]:<12} {len(data) / 1e6:,.1f} MB; {result['same_label']} of "
            f"{result['images']} images have the same {_LABEL_TEXTS[bundle.spec.task]}, scores "
            f"differ by {result['largest_difference']:.1e} at most",
        )
    description = _build_description(bundle.spec) | {"files": files, "sha256": bundle.sha256}
    contents[MODEL_CARD_FILE] = _build_card(bundle, config.formats).encode()
    if "onnx" in config.formats:
        contents[EXAMPLE_FILE] = render_example(bundle.spec).encode()
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    _write_export(output, contents | {EXPORT_DESCRIPTION_FILE: text.encode()})
    log.show(f"export       {output}")
    return description


def _check_output(output: str, *, overwrite: bool) -> None:
    """Raise OutputError for a folder with a bundle, or with other files and no `overwrite`."""
    names = filesystem.list_names(output)
    if BUNDLE_FILE in names:
        raise OutputError(
            f"output {output}: is a bundle, whose {MODEL_CARD_FILE} the export would replace; pass "
            "another --output"
        )
    if names and not overwrite:
        raise OutputError(
            f"output {output}: contains {names[0]}; pass another --output, or --overwrite"
        )


def _write_export(output: str, contents: Mapping[str, bytes]) -> None:
    """Replace the files of an earlier export; the description is removed first, written last."""
    for name in (EXPORT_DESCRIPTION_FILE, EXAMPLE_FILE, *EXPORT_FILES.values()):
        filesystem.remove(filesystem.join(output, name))
    for name, data in contents.items():
        filesystem.write(filesystem.join(output, name), data)


def compare_scores(
    format: str,
    expected: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    task: Task = SINGLE_LABEL,
    thresholds: Sequence[float] = (),
) -> dict[str, Any]:
    """Compare (N, C) scores with the expected ones; raises RunFailed if labels differ.

    A label must be equal if its score leads by more than `CLEAR_MARGIN`; for multilabel, the
    decision of each class whose score is that far from its threshold.
    """
    same, has_changed = task.compare_decisions(expected, scores, thresholds, CLEAR_MARGIN)
    largest = float(np.abs(expected - scores).max())
    if has_changed.any() or not np.isfinite(largest):
        another = {"single_label": "another label", "multilabel": "other labels"}[task.name]
        raise RunFailed(
            f"{format}: {int((~same).sum())} of {len(same)} images have {another}, and scores "
            f"differ by up to {largest:.3f}; the format does not express this network"
        )
    return {"images": len(same), "same_label": int(same.sum()), "largest_difference": largest}


_LABEL_TEXTS: dict[TaskName, str] = {"single_label": "label", "multilabel": "labels"}
RunExported = Callable[[Pixels], npt.NDArray[np.float32]]


def _export_onnx(portable: PortableNetwork, crop: int) -> tuple[bytes, RunExported]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with _convert_exporter_errors("onnx"):
            torch.onnx.export(
                portable,
                (_build_example_input(crop),),
                file,
                dynamo=True,
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
                input_names=["pixels"],
                output_names=["scores"],
                external_data=False,
                verbose=False,
            )
        data = file.read_bytes()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda pixels: session.run(None, {"pixels": np.ascontiguousarray(pixels)})[0]


def _export_program(portable: PortableNetwork, crop: int) -> tuple[bytes, RunExported]:
    sink = io.BytesIO()
    with _convert_exporter_errors("program"):
        program = torch.export.export(
            portable,
            (_build_example_input(crop),),
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        )
        torch.export.save(program, sink)
        loaded = torch.export.load(io.BytesIO(sink.getvalue())).module()
    return sink.getvalue(), lambda pixels: _run_module(loaded, pixels)


def _export_torchscript(portable: PortableNetwork, crop: int) -> tuple[bytes, RunExported]:
    sink = io.BytesIO()
    with _convert_exporter_errors("torchscript"), torch.inference_mode():
        traced = torch.jit.trace(portable, _build_example_input(crop), check_trace=False)
        torch.jit.save(traced, sink)
        loaded = torch.jit.load(io.BytesIO(sink.getvalue()))
    return sink.getvalue(), lambda pixels: _run_module(loaded, pixels)


_EXPORTERS: dict[ExportFormat, Callable[[PortableNetwork, int], tuple[bytes, RunExported]]] = {
    "onnx": _export_onnx,
    "program": _export_program,
    "torchscript": _export_torchscript,
}


@contextlib.contextmanager
def _convert_exporter_errors(format: str) -> Iterator[None]:
    """Convert an exporter's error to one line with the format; suppress its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            raise RunFailed(
                f"{format}: torch cannot export this network: {first_line(error)}; remove the "
                "format from --formats"
            ) from error


def _build_example_input(crop: int) -> torch.Tensor:
    return torch.zeros(2, 3, crop, crop, dtype=torch.uint8)


@torch.inference_mode()
def _run_module(module: Any, pixels: Pixels) -> npt.NDArray[np.float32]:
    scores: npt.NDArray[np.float32] = module(torch.from_numpy(pixels)).numpy()
    return scores


def _check_packages(formats: list[ExportFormat]) -> None:
    if not formats:
        raise RequestError("formats: is empty; pass onnx, program or torchscript")
    needed = ("onnx", "onnxscript", "onnxruntime") if "onnx" in formats else ()
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise RequestError(
                f"formats: onnx requires the package {package}; run: pip install "
                "'imgcls[export]', or remove it from --formats"
            )


def _load_comparison_images(bundle: Bundle, config: ExportConfig) -> Pixels:
    """(N, 3, crop, crop) uint8 images for the comparison."""
    if config.images is None:
        return _draw_synthetic_images(bundle.spec.preprocess.crop)
    pixels = list(islice(_decode_manifest_images(bundle, config.images), config.max_images))
    if not pixels:
        raise RequestError(
            f"images {config.images.path}: none of the images can be read; pass others, or omit "
            "--images"
        )
    return decode.stack_images(pixels)


def _decode_manifest_images(bundle: Bundle, config: ManifestConfig) -> Iterator[Pixels]:
    manifest = open_manifest(config, keys=KeyNames("images"))
    for batch in manifest.batches():
        paths = batch.column(manifest.path_column).cast(pa.string()).to_pylist()
        for blob in image_files.read_ahead(manifest.resolve(path) for path in paths):
            if not isinstance(blob, bytes):
                continue
            try:
                yield decode.decode_image(blob, bundle.spec.preprocess)[0]
            except ImageError:
                continue


def _draw_synthetic_images(crop: int) -> Pixels:
    """Smooth color gradients from a fixed seed."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((SYNTHETIC_IMAGES, 3, 6, 6), dtype=np.float32))
    soft = torch.nn.functional.interpolate(coarse, (crop, crop), mode="bicubic").clamp(0, 1)
    return (255 * soft).round().to(torch.uint8).numpy()


def _build_description(spec: BundleSpec) -> dict[str, Any]:
    pre = spec.preprocess
    return {
        "input": {"name": "pixels", "dtype": "uint8", "shape": ["batch", 3, pre.crop, pre.crop]},
        "output": {"name": "scores", "dtype": "float32", "shape": ["batch", len(spec.classes)]},
        "preprocess": pre.model_dump(mode="json", include={"resize", "crop", "interpolation"})
        | {"mode": pre.mode},
        "task": spec.task,
        "classes": spec.classes,
        "threshold": spec.threshold,
        "thresholds": spec.thresholds,
        "architecture": spec.architecture.model_dump(mode="json"),
    }


def _build_card(bundle: Bundle, formats: Sequence[ExportFormat]) -> str:
    """The bundle's model card, with front matter for the Hugging Face hub."""
    try:
        card = filesystem.read(filesystem.join(bundle.url, MODEL_CARD_FILE))
        text = card.decode(errors="replace").rstrip()
    except StorageMissing:  # it is not a part of the model
        text = render_minimal_card(bundle.spec).rstrip()
    if not text.startswith("---\n"):
        tags = ["image-classification", "imgcls", bundle.spec.architecture.name]
        library = "onnx" if "onnx" in formats else "pytorch"
        front = {"pipeline_tag": "image-classification", "library_name": library, "tags": tags}
        text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}"
    text = (
        f"{text}\n\n## Exported files\n\n"
        "The exported files take `pixels`, uint8 RGB of the size in `model.json`, and return "
        "calibrated `scores`; normalization is part of the model. `model.json` also has the resize "
        "settings, the class of each score, and the difference from the scores of imgcls.\n"
    )
    if bundle.spec.task == "multilabel":
        text += (
            "\nEach class has its own score, the sigmoid of its logit. The labels of an image are "
            "all classes whose score reaches their threshold: that in `thresholds` of "
            "`model.json`, otherwise `threshold`.\n"
        )
    return text + ("\n    python example.py IMAGE\n" if "onnx" in formats else "")


def render_example(spec: BundleSpec) -> str:
    """A script that classifies an image with model.onnx, without imgcls."""
    fit = _RESIZE_CODE[spec.preprocess.mode].strip("\n")
    return _EXAMPLE_TEMPLATE.format(
        fit=fit.format(filter=spec.preprocess.interpolation.upper()),
        purpose=_EXAMPLE_PURPOSES[spec.task],
        output=_OUTPUT_CODE[spec.task].strip("\n"),
    )


_EXAMPLE_TEMPLATE = '''\
"""python example.py IMAGE: {purpose}. Requires onnxruntime, numpy and pillow."""

import json
import pathlib
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder = pathlib.Path(__file__).parent
model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
resize, crop = model["preprocess"]["resize"], model["preprocess"]["crop"]
image = ImageOps.exif_transpose(Image.open(sys.argv[1]))
if image.mode.startswith("I"):  # 16 bits
    image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
image = image.convert("RGB")
{fit}
pixels = np.asarray(image, np.uint8).transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession(folder / "model.onnx")
scores = session.run(None, {{"pixels": pixels}})[0][0]
{output}
'''
_EXAMPLE_PURPOSES: dict[TaskName, str] = {
    "single_label": "classify an image",
    "multilabel": "print the labels of an image",
}
_OUTPUT_CODE: dict[TaskName, str] = {
    "single_label": """
for index in scores.argsort()[::-1][:5]:
    print(f"{scores[index]:.4f}  {model['classes'][index]}")
""",
    "multilabel": """
thresholds = [model["thresholds"].get(name, model["threshold"]) for name in model["classes"]]
is_label = scores >= np.array(thresholds, np.float32)
for index in (-scores).argsort(kind="stable"):  # a score per class, any number of labels
    if is_label[index]:
        print(f"{scores[index]:.4f}  {model['classes'][index]}")
if not is_label.any():
    print("no label")
""",
}
_RESIZE_CODE = {
    "crop": """
short = min(image.size)
image = image.resize([int(resize * side / short) for side in image.size], Image.{filter})
left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
image = image.crop((left, top, left + crop, top + crop))
""",
    "squash": """
image = image.resize((crop, crop), Image.{filter})
""",
    "pad": """
scale = crop / max(image.size)
image = image.resize([max(1, round(side * scale)) for side in image.size], Image.{filter})
square = Image.new("RGB", (crop, crop))
square.paste(image, ((crop - image.width) // 2, (crop - image.height) // 2))
image = square
""",
}
