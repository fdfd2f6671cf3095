"""How else people label images: each as its documentation writes it, and tuned for this machine.

    python -m benchmarks.peers NAME MODEL MANIFEST OUTPUT

A process of its own per measurement, from its imports to its written predictions, like a command.
"tuned" is what an expert would change without leaving the tool: bfloat16 in channels-last, JPEGs
decoded at reduced size by Pillow's draft mode, one process per core, batches of 32.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workloads import CORES, read_manifest

BATCH = 32


def main() -> None:
    name, model, manifest, output = sys.argv[1:]
    PEERS[name](model, Path(manifest), Path(output))


def ray_data(model: str, manifest: Path, output: Path, *, tuned: bool = False) -> None:
    """Offline image classification as docs.ray.io shows it, for a machine of CPUs."""
    import numpy as np
    import ray
    import torch

    load, transform = loader(model, tuned)
    ray.init(num_cpus=CORES, include_dashboard=False)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "image": transform(load(row["path"])).numpy()}

    class Predictor:
        def __init__(self) -> None:
            self.predict = network(model, tuned=False)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            labels = self.predict(torch.from_numpy(np.stack(batch["image"])))
            return {"path": batch["path"], "predicted": labels.numpy()}

    class LoadAndPredict:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.predict = network(model, tuned=True)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            images = torch.stack([transform(load(path)) for path in batch["path"]])
            return {"path": batch["path"], "predicted": self.predict(images).numpy()}

    if tuned:
        rows = ray.data.read_csv(str(manifest), override_num_blocks=8 * CORES)
        pool = ray.data.ActorPoolStrategy(size=CORES)
        # Ray reads and writes in tasks of a CPU each, and waits without end if none is free
        rows = rows.map_batches(LoadAndPredict, compute=pool, batch_size=BATCH, num_cpus=0.5)
    else:
        pool = ray.data.ActorPoolStrategy(size=1)
        rows = ray.data.read_csv(str(manifest)).map(preprocess)
        rows = rows.map_batches(Predictor, compute=pool, batch_size=BATCH)
    rows.write_parquet(str(output))


def daft(model: str, manifest: Path, output: Path, *, tuned: bool = False) -> None:
    """Daft's image pipeline: download, decode, and a class that classifies batches."""
    import daft as df
    import numpy as np
    import torch
    from PIL import Image

    load, transform = loader(model, tuned)

    class Classify:
        def __init__(self) -> None:
            self.predict = network(model, tuned=tuned)

        def __call__(self, images: Any) -> Any:
            found = [transform(Image.fromarray(np.asarray(image))) for image in images.to_pylist()]
            return self.predict(torch.stack(found)).tolist() if found else []  # some are empty

    class LoadAndClassify:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.predict = network(model, tuned=tuned)

        def __call__(self, paths: Any) -> Any:
            found = [transform(load(path)) for path in paths.to_pylist()]
            return self.predict(torch.stack(found)).tolist() if found else []

    rows = df.read_csv(str(manifest))
    batches: dict[str, Any] = {"return_dtype": df.DataType.int64(), "batch_size": BATCH}
    if tuned:
        classify: Any = df.udf(**batches, concurrency=CORES)(LoadAndClassify)
        rows = rows.with_column("predicted", classify(df.col("path")))
    else:
        classify = df.udf(**batches)(Classify)
        image = df.functions.decode_image(df.functions.download(df.col("path")), mode="RGB")
        rows = rows.with_column("image", image)
        rows = rows.with_column("predicted", classify(df.col("image"))).exclude("image")
    rows.write_parquet(str(output))


def timm(model: str, manifest: Path, output: Path, *, tuned: bool = False) -> None:
    """The loop of timm's inference script, with its loader at the script's defaults."""
    import timm as library
    import torch
    from timm.data import ImageDataset, create_loader, resolve_data_config
    from timm.data.readers.reader import Reader

    class Listed(Reader):
        """Files by a list; timm's own reader takes folders."""

        def __init__(self) -> None:
            super().__init__()
            self.files = read_manifest(manifest)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return Path(self.files[index]).open("rb"), 0

        def __len__(self) -> int:
            return len(self.files)

        def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
            return self.files[index]

    network_ = library.create_model(TIMM_NAMES.get(model, model), pretrained=False).eval()
    config = resolve_data_config({}, model=network_)
    precision = torch.bfloat16 if tuned else torch.float32
    if tuned:
        network_ = network_.to(memory_format=torch.channels_last)
    batches = create_loader(
        ImageDataset("", reader=Listed()),
        batch_size=BATCH if tuned else 256,
        use_prefetcher=False,
        num_workers=CORES if tuned else 2,
        device=torch.device("cpu"),
        **config,
    )
    found = []
    with torch.inference_mode(), torch.autocast("cpu", precision, enabled=tuned):
        for images, _ in batches:
            if tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            found += network_(images).softmax(-1).topk(1).indices[:, 0].tolist()
    write(output, manifest, found)


def data_loader(model: str, manifest: Path, output: Path, *, tuned: bool = False) -> None:
    """The loop over a DataLoader that PyTorch's tutorials teach."""
    from torch.utils.data import DataLoader, Dataset

    load, transform = loader(model, tuned)

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            self.files = read_manifest(manifest)

        def __getitem__(self, index: int) -> Any:
            return transform(load(self.files[index]))

        def __len__(self) -> int:
            return len(self.files)

    predict = network(model, tuned=tuned)
    found: list[int] = []
    for images in DataLoader(Images(), batch_size=BATCH, num_workers=CORES):
        found += predict(images).tolist()
    write(output, manifest, found)


def transformers(model: str, manifest: Path, output: Path, *, tuned: bool = False) -> None:
    """Hugging Face's image-classification pipeline over a list of files.

    The network is theirs of the same shape, with random weights; resnet18 and resnet50 only.
    """
    import torch
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification
    from transformers import pipeline as make_pipeline

    small = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    shape = {"resnet18": small, "resnet50": {}}[model]
    classify = make_pipeline(
        "image-classification",
        model=ResNetForImageClassification(ResNetConfig(**shape, num_labels=1000)),
        image_processor=ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
        dtype=torch.bfloat16 if tuned else torch.float32,
    )
    files = read_manifest(manifest)
    more = {"batch_size": BATCH, "num_workers": CORES} if tuned else {}
    write(output, manifest, [one[0]["label"] for one in classify(files, top_k=1, **more)])


TIMM_NAMES = {
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "vit_b_16": "vit_base_patch16_224",
}


def loader(model: str, tuned: bool) -> tuple[Callable[[str], Any], Callable[[Any], Any]]:
    """How a file becomes a picture, and how that becomes the network's input."""
    import torchvision
    from PIL import Image

    transform = torchvision.models.get_model_weights(model).DEFAULT.transforms()

    def load(path: str) -> Any:
        image = Image.open(path)
        if tuned:
            side = transform.resize_size[0]
            image.draft("RGB", (side, side))
        return image.convert("RGB")

    return load, transform


def network(model: str, *, tuned: bool) -> Callable[[Any], Any]:
    """What turns a batch of inputs into classes."""
    import torch
    import torchvision

    module = torchvision.models.get_model(model, weights=None).eval()
    if tuned:
        module = module.to(memory_format=torch.channels_last)

    def predict(images: Any) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=tuned):
            if tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            return module(images).argmax(1)

    return predict


def write(output: Path, manifest: Path, found: list[Any]) -> None:
    with output.open("w", newline="") as stream:
        rows = zip(read_manifest(manifest), found, strict=True)
        csv.writer(stream).writerows([("path", "predicted"), *rows])


def _tuned(peer: Callable[..., None]) -> Callable[[str, Path, Path], None]:
    return lambda model, manifest, output: peer(model, manifest, output, tuned=True)


_AS_DOCUMENTED: dict[str, Callable[..., None]] = {
    "Ray Data": ray_data,
    "Daft": daft,
    "timm": timm,
    "DataLoader": data_loader,
    "transformers": transformers,
}
PEERS: dict[str, Callable[[str, Path, Path], None]] = {
    **_AS_DOCUMENTED,
    **{f"{name}, tuned": _tuned(peer) for name, peer in _AS_DOCUMENTED.items()},
}

if __name__ == "__main__":
    main()
