"""Other tools that classify images: each as its documentation writes it, and tuned to a machine.

    python -m benchmarks.peers NAME BUNDLE MANIFEST OUTPUT PRECISION

One process per measurement, from its imports to its written predictions, like a command. "tuned" is
what an expert changes without leaving the tool: the precision that is fastest on this CPU,
channels-last, JPEGs decoded at reduced size by Pillow's draft mode, one process per core, batches
of 32. All have the weights and the preprocessing of the bundle, so that their labels can be
compared; the programs themselves do not import imgcls. PRECISION is fp32 or bf16; a documented peer
is given the one that the tool takes by itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import exported_peers
from benchmarks.machine import CORES
from benchmarks.peer_jobs import BATCH, Job, read_job, write_labels
from benchmarks.workloads import read_manifest

TIMM_NAMES = {
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "vit_b_16": "vit_base_patch16_224",
}
"""Networks that timm builds with layers of other names: with random weights of its own."""


def main() -> None:
    name, bundle, manifest, output, precision = sys.argv[1:]
    peer = PEERS[name]
    peer.run(read_job(Path(bundle), Path(manifest), Path(output), precision, tuned=peer.tuned))


def ray_data(job: Job) -> None:
    """Offline image classification as docs.ray.io shows it, for a machine of CPUs."""
    import numpy as np
    import ray
    import torch

    load, transform = loader(job)
    ray.init(num_cpus=CORES, include_dashboard=False)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "image": transform(load(row["path"])).numpy()}

    class Predictor:
        def __init__(self) -> None:
            self.predict = network(job)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            labels = self.predict(torch.from_numpy(np.stack(batch["image"])))
            return {"path": batch["path"], "predicted": labels.numpy()}

    class LoadAndPredict:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.predict = network(job)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            images = torch.stack([transform(load(path)) for path in batch["path"]])
            return {"path": batch["path"], "predicted": self.predict(images).numpy()}

    if job.tuned:
        rows = ray.data.read_csv(str(job.manifest), override_num_blocks=8 * CORES)
        pool = ray.data.ActorPoolStrategy(size=CORES)
        # Ray reads and writes in tasks of a CPU each, and waits without end if none is free
        rows = rows.map_batches(LoadAndPredict, compute=pool, batch_size=BATCH, num_cpus=0.5)
    else:
        pool = ray.data.ActorPoolStrategy(size=1)
        rows = ray.data.read_csv(str(job.manifest)).map(preprocess)
        rows = rows.map_batches(Predictor, compute=pool, batch_size=BATCH)
    rows.write_parquet(str(job.output))


def daft(job: Job) -> None:
    """Daft's benchmark of image classification: download, decode, transform, and a class."""
    import daft as df
    import numpy as np
    import torch

    load, transform = loader(job)
    labels: dict[str, Any] = {"return_dtype": df.DataType.int64(), "batch_size": BATCH}

    @df.cls
    class Classify:
        def __init__(self) -> None:
            self.predict = network(job)

        @df.method.batch(**labels)  # type: ignore[untyped-decorator]
        def __call__(self, images: Any) -> Any:
            if len(images) == 0:
                return []
            return self.predict(torch.from_numpy(np.array(images.to_pylist()))).tolist()

    @df.cls(max_concurrency=CORES, use_process=True)
    class LoadAndClassify:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.predict = network(job)

        @df.method.batch(**labels)  # type: ignore[untyped-decorator]
        def __call__(self, paths: Any) -> Any:
            found = [transform(load(path)) for path in paths.to_pylist()]
            return self.predict(torch.stack(found)).tolist() if found else []

    pixels = df.DataType.tensor(df.DataType.float32(), (3, job.crop, job.crop))

    @df.func(return_dtype=pixels)  # type: ignore[untyped-decorator]
    def normalize(image: Any) -> Any:
        from PIL import Image

        return transform(Image.fromarray(np.asarray(image))).numpy()

    rows = df.read_csv(str(job.manifest))
    if job.tuned:
        rows = rows.with_column("predicted", LoadAndClassify()(df.col("path")))
    else:
        image = df.functions.decode_image(df.functions.download(df.col("path")), mode="RGB")
        rows = rows.with_column("image", normalize(image))
        rows = rows.with_column("predicted", Classify()(df.col("image"))).exclude("image")
    rows.write_parquet(str(job.output))


def timm(job: Job) -> None:
    """The loop of timm's inference script, with its loader at the script's defaults."""
    import timm as library
    import torch
    from timm.data import ImageDataset, create_loader, resolve_data_config
    from timm.data.readers.reader import Reader

    class Listed(Reader):
        """Files by a list; timm's own reader takes folders."""

        def __init__(self) -> None:
            super().__init__()
            self.files = read_manifest(job.manifest)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return Path(self.files[index]).open("rb"), 0

        def __len__(self) -> int:
            return len(self.files)

        def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
            return self.files[index]

    network_ = library.create_model(TIMM_NAMES.get(job.model, job.model), pretrained=False).eval()
    if job.model not in TIMM_NAMES:
        network_.load_state_dict(job.load_weights())
    same = {
        "input_size": (3, job.crop, job.crop), "crop_pct": job.crop / job.resize,
        "interpolation": job.interpolation, "mean": job.mean, "std": job.std,
    }  # fmt: skip
    if job.tuned:
        network_ = network_.to(memory_format=torch.channels_last)
    batches = create_loader(
        ImageDataset("", reader=Listed()),
        batch_size=BATCH if job.tuned else 256,
        use_prefetcher=False,
        num_workers=CORES if job.tuned else 2,
        device=torch.device("cpu"),
        **resolve_data_config(same, model=network_),
    )
    found = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=job.in_bf16):
        for images, _ in batches:
            if job.tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            found += network_(images).softmax(-1).topk(1).indices[:, 0].tolist()
    write_labels(job, found)


def data_loader(job: Job) -> None:
    """The loop over a DataLoader that PyTorch's tutorials teach."""
    from torch.utils.data import DataLoader, Dataset

    load, transform = loader(job)

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            self.files = read_manifest(job.manifest)

        def __getitem__(self, index: int) -> Any:
            return transform(load(self.files[index]))

        def __len__(self) -> int:
            return len(self.files)

    predict = network(job)
    found: list[int] = []
    for images in DataLoader(Images(), batch_size=BATCH, num_workers=CORES):
        found += predict(images).tolist()
    write_labels(job, found)


def transformers(job: Job) -> None:
    """Hugging Face's image-classification pipeline over a list of files.

    The network is theirs of the same shape; resnet18 and resnet50 only.
    """
    import torch
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification
    from transformers import pipeline as make_pipeline

    small = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    shape = {"resnet18": small, "resnet50": {}}[job.model]
    network_ = ResNetForImageClassification(ResNetConfig(**shape, num_labels=1000))
    weights = job.load_weights()
    network_.load_state_dict(
        {name: weights[_find_torchvision_name(name)] for name in network_.state_dict()}
    )
    dtype = torch.bfloat16 if job.in_bf16 else torch.float32
    classify = make_pipeline(
        "image-classification",
        model=network_.to(dtype).eval(),
        image_processor=ConvNextImageProcessor(
            size={"shortest_edge": job.crop},
            crop_pct=job.crop / job.resize,
            resample=job.resample,
            image_mean=job.mean,
            image_std=job.std,
        ),
        dtype=dtype,
    )
    files = read_manifest(job.manifest)
    more = {"batch_size": BATCH, "num_workers": CORES} if job.tuned else {}
    found = [one[0]["label"] for one in classify(files, top_k=1, **more)]
    write_labels(job, [int(label.removeprefix("LABEL_")) for label in found])


def _find_torchvision_name(name: str) -> str:
    """The name in torchvision's ResNet of an entry of Hugging Face's."""
    name = name.replace("resnet.embedder.embedder.convolution", "conv1")
    name = name.replace("resnet.embedder.embedder.normalization", "bn1")
    name = name.replace("classifier.1", "fc")
    block = re.match(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)", name)
    if block is None:
        return name
    stage, layer, part = block.groups()
    part = part.replace("shortcut.convolution", "downsample.0")
    part = part.replace("shortcut.normalization", "downsample.1")
    convolution = re.match(r"layer\.(\d)\.(convolution|normalization)\.(.+)", part)
    if convolution is not None:
        index, kind, entry = convolution.groups()
        part = f"{'conv' if kind == 'convolution' else 'bn'}{int(index) + 1}.{entry}"
    return f"layer{int(stage) + 1}.{layer}.{part}"


def loader(job: Job) -> tuple[Callable[[str], Any], Callable[[Any], Any]]:
    """Two functions: from a file to an image, and from that to the input of the network."""
    import torchvision
    from PIL import Image

    transform = torchvision.models.get_model_weights(job.model).DEFAULT.transforms()

    def load(path: str) -> Any:
        image = Image.open(path)
        if job.tuned:
            image.draft("RGB", (job.resize, job.resize))
        return image.convert("RGB")

    return load, transform


def network(job: Job) -> Callable[[Any], Any]:
    """A function from a batch of inputs to classes."""
    import torch
    import torchvision

    module = torchvision.models.get_model(job.model, weights=None).eval()
    module.load_state_dict(job.load_weights())
    if job.tuned:
        module = module.to(memory_format=torch.channels_last)

    def predict(images: Any) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=job.in_bf16):
            if job.tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            return module(images).argmax(1)

    return predict


def has_own_weights(name: str, bundle: Path) -> bool:
    """Whether a peer's network has other weights than the bundle, so that labels differ."""
    model = read_job(bundle, Path(), Path(), "fp32", tuned=False).model
    return name.startswith("timm") and model in TIMM_NAMES


Engine = Literal["torch", "openvino", "onnxruntime"]


@dataclass(frozen=True)
class Peer:
    """A program of another tool.

    engine: runs its network, and decides which precision is fastest
    """

    run: Callable[[Job], None]
    engine: Engine
    tuned: bool


_PROGRAMS: dict[str, tuple[Callable[[Job], None], Engine]] = {
    "Ray Data": (ray_data, "torch"),
    "Daft": (daft, "torch"),
    "timm": (timm, "torch"),
    "DataLoader": (data_loader, "torch"),
    "transformers": (transformers, "torch"),
    "OpenVINO": (exported_peers.openvino, "openvino"),
    "ONNX Runtime": (exported_peers.onnxruntime, "onnxruntime"),
}
PEERS: dict[str, Peer] = {
    **{name: Peer(*program, tuned=False) for name, program in _PROGRAMS.items()},
    **{f"{name}, tuned": Peer(*program, tuned=True) for name, program in _PROGRAMS.items()},
}

if __name__ == "__main__":
    main()
