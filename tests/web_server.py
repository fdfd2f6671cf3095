"""A web server in this process whose answers a test sets up, and which records the requests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """One answer; `body` makes pieces that are sent as chunks, or is sent whole.

    missing: bytes at the end of the body that are announced, but not sent: the connection closes
    """

    status: int = 200
    body: bytes | Callable[[], Iterator[bytes]] = b""
    headers: dict[str, str] = field(default_factory=dict)
    missing: int = 0


class Server(ThreadingHTTPServer):
    """Answers each path as a test has set it up, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.lines: list[str] = []
        self.times: list[float] = []
        self.heads: list[dict[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.lines.append(self.raw_requestline.split(b" ")[1].decode("latin-1"))
            server.times.append(time.monotonic())
            server.heads.append({name.lower(): value for name, value in self.headers.items()})
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            replies = server.replies.get(self.path, [Reply(body=b"default")])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        time.sleep(server.pause)
        with server.lock:
            server.under_way -= 1
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        try:
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body[: len(reply.body) - reply.missing])
                self.close_connection |= reply.missing > 0
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in reply.body():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                server.sent[self.path] += len(piece)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the client has had enough

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server within the block."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()
