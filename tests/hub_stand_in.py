# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
A model Hub on this machine, in memory, that speaks the HTTP of the real one as far as `huggingface_hub` uses it for
models: creating repositories, committing with and without LFS, listing, downloading, private repositories.

    with HubStandIn({"hf_alice": "alice"}) as hub:
        ...  # a process whose environment has hub.environment(tmp_path) talks to it

`huggingface_hub` reads its address when it is imported, so its user is a fresh process.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


# What the real Hub stores as LFS by the `.gitattributes` of a new repository, and above which size everything
_LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".model", ".npy", ".npz", ".parquet", ".pickle", ".pkl", ".pt", ".pth")
_LFS_SUFFIXES += (".safetensors", ".tar", ".zip")
_LFS_SIZE = 10 * 1024 * 1024


@dataclass
class Repo:
    """
    A repository: its files by path at each commit, newest last, and the messages of the commits.

    Args:
        private (`bool`):
            Whether only its owner may see it.
    """

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def commit(self, files: dict[str, bytes], message: str) -> None:
        self.commits.append(files)
        self.messages.append(message)

    def sha(self, number: int = -1) -> str:
        number %= len(self.commits)
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def at(self, revision: str) -> int | None:
        """The number of a commit, by its hash or as the newest of `main`."""
        if revision == "main":
            return len(self.commits) - 1
        return next((i for i in range(len(self.commits)) if self.sha(i) == revision), None)


class HubStandIn:
    """
    The server.

    Args:
        tokens (`dict[str, str]`):
            The user of each token. A user may write, and read what is private, under their own name only.

    Attributes:
        repos (`dict[str, Repo]`):
            Repositories by id. Tests read what was pushed here, and put here what is to be downloaded.
        requests (`list[tuple[str, str, str or None]]`):
            Method, path and user of every request.
        unknown (`list[str]`):
            Requests that the stand-in does not know, and answered with 501.
        lfs_size (`int`):
            Files larger than this, in bytes, are stored as LFS.
        refuse_commits (`set[str]`):
            Repositories to which commits are answered with 403.
        before_upload (`Callable[[dict[str, int]], None]`, *optional*):
            Called before LFS files may be uploaded, with the size of each by its hash.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[str] = []
        self.lfs_size = _LFS_SIZE
        self.refuse_commits: set[str] = set()
        self.before_upload: Callable[[dict[str, int]], None] | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Large files are on another host, which is sent no token: the same server by another name
        self.lfs_url = self.url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Makes a repository with files whose names are not checked, as a hostile server's would not be."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit(dict(files), "by hand")
        return repo

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that knows this Hub and no other, with an empty cache and nobody logged in."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # its chunks are another protocol; without it files are uploaded as LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def is_lfs(self, path: str, size: int) -> bool:
        return path.endswith(_LFS_SUFFIXES) or size > self.lfs_size


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each answer is two writes, of which the second would wait 40 ms

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b"".join(iter(self._chunk, b""))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        self.hub.requests.append((self.command, path, self.user))
        if token and self.user is None:
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for method, pattern, name in _ROUTES:
            if (match := re.fullmatch(pattern, path)) and self.command in method.split("|"):
                return getattr(self, name)(**match.groupdict())
        self.hub.unknown.append(f"{self.command} {path}")
        return self._send(501, {"error": "the stand-in does not know this request"})

    def _chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def _send(self, status: int, content, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _repo(self, repo: str, write: bool = False) -> Repo | None:
        """The repository, if this user may see it, or write to it; else `None`, and the answer is sent."""
        found = self.hub.repos.get(repo)
        owner = repo.split("/")[0] == self.user
        if found is None or (found.private and not owner):
            # The real Hub does not tell a stranger whether a private repository exists
            self._error(404 if self.user else 401, "RepoNotFound")
            return None
        if write and not owner:
            self._error(403, "Forbidden")
            return None
        return found

    # Repositories

    def create(self) -> None:
        if self.user is None:
            return self._send(401, {"error": "Unauthorized"})
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != self.user:
            return self._error(403, "Forbidden")
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self._send(409, answer | {"error": "You already created this model repo"})
        self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        return self._send(200, answer)

    def whoami(self) -> None:
        if self.user is None:
            return self._send(401, {"error": "Unauthorized"})
        return self._send(200, {"type": "user", "name": self.user, "orgs": [], "auth": {}})

    def info(self, repo: str, revision: str = "main") -> None:
        if (found := self._repo(repo)) is None:
            return None
        if (number := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in found.commits[number]]
        info = {"id": repo, "sha": found.sha(number), "private": found.private, "siblings": siblings, "tags": []}
        return self._send(200, info)

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if (found := self._repo(repo)) is None:
            return None
        if (number := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        prefix = f"{folder}/" if folder else ""
        files = {path: data for path, data in found.commits[number].items() if path.startswith(prefix)}
        if folder and not files:
            return self._error(404, "EntryNotFound")
        return self._send(200, [self._entry(path, data) for path, data in files.items()])

    def paths_info(self, repo: str, revision: str) -> None:
        if (found := self._repo(repo)) is None:
            return None
        if (number := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        files, wanted = found.commits[number], json.loads(self.body)["paths"]
        return self._send(200, [self._entry(path, files[path]) for path in wanted if path in files])

    def _entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
        if self.hub.is_lfs(path, len(data)):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    # Downloads

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._repo(repo)) is None:
            return None
        if (number := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        headers = {"X_Repo_Commit": found.sha(number)}
        data = found.commits[number].get(path)
        if data is None:
            return self._send(404, {}, **headers, X_Error_Code="EntryNotFound")
        if self.hub.is_lfs(path, len(data)):
            oid = hashlib.sha256(data).hexdigest()
            self.hub.lfs[oid] = data
            headers |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data))}
            return self._send(302, b"", **headers, Location=f"{self.hub.lfs_url}/lfs-files/{oid}")
        return self._send(200, data, **headers, ETag=f'"{_git_hash(data)}"')

    def lfs_file(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self._send(400, {"error": "the content is not what was announced"})
            self.hub.lfs[oid] = self.body
            return self._send(200, b"")
        if oid not in self.hub.lfs:
            return self._send(404, {})
        return self._send(200, self.hub.lfs[oid], ETag=f'"{oid}"')

    # Uploads

    def validate_yaml(self) -> None:
        match = re.match(r"---\n(.*?\n)---\n", json.loads(self.body)["content"], re.DOTALL)
        if match is None or not isinstance(yaml.safe_load(match[1]), dict):
            return self._send(400, {"errors": [{"message": "the card has no metadata"}]})
        return self._send(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if (found := self._repo(repo, write=True)) is None:
            return None
        modes = []
        for file in json.loads(self.body)["files"]:
            lfs, data = self.hub.is_lfs(file["path"], file["size"]), found.files.get(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if lfs else _git_hash(data)
            mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            modes.append(mode | ({"oid": oid} if oid else {}))
        return self._send(200, {"files": modes, "commitOid": found.sha()})

    def lfs_batch(self, repo: str) -> None:
        if self._repo(repo, write=True) is None:
            return None
        objects = json.loads(self.body)["objects"]
        if self.hub.before_upload is not None:
            self.hub.before_upload({item["oid"]: item["size"] for item in objects})
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.lfs_url}/lfs-files/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}}
        return self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.lfs.get(wanted["oid"])
        return self._send(200 if stored is not None and len(stored) == wanted["size"] else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        if (found := self._repo(repo, write=True)) is None:
            return None
        if repo in self.hub.refuse_commits:
            return self._error(403, "Forbidden")
        if revision != "main":
            return self._error(404, "RevisionNotFound")
        files, message = dict(found.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._send(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._send(400, {"error": f"unknown operation {item['key']}"})
        found.commit(files, message)
        url = f"{self.hub.url}/{repo}/commit/{found.sha()}"
        return self._send(200, {"success": True, "commitUrl": url, "commitOid": found.sha()})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", "/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", "/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", "/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("GET", "/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
    ("GET", "/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
    ("GET|HEAD", "/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET|HEAD|PUT", "/lfs-files/(?P<oid>[0-9a-f]{64})", "lfs_file"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
)
