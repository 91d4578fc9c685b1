"""A Hugging Face hub on this machine: the few answers that a download needs, and its accidents."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes from which on a file is listed as in large-file storage


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    private: bool = False
    revisions: tuple[str, ...] = ("main",)


@dataclass
class FakeHub:
    """Attributes say what goes wrong; `requests` is what was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes before the line goes dead
    down: bool = False  # files answer 503
    flipped: set[str] = field(default_factory=set)  # files whose first byte arrives wrong
    ignore_ranges: bool = False
    extra_entries: list[dict] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    url: str = ""

    def asked(self, name: str) -> list[str | None]:
        """The Range headers of the requests for a file."""
        return [ranges for path, ranges in self.requests if path.endswith("/" + name)]

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.requests.append((path, request.headers.get("Range")))
        self.tokens.append(request.headers.get("Authorization"))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._listing(request, match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._moved(request, f"/storage/{match[1]}/{match[3]}")
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self._file(request, match[2], self.repositories[match[1]].files[match[2]], body)
        else:
            self._error(request, 404, "EntryNotFound")

    def _listing(
        self, request: http.server.BaseHTTPRequestHandler, name: str, revision: str
    ) -> None:
        repository = self.repositories.get(name)
        if repository is None:
            return self._error(request, 404, "RepoNotFound")
        authorised = "Authorization" in request.headers
        if repository.private and not authorised:
            return self._error(request, 401, "RepoNotFound")
        if repository.gated and not authorised:
            return self._error(request, 403, "GatedRepo")
        if revision not in (*repository.revisions, repository.commit):
            return self._error(request, 404, "RevisionNotFound")
        siblings = [self._entry(*item) for item in repository.files.items()]
        self._json(
            request,
            {"id": name, "sha": repository.commit, "siblings": siblings + self.extra_entries},
        )
        return None

    @staticmethod
    def _entry(name: str, data: bytes) -> dict:
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        entry: dict = {"rfilename": name, "size": len(data), "blobId": blob}
        if len(data) >= LARGE:
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
        return entry

    def _file(
        self, request: http.server.BaseHTTPRequestHandler, name: str, data: bytes, body: bool
    ) -> None:
        if self.down:
            return self._error(request, 503, "")
        if name in self.flipped:
            data = bytes([data[0] ^ 1]) + data[1:]
        ranges = request.headers.get("Range")
        start = int(ranges.removeprefix("bytes=").partition("-")[0]) if ranges else 0
        if self.ignore_ranges:
            ranges, start = None, 0
        request.send_response(206 if ranges else 200)
        if ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        request.end_headers()
        if not body:
            return None
        rest = data[start:]
        if name in self.cut:
            rest = rest[: self.cut.pop(name)]
            self.down = True
            request.close_connection = True
        request.wfile.write(rest)
        return None

    def _moved(self, request: http.server.BaseHTTPRequestHandler, target: str) -> None:
        request.send_response(302)
        request.send_header("Location", self.url + urllib.parse.quote(target))
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _error(self, request: http.server.BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _json(self, request: http.server.BaseHTTPRequestHandler, value: object) -> None:
        data = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)
