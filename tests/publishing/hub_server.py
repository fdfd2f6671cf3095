"""A server with the requests of Hugging Face that publishing a data set makes, over real HTTP."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """One data set, `me/photos`: its commits, and the content of its files by SHA-256.

    lose_races: number of commits that another writer precedes
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = Lock()
        self.commits: list[dict[str, Any]] = [{"sha": _hash("0"), "files": {}, "summary": ""}]
        self.blobs: dict[str, bytes] = {}
        self.lose_races = 0

    @property
    def files(self) -> dict[str, bytes]:
        """Content of the files of the newest commit."""
        return {path: self.blobs[oid] for path, oid in self.commits[-1]["files"].items()}

    def commit(self, lines: list[dict[str, Any]]) -> str | None:
        """Apply a commit; None if it does not follow the newest one."""
        with self.lock:
            if self.lose_races:
                self.lose_races -= 1
                self._add(dict(self.commits[-1]["files"]), "of another writer")
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header["parentCommit"] != self.commits[-1]["sha"]:
                return None
            files = dict(self.commits[-1]["files"])
            for line in lines:
                value = line["value"]
                if line["key"] == "deletedFolder":
                    files = {p: o for p, o in files.items() if not p.startswith(value["path"])}
                elif line["key"] == "lfsFile":
                    assert value["oid"] in self.blobs
                    files[value["path"]] = value["oid"]
            return self._add(files, header["summary"])

    def _add(self, files: dict[str, str], summary: str) -> str:
        sha = _hash(str(len(self.commits)))
        self.commits.append({"sha": sha, "files": files, "summary": summary})
        return sha


def _hash(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/datasets/me/photos":
            self._answer({"id": "me/photos", "sha": self.server.commits[-1]["sha"]})
        elif path.startswith("/api/datasets/me/photos/tree/"):
            sha = path.split("/")[6]
            files = next(c["files"] for c in self.server.commits if c["sha"] == sha)
            found = sorted({file.rpartition("/")[0] for file in files})
            if not found:
                self._answer({"error": "no such folder"}, 404, "EntryNotFound")
                return
            self._answer([{"type": "directory", "path": each, "oid": "0"} for each in found])
        else:
            self._answer({"error": "not found"}, 404, "RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "lfs", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/blob/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            sha = self.server.commit([json.loads(line) for line in body.splitlines()])
            if sha is None:
                self._answer({"error": "A commit has happened since."}, 412)
            else:
                self._answer(
                    {
                        "commitUrl": f"{self.server.url}/datasets/me/photos/commit/{sha}",
                        "commitOid": sha,
                    }
                )

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self._answer({})

    def _answer(self, body: Any, status: int = 200, code: str = "") -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
