"""A Hub on loopback, in memory, for tests that run the real huggingface_hub client against it.

It answers with the Hub's routes, status codes and error headers, keeps every commit, and stores large files as the
Hub does: on another host (localhost for 127.0.0.1), behind signed URLs, where the user's token has no business. Like
S3, that host refuses a request that brings an Authorization header: a leaked token is an error and not a shrug.

What it does not do it refuses with 501, a status that the client does not retry: pull requests, .gitignore, Xet.
The client reads its environment at import: run it in a subprocess with `HubServer.environment`.
"""

import base64
import binascii
import functools
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlencode, urlsplit

from hub_cards import card_metadata
from werkzeug.exceptions import HTTPException, abort
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

LFS_PATTERNS = "*.7z *.arrow *.bin *.bz2 *.ckpt *.gz *.h5 *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.pt *.pth \
*.safetensors *.tar *.tgz *.xz *.zip *.zst *tfevents*".split()
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
# For the programs that tests run in processes of their own: what a call fails with.
FAILURE = """
def failure(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
"""

# A route's endpoint is the method that answers and who may ask: anybody, a user, who can read or write the repository.
_REPO = "/api/<any(models, datasets):kind>/<namespace>/<name>"
_HUB_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami", "user"),
    ("POST", "/api/validate-yaml", "validate_yaml", "anybody"),
    ("POST", "/api/repos/create", "create_repo", "user"),
    ("GET", _REPO, "info", "read"),
    ("GET", _REPO + "/revision/<revision>", "info", "read"),
    ("GET", _REPO + "/tree/<revision>", "tree", "read"),
    ("GET", _REPO + "/tree/<revision>/<path:path>", "tree", "read"),
    ("POST", _REPO + "/paths-info/<revision>", "paths_info", "read"),
    ("GET", _REPO + "/refs", "refs", "read"),
    ("GET", _REPO + "/commits/<revision>", "commits", "read"),
    ("POST", _REPO + "/branch/<branch>", "create_branch", "write"),
    ("DELETE", _REPO + "/branch/<branch>", "delete_branch", "write"),
    ("POST", _REPO + "/tag/<revision>", "create_tag", "write"),
    ("DELETE", _REPO + "/tag/<tag>", "delete_tag", "write"),
    ("POST", _REPO + "/preupload/<revision>", "preupload", "write"),
    ("POST", _REPO + "/commit/<revision>", "commit", "write"),
    ("POST", "/<namespace>/<name>.git/info/lfs/objects/batch", "lfs_batch", "write"),
    ("POST", "/<any(datasets):kind>/<namespace>/<name>.git/info/lfs/objects/batch", "lfs_batch", "write"),
    ("GET", "/<namespace>/<name>/resolve/<revision>/<path:path>", "resolve", "read"),
    ("GET", "/<any(datasets):kind>/<namespace>/<name>/resolve/<revision>/<path:path>", "resolve", "read"),
)
_STORAGE_ROUTES = (
    ("PUT", "/storage/<sha256>", "put_object", "storage"),
    ("GET", "/storage/<sha256>", "get_object", "storage"),
)


def _routes(table) -> Map:
    rules = [Rule(path, methods=[method], endpoint=(f"_{name}", access)) for method, path, name, access in table]
    return Map(rules, strict_slashes=False, merge_slashes=False, redirect_defaults=False)


@dataclass(frozen=True)
class Blob:
    """A file's bytes, in git or (lfs) in the storage with a pointer in git."""

    data: bytes
    lfs: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def pointer(self) -> bytes:
        size = len(self.data)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @functools.cached_property
    def oid(self) -> str:
        """Git's name for it."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository; `parent` is the state before."""

    parent: "Commit | None"
    files: Mapping[str, Blob]
    title: str
    message: str = ""
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @functools.cached_property
    def oid(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.files.items())
        content = [self.parent and self.parent.oid, tree, self.title, self.message, self.date.isoformat()]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def history(self) -> Iterator["Commit"]:
        """From here back to the first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repository:
    """Branches and tags point at commits; no commit is ever dropped."""

    kind: str
    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> Commit:
        self.commits[commit.oid] = self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit:
        """A branch, a tag, or a commit hash that is not too short."""
        commit = self.branches.get(revision) or self.tags.get(revision)
        if commit is None and len(revision) >= 7:
            commit = next((commit for oid, commit in self.commits.items() if oid.startswith(revision)), None)
        return commit or _fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def head(self, branch: str) -> Commit:
        return self.branches.get(branch) or _fail(404, f"Invalid rev id: {branch}", "RevisionNotFound")


@dataclass
class LoggedRequest:
    """What came in; `status` is what went out, None where the connection was dropped or the answer is on its way."""

    method: str
    origin: str
    path: str
    query: str
    headers: Mapping[str, str]
    status: int | None = None

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")


@dataclass
class Fault:
    """What the next `times` requests that match get instead of, or in the middle of, their answer."""

    method: str | None
    path_regex: str
    times: int
    status: int
    drop_connection: bool
    after_bytes: int
    headers: Mapping[str, str]

    def matches(self, request: LoggedRequest) -> bool:
        return (
            self.times > 0
            and self.method in (None, request.method)
            and re.search(self.path_regex, request.path) is not None
        )


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, mimetype="application/json")


def _error(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    """An error as the Hub words it: the client makes its exception from the headers."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers["X-Error-Message"] = message.splitlines()[0].encode("ascii", "replace").decode()
    if code is not None:
        headers["X-Error-Code"] = code
    return _json({"error": message}, status, headers)


def _fail(status: int, message: str, code: str | None = None, **headers: str) -> NoReturn:
    abort(_error(status, message, code, **headers))


def _cut(body: bytes, size: int) -> Iterator[bytes]:
    yield body[:size]
    raise ConnectionAbortedError("dropped by the test")


class _Handler(WSGIRequestHandler):
    def log_request(self, *args):
        """The server keeps its own log."""

    def connection_dropped(self, error, environ=None):
        self.close_connection = True


class HubServer:
    """A Hub with one user; a context manager that listens while it is open.

    Args:
        user: the name that the token stands for and the only namespace it can write to.
        page_size: entries of a tree or a history in one answer; the Hub has 1000.
        lfs_threshold: files above this many bytes go to the storage, and so do those of `LFS_PATTERNS`; None keeps
            everything in git, which a client with Xet needs: it has no other way to upload a large file.

    Attributes:
        endpoint: the value for HF_ENDPOINT.
        storage: the origin of the large files.
        token: the user's token.
        requests: a `LoggedRequest` for each request, in the order in which they came.
    """

    def __init__(self, user: str = "tester", page_size: int = 1000, lfs_threshold: int | None = 10_000_000):
        self.user = user
        self.page_size = page_size
        self.lfs_threshold = lfs_threshold
        self.token = f"hf_{secrets.token_hex(17)}"
        self.requests: list[LoggedRequest] = []
        self.endpoint = self.storage = ""
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._objects: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._servers: list[BaseWSGIServer] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "HubServer":
        origins = []
        # Two names, because clients tell the Hub from a stranger by the host's name, and some by nothing else.
        for host, table in (("127.0.0.1", _HUB_ROUTES), ("localhost", _STORAGE_ROUTES)):
            answer = functools.partial(self._answer, _routes(table))
            server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=_Handler)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            self._servers.append(server)
            self._threads.append(thread)
            origins.append(f"http://{host}:{server.port}")
        self.endpoint, self.storage = origins
        return self

    def __exit__(self, *exception) -> None:
        for server, thread in zip(self._servers, self._threads):
            server.shutdown()
            thread.join()

    def environment(self, home: Path | str, **more: str | None) -> dict[str, str]:
        """The environment for a process that knows this Hub and no other.

        Args:
            home: HF_HOME: caches, and nothing else of the user's.
            more: variables on top of that; None takes one away, as in `HF_TOKEN=None`.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "XDG_CACHE"))
            and not name.upper().endswith("_PROXY")
        }
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # A busy machine is not an error.
            "HF_HUB_ETAG_TIMEOUT": "60",
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        }
        return {name: value for name, value in (kept | own | more).items() if value is not None}

    def fail(
        self,
        method: str | None = None,
        path_regex: str = "",
        times: int = 1,
        status: int = 500,
        drop_connection: bool = False,
        after_bytes: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        """Makes requests fail before they are looked at; what it returns counts its `times` down.

        Args:
            method: the method to match; None matches each.
            path_regex: searched for in the path, without host and query; large files are under /storage/.
            times: how many requests fail.
            status: the answer, unless the connection is dropped.
            drop_connection: close the connection instead of answering.
            after_bytes: drop it after that much of the request's body was read or, for a request without one, after
                that much of the answer's was sent.
            headers: more headers for the answer.
        """
        fault = Fault(method, path_regex, times, status, drop_connection, after_bytes, headers or {})
        with self._lock:
            self._faults.append(fault)
        return fault

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """What a revision holds, by path, with large files' own bytes."""
        with self._lock:
            commit = self._repositories[f"{repo_type}s", repo_id].find(revision)
            return {path: blob.data for path, blob in commit.files.items()}

    def history(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """A revision's commits, the last one first."""
        with self._lock:
            return list(self._repositories[f"{repo_type}s", repo_id].find(revision).history())

    def _answer(self, routes: Map, environ, start_response):
        request = Request(environ)
        # The server unquotes PATH_INFO, and with it the slashes in a branch's name.
        raw_path = urlsplit(environ["RAW_URI"]).path
        query = request.query_string.decode()
        entry = LoggedRequest(request.method, request.host_url.rstrip("/"), request.path, query, request.headers)
        with self._lock:
            self.requests.append(entry)
            fault = next((fault for fault in self._faults if fault.matches(entry)), None)
            if fault is not None:
                fault.times -= 1
        if fault is None:
            response = self._dispatch(routes, request, raw_path)
        elif not fault.drop_connection:
            message = "Invalid credentials in Authorization header" if fault.status == 401 else "injected by the test"
            response = _error(fault.status, message)
            response.headers.update(fault.headers)
        elif fault.after_bytes and request.method in ("GET", "HEAD"):
            response = self._dispatch(routes, request, raw_path)
            response.response = _cut(response.get_data(), fault.after_bytes)
            return response(environ, start_response)
        else:
            if fault.after_bytes:  # reading nothing is taken for a client that went away, and answered
                request.stream.read(fault.after_bytes)
            raise ConnectionAbortedError("dropped by the test")
        entry.status = response.status_code
        return response(environ, start_response)

    def _dispatch(self, routes: Map, request: Request, raw_path: str) -> Response:
        request.get_data()  # not under the lock: the client may be slow
        try:
            (handler, access), values = routes.bind("").match(raw_path, request.method)
            arguments = {name: unquote(value) for name, value in values.items()}
            with self._lock:
                user = None if access == "storage" else self._identify(request)
                if access == "user" and user is None:
                    _fail(401, "Invalid username or password.")
                if access in ("read", "write"):
                    repo_id = f"{arguments.pop('namespace')}/{arguments.pop('name')}"
                    arguments["repo"] = self._repository(arguments.pop("kind", "models"), repo_id, user, access)
                return getattr(self, handler)(request, **arguments)
        except HTTPException as error:
            return error.response or _error(error.code or 500, error.description or "")
        except Exception:
            # A mistake of this server's, or a request unlike the Hub's: 500 would be retried and hide it.
            return _error(501, "".join(traceback.format_exc()))

    def _identify(self, request: Request) -> str | None:
        given = request.headers.get("Authorization")
        if given is None:
            return None
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            _fail(401, "Invalid credentials in Authorization header")
        return self.user

    def _repository(self, kind: str, repo_id: str, user: str | None, access: str) -> Repository:
        repo = self._repositories.get((kind, repo_id))
        if user is None and (repo is None or repo.private or access == "write"):
            # The Hub does not tell strangers which private repositories exist. Over https the client knows this
            # answer by its status; over http it needs the code.
            _fail(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            _fail(404, "Repository not found", "RepoNotFound")
        return repo

    def _sign(self, method: str, sha256: str) -> str:
        return hmac.new(self.token.encode(), f"{method} {sha256}".encode(), "sha256").hexdigest()

    def _storage_url(self, method: str, sha256: str) -> str:
        return f"{self.storage}/storage/{sha256}?signature={self._sign(method, sha256)}"

    def _check_signature(self, request: Request, method: str, sha256: str) -> None:
        if "Authorization" in request.headers:
            _fail(400, "Only one auth mechanism allowed")
        if request.args.get("signature") != self._sign(method, sha256):
            _fail(403, "Access denied")

    def _is_large(self, path: str, size: int) -> bool:
        if self.lfs_threshold is None or size == 0:
            return False
        return size > self.lfs_threshold or any(fnmatch(path.rsplit("/")[-1], pattern) for pattern in LFS_PATTERNS)

    # What follows answers one route each.

    def _whoami(self, request: Request) -> Response:
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json({"type": "user", "id": "1", "name": self.user, "fullname": self.user, "orgs": [], "auth": access})

    def _validate_yaml(self, request: Request) -> Response:
        metadata, problems = card_metadata(request.get_json(force=True)["content"])
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        errors = [{"message": problem} for problem in problems]
        return _json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _create_repo(self, request: Request) -> Response:
        given = request.get_json(force=True)
        kind, namespace = f"{given.get('type') or 'model'}s", given.get("organization") or self.user
        repo_id = f"{namespace}/{given['name']}"
        if kind not in ("models", "datasets"):
            _fail(501, f"this server has no {kind}")
        if namespace != self.user:
            _fail(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {namespace!r}")
        url = f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self._repositories:
            return _json({"error": f"You already created this {kind[:-1]} repo", "url": url}, 409)
        repo = Repository(kind, repo_id, bool(given.get("private")) or given.get("visibility") == "private")
        repo.add("main", Commit(None, {".gitattributes": Blob(GIT_ATTRIBUTES.encode())}, "initial commit"))
        self._repositories[kind, repo_id] = repo
        return _json({"url": url, "name": repo_id, "id": repo_id})

    def _info(self, request: Request, repo: Repository, revision: str = "main") -> Response:
        commit = repo.find(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if request.args.get("blobs", "").lower() == "true":
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                lfs = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
                sibling |= {"size": len(blob.data), "blobId": blob.oid} | ({"lfs": lfs} if blob.lfs else {})
        readme = commit.files.get("README.md", Blob(b"")).data.decode()
        card, _ = card_metadata(readme)
        tags = card.get("tags") or []
        info = {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": _date(commit),
            "createdAt": _date(list(repo.branches["main"].history())[-1]),
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [tags] if isinstance(tags, str) else tags,
            "siblings": siblings,
            **{name: card[name] for name in ("library_name", "pipeline_tag") if name in card},
            **({"cardData": card} if card else {}),
        }
        return Response(json.dumps(info, default=str), mimetype="application/json")

    def _tree(self, request: Request, repo: Repository, revision: str, path: str = "") -> Response:
        commit = repo.find(revision)
        entries = _listing(commit, path.strip("/"), recursive=request.args.get("recursive", "").lower() == "true")
        if path and not entries:
            _fail(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return self._page(request, entries)

    def _paths_info(self, request: Request, repo: Repository, revision: str) -> Response:
        wanted = {path.strip("/") for path in request.form.getlist("paths")}
        return _json([entry for entry in _listing(repo.find(revision), "", True) if entry["path"] in wanted])

    def _refs(self, request: Request, repo: Repository) -> Response:
        refs = {
            group: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": c.oid} for name, c in named.items()]
            for group, folder, named in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        return _json(refs | {"converts": [], "pullRequests": []})

    def _commits(self, request: Request, repo: Repository, revision: str) -> Response:
        return self._page(
            request,
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "date": _date(commit),
                    "authors": [{"user": self.user}],
                }
                for commit in repo.find(revision).history()
            ],
        )

    def _page(self, request: Request, entries: list[dict]) -> Response:
        start = int(request.args.get("cursor", 0))
        end = start + self.page_size
        headers = {}
        if end < len(entries):
            path = urlsplit(request.environ["RAW_URI"]).path
            query = urlencode(request.args.to_dict() | {"cursor": end})
            headers["Link"] = f'<{self.endpoint}{path}?{query}>; rel="next"'
        return _json(entries[start:end], headers=headers)

    def _create_branch(self, request: Request, repo: Repository, branch: str) -> Response:
        if branch.startswith("refs/"):
            _fail(400, f"Invalid reference for a branch: {branch}")
        if branch in repo.branches:
            _fail(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.find(request.get_json(force=True).get("startingPoint") or "main")
        return _json({})

    def _delete_branch(self, request: Request, repo: Repository, branch: str) -> Response:
        if branch == "main":
            _fail(403, "main cannot be deleted")
        repo.head(branch)
        del repo.branches[branch]
        return _json({})

    def _create_tag(self, request: Request, repo: Repository, revision: str) -> Response:
        tag = request.get_json(force=True)["tag"]
        if tag in repo.tags:
            _fail(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.find(revision)
        return _json({})

    def _delete_tag(self, request: Request, repo: Repository, tag: str) -> Response:
        if repo.tags.pop(tag, None) is None:
            _fail(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        return _json({})

    def _preupload(self, request: Request, repo: Repository, revision: str) -> Response:
        given = request.get_json(force=True)
        if "create_pr" in request.args or "gitIgnore" in given:
            _fail(501, "this server has neither pull requests nor .gitignore")
        there = repo.head(revision).files
        answers = []
        for file in given["files"]:
            path, blob = file["path"], there.get(file["path"])
            answer = {
                "path": path,
                "uploadMode": "lfs" if self._is_large(path, file["size"]) else "regular",
                "shouldIgnore": False,
            }
            if blob is not None:
                answer["oid"] = blob.sha256 if blob.lfs else blob.oid
            answers.append(answer)
        return _json({"files": answers})

    def _lfs_batch(self, request: Request, repo: Repository) -> Response:
        objects = []
        for wanted in request.get_json(force=True)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._objects:
                answer["actions"] = {"upload": {"href": self._storage_url("PUT", wanted["oid"]), "header": {}}}
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _put_object(self, request: Request, sha256: str) -> Response:
        self._check_signature(request, "PUT", sha256)
        data = request.get_data()
        if hashlib.sha256(data).hexdigest() != sha256:
            _fail(400, "The content does not have the hash that was announced")
        self._objects[sha256] = data
        return Response()

    def _get_object(self, request: Request, sha256: str) -> Response:
        self._check_signature(request, "GET", sha256)
        return _content(request, self._objects[sha256], sha256)

    def _commit(self, request: Request, repo: Repository, revision: str) -> Response:
        if "create_pr" in request.args:
            _fail(501, "this server has no pull requests")
        lines = [json.loads(line) for line in request.get_data().splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header":
            _fail(400, "The first line must be the header")
        header, head = lines[0]["value"], repo.head(revision)
        if not head.oid.startswith(header.get("parentCommit", "")):
            _fail(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        commit = repo.add(revision, Commit(head, files, header["summary"], header.get("description", "")))
        url = f"{self.endpoint}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, Blob], operation: str, value: dict) -> None:
        path = value["path"]
        if operation == "file":
            try:
                files[path] = Blob(base64.b64decode(value["content"], validate=True))
            except binascii.Error:
                _fail(400, f"{path} is not base64")
        elif operation == "lfsFile":
            data = self._objects.get(value["oid"])
            if data is None or value.get("size", len(data)) != len(data):
                _fail(400, f"Your push was rejected because the LFS object of {path} does not exist: {value['oid']}")
            files[path] = Blob(data, lfs=True)
        elif operation in ("deletedFile", "deletedFolder"):
            inside = f"{path.rstrip('/')}/"
            doomed = [p for p in files if (p == path if operation == "deletedFile" else p.startswith(inside))]
            if not doomed:
                _fail(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            _fail(400, f"Unknown operation: {operation}")

    def _resolve(self, request: Request, repo: Repository, revision: str, path: str) -> Response:
        commit = repo.find(revision)
        blob = commit.files.get(path)
        if blob is None:
            _fail(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        if blob.lfs:
            response = Response(status=302)
            response.set_etag(blob.oid)
            response.headers["Location"] = self._storage_url("GET", blob.sha256)
            response.headers["X-Linked-Size"] = str(len(blob.data))
            response.headers["X-Linked-Etag"] = f'"{blob.sha256}"'
        else:
            response = _content(request, blob.data, blob.oid)
        response.headers["X-Repo-Commit"] = commit.oid
        return response


def _date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _content(request: Request, data: bytes, etag: str) -> Response:
    """The bytes, or the range that was asked for."""
    response = Response(data, mimetype="application/octet-stream")
    response.set_etag(etag)
    return response.make_conditional(request.environ, accept_ranges=True, complete_length=len(data))


def _listing(commit: Commit, folder: str, recursive: bool) -> list[dict]:
    """The entries of a folder, and with `recursive` those of all below it."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict] = {}
    for path, blob in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.oid} {name}".encode()).hexdigest()
            entries.setdefault(name, {"type": "directory", "oid": oid, "size": 0, "path": name})
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            if blob.lfs:
                lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
                entries[path]["lfs"] = lfs
    return list(entries.values())
