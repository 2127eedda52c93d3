"""A hub on loopback: repositories, commits, large files, downloads, refusals; as much as huggingface_hub asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

TOKEN = "hf_of_this_hub"
OWNER = "micl"  # that the token may write to
LARGE = (".safetensors", ".onnx")


class Hub:
    """What the server holds and what it was asked.

    Attributes:
        url: of it.
        commits: files of each commit, by repository and commit.
        heads: the last commit of each repository.
        made: (repository, commit, summary, names of the files changed) of each commit that a client made, in order.
        large: bytes of large files by sha256.
        private: repositories that were made as private ones.
        requests: method and path of each request.
        tags: commits by repository and tag.
        cards: front matter of the cards by repository.
        gated: repositories whose files nobody may have.
        renamed: new names of repositories by the old ones.
        trouble: status of every answer to a GET or HEAD, where there is one.
        instead: bytes sent in the place of files, by name.
        cuts: how many bytes of a file are sent before the connection is cut, by name; a number for each request.
        stalls: names of files of which half is sent, and then nothing until `resumes` is set; that sets `stalled`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.made: list[tuple[str, str, str, list[str]]] = []
        self.large: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.tags: dict[tuple[str, str], str] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.gated: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.trouble: int | None = None
        self.instead: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.stalls: set[str] = set()
        self.stalled, self.resumes = threading.Event(), threading.Event()

    def find(self, repo: str, revision: str) -> str | None:
        """The commit of a branch, a tag, or the first digits of a commit."""
        if revision == "main":
            return self.heads[repo]
        commits = [commit for name, commit in self.commits if name == repo and len(revision) >= 7]
        return self.tags.get((repo, revision)) or next((one for one in commits if one.startswith(revision)), None)

    def put(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        """A commit as if it had been there."""
        self.commits[repo, commit] = files
        self.heads[repo] = commit

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """A client's commit, as it comes: a line a change."""
        files, changed, summary = dict(self.commits[repo, self.heads[repo]]), [], ""
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "header":
                summary = value["summary"]
                continue
            changed.append(value["path"])
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                assert kind == "deletedFile", kind
                del files[value["path"]]
        commit = hashlib.sha1(f"{repo} {len(self.made)}".encode()).hexdigest()
        self.put(repo, commit, files)
        self.made.append((repo, commit, summary, sorted(changed)))
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, found: object, status: int = 200) -> None:
        self.answer(status, json.dumps(found).encode(), Content_Type="application/json")

    def handle_request(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body, path = self.body(), self.path.partition("?")[0]
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if self.command == "POST" and not known:  # the large files go to a place that was told by a POST
                    return self.say({"error": "Invalid username or password."}, 401)
                return method(self, body, *map(unquote, match.groups()))
        return self.answer(404)

    do_HEAD = do_GET = do_POST = do_PUT = handle_request

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            return self.say({"error": "You don't have the rights"}, 403)
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        if repo in self.hub.heads:
            return self.say({"error": "You already created this repo", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.put(repo, "0" * 40, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.say({"url": f"{self.hub.url}/{repo}"})

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.say({"errors": [], "warnings": []})

    def tree(self, _: bytes, repo: str) -> None:
        files = self.hub.commits[repo, self.hub.heads[repo]]
        self.say([{"type": "file", "path": name, "size": len(data), "oid": "1"} for name, data in files.items()])

    def refuse(self, repo: str, revision: str) -> bool:
        """Answer a GET or HEAD that has no good answer, as the hub would."""
        hub, sent = self.hub, self.headers.get("Authorization")
        known = sent == f"Bearer {TOKEN}"
        if hub.trouble:
            self.answer(hub.trouble)
        elif sent and not known:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif repo in hub.renamed:
            self.answer(307, Location=self.path.replace(repo, hub.renamed[repo]))
        elif repo not in hub.heads or (repo in hub.private and not known):
            self.answer(404 if known else 401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif hub.find(repo, revision) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            return False
        return True

    def info(self, _: bytes, repo: str, revision: str = "main") -> None:
        if self.refuse(repo, revision):
            return None
        commit = self.hub.find(repo, revision)
        assert commit
        siblings = [_sibling(name, data) for name, data in self.hub.commits[repo, commit].items()]
        about = {"gated": "auto" if repo in self.hub.gated else False, "cardData": self.hub.cards.get(repo)}
        return self.say({"id": repo, "sha": commit, "siblings": siblings, "tags": [], **about})

    def preupload(self, body: bytes, repo: str) -> None:
        there = self.hub.commits[repo, self.hub.heads[repo]]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _git_oid(there[file["path"]], file["path"]) if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        self.say({"files": files})

    def batch(self, body: bytes, _: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.say({"transfer": "basic", "objects": objects})

    def large(self, body: bytes, sha256: str) -> None:
        assert hashlib.sha256(body).hexdigest() == sha256
        self.hub.large[sha256] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        commit = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.say({"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        if self.refuse(repo, revision):
            return None
        if repo in self.hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        commit = self.hub.find(repo, revision) or ""
        content = self.hub.commits[repo, commit].get(name)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        about = {"X_Repo_Commit": commit, "ETag": f'"{_git_oid(content, name)}"', "Accept_Ranges": "bytes"}
        content = self.hub.instead.get(name, content)
        if self.command == "HEAD":
            return self.answer(200, content, **about)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            about["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(name, content[start:], 206 if asked else 200, about)

    def send(self, name: str, content: bytes, status: int, about: dict[str, str]) -> None:
        """A file or what is left of it, whole or up to where the connection is cut; this server closes each."""
        cuts, whole = self.hub.cuts.get(name), len(content)
        if cuts:
            content = content[: cuts.pop(0)]
        half = whole // 2 if name in self.hub.stalls else len(content)
        self.answer(status, content[:half], **about, Content_Length=str(whole))
        if name in self.hub.stalls:
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.resumes.wait(30)

    def log_message(self, *_: object) -> None:
        pass


def _git_oid(data: bytes, name: str) -> str:
    """As huggingface_hub compares: the sha256 of a large file, git's own of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    """A file as the hub tells of it with ?blobs=true."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\n" % hashlib.sha256(data).hexdigest().encode()
    large = {"sha256": _git_oid(data, name), "size": len(data), "pointerSize": len(pointer)}
    blob = {"blobId": _git_oid(pointer, ""), "lfs": large} if name.endswith(LARGE) else {"blobId": _git_oid(data, name)}
    return {"rfilename": name, "size": len(data), **blob}


def environment_for(hub: Hub, cache: Path) -> dict[str, str]:
    """For a process that asks this hub and no other, and keeps what it gets in a folder."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"}


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    f"GET /api/models/{REPO}/tree/main": _Handler.tree,
    f"GET /api/models/{REPO}": _Handler.info,
    f"GET /api/models/{REPO}/revision/([^/]+)": _Handler.info,
    f"POST /api/models/{REPO}/preupload/main": _Handler.preupload,
    f"POST /{REPO}.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(\w+)": _Handler.large,
    f"POST /api/models/{REPO}/commit/main": _Handler.commit,
    rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)": _Handler.resolve,
}


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    """A hub for as long as the block takes."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees its end
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
