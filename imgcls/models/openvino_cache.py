"""Networks converted for OpenVINO, kept on this machine: each is converted and checked once.

The other workers of the machine and later commands read the file of the first worker. The name of
a file is a hash of all that the conversion and its check depend on: weights, architecture,
preprocessing, precision, versions of the packages, and the CPU. The least recently used files are
removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata

from imgcls.models.bundle import Bundle
from imgcls.models.cache_folder import find_cache_folder
from imgcls.models.cpu import read_cpu_flags
from imgcls.models.precision import RunPrecision

FOLDER = "openvino"
CONVERSION = 1
"""Version of `openvino_engine.convert_network`; another one converts all networks again."""
MAX_FILES = 8
_PACKAGES = (
    "imgcls", "openvino", "torch", "torchvision", "timm", "transformers", "open_clip_torch",
)  # fmt: skip
_SUFFIX, _LOCK = ".zip", "lock"


class CachedNetwork:
    """The file of one converted network.

    Where the folder cannot be used, `read` finds nothing and `write` does nothing.
    """

    def __init__(self, bundle: Bundle, precision: RunPrecision) -> None:
        self._folder = find_cache_folder(FOLDER)
        self._path = os.path.join(self._folder, _compute_key(bundle, precision) + _SUFFIX)

    def read(self) -> bytes | None:
        """The network as `openvino_engine.pack_model` made it; None if there is no whole one."""
        try:
            with open(self._path, "rb") as file:
                packed = file.read()
            with zipfile.ZipFile(io.BytesIO(packed)) as files:
                if files.testzip() is not None:
                    return None
            os.utime(self._path)
        except (OSError, zipfile.BadZipFile):
            return None
        return packed

    def write(self, packed: bytes) -> None:
        """Keep a network, and remove the least recently used files."""
        with contextlib.suppress(OSError):
            file, draft = tempfile.mkstemp(dir=self._folder, prefix=".draft-")
            try:
                with open(file, "wb") as stream:
                    stream.write(packed)
                os.replace(draft, self._path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
            self._remove_oldest()

    @contextlib.contextmanager
    def take_turn(self) -> Iterator[None]:
        """Wait while another process of this machine converts; within the block, others wait.

        Those that have waited do not wait for each other: the conversion may have failed.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
                lock = stack.enter_context(open(os.path.join(self._folder, _LOCK), "ab"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    fcntl.flock(lock, fcntl.LOCK_UN)
            yield

    def _remove_oldest(self) -> None:
        found = [each for each in os.scandir(self._folder) if each.name.endswith(_SUFFIX)]
        for each in sorted(found, key=lambda entry: entry.stat().st_mtime)[:-MAX_FILES]:
            os.unlink(each.path)


def _compute_key(bundle: Bundle, precision: RunPrecision) -> str:
    spec = bundle.spec
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    parts = {
        "conversion": CONVERSION,
        "weights": bundle.weights_sha256,
        "architecture": spec.architecture.model_dump(mode="json"),
        "outputs": spec.num_outputs,
        "preprocess": spec.preprocess.model_dump(mode="json", exclude={"decode"}),
        "precision": precision,
        "versions": versions,
        "cpu": sorted(read_cpu_flags()),
        "limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
