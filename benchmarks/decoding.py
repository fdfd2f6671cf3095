"""CPU time of decoding, and of decoding with resize and crop, by this package and by others.

    python -m benchmarks.decoding [--sizes 32 photo 3mp 12mp] [--formats 4:2:0 4:4:4 png]
    python -m benchmarks.decoding --without-avx512

One thread. The routes take turns in random order, image by image, with the allocator settings of
prediction. Printed are medians over the images, in milliseconds of CPU time, and the difference of
the 224 x 224 pixels from Pillow's (decode at full size, antialiased resize, center crop), of 255:
the mean, and the largest of any pixel. The CPU time is that of the process, because libvips decodes
in threads of its own.

PyTurboJPEG, kornia_rs, OpenCV and pyvips are measured if they are installed. `--without-avx512`
masks AVX-512 in torch and OpenCV; libjpeg-turbo, libspng and Pillow have no code for it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision import io as torchvision_io
from torchvision.transforms.v2 import functional

from benchmarks.agreement import at_size, camera_files
from benchmarks.workloads import SAMPLE, photographs
from imgcls.cluster.session import build_malloc_env
from imgcls.data.decoding import decode, jpeg, open_image, png
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import compute_resized_size

Route = tuple[Callable[[bytes], Any], Callable[[bytes], Any]]
"""Bytes to the decoded image, and bytes to (224, 224, 3) uint8 RGB."""
MASKS = {
    "ATEN_CPU_CAPABILITY": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENCV_CPU_DISABLE": "AVX512-SKX",
}  # fmt: skip
MEGAPIXELS = {"3mp": 3, "12mp": 12}
EVERY = {"32": 24, "photo": 12, "3mp": 40, "12mp": 80}
"""Sizes, with the number of photographs of which one is used."""
FORMATS = ("4:2:0", "4:4:4", "png")
RUNS = 5
"""Successive runs of a step, of which the fastest counts: the first one has cold caches."""
EXACT, FAST = Preprocess(), Preprocess(decode="fast")
RESIZE, CROP, BILINEAR = EXACT.resize, EXACT.crop, Image.Resampling.BILINEAR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=list(EVERY), choices=EVERY)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--every", type=int, help="use every Nth photograph")
    parser.add_argument("--without-avx512", action="store_true", help="imitate a CPU with AVX2")
    options = parser.parse_args()
    wanted = build_malloc_env()["env_vars"] | {"VIPS_CONCURRENCY": "1"}
    wanted |= MASKS if options.without_avx512 else {}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "benchmarks.decoding", *sys.argv[1:]]
        os.execve(command[0], command, os.environ | wanted)  # libraries read these at their start
    torch.set_num_threads(1)
    print(f"{cpu()}; kernels of torch: {torch.backends.cpu.get_cpu_capability()}")
    for size in options.sizes:
        for format_ in options.formats:
            measure(size, format_, options.every or EVERY[size])


def cpu() -> str:
    """Model of the CPU, and the vector instructions that it has."""
    info = Path("/proc/cpuinfo").read_text(encoding="ascii")
    found = re.findall(r"(?<=model name\t: ).+|\bavx2\b|\bavx512f\b|\bamx_tile\b", info)
    return ", ".join(dict.fromkeys(found))


def measure(size: str, format_: str, every: int) -> None:
    """Print a table of all routes over images of one kind."""
    routes = dict(routes_of(format_))
    steps = [(name, step) for name in routes for step in (0, 1)]
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    apart: dict[str, list[Any]] = {name: [] for name in routes}
    files = list(encode(size, format_, every))
    for data in files:
        expected = routes["Pillow"][1](data).astype(np.int16)
        for name, (_, prepare) in routes.items():
            apart[name].append(np.abs(prepare(data) - expected).astype(np.uint8))
        best = dict.fromkeys(steps, float("inf"))
        for name, step in random.sample(steps, len(steps)):
            for _ in range(RUNS):
                start = time.process_time()
                routes[name][step](data)
                best[name, step] = min(best[name, step], 1e3 * (time.process_time() - start))
        for key, taken in best.items():
            times[key].append(taken)
    kind = f"{size} {format_}, {len(files)} images"
    print(f"\n{kind:<28} {'decode':>8} {'+ resize':>9} {'pixels: mean':>13} {'max':>4}")
    for name, differences in apart.items():
        alone, both = (float(np.median(times[name, step])) for step in (0, 1))
        away = f"{np.mean(differences):>13.2f} {np.max(differences):>4}"
        print(f"{name:<28} {alone:>8.3f} {both:>9.3f} {away}", flush=True)


def encode(size: str, format_: str, every: int) -> Iterator[bytes]:
    """Photographs of a size, as JPEG with a chroma subsampling or as PNG."""
    megapixels = MEGAPIXELS.get(size)
    if megapixels and format_ != "png":
        yield from camera_files(megapixels, format_, 0, every)
        return
    for file in photographs(SAMPLE)[::every]:
        if size == "photo" and format_ == "4:2:0":
            yield file.read_bytes()  # as it is, which is 4:2:0 for nearly all
            continue
        image, sink = Image.open(file).convert("RGB"), io.BytesIO()
        if size != "photo":
            image = at_size(image, megapixels) if megapixels else image.resize((32, 32), BILINEAR)
        options: Any = {} if format_ == "png" else {"quality": 90, "subsampling": format_}
        image.save(sink, "PNG" if format_ == "png" else "JPEG", **options)
        yield sink.getvalue()


def routes_of(format_: str) -> Iterator[tuple[str, Route]]:
    """The routes for a format, by name; other packages only if they are installed."""
    others = kornia if format_ == "png" else turbojpeg
    for maker in (ours, pillow, torchvision, others, opencv, vips):
        try:
            yield from maker(format_)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"left out: {maker.__name__} ({error})", file=sys.stderr)


def ours(format_: str) -> Iterator[tuple[str, Route]]:
    def decode_fast(data: bytes) -> Any:
        frame = jpeg.read_frame_header(data)
        assert frame is not None
        factor = decode.choose_jpeg_factor(frame, compute_resized_size(frame.size, EXACT))
        return jpeg.decode_jpeg(data, factor, frame=frame)

    def decode_png(data: bytes) -> Any:
        return png.decode_8_bit(
            data, open_image.read_header(data, open_image.MAX_PIXELS).png_chunks
        )

    def prepare_by(spec: Preprocess) -> Callable[[bytes], Any]:
        return lambda data: decode.decode_image(data, spec)[0].transpose(1, 2, 0)

    yield "imgcls", (decode_png if format_ == "png" else jpeg.decode_jpeg, prepare_by(EXACT))
    if format_ != "png":
        yield "imgcls, fast", (decode_fast, prepare_by(FAST))


def pillow(format_: str) -> Iterator[tuple[str, Route]]:
    def whole(data: bytes) -> Any:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def draft(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data))
        width, height = compute_resized_size(image.size, EXACT)
        image.draft("RGB", (2 * width, 2 * height))
        return image.convert("RGB")

    def reduced(data: bytes) -> Any:
        size = compute_resized_size(Image.open(io.BytesIO(data)).size, EXACT)
        return crop(np.asarray(draft(data).resize(size, BILINEAR, reducing_gap=2)))

    yield "Pillow", (whole, lambda data: crop(np.asarray(functional.resize(whole(data), [RESIZE]))))
    if format_ != "png":
        yield "Pillow, draft and reduce", (draft, reduced)


def by_torch_resize(name: str, whole: Callable[[bytes], Any]) -> tuple[str, Route]:
    """A route whose decoder returns (H, W, 3) uint8, with torchvision's resize and crop."""

    def prepare(data: bytes) -> Any:
        tensor = torch.from_numpy(whole(data)).permute(2, 0, 1)
        return crop(functional.resize(tensor, [RESIZE], antialias=True).permute(1, 2, 0).numpy())

    return name, (whole, prepare)


def torchvision(_: str) -> Iterator[tuple[str, Route]]:
    def whole(data: bytes) -> Any:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = torchvision_io.decode_image(tensor, torchvision_io.ImageReadMode.RGB)
        return image.permute(1, 2, 0).numpy()

    yield by_torch_resize("torchvision", whole)


def turbojpeg(_: str) -> Iterator[tuple[str, Route]]:
    yield by_torch_resize("simplejpeg alone", lambda data: simplejpeg.decode_jpeg(data, "RGB"))
    package = importlib.import_module("turbojpeg")
    library = package.TurboJPEG(os.environ.get("TURBOJPEG"))
    yield by_torch_resize("PyTurboJPEG", lambda data: library.decode(data, package.TJPF_RGB))


def kornia(_: str) -> Iterator[tuple[str, Route]]:
    by_rust, size = importlib.import_module("kornia_rs").io.decode_image_png_u8, png.parse_ihdr
    yield by_torch_resize("kornia_rs", lambda data: by_rust(data, size(data)[1::-1], "rgb"))


def opencv(_: str) -> Iterator[tuple[str, Route]]:
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(0)

    def whole(data: bytes) -> Any:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    def prepare(data: bytes) -> Any:
        image = whole(data)
        size = compute_resized_size(image.shape[1::-1], EXACT)
        filter_ = cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_LINEAR
        return crop(cv2.resize(image, size, interpolation=filter_))

    yield "OpenCV, area filter", (whole, prepare)


def vips(_: str) -> Iterator[tuple[str, Route]]:
    library = importlib.import_module("pyvips").Image

    def prepare(data: bytes) -> Any:
        header = library.new_from_buffer(data, "")
        width, height = compute_resized_size((header.width, header.height), EXACT)
        image = library.thumbnail_buffer(data, width, height=height, size="force")
        return crop(image.colourspace("srgb").numpy())

    def whole(data: bytes) -> Any:
        return library.new_from_buffer(data, "").write_to_memory()

    yield "pyvips, shrink-on-load", (whole, prepare)


def crop(image: Any) -> Any:
    """The center of (H, W, 3), as torchvision crops it."""
    top, left = (round((side - CROP) / 2) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + CROP, left : left + CROP])


if __name__ == "__main__":
    main()
