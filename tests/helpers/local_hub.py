"""A server on this machine with the endpoints of the Hugging Face hub that huggingface_hub calls for models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class LocalHub:
    """Repositories in memory: all commits of a repository by hash, and the last commit of each branch.

    `requests` lists methods and paths, `token` is the required login for writing. Files that end in .safetensors are
    uploaded with the protocol of Git LFS, as on the hub.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> hash -> files
        self.branches: dict[str, dict[str, str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a branch or commit; None if there is no such revision."""
        commit = self.branches.get(repo, {}).get(revision, revision)
        files = self.commits.get(repo, {}).get(commit)
        return None if files is None else (commit, files)

    def commit(self, repo: str, branch: str, changes: dict[str, bytes]) -> str:
        """Add files to a branch."""
        _, files = self.files(repo, branch) or ("", {})
        files = {**files, **changes}
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[name] = files
        self.branches.setdefault(repo, {})[branch] = name
        return name

    def add_folder(self, repo: str, folder: Path) -> str:
        """Publish a folder as a repository."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.commit(repo, "main", files)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def _reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._reply(404, b"", X_Error_Code=code)

    def _handle(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("POST", "PUT") and "hf_writer" not in self.headers.get("Authorization", "hf_writer"):
            return self._reply(401, b"", X_Error_Message="Invalid user token.")
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                return answer(self, body, *found.groups())
        return self._missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        if repo not in self.hub.branches:
            return self._missing("RepoNotFound")
        found = self.hub.files(repo, revision or "main")
        if found is None:
            return self._missing("RevisionNotFound")
        return self._json({"id": repo, "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self.hub.files(repo, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        digests = {name: hashlib.sha1(content).hexdigest() for name, content in found[1].items()}
        sizes = {name: len(content) for name, content in found[1].items()}
        return self._json([{"type": "file", "path": n, "size": sizes[n], "oid": digests[n]} for n in sizes])

    def _file(self, body: bytes, repo: str, revision: str, name: str) -> None:
        found = self.hub.files(repo, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        commit, files = found
        if name not in files:
            return self._missing("EntryNotFound")
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return self._reply(200, files[name], ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def _create(self, body: bytes) -> None:
        request = json.loads(body)
        repo = "/".join(filter(None, (request.get("organization"), request["name"])))
        if repo in self.hub.branches:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.commit(repo, "main", {})
        return self._json({"url": f"{self.hub.url}/{repo}"})

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        if branch in self.hub.branches[repo]:
            return self._json({"error": "Reference already exists"}, 409)
        self.hub.branches[repo][branch] = self.hub.branches[repo]["main"]
        return self._json({})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        actions = {"upload": {"href": f"{self.hub.url}/objects/"}}
        objects = [
            {**item, "actions": {"upload": {"href": actions["upload"]["href"] + item["oid"]}}}
            for item in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _object(self, body: bytes, oid: str) -> None:
        self.hub.objects[oid] = body
        self._reply(200, b"")

    def _commit(self, body: bytes, repo: str, branch: str) -> None:
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit(repo, branch, changes)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})

    def _yaml(self, body: bytes) -> None:
        self._json({"warnings": [], "errors": []})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", rf"/api/models/{_REPO}(?:/revision/([\w.-]+))?", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/tree/([\w.-]+)", _Handler._tree),
    ("HEAD", rf"/{_REPO}/resolve/([\w.-]+)/(.+)", _Handler._file),
    ("GET", rf"/{_REPO}/resolve/([\w.-]+)/(.+)", _Handler._file),
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", rf"/api/models/{_REPO}/branch/([\w.-]+)", _Handler._branch),
    ("POST", rf"/api/models/{_REPO}/preupload/([\w.-]+)", _Handler._preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/objects/(\w+)", _Handler._object),
    ("POST", rf"/api/models/{_REPO}/commit/([\w.-]+)", _Handler._commit),
    ("POST", r"/api/validate-yaml", _Handler._yaml),
]


@contextmanager
def local_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LocalHub]:
    """Run the server, and let huggingface_hub use it with an empty cache and a token for writing."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    hub = _Handler.hub = LocalHub(url)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", raising=False
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
