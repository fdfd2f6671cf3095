"""OpenVINO and ONNX Runtime as peers: programs that run an exported network, and its export.

The programs read files with Pillow in a pool of processes and need neither torch nor torchvision:
they start in about a second. The export precedes them, as the bundle precedes `imgcls predict`, and
is not a part of their time.
"""

from __future__ import annotations

import functools
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.machine import CORES
from benchmarks.peer_jobs import BATCH, Job, read_job, write_labels
from benchmarks.workloads import read_manifest

OPENVINO_FILE, ONNX_FILE = "openvino/model.xml", "model.onnx"
_HINTS = {"fp32": "f32", "bf16": "bf16"}
"""OpenVINO's names of precisions."""

TUNED_BATCH = 8
"""3% faster than 32 with one thread, measured for ResNet-18 with AVX2."""
ExportEngine = Literal["openvino", "onnxruntime"]
Pixels = npt.NDArray[np.uint8]


def export_network(bundle: Path) -> None:
    """Write the network of a bundle for both tools, into a folder next to the bundle.

    OpenVINO: (N, crop, crop, 3) uint8 to logits, normalization included, as PrePostProcessor adds
    it. ONNX: (N, 3, crop, crop) float32, normalized, to logits.
    """
    import openvino
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import load_bundle

    job = read_job(bundle, Path(), Path(), "fp32", tuned=True)
    folder = get_export_folder(bundle)
    folder.mkdir()
    spec = load_bundle(str(bundle)).spec
    module = zoo.build_network(spec.architecture, len(spec.classes)).eval()
    module.load_state_dict(job.load_weights())
    example = torch.rand(2, 3, job.crop, job.crop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.jit, which OpenVINO's converter uses
        model = openvino.convert_model(
            module, example_input=example, input=[[-1, 3, job.crop, job.crop]]
        )
    steps = openvino.preprocess.PrePostProcessor(model)
    pixels = steps.input(0)
    pixels.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    pixels.model().set_layout(openvino.Layout("NCHW"))
    mean, std = ([255 * each for each in values] for values in (job.mean, job.std))
    pixels.preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
    openvino.save_model(steps.build(), folder / OPENVINO_FILE, compress_to_fp16=False)
    torch.onnx.export(
        module,
        (example,),
        folder / ONNX_FILE,
        input_names=["pixels"],
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )


def get_export_folder(bundle: Path) -> Path:
    """The folder of the exported networks of a bundle."""
    return bundle.with_name(f"{bundle.name}-exported")


def openvino(job: Job) -> None:
    """OpenVINO's asynchronous API, or one process per core.

    Documented for throughput: the performance hint, an AsyncInferQueue, a request per image, images
    from a pool of processes, the precision of OpenVINO's choice.
    """
    if job.tuned:
        classify_by_cores(job, "openvino")
        return
    import openvino as ov

    precision = {"INFERENCE_PRECISION_HINT": _HINTS.get(job.precision, job.precision)}
    queue = ov.AsyncInferQueue(_compile_for_throughput(job, precision))
    files = read_manifest(job.manifest)
    found = np.empty(len(files), np.int64)

    def keep(request: Any, row: int) -> None:
        found[row] = request.get_output_tensor().data[0].argmax()

    queue.set_callback(keep)
    with multiprocessing.Pool(CORES) as pool:
        images = pool.imap(functools.partial(load_pixels, job), files, chunksize=8)
        for row, image in enumerate(images):
            queue.start_async({0: image[None]}, row)
    queue.wait_all()
    write_labels(job, found.tolist())


def onnxruntime(job: Job) -> None:
    """ONNX Runtime's session in a loop over batches, or one process per core.

    Documented: the threads of its choice, images from a pool of processes.
    """
    if job.tuned:
        classify_by_cores(job, "onnxruntime")
        return
    classify = load_classifier("onnxruntime", job, threads=0)
    found: list[int] = []
    with multiprocessing.Pool(CORES) as pool:
        images = pool.imap(
            functools.partial(load_pixels, job), read_manifest(job.manifest), chunksize=8
        )
        for batch in stack_batches(images, BATCH):
            found += classify(batch).tolist()
    write_labels(job, found)


def classify_by_cores(job: Job, engine: ExportEngine) -> None:
    """Read and classify images in one process per core, each with a network of one thread."""
    files = read_manifest(job.manifest)
    parts = [files[core::CORES] for core in range(CORES)]
    with multiprocessing.Pool(CORES) as pool:
        labels = pool.map(functools.partial(_classify_files, job, engine), parts, chunksize=1)
    found = [0] * len(files)
    for core, some in enumerate(labels):
        found[core::CORES] = some
    write_labels(job, found)


def _classify_files(job: Job, engine: ExportEngine, files: list[str]) -> list[int]:
    classify = load_classifier(engine, job, threads=1)
    found: list[int] = []
    for batch in stack_batches((load_pixels(job, file) for file in files), TUNED_BATCH):
        found += classify(batch).tolist()
    return found


def load_classifier(engine: ExportEngine, job: Job, *, threads: int) -> Callable[[Pixels], Any]:
    """A function from (N, crop, crop, 3) uint8 to N classes.

    threads: of ONNX Runtime, 0 for all; of OpenVINO
    """
    if engine == "openvino":
        import openvino as ov

        config = {
            "INFERENCE_PRECISION_HINT": _HINTS[job.precision], "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        file = get_export_folder(job.bundle) / OPENVINO_FILE
        compiled = ov.Core().compile_model(file, "CPU", config)
        return lambda batch: compiled(batch)[0].argmax(1)
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        str(get_export_folder(job.bundle) / ONNX_FILE), options, providers=["CPUExecutionProvider"]
    )
    mean, std = (255 * np.array(values, np.float32) for values in (job.mean, job.std))

    def classify(batch: Pixels) -> Any:
        inputs = np.ascontiguousarray(((batch - mean) / std).transpose(0, 3, 1, 2))
        return session.run(None, {"pixels": inputs})[0].argmax(1)

    return classify


def find_openvino_default(bundle: Path) -> str:
    """The precision that OpenVINO takes by itself on this CPU; on Arm it is f16.

    With ONEDNN_MAX_CPU_ISA it still takes bf16 where the CPU has it, and fails where the limit
    excludes it: on a CPU without bf16 it takes fp32.
    """
    job = read_job(bundle, Path(), Path(), "fp32", tuned=False)
    try:
        chosen = _compile_for_throughput(job, {}).get_property("INFERENCE_PRECISION_HINT")
    except RuntimeError:
        return "fp32"
    name: str = chosen.to_string()
    return {hint: precision for precision, hint in _HINTS.items()}.get(name, name)


def _compile_for_throughput(job: Job, precision: dict[str, str]) -> Any:
    """OpenVINO's network of one image per request."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(get_export_folder(job.bundle) / OPENVINO_FILE)
    model.reshape([1, job.crop, job.crop, 3])
    return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", **precision})


def load_pixels(job: Job, path: str) -> Pixels:
    """(crop, crop, 3) uint8: the shorter side resized, as torchvision does it, and the center."""
    file = Image.open(path)
    if job.tuned:
        file.draft("RGB", (job.resize, job.resize))
    image = file.convert("RGB")
    short = min(image.size)
    width, height = (job.resize * side // short for side in image.size)
    left, top = round((width - job.crop) / 2), round((height - job.crop) / 2)
    resized = image.resize((width, height), job.resample)
    return np.asarray(resized.crop((left, top, left + job.crop, top + job.crop)))


def stack_batches(images: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """(N, crop, crop, 3) batches of images, the last one with what remains."""
    waiting: list[Pixels] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == size:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)
