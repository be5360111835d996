"""The part of the Hugging Face hub's HTTP interface that pushing and pulling a model needs, on this machine alone.

huggingface_hub and timm talk to it as they talk to the hub (``HF_ENDPOINT``): repositories, commits, files with their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

__all__ = ["Hub"]


class Hub:
    """Attributes:
    url: of the endpoint.
    repositories: name → {"private": bool, "branches": {branch: {path: bytes}}, "message": of the last commit}.
    token: that a client must send.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(*hub.read(unquote(urlparse(self.path).path)))

            def do_HEAD(self) -> None:
                self._answer(*hub.read(unquote(urlparse(self.path).path)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._answer(401, {}, b'{"error": "Invalid token"}')
                    return
                self._answer(*hub.write(unquote(urlparse(self.path).path), body))

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        return Handler

    def write(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """A POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name in self.repositories:
                return _json({"error": "exists", "url": f"{self.url}/{name}"}, 409)
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.repositories[name] = {"private": private, "branches": {"main": {}}, "message": ""}
            return _json({"url": f"{self.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if found is None or found[1] not in self.repositories:
            return _json({"error": f"no {path}"}, 404)
        name, verb, branch = found.groups()
        branches = self.repositories[name]["branches"]
        if verb == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return _json({})
        if verb == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            return _json({"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.repositories[name]["message"] = value["summary"]
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                branches[branch][value["path"]] = base64.b64decode(value["content"])
        commit = self._commit(name, branch)
        return _json({"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"})

    def read(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """A GET or HEAD."""
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if found and found[1] in self.repositories:
            name, what, revision = found.groups()
            files = self._files(name, revision or "main")
            if files is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if what == "tree":
                rows = [
                    {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for f, c in files.items()
                ]
                return _json(rows)
            facts = {"id": name, "modelId": name, "private": self.repositories[name]["private"], "tags": []}
            facts |= {
                "sha": self._commit(name, revision or "main"),
                "siblings": [{"rfilename": file} for file in files],
            }
            return _json({**facts, "downloads": 0, "likes": 0})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        name, revision, file = found.groups()
        files = self._files(name, revision)
        if files is None or file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self._commit(name, "main")}, b"{}"
        content = files[file]
        headers = {"X-Repo-Commit": self._commit(name, revision), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return 200, headers, content

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repositories[name]["branches"]
        by_commit = {self._commit(name, branch): files for branch, files in branches.items()}
        return branches.get(revision, by_commit.get(revision))

    def _commit(self, name: str, revision: str) -> str:
        files = self.repositories[name]["branches"].get(revision)
        if files is None:
            return revision
        digest = hashlib.sha1(name.encode())
        for file, content in sorted(files.items()):
            digest.update(file.encode() + content)
        return digest.hexdigest()


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()
