"""A network that fails as networks do: an HTTP proxy before a store that loses, breaks and delays.

Every request may meet one fault, drawn by a seeded generator. The store behind it is real and
does not know of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

KINDS = ("slow_down", "reset", "lost", "stall", "truncate", "damage", "trickle")
"""What may happen to a request:

slow_down  503 from a busy store, which has done nothing
reset      the connection is reset before the request arrives
lost       the request is carried out, and the connection reset before the answer
stall      no answer, for a long time
truncate   the answer breaks off half way
damage     half of the answer, with a matching Content-Length
trickle    the answer comes byte by byte
"""


def refusal(status: int, code: str, message: str, *, more: str = "", head: str = "") -> bytes:
    """An answer as S3 refuses: an error document, with more elements and header lines."""
    document = (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code>"
        f"<Message>{message}</Message>{more}</Error>"
    )
    return (
        f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\n{head}"
        f"Content-Length: {len(document)}\r\n\r\n{document}"
    ).encode()


@dataclass
class Proxy:
    """The store as seen through the network.

    share: of requests that meet a fault, by kind; delay: seconds added to every answer
    drop:  a header that requests lose on the way, in lower case
    respond: gives the response to a request's head in place of the store, if not None
    met:   faults that happened
    """

    upstream: str
    share: dict[str, float] = field(default_factory=dict)
    delay: float = 0.0
    drop: str | None = None
    respond: Callable[[str], bytes | None] | None = None
    seed: int = 0
    met: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        """Serve from a thread of its own until the end of the block."""
        self._draw = random.Random(self.seed)
        loop = asyncio.new_event_loop()
        started = threading.Event()
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        async def serve() -> None:
            server = await asyncio.start_server(self._client, sock=listener, limit=1 << 20)
            started.set()
            async with server:
                await server.serve_forever()

        def run() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            for left in asyncio.all_tasks(loop):
                left.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    loop.run_until_complete(left)
            loop.close()

        task = loop.create_task(serve())
        thread = threading.Thread(target=run, name="fault-proxy", daemon=True)
        thread.start()
        started.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(10)

    def _fault(self) -> str | None:
        """The fault that the next request meets, if any."""
        point = self._draw.random()
        for kind, share in self.share.items():
            if point < share:
                self.met[kind] += 1
                return kind
            point -= share
        return None

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError
        ):
            while await self._request(reader, writer):
                pass
        with contextlib.suppress(Exception):
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Carry one request; whether the connection goes on."""
        head, body = await _message(reader, client=writer)
        head = _without(head, b"expect:")
        if self.drop is not None:
            head = _without(head, self.drop.encode() + b":")
        self.requests[head.partition(b" ")[0].decode()] += 1
        response = self.respond(head.decode()) if self.respond is not None else None
        if response is not None:
            writer.write(response)
            await writer.drain()
            return True
        fault = self._fault()
        if fault == "reset":
            return _reset(writer)
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "slow_down":
            writer.write(refusal(503, "SlowDown", "Please reduce your request rate."))
            await writer.drain()
            return True
        if self.delay:
            await asyncio.sleep(self.delay)
        answer, content = await self._ask(head, body)
        if fault == "lost":
            return _reset(writer)
        lasting = answer.startswith(b"HTTP/1.1") and b"connection: close" not in answer.lower()
        if fault == "truncate" and content:
            writer.write(answer + content[: len(content) // 2])
            await writer.drain()
            return False
        if fault == "damage" and content:
            content = content[: len(content) // 2]
            answer = _with_length(answer, len(content))
        if fault == "trickle" and content:
            writer.write(answer)
            for start in range(len(content)):
                writer.write(content[start : start + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
            return lasting
        writer.write(answer + content)
        await writer.drain()
        return lasting

    async def _ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        place = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
        writer.write(head + body)
        await writer.drain()
        without_body = head.startswith(b"HEAD")
        answer = await _message(reader, without_body=without_body)
        writer.close()
        return answer


async def _message(
    reader: asyncio.StreamReader,
    *,
    client: asyncio.StreamWriter | None = None,
    without_body: bool = False,
) -> tuple[bytes, bytes]:
    """Head and body of a client's request, or of an answer, as they came."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if client is not None and b"expect: 100-continue" in lines:
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
    if client is None and (without_body or lines[0].split()[1] in (b"204", b"304")):
        return head, b""
    if fields.get(b"transfer-encoding") == b"chunked":
        body = b""
        while True:
            size = await reader.readuntil(b"\r\n")
            length = int(size.split(b";")[0], 16)
            chunk = await reader.readexactly(length + 2) if length else b""
            body += size + chunk
            if not length:
                while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
                    body += line
                return head, body + b"\r\n"
    if b"content-length" in fields:
        return head, await reader.readexactly(int(fields[b"content-length"]))
    return head, await reader.read() if client is None else b""


def _without(head: bytes, *fields: bytes) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith(fields))


def _with_length(head: bytes, length: int) -> bytes:
    kept = _without(head, b"content-length:", b"transfer-encoding:").rstrip(b"\r\n")
    return kept + b"\r\nContent-Length: %d\r\n\r\n" % length


def _reset(writer: asyncio.StreamWriter) -> bool:
    """Close so that the other side sees a reset, not an end."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
