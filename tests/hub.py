"""A hub on this machine, of folders: what huggingface_hub's own client asks of the real one, it asks of this.

    with Hub(folder) as hub:  # folder/models/OWNER/NAME/config.json, folder/datasets/OWNER/NAME/...
        subprocess.run([...], env=os.environ | hub.environment(cache))

Repositories have one revision, main, which is also the commit `COMMIT`. Files of a commit come without LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
TOKEN = "hf_reader"  # of an account that may read what is gated, and write


class Hub(ThreadingHTTPServer):
    """Serves `root` until the end of a with statement.

    Args:
        gated: Models (OWNER/NAME) whose licence only the account of `TOKEN` has accepted.

    Attributes:
        asked: Method and path of each request, in their order.
    """

    def __init__(self, root: Path, gated: Collection[str] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.root, self.gated = root, {*gated}
        self.asked: list[str] = []

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """The variables with which a process asks this hub, with a cache of its own."""
        found = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}", "HF_HOME": str(cache)}
        found |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return found | ({"HF_TOKEN": token} if token else {})

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/api/"):
            self._resolve()
            return
        _, _, kind, owner, name, *rest = [*path.split("/"), "", ""]
        rest = [part for part in rest if part]
        folder = self._repository(kind, f"{owner}/{name}", rest[1] if len(rest) > 1 else "main")
        if folder is None:
            return
        if rest[:1] == ["tree"]:
            self._tree(folder, folder.joinpath(*rest[2:]), "recursive=true" in self.path.lower())
            return
        files = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
        card: dict[str, Any] = {"tags": [], "downloads": 0, "likes": 0, "private": False}
        self._json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": files, **card})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.server.root / f"{asked.get('type') or 'model'}s" / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.server.environment(Path())['HF_ENDPOINT']}/{name}", "id": name})
        else:
            self._post_to_repository(path, body)

    def _post_to_repository(self, path: str, body: bytes) -> None:
        _, _, kind, owner, name, what, *_ = path.split("/")
        folder = self._repository(kind, f"{owner}/{name}", "main")
        if folder is None:
            return
        if what == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else _form(body)
            self._json([_entry(folder, folder / each) for each in paths if (folder / each).exists()])
        elif what == "preupload":
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif what == "commit":
            for line in filter(None, body.split(b"\n")):
                said = json.loads(line)
                if said["key"] == "file":
                    file = folder / said["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(said["value"]["content"]))
            self._json({"commitUrl": f"/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self._refuse(404, "", f"Nothing here answers {self.path}")

    def _resolve(self) -> None:
        """A file: /OWNER/NAME/resolve/REVISION/FILE, of a data set behind /datasets."""
        parts = unquote(urlsplit(self.path).path).removeprefix("/").split("/")
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        if parts[2:3] != ["resolve"]:
            self._refuse(404, "", f"Nothing here answers {self.path}")
            return
        folder = self._repository(kind, "/".join(parts[:2]), parts[3], reads=True)
        if folder is None:
            return
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = file.read_bytes()
        begin, end = 0, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or end - 1) + 1, end)
            self._begin(206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}, end - begin, content)
        else:
            self._begin(200, {}, end, content)
        if self.command == "GET":
            self.wfile.write(content[begin:end])

    def _begin(self, status: int, headers: dict[str, str], length: int, content: bytes) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_response(status)
        known = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        for name, value in {**known, **headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _repository(self, kind: str, name: str, revision: str, reads: bool = False) -> Path | None:
        """Its folder; None: refused, as the real one does."""
        folder = self.server.root / kind / name.strip("/")
        if kind not in ("models", "datasets") or not folder.is_dir():
            self._refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif reads and name in self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 403 if "Authorization" in self.headers else 401
            self._refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return folder
        return None

    def _tree(self, folder: Path, below: Path, recursive: bool) -> None:
        if not below.exists():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        self._json([_entry(folder, path) for path in sorted(below.rglob("*") if recursive else below.iterdir())])

    def _json(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self._begin(200, {"Content-Type": "application/json"}, len(content), content)
        self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._begin(status, {"X-Error-Code": code, "X-Error-Message": message}, 0, b"")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _form(body: bytes) -> list[str]:
    return [unquote(part.partition(b"=")[2].decode()) for part in body.split(b"&") if part.startswith(b"paths=")]


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": str(path.relative_to(folder))}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": str(path.relative_to(folder))}
