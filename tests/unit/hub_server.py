"""A server that speaks the part of the Hugging Face hub's API that huggingface_hub calls.

Paths, headers and status codes follow huggingface.co. Files of ``LARGE`` bytes and more are LFS
files: their content lies behind a redirect, and they are uploaded by the LFS batch protocol.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 5000
TOKEN = "hf_writer"


@dataclass
class Repository:
    """Commits (path to content) by hash, branches and tags, and who may read."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files, branch="main", message="Upload"):
        parts = [f"{len(self.commits)}"] + [f"{name}:{len(files[name])}" for name in sorted(files)]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.references[branch] = commit
        self.messages.append(message)
        return commit

    def resolve(self, revision):
        return revision if revision in self.commits else self.references.get(revision)


class HubServer(ThreadingHTTPServer):
    """The hub: repositories by name, its requests, and the names of the files that it sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.requests: list[str] = []
        self.sent: list[str] = []
        self.failure: int | None = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._dispatch()

    def do_GET(self):
        self._dispatch()

    def do_PUT(self):
        self._dispatch()

    def do_POST(self):
        self._dispatch()

    def _dispatch(self):
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.failure is not None:
            self._fail(self.server.failure, "", "the hub is down")
            return
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                handler(self, **match.groupdict())
                return
        self._fail(404, "EntryNotFound", f"no route {self.command} {path}")

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _repository(self, name, *, writes=False):
        """Return a repository that the caller may use, or answer as the hub does."""
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ")
        found = self.server.repositories.get(name)
        if token not in ("", TOKEN):
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif writes and not token:
            self._fail(401, "", "Invalid username or password.")
        elif found is None or (found.is_private and not token):
            # Without a token a missing repository looks like a private one.
            self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
        elif found.is_gated and not token:
            self._fail(401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return found
        return None

    def _resolved(self, name, revision):
        repository = self._repository(name)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def info(self, name, revision="main"):
        if found := self._resolved(name, revision):
            commit, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def tree(self, name, revision):
        if found := self._resolved(name, revision):
            self._answer(200, [_entry(path, content) for path, content in found[1].items()])

    def resolve(self, name, revision, file):
        found = self._resolved(name, revision)
        if not found:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            self._fail(404, "EntryNotFound", f"{file} does not exist", headers)
            return
        content = files[file]
        if len(content) >= LARGE:
            sha256 = hashlib.sha256(content).hexdigest()
            self.server.blobs[sha256] = content
            self.server.names[sha256] = file
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            # Another host than that of the hub, as the CDN is.
            cdn = self.server.url.replace("127.0.0.1", "localhost")
            self._answer(302, b"", headers | {"Location": f"{cdn}/cdn/{sha256}"})
        else:
            self._send_file(file, content, headers | {"ETag": f'"{_git_hash(content)}"'})

    def cdn(self, sha256):
        name = self.server.names[sha256]
        self._send_file(name, self.server.blobs[sha256], {"ETag": f'"{sha256}"'})

    def _send_file(self, name, content, headers):
        if self.command == "GET":
            self.server.sent.append(name)
        self._answer(200, content, headers)

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.headers.get("Authorization"):
            self._fail(401, "", "Invalid username or password.")
        elif name in self.server.repositories:
            self._answer(409, {"url": f"{self.server.url}/{name}", "error": "it exists"})
        else:
            made = Repository(is_private=wanted.get("visibility") == "private")
            made.commit({".gitattributes": b"*.onnx filter=lfs\n"}, message="initial commit")
            self.server.repositories[name] = made
            self._answer(200, {"url": f"{self.server.url}/{name}"})

    def branch(self, name, branch):
        if repository := self._repository(name, writes=True):
            if branch in repository.references:
                self._fail(409, "", "Reference already exists")
            else:
                repository.references[branch] = repository.references["main"]
                self._answer(200, {})

    def preupload(self, name, revision):
        if self._repository(name, writes=True):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._answer(200, {"files": files})

    def lfs_batch(self, name):
        if self._repository(name, writes=True):
            objects = json.loads(self.body)["objects"]
            for each in objects:
                if each["oid"] not in self.server.blobs:
                    action = {"href": f"{self.server.url}/cdn/{each['oid']}"}
                    each["actions"] = {"upload": action}
            self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            self._fail(400, "", "checksum mismatch")
            return
        self.server.blobs[sha256] = self.body
        self._answer(200, b"")

    def commit(self, name, revision):
        repository = self._repository(name, writes=True)
        if repository is None:
            return
        files = dict(repository.commits[repository.references[revision]])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, revision, message)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit})

    def validate_yaml(self):
        self._answer(200, {"errors": [], "warnings": []})

    def _fail(self, status, code, message, headers=()):
        headers = dict(headers) | {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(status, {"error": message}, headers)

    def _answer(self, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if len(content) >= LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/(?P<revision>.+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    (r"(?:GET|HEAD) /cdn/(?P<sha256>\w+)", _Handler.cdn),
    (r"PUT /cdn/(?P<sha256>\w+)", _Handler.lfs_put),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
]
