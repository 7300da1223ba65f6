"""A hub on loopback, with the part of the interface that uploading and downloading small files needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Hub"]


class Hub(ThreadingHTTPServer):
    """Serves repositories from memory.

    Attributes:
        repositories: content by file name, by repository and branch.
        private: those that were asked to be so.
        commits: messages, in order.
        token: what requests that write must bring.
    """

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.token = token

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repository: str, branch: str) -> dict[str, bytes] | None:
        """Those of a branch, by its name or by its commit."""
        branches = self.repositories.get(repository, {})
        return branches.get(branch) or next(
            (files for files in branches.values() if commit_of(files) == branch), None
        )


def commit_of(files: dict[str, bytes]) -> str:
    state = hashlib.sha1()
    for name in sorted(files):
        state.update(name.encode() + b"\0" + files[name])
    return state.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def _send(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
            return
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._send({"error": "who are you?"}, 401)
            return
        repositories = self.server.repositories
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            repositories.setdefault(name, {"main": {".gitattributes": b""}})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            self._send({"url": f"{self.server.address}/{name}", "name": name})
            return
        found = re.fullmatch(
            r"/api/models/([\w./-]+?)/(branch|preupload|commit)/([\w.-]+)", self.path.split("?")[0]
        )
        assert found, self.path
        name, action, branch = found.groups()
        if action == "branch":
            repositories[name].setdefault(branch, dict(repositories[name]["main"]))
            self._send({})
        elif action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._send({"files": [{**file, "shouldIgnore": False} for file in files]})
        else:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    repositories[name][branch][line["value"]["path"]] = content
                else:
                    self.server.commits.append(line["value"]["summary"])
            oid = commit_of(repositories[name][branch])
            self._send(
                {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"}
            )

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if tree := re.fullmatch(r"/api/models/([\w./-]+?)/tree/([\w.-]+)", path):
            files = self.server.files(*tree.groups()) or {}
            self._send([
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ])  # fmt: skip
            return
        if info := re.fullmatch(r"/api/models/([\w./-]+?)(?:/revision/([\w.-]+))?", path):
            name, branch = info.group(1), info.group(2) or "main"
            files = self.server.files(name, branch)
            if files is None:
                self._send({"error": "none"}, 404, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": file} for file in files]
            self._send(
                {"id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings, "tags": []}
            )
            return
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
        assert found, path
        files = self.server.files(found.group(1), found.group(2)) or {}
        data = files.get(found.group(3))
        if data is None:
            self._send({"error": "none"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit_of(files)}
        self._send(data, **headers)

    do_HEAD = do_GET
