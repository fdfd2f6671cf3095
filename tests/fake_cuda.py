"""CUDA streams without a GPU: which kernel is known to have ended before which one starts.

Streams and events of `torch.cuda` are replaced; tensors stay in main memory. Every queued kernel
gets a number in its stream, and each stream, and the host, know up to which kernel of every stream
they have waited (vector clocks). A read of memory that the reader has not waited for fails the
test, whether or not it would go wrong on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

Clock = dict["FakeStream", int]


class FakeStream:
    """A stream, or with `cuda.host` the host, with what it has waited for."""

    def __init__(self, cuda: FakeCuda, device: torch.device, name: str) -> None:
        self.cuda, self.device, self.name = cuda, device, name
        self.queued = 0
        self.waited: Clock = {}

    def __repr__(self) -> str:
        return f"<{self.name} of {self.device}>"

    def now(self) -> Clock:
        return {**self.waited, self: self.queued}

    def wait(self, clock: Clock) -> None:
        for stream, kernel in clock.items():
            self.waited[stream] = max(kernel, self.waited.get(stream, 0))

    def wait_stream(self, other: FakeStream) -> None:
        self.wait(other.now())

    def synchronize(self) -> None:
        self.cuda.host.wait(self.now())


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self._clock = cuda, {}

    def record(self, stream: FakeStream | None = None) -> None:
        self._clock = (stream or self._cuda.current_stream()).now()

    def synchronize(self) -> None:
        self._cuda.host.wait(self._clock)

    def elapsed_time(self, end: FakeEvent) -> float:
        (stream,) = end._clock.keys() & self._clock.keys()
        return float(end._clock[stream] - self._clock[stream])


class FakeCuda:
    """The device: launches kernels and checks what they read.

    failure: raised by `synchronize` if set, as by a device that has failed
    """

    def __init__(self) -> None:
        self.failure: RuntimeError | None = None
        self.host = FakeStream(self, torch.device("cpu"), "host")
        self.streams: list[FakeStream] = []
        self._local = threading.local()
        self._default: dict[int, FakeStream] = {}

    def current_stream(self, device: Any = None) -> FakeStream:
        index = self._state().device if device is None else torch.device(device).index or 0
        return self._state().streams.get(index) or self.default_stream(index)

    def default_stream(self, index: int = 0) -> FakeStream:
        device = torch.device("cuda", index)
        return self._default.setdefault(index, FakeStream(self, device, "default stream"))

    def new_stream(self, device: Any = None) -> FakeStream:
        found = torch.device("cuda", torch.device(device).index or 0)
        self.streams.append(FakeStream(self, found, f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        with self.device(stream.device):
            streams = self._state().streams
            before = streams.get(stream.device.index)
            streams[stream.device.index] = stream
            try:
                yield
            finally:
                streams[stream.device.index] = before

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self._state().device
        self._state().device = device.index or 0
        try:
            yield
        finally:
            self._state().device = before

    def synchronize(self, device: Any = None) -> None:
        if self.failure is not None:
            raise self.failure
        for stream in [*self.streams, *self._default.values()]:
            self.host.wait(stream.now())

    def launch(self, output: torch.Tensor, *inputs: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Queue a kernel on the current stream that reads the inputs and writes the output."""
        stream = self.current_stream(torch.device("cuda", index))
        for tensor in inputs:
            self.check_read(tensor, stream)
        stream.wait(self.host.waited)
        stream.queued += 1
        output.fake_writer = (stream, stream.queued)
        return output

    def check_read(self, tensor: torch.Tensor, reader: FakeStream) -> None:
        """Fail if the reader has not waited for a tensor, or its memory may be reused meanwhile."""
        tensor = tensor if tensor._base is None else tensor._base  # type: ignore[attr-defined]
        writer, kernel = getattr(tensor, "fake_writer", (reader, 0))
        if writer is reader:
            return
        assert reader.waited.get(writer, 0) >= kernel, f"{reader} did not wait for {writer}"
        recorded = reader is self.host or reader in getattr(tensor, "fake_readers", ())
        assert recorded, f"memory of {writer} may be reused while {reader} reads it"

    def check_idle(self, stream: FakeStream) -> None:
        """Fail unless the host knows that all kernels of a stream have ended."""
        assert self.host.waited.get(stream, 0) == stream.queued, f"kernels of {stream} may run"

    def _state(self) -> Any:
        if not hasattr(self._local, "streams"):
            self._local.streams, self._local.device = {}, 0
        return self._local


class DeviceTensor(torch.Tensor):
    """A tensor in main memory that passes for one on the second GPU."""

    device = torch.device("cuda", 1)  # type: ignore[assignment]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """`torch.cuda` with fake streams, and tensors whose copies are kernels."""
    fake = FakeCuda()
    for name, value in {
        "Stream": fake.new_stream,
        "Event": lambda **_: FakeEvent(fake),
        "current_stream": fake.current_stream,
        "stream": fake.stream,
        "device": fake.device,
        "synchronize": fake.synchronize,
        "current_device": lambda: fake._state().device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    to, copy_, empty = torch.Tensor.to, torch.Tensor.copy_, torch.empty

    def fake_to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
            return fake.launch(tensor.clone(), tensor, index=args[0].index or 0)
        return to(tensor, *args, **options)

    def fake_copy(tensor: torch.Tensor, source: torch.Tensor, **_: Any) -> torch.Tensor:
        copy_(tensor, source)
        return fake.launch(tensor, source, index=source.device.index or 0)

    def record_stream(tensor: torch.Tensor, stream: FakeStream) -> None:
        tensor.fake_readers = {*getattr(tensor, "fake_readers", ()), stream}

    def fake_empty(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*args, **options)

    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    monkeypatch.setattr(torch.Tensor, "copy_", fake_copy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(torch, "empty", fake_empty)
    return fake
