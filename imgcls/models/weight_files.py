"""Read weights files of other training scripts and match their keys with a network.

Reading a file runs no code. Known objects in the file other than tensors (arguments, optimizer
settings) are replaced by inert placeholders, so that not even their classes are imported. A file
with any other object is rejected; the message names it.
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from imgcls.errors import BundleError
from imgcls.formatting import format_list
from imgcls.models.bundle import is_lfs_pointer

_WRAPPER_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "module",
)  # fmt: skip
"""Keys of a checkpoint that can contain its weights, in order of preference."""
_PREFIXES = ("model.", "net.", "network.", "backbone.", "module.", "encoder.", "teacher.")
"""Preferred prefixes, in this order, if several match."""

_IGNORED_GLOBALS = re.compile(
    r"""
    argparse\.Namespace | pathlib(\._local)?\.\w+ | numpy(\.\w+)* | collections\.\w+ | datetime\.\w+
    | typing\.\w+ | (omegaconf|lightning|lightning_fabric|pytorch_lightning|yacs|easydict)(\.\w+)+
    """,
    re.VERBOSE,
)
"""Objects that training scripts store next to the weights, and that the weights do not need."""
_VALUE_MODULES = ("pathlib.", "numpy.", "datetime.")
_ALWAYS_REPLACED = ("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath")
"""The same for files from before PyTorch 1.6, whose objects cannot be listed in advance."""


class _InertValue:
    """Placeholder for a value that is not loaded (a numpy number, a path, a date)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _InertFields:
    """Placeholder for an object with fields or keys: a plain dict, which torch can fill."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def read_state_dict(name: str, data: bytes) -> dict[str, torch.Tensor]:
    """Read the tensors of a weights file, without the wrappers of training scripts.

    name: name of the file, for messages
    data: its bytes, in safetensors format or as written by `torch.save`
    Raises BundleError if the file cannot be read without running code, or has no tensors.
    """
    place = f"model.weights {name}"
    if is_lfs_pointer(data):
        raise BundleError(
            f"{place}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
        )
    if name.endswith(".safetensors") or data[8:10] == b'{"':
        return _unwrap_state_dict(place, _read_safetensors(place, data))
    if data[:1] == b"<":
        raise BundleError(f"{place}: is an HTML or XML page; download the file itself")
    return _unwrap_state_dict(place, _read_pickle(place, data))


def _read_safetensors(place: str, data: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(data))
    except SafetensorError as error:
        raise BundleError(f"{place}: is damaged, or not a safetensors file ({error})") from error


def _read_pickle(place: str, data: bytes) -> Any:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # noqa: BLE001  not an archive: from before PyTorch 1.6, or not a checkpoint
        found = []
    unknown = sorted(each for each in found if not _IGNORED_GLOBALS.fullmatch(each))
    if unknown:
        shown = format_list(unknown, 3)
        raise BundleError(
            f"{place}: not a plain state dict (it has objects of {shown}, which could run code "
            "when loaded); save it with torch.save(model.state_dict(), path)"
        )
    inert: list[Any] = [
        (_InertValue if each.startswith(_VALUE_MODULES) else _InertFields, each)
        for each in {*_ALWAYS_REPLACED, *found}
    ]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message recommends disabling the protection, with terminal colors
        named = re.search(r"(?:GLOBAL:?|class|function) ([\w]+\.[\w.]+)", str(error))
        reason = f"it has an object of {named[1]}" if named else "damaged, or not by torch.save"
        raise BundleError(
            f"{place}: not a plain state dict ({reason}); save it with "
            "torch.save(model.state_dict(), path)"
        ) from error


def _unwrap_state_dict(place: str, state: Any) -> dict[str, torch.Tensor]:
    while isinstance(state, dict):
        inner = next((key for key in _WRAPPER_KEYS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = state[inner]
    if isinstance(state, dict):
        state = {k: v for k, v in state.items() if not str(k).endswith("_extra_state")}
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else ""
        shown = f" (its keys: {keys})" if keys else ""
        raise BundleError(f"{place}: has no state dict of tensors{shown}")
    # prefixes of torch.compile, DistributedDataParallel and AveragedModel, and its counter
    named = {str(key).replace("_orig_mod.", ""): value for key, value in state.items()}
    return {k.removeprefix("module."): v for k, v in named.items() if k != "n_averaged"}


@dataclass(frozen=True)
class MatchedWeights:
    """Tensors of a file by the names of the network.

    prefix:            prefix removed from the file's keys; None if none was removed
    unused_keys:       the file's keys that belong to other networks
    interpolated_keys: position embeddings that were interpolated to the network's input size
    """

    state: Mapping[str, torch.Tensor]
    prefix: str | None = None
    unused_keys: tuple[str, ...] = ()
    interpolated_keys: tuple[str, ...] = ()

    def describe_changes(self) -> list[str]:
        """Messages about tensors that are not used, or not as they are in the file."""
        notes = [self._describe_unused()] if self.unused_keys else []
        if self.interpolated_keys:
            names = format_list(self.interpolated_keys, 3)
            notes.append(f"interpolated to the input size of the network: {names}")
        return notes

    def _describe_unused(self) -> str:
        shown = format_list(self.unused_keys, 3)
        below = f"using the weights below {self.prefix!r}; " if self.prefix else ""
        return f"{below}{len(self.unused_keys):,} other tensors are ignored ({shown})"


def list_body_keys(own: Mapping[str, torch.Tensor], heads: Collection[str]) -> list[str]:
    """Keys of the network that weights must have: all except heads and batch counters."""
    return [
        key
        for key in own
        if key.rpartition(".")[0] not in heads and not key.endswith("num_batches_tracked")
    ]


def match_keys(
    own: Mapping[str, torch.Tensor], heads: Collection[str], state: Mapping[str, torch.Tensor]
) -> MatchedWeights:
    """Remove the prefix of a wrapper from a file's keys if the network's body then matches.

    own:   state dict of the network
    heads: names of its heads, which may be missing or of another size
    Raises BundleError if two prefixes match and none is preferred.
    """
    body = {key: own[key].shape for key in list_body_keys(own, heads)}
    if not body:
        return MatchedWeights(state)
    sample = max(body, key=len)
    fitting = [
        key.removesuffix(sample) for key in state if key == sample or key.endswith(f".{sample}")
    ]
    fitting = [
        prefix
        for prefix in fitting
        if all(prefix + k in state and state[prefix + k].shape == s for k, s in body.items())
    ]
    if not fitting or "" in fitting:
        return MatchedWeights(state)
    known = [prefix for prefix in _PREFIXES if prefix in fitting]
    if len(fitting) > 1 and not known:
        raise BundleError(
            f"the weights match the network below {fitting[0]!r} and below {fitting[1]!r}; save "
            "only one of them, with torch.save(model.state_dict(), path)"
        )
    prefix = known[0] if known else fitting[0]
    kept = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    left_out = tuple(key for key in state if not key.startswith(prefix))
    return MatchedWeights(kept, prefix, left_out)
