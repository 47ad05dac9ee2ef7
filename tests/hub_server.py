"""A Hub in this process: the part of its HTTP API by which files get there and back, with faults to order.

Repositories are lists of commits; a commit is a mapping of path to bytes. Large files come first, by the LFS protocol,
and are part of a repository when a commit names them. What the real one refuses, this refuses: other people's names,
objects that were not uploaded or are not what their digest says, a commit upon a head that is no longer one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = ("*.safetensors", "*.png", "*.gguf")
"""What is stored as large files."""
OWNER = "me"
"""Whose token every request has."""


@dataclass
class Repo:
    private: bool
    writable: bool = True
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class Hub:
    """`url` is its address; use it as a context."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        """Every request: method and path."""
        self.break_at: Callable[[str], bool] = lambda request: False
        """Of which request the connection breaks, before anything is done."""
        self.break_after: Callable[[str], bool] = lambda request: False
        """The same, when all is done and the answer is on its way."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request; bytes are sent as they are."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case "PUT", ["objects", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    return 400, {"error": "not what the digest says"}
                self.objects[oid] = body
                return 200, {}
        repo_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        repo = self.repos.get(repo_id)
        if repo is None:
            return 404, {"error": "Repository not found"}
        match method, parts[4:] if parts[0] == "api" else parts[2:]:
            case "GET", [] | ["revision", _]:
                files = [{"rfilename": name} for name in sorted(repo.files)]
                return 200, {"id": repo_id, "sha": repo.sha, "private": repo.private, "siblings": files}
            case "GET", ["tree", _]:
                sizes = {name: len(data) for name, data in sorted(repo.files.items())}
                return 200, [{"type": "file", "path": n, "size": s, "oid": repo.sha} for n, s in sizes.items()]
            case "GET" | "HEAD", ["resolve", _, *names]:
                found = repo.files.get("/".join(names))
                return (404, {"error": "Entry not found"}) if found is None else (200, found)
        if not repo.writable:
            return 403, {"error": f"You don't have the rights to write to {repo_id}"}
        match method, parts[4:] if parts[0] == "api" else parts[2:]:
            case "POST", ["preupload", _]:
                return 200, {"files": [self._mode(repo, f, json.loads(body)) for f in json.loads(body)["files"]]}
            case "POST", ["info", "lfs", "objects", "batch"]:
                return 200, {"objects": [self._upload(o) for o in json.loads(body)["objects"]], "transfer": "basic"}
            case "POST", ["commit", "main"]:
                return self._commit(repo, repo_id, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no such thing: {method} {path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return 409, {"error": "You already created this model repo", **url}
        if wanted["organization"] != OWNER:
            return 403, {"error": f'You don\'t have the rights to create a model under "{wanted["organization"]}"'}
        self.repos[repo_id] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return 200, url

    def _mode(self, repo: Repo, file: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        ignored = asked.get("gitIgnore", repo.files.get(".gitignore", b"").decode()).split()
        return {
            "path": file["path"],
            "uploadMode": "lfs" if any(fnmatch(file["path"], pattern) for pattern in LFS) else "regular",
            "shouldIgnore": any(fnmatch(file["path"], pattern) for pattern in ignored),
            "oid": None,
        }

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        there = item["oid"] in self.objects
        place = {"href": f"{self.url}/objects/{item['oid']}", "header": {}}
        return {**item, **({} if there else {"actions": {"upload": place}})}

    def _commit(self, repo: Repo, repo_id: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit") not in (None, repo.sha):
                        return 412, {"error": "A commit has happened since. Please refresh and try again."}
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        return 400, {"error": f"{value['path']}: this large file was not uploaded"}
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return 404, {"error": "A file with this name doesn't exist"}
        repo.commits.append(files)
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{repo.sha}", "commitOid": repo.sha}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        if self.hub.break_at(request):
            return self._hang_up()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, found = self.hub.answer(self.command, path, body)
        if self.hub.break_after(request):
            return self._hang_up()
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        if isinstance(found, bytes):
            sha = self.hub.repos["/".join(path.strip("/").split("/")[:2])].sha
            self.send_header("ETag", f'"{hashlib.sha256(found).hexdigest()}"')
            self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
