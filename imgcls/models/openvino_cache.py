"""Networks converted for OpenVINO, kept on this machine: each is converted and checked once.

The other workers of the machine and later commands read the file of the first worker. The name of
a file is a hash of all that the conversion and its check depend on: weights, architecture,
preprocessing, precision, the code of this package, versions of others, and the CPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from imgcls.data.storage import filesystem
from imgcls.errors import RequestError, StorageError
from imgcls.models.bundle import Bundle
from imgcls.models.cache_folder import find_cache_folder
from imgcls.models.cpu import read_cpu_flags
from imgcls.models.precision import RunPrecision

FOLDER = "openvino"
MAX_FILES = 8
"""Number of networks that are kept, those that were used last."""
MAX_WAIT_S = 60.0
"""Maximum time to wait for the conversion by another process, in seconds."""
MAX_DRAFT_S = 3600.0
"""Age of a file that a killed process has left, in seconds."""
_PACKAGES = (
    "imgcls",
    "openvino",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "open_clip_torch",
)
_SUFFIX = ".zip"


class CachedNetwork:
    """The file of one converted network.

    Where the folder cannot be used, `read` finds nothing and `write` does nothing.
    """

    def __init__(self, bundle: Bundle, precision: RunPrecision) -> None:
        try:
            self._folder = Path(find_cache_folder(FOLDER))
        except RequestError:
            self._folder = Path(os.devnull)  # where no file can be
        self._path = self._folder / (_compute_key(bundle, precision) + _SUFFIX)

    def read(self) -> bytes | None:
        """The network as `openvino_engine.pack_model` made it; None if there is none."""
        try:
            packed = self._path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # of a folder that is read-only
            os.utime(self._path)
        return packed

    def write(self, packed: bytes) -> None:
        """Keep a network, and remove those that were used least recently."""
        with contextlib.suppress(OSError, StorageError):
            filesystem.write(str(self._path), packed)
            self._remove_old_files()

    @contextlib.contextmanager
    def take_turn(self) -> Iterator[None]:
        """Wait while another process converts the network; within the block, others wait.

        Those that have waited do not wait for each other: the conversion may have failed.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = self._path.with_suffix(".lock")
                lock = stack.enter_context(path.open("ab"))
                os.utime(path)  # it is not a file that a killed process has left
                if _wait_for(lock.fileno()):
                    stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)  # forks have the file, too
            yield

    def _remove_old_files(self) -> None:
        found = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        networks = [path for path in found if path.suffix == _SUFFIX]
        oldest = time.time() - MAX_DRAFT_S
        others = [path for path in found if path.suffix != _SUFFIX]
        for path in networks[:-MAX_FILES]:
            path.unlink()
        for path in others:
            if path.stat().st_mtime < oldest:
                path.unlink()


def _wait_for(lock: int) -> bool:
    """Wait until no other process has a lock; whether this one has it, as it did not wait."""
    end = time.monotonic() + MAX_WAIT_S
    has_waited = False
    while time.monotonic() < end:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            has_waited = True
            time.sleep(0.05)
            continue
        if has_waited:
            fcntl.flock(lock, fcntl.LOCK_UN)
        return not has_waited
    return False


def _compute_key(bundle: Bundle, precision: RunPrecision) -> str:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    parts = {
        "code": _CODE,
        "weights": bundle.weights_sha256,
        "architecture": bundle.spec.architecture.model_dump(mode="json"),
        "outputs": bundle.spec.num_outputs,
        "preprocess": bundle.spec.preprocess.model_dump(mode="json", exclude={"decode"}),
        "precision": precision,
        "versions": versions,
        "cpu": sorted(read_cpu_flags()),
        "limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _hash_code() -> str:
    """Hash of the modules that build, fuse and convert networks."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


_CODE = _hash_code()
"""Of the modules that this process has imported, which may be replaced while it runs."""
