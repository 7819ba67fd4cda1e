"""A data set hub on this machine, with faults on demand; and a way to write shards."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "c0ffee" + "0" * 34


def write_shard(path: Path, groups: list[list[str | None]], kind: pa.DataType | None = None) -> None:
    """A parquet file with these row groups of texts."""
    schema = pa.schema([("id", pa.int64()), ("text", kind or pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for texts in groups:
            writer.write_table(pa.table([list(range(len(texts))), texts], schema=schema))


class Gate:
    """Lets so many bytes of files through, then holds everybody until it is opened."""

    def __init__(self, num_bytes: int) -> None:
        self.left, self.lock = num_bytes, threading.Lock()
        self.reached, self.opened = threading.Event(), threading.Event()

    def passed(self, wanted: int) -> int:
        """How many of the wanted bytes may go on; waits while there are none."""
        with self.lock:
            allowed = min(wanted, self.left)
            self.left -= allowed
        if allowed == 0:
            self.reached.set()
            self.opened.wait(60)
            return wanted
        return allowed


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` by their paths in one data set, each request for one by the next of its `faults`.

    A fault is a status ("429", "500"), or "drop" (no answer), "truncate" (half of the bytes), "wrong" (other bytes),
    "hang" (half of the bytes, then silence), "whole" (ignores the range), "slow" (in small pieces).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.tokens: list[str | None] = []
        self.gate: Gate | None = None
        self.released = threading.Event()  # ends what hangs
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed are no errors of the server."""

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/"):
            self.api()
            return
        path = re.sub(r"^/(datasets/[^/]+/[^/]+/resolve/[^/]+/)?", "", self.path).split("?")[0]
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults and self.command == "GET" else "none"
        content = self.server.files.get(path)
        if fault == "drop":
            self.close_connection = True
            return
        if content is None or fault.isdigit():
            self.send_error(int(fault) if fault.isdigit() else 404)
            return
        self.send_content(content, fault)

    def send_content(self, content: bytes, fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = int(asked[1]) if asked and fault != "whole" and self.headers.get("If-Range", etag) == etag else 0
        if asked:
            self.server.ranges.append(self.headers["Range"])
        if start > len(content):
            self.send_error(416)
            return
        body = bytes(255 - b for b in content[start:]) if fault == "wrong" else content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("truncate", "hang"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "hang":
                self.server.released.wait(20)
            self.close_connection = True
        elif fault == "slow":
            step = max(1, len(body) // 50)
            for i in range(0, len(body), step):
                self.wfile.write(body[i : i + step])
                self.server.released.wait(0.002)
        elif gate := self.server.gate:
            while body:
                part = gate.passed(len(body))
                self.wfile.write(body[:part])
                body = body[part:]
        else:
            self.wfile.write(body)

    def api(self) -> None:
        """The two questions that are asked about a data set: which commit, and which files."""
        self.server.tokens.append(self.headers.get("Authorization"))
        faults = self.server.faults.get("api", [])
        if faults:
            self.send_error(int(faults.pop(0)))
            return
        if "/tree/" in self.path:
            answer: Any = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest(),
                    **(self.lfs(content) if not path.startswith("small") else {}),
                }
                for path, content in self.server.files.items()
            ]
        else:
            answer = {"id": "someone/texts", "sha": COMMIT, "siblings": [], "tags": [], "private": False}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def lfs(self, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        return {"lfs": {"oid": digest, "size": len(content), "pointerSize": 134}}

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""
