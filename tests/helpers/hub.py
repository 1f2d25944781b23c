"""A hub of models on this machine: what huggingface_hub asks of one, in memory.

A repository holds one line of commits a branch. Every file is a "regular" one, which the commit
itself carries.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """repositories: name -> branch -> file -> bytes; commits: id -> files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []  # method and path of every request
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The id of a commit and its files, by branch or id."""
        branches = self.repositories.get(name)
        if branches is None:
            return None
        if revision in branches:
            return self.commit(branches[revision]), branches[revision]
        found = self.commits.get(revision)
        return None if found is None else (revision, found)

    def commit(self, files: dict[str, bytes]) -> str:
        whole = json.dumps({name: _sha(data) for name, data in sorted(files.items())})
        self.commits[_sha(whole.encode())] = dict(files)
        return _sha(whole.encode())


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        path = self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = name in self.state.repositories
            self.state.repositories.setdefault(name, {"main": {}})
            url = {"url": f"{self.state.address}/{name}"}
            self._answer(409 if known else 200, url)
        elif path[:2] == ["api", "models"] and path[4] == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path[:2] == ["api", "models"] and path[4] == "branch":
            branches = self.state.repositories["/".join(path[2:4])]
            branches.setdefault(path[5], dict(branches["main"]))
            self._answer(200, {})
        elif path[:2] == ["api", "models"] and path[4] == "commit":
            self._commit("/".join(path[2:4]), path[5], body)
        elif path == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        else:
            self._answer(404, {"error": "unknown"})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        files = self.state.repositories[name][branch]
        for line in body.splitlines():
            change = json.loads(line)
            if change["key"] == "file":
                assert change["value"]["encoding"] == "base64"
                content = base64.b64decode(change["value"]["content"])
                files[change["value"]["path"]] = content
            elif change["key"] == "deletedFile":
                del files[change["value"]["path"]]
        commit = self.state.commit(files)
        url = f"{self.state.address}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _get(self) -> None:
        path = self._path()
        if path == ["api", "whoami-v2"]:
            self._answer(200, {"name": "somebody", "type": "user", "orgs": []})
            return
        is_api = path[:2] == ["api", "models"]
        name = "/".join(path[2:4] if is_api else path[:2])
        kind, revision = [*path[4 if is_api else 2 :], "revision", "main"][:2]
        found = self.state.files(name, revision)
        if found is None:
            missing = name in self.state.repositories
            code = "RevisionNotFound" if missing else "RepoNotFound"
            self._answer(404, {"error": code}, {"X-Error-Code": code})
            return
        commit, files = found
        if kind == "revision":
            siblings = [{"rfilename": one} for one in files]
            self._answer(200, {"id": name, "sha": commit, "siblings": siblings})
        elif kind == "tree":
            rows = [
                {"type": "file", "path": one, "size": len(data), "oid": _sha(data)}
                for one, data in files.items()
            ]
            self._answer(200, rows)
        elif kind == "resolve" and "/".join(path[4:]) in files:
            data = files["/".join(path[4:])]
            self._answer(200, data, {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": commit})
        else:
            head = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._answer(404, {"error": "Entry not found"}, head)

    def _path(self) -> list[str]:
        path = urlsplit(self.path).path
        self.state.asked.append(f"{self.command} {path}")
        return [unquote(part) for part in path.strip("/").split("/")]

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
