"""A stand-in for the Hub on loopback, for tests: the unmodified `huggingface_hub` client works with it; it can fail.

    with StandInHub() as hub:
        hub.fail(503, "/commit/", times=2, retry_after=0)
        HfApi(endpoint=hub.url, token=hub.token).create_repo("me/stack")

PEFT and transformers read `HF_ENDPOINT` once, when huggingface_hub is imported: run them in a process of their own
with `hub.environment(cache_dir)`. Model repositories only; every file arrives inside its commit (`uploadMode:
"regular"`), so Git LFS and Xet are not imitated.
"""

import base64
import hashlib
import json
import os
import random
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_standInTokenOfNobody"  # not a secret: it opens nothing but this server
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    """files: the whole content of the repository after it, {path: bytes}."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """branches, tags: {name: oid}."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or an oid."""
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def history(self, revision: str = "main") -> list[Commit]:
        """The newest first."""
        found, commit = [], self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(repr((len(self.commits), parent, title)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return oid


@dataclass
class Fault:
    """See [`StandInHub.fail`]; hits: how often it has struck."""

    kind: int | str
    pattern: str
    method: str | None
    times: int | None
    share: float
    after: int
    seconds: float
    retry_after: float | None
    random: random.Random
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        if self.method not in (None, method) or not re.search(self.pattern, path):
            return False
        if self.random.random() >= self.share:
            return False
        self.hits += 1
        return True


class StandInHub:
    """The server, as a context manager. url; token of user `me`, who may write to `me/` and to organisation `team/`.

    repos: {"me/stack": Repo}. requests: (method, path) of everything that arrived, also what was made to fail.
    tokens: {token: {"name", "orgs", "write"}}.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent = 0
        self.faults: list[Fault] = []
        self.token = TOKEN
        self.tokens = {TOKEN: {"name": "me", "orgs": ["team"], "write": True}}
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(
        self, kind, pattern="", *, method=None, times=None, share=1.0, after=0, seconds=0.0, retry_after=None, seed=0
    ) -> Fault:
        """Make requests whose "path?query" matches `pattern` fail.

        kind: a status (500, 503, 412, 401, ...), the request then does nothing; "refuse": the connection is closed
        before anything is done; "drop": the request is carried out, and the connection closed after `after` bytes of
        the answer's body (0: not even the status arrives); "slow": the answer comes `seconds` late.
        times: so often, then no more; share: with this probability.
        """
        fault = Fault(kind, pattern, method, times, share, after, seconds, retry_after, random.Random(seed))
        self.faults.append(fault)
        return fault

    def patch(self, monkeypatch) -> None:
        """Make huggingface_hub of this process take it for the Hub, with the token as the login."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", self.token)

    def environment(self, cache: os.PathLike | str, **more: str) -> dict[str, str]:
        """Environment of a process that takes this for the Hub, with an own cache."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        dropped = {"HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"}
        return {**{k: v for k, v in os.environ.items() if k not in dropped}, **own, **more}

    def count(self, method: str, pattern: str) -> int:
        """Requests that arrived."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)


def blob_oid(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_card(content: str) -> list[str]:
    """What is wrong with a model card's metadata, by the rules of the Hub that matter to us."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.S)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["not a mapping"]
    wrong = []
    names = re.compile(r"[\w.-]+(/[\w.-]+)?")
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not names.fullmatch(value):
                wrong.append(f'"{key}" must be the id of a repository, got {value!r}')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            wrong.append(f'"{key}" must be a string')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        wrong.append('"tags" must be an array of strings')
    for number, model in enumerate(data.get("model-index", [])):
        where = f'"model-index[{number}]'
        if not isinstance(model.get("name"), str) or not model["name"]:
            wrong.append(f'{where}.name" is required')
        if not isinstance(model.get("results"), list) or not model["results"]:
            wrong.append(f'{where}.results" must be an array that is not empty')
        for result in model.get("results") or ():
            if not isinstance(result.get("task", {}).get("type"), str):
                wrong.append(f'{where}.results.task.type" is required')
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("name", "type")):
                wrong.append(f'{where}.results.dataset" needs name and type')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                    wrong.append(f'{where}.results.metrics" needs type and a value')
    return wrong


class _Answer(Exception):
    def __init__(self, status: int, body: object = None, **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): str(value) for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


def _error(status: int, code: str, message: str = "") -> _Answer:
    return _Answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self):
        self.hub: StandInHub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if len(body) < int(self.headers.get("Content-Length") or 0):  # the client was killed
            return self._close()
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            fault = next((f for f in self.hub.faults if f.strikes(self.command, self.path)), None)
        kind = fault.kind if fault else None
        if kind == "slow":
            time.sleep(fault.seconds)
        if kind == "refuse":
            return self._close()
        if isinstance(kind, int):
            answer = _Answer(kind, {"error": f"injected {kind}"}, X_Error_Message=f"injected {kind}")
            if fault.retry_after is not None:
                answer.headers["Retry-After"] = str(fault.retry_after)
        else:
            try:
                with self.hub.lock:
                    self._route(body)
                answer = _Answer(404, {"error": "no such route"})
            except _Answer as made:
                answer = made
        if kind == "drop" and not fault.after:
            return self._close()
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            sent = answer.body[: fault.after] if kind == "drop" else answer.body
            self.wfile.write(sent)
            self.hub.bytes_sent += len(sent)
            if len(sent) < len(answer.body):
                self._close()

    do_GET = do_HEAD = do_POST = do_DELETE = do_PUT = _serve

    def _close(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    # ---- who ------------------------------------------------------------------------------------------------------

    def _user(self) -> dict | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _error(401, "InvalidToken", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repo(self, name: str, write: bool = False) -> Repo:
        user, owner = self._user(), name.split("/")[0]
        member = user is not None and owner in (user["name"], *user["orgs"])
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not member):
            raise _error(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (member and user and user["write"]):
            raise _error(403 if user else 401, "Forbidden", "You don't have the rights to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- routes ---------------------------------------------------------------------------------------------------

    def _route(self, body: bytes) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts == ["api", "whoami-v2"]:
            user = self._user()
            if user is None:
                raise _error(401, "Unauthorized", "Invalid username or password.")
            role = "write" if user["write"] else "read"
            raise _Answer(
                200,
                {
                    "type": "user",
                    "name": user["name"],
                    "fullname": user["name"],
                    "orgs": [{"name": org} for org in user["orgs"]],
                    "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
                },
            )
        if parts == ["api", "validate-yaml"]:
            wrong = [{"message": message} for message in check_card(json.loads(body)["content"])]
            raise _Answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        if parts == ["api", "repos", "delete"]:
            data = json.loads(body)
            name = f"{data.get('organization') or self._user()['name']}/{data['name']}"
            self._repo(name, write=True)
            del self.hub.repos[name]
            raise _Answer(200)
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:], body)
        if len(parts) >= 5 and parts[2] == "resolve":
            self._download("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _create(self, data: dict) -> None:
        user = self._user()
        if user is None:
            raise _error(401, "Unauthorized", "Invalid username or password.")
        owner = data.get("organization") or user["name"]
        name = f"{owner}/{data['name']}"
        if owner not in (user["name"], *user["orgs"]) or not user["write"]:
            raise _error(403, "Forbidden", f"You don't have the rights to create a model under the namespace {owner}")
        exists = name in self.hub.repos
        if not exists:
            repo = self.hub.repos[name] = Repo(data.get("visibility") == "private" or bool(data.get("private")))
            repo.add(
                "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
            )
        raise _Answer(
            409 if exists else 200,
            {"url": f"{self.hub.url}/{name}", "name": name, "error": "You already created this model repo"},
        )

    def _api(self, name: str, action: str, rest: list[str], body: bytes) -> None:
        write = self.command in ("DELETE", "PUT") or action in ("commit", "preupload", "tag", "branch")
        repo = self._repo(name, write)
        key = (self.command, action)
        if key in (("GET", "revision"), ("HEAD", "revision")):
            commit = self._commit(repo, rest[0] if rest else "main")
            raise _Answer(
                200,
                {
                    "id": name,
                    "modelId": name,
                    "author": name.split("/")[0],
                    "sha": commit.oid,
                    "private": repo.private,
                    "lastModified": DATE,
                    "createdAt": DATE,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                },
            )
        if key == ("GET", "tree"):
            self._tree(self._commit(repo, rest[0]), "/".join(rest[1:]))
        if key == ("POST", "paths-info"):
            commit = self._commit(repo, rest[0])
            paths = json.loads(body)["paths"]
            raise _Answer(200, [self._entry(commit, path) for path in paths if path in commit.files])
        if key == ("GET", "refs"):
            kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            refs = {
                key: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in named.items()]
                for key, (kind, named) in kinds.items()
            }
            raise _Answer(200, {**refs, "converts": []})
        if key == ("GET", "commits"):
            self._commit(repo, rest[0])
            made = [
                {"id": c.oid, "authors": [{"user": "me"}], "date": DATE, "title": c.title, "message": ""}
                for c in repo.history(rest[0])
            ]
            raise _Answer(200, made)
        if key == ("POST", "preupload"):
            old = self._commit(repo, rest[0]).files
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": blob_oid(old[file["path"]]) if file["path"] in old else None,
                }
                for file in json.loads(body)["files"]
            ]
            raise _Answer(200, {"files": files})
        if key == ("POST", "commit"):
            self._add_commit(name, repo, rest[0], body)
        if key == ("POST", "tag"):
            tag, commit = json.loads(body)["tag"], self._commit(repo, rest[0])
            if tag in repo.tags:
                raise _error(409, "Conflict", f"Tag {tag} already exists")
            repo.tags[tag] = commit.oid
            raise _Answer(200)
        if key == ("DELETE", "tag"):
            if repo.tags.pop(rest[0], None) is None:
                raise _error(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
            raise _Answer(200)
        if key == ("POST", "branch"):
            if rest[0] in repo.branches:
                raise _error(409, "Conflict", f"Reference refs/heads/{rest[0]} already exists")
            start = json.loads(body).get("startingPoint") if body else None
            repo.branches[rest[0]] = self._commit(repo, start or "main").oid
            raise _Answer(200)

    def _entry(self, commit: Commit, path: str) -> dict:
        content = commit.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}

    def _tree(self, commit: Commit, under: str) -> None:
        inside = [path for path in sorted(commit.files) if not under or path.startswith(f"{under}/")]
        if under and not inside:
            raise _error(404, "EntryNotFound", f"{under} does not exist")
        entries, folders = [], set()
        for path in inside:
            relative = path.removeprefix(f"{under}/" if under else "")
            parents = relative.split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                folder = "/".join([*([under] if under else []), *parents[:depth]])
                if folder not in folders and (depth == 1 or "recursive=" in self.path):
                    folders.add(folder)
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    entries.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
            if not parents or re.search("recursive=([Tt]rue|1)", self.path):
                entries.append(self._entry(commit, path))
        raise _Answer(200, entries)

    def _add_commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        if branch not in repo.branches:
            raise _error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        header, files = {}, dict(repo.resolve(branch).files)
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                header = value
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _error(404, "EntryNotFound", "A file with this name doesn't exist")
            elif kind == "deletedFolder":
                files = {p: c for p, c in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise _error(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        oid = repo.add(branch, header["summary"], files)
        raise _Answer(200, {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _download(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(self._repo(name), revision)
        if path not in commit.files:
            raise _error(404, "EntryNotFound", f"{path} does not exist")
        content = commit.files[path]
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{blob_oid(content)}"', "Accept_Ranges": "bytes"}
        headers["Content_Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            raise _Answer(200, content, **headers)
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        if start >= len(content):
            raise _Answer(416, b"", **headers, Content_Range=f"bytes */{len(content)}")
        part = content[start:stop]
        headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        raise _Answer(206, part, **headers)
