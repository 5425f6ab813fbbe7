"""A hub on loopback that speaks what huggingface_hub asks of one: repositories held in memory.

Faults are asked for by path, one a request: "stall" (no answer until the hub closes), "cut" (half
of a file, then the connection breaks) and "alter" (a byte of it is another).
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_FILES = rf"/(?P<datasets>datasets/)?{_REPO}"
_API = rf"/api/(?P<kind>model|dataset)s/{_REPO}"


@lru_cache
def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@lru_cache
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _large(path: str) -> bool:
    return path.endswith((".safetensors", ".stl", ".bin", ".hdf5"))


class Repository:
    """Commits, each with all its files, the last of them `main`."""

    def __init__(self, private: bool = False) -> None:
        self.private, self.commits = private, {}

    def commit(self, files: dict[str, bytes]) -> str:
        listed = json.dumps(
            {k: _git(v) for k, v in sorted(files.items())} | {"n": len(self.commits)}
        )
        sha = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    @property
    def main(self) -> str:
        return next(reversed(self.commits))

    def resolve(self, revision: str) -> str | None:
        sha = self.main if revision == "main" else revision
        return sha if sha in self.commits else None


class Hub:
    """`with Hub() as hub:`; hub.endpoint, hub.repositories, hub.faults, hub.requests."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, files: dict[str, bytes], kind: str = "model") -> str:
        """One commit more of a repository."""
        return self.repositories.setdefault((kind, name), Repository()).commit(files)

    def asked(self, method: str, part: str) -> list[str | None]:
        """The ranges of all requests of a method whose path holds `part`."""
        return [r for m, path, r in self.requests if m == method and part in path]

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        faults = next((f for part, f in self.hub.faults.items() if f and part in self.path), None)
        # The question for a file's hash is not the file: cuts and alterations wait for that.
        plain = self.command == "HEAD" and faults and faults[0] != "stall"
        self.fault = faults.pop(0) if faults and not plain else None
        if self.fault == "stall":
            self.hub.closing.wait()
            self.close_connection = True
            return
        for pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, self.path)
            if found:
                return answer(self, **found.groupdict())
        self._fail(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _send(self, data: bytes, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault == "cut":
                data, self.close_connection = data[: len(data) // 2], True
            if self.fault == "alter":
                data = bytes([data[0] ^ 1]) + data[1:]
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200, **headers: object) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _fail(self, status: int, code: str) -> None:
        self._json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _at(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files, or an answer that says there is none."""
        found = self.hub.repositories.get((kind, repo))
        if found is None or (found.private and not self._may_write()):
            return self._fail(404, "RepoNotFound")
        sha = found.resolve(revision)
        return (sha, found.commits[sha]) if sha else self._fail(404, "RevisionNotFound")

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        if at := self._at(kind, repo, revision or "main"):
            siblings = [{"rfilename": path} for path in at[1]]
            self._json({"id": repo, "sha": at[0], "siblings": siblings, "private": False})

    def tree(self, kind: str, repo: str, revision: str) -> None:
        if at := self._at(kind, repo, revision):
            rows = []
            for path, data in at[1].items():
                row = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
                if _large(path):
                    oid = _sha256(data)
                    row["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
                rows.append(row)
            self._json(rows)

    def resolve(self, repo: str, revision: str, file: str, datasets: str | None) -> None:
        at = self._at("dataset" if datasets else "model", repo, revision)
        if at is None:
            return
        if file not in at[1]:
            return self._fail(404, "EntryNotFound")
        data = at[1][file]
        etag = _sha256(data) if _large(file) else _git(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": at[0], "X-Linked-Size": len(data)}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not begin:
            return self._send(data, **headers)
        start = int(begin[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(data[start:], 206, **headers)

    def create(self) -> None:
        if not self._may_write():
            return self._fail(401, "Unauthorized")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        key = (asked.get("type") or "model", name)
        if key in self.hub.repositories:
            return self._json({"url": f"{self.hub.endpoint}/{name}"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[key] = Repository(private)
        self.hub.repositories[key].commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if _large(f["path"]) else "regular",
             "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._json({"files": files})

    def batch(self, repo: str, datasets: str | None) -> None:
        href = f"{self.hub.endpoint}/upload/"
        objects = [
            {**o, "actions": {"upload": {"href": href + o["oid"]}}}
            for o in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        self.hub.uploads[oid] = self.body
        self._send(b"")

    def commit(self, kind: str, repo: str, revision: str) -> None:
        if not self._may_write():
            return self._fail(403, "Forbidden")
        found = self.hub.repositories[kind, repo]
        files = dict(found.commits[found.main])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        sha = found.commit(files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def yaml(self) -> None:
        self._json({})


_ROUTES = [
    (_API, _Handler.info),
    (_API + r"/revision/(?P<revision>.+)", _Handler.info),
    (_API + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    (_API + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    (_API + r"/commit/(?P<revision>.+)", _Handler.commit),
    (
        rf"/(?P<datasets>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
    (_FILES + r"\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/upload/(?P<oid>\w+)", _Handler.upload),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.yaml),
]
