"""The loopback Hub against the real huggingface_hub and diffusers: what other tests that need a Hub stand on."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_server import HubServer

# What they assert of retries, paging and classes of errors is that of this client and newer ones.
newer_client = pytest.mark.skipif(
    tuple(map(int, huggingface_hub.__version__.split(".")[:2])) < (1, 23), reason="huggingface_hub before 1.23"
)
REPO = "tester/model"
CARD = "---\nlicense: apache-2.0\ntags:\n- one\n- two\n---\n# Card\n"
# Every program begins with this; what it has to say it puts into `said`, which the test gets.
PRELUDE = """
import json, sys, warnings
import huggingface_hub as hf

REPO, said = "tester/model", {}
globals().update(json.loads(sys.argv[1]))

def failure(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
"""
# How a client notices depends on whether it is still writing, and on the system's buffers.
DROPPED = [["ReadError", None], ["RemoteProtocolError", None], ["WriteError", None]]


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Runs a program in a process with an empty Hub cache, or with that of an earlier one (`home`), more variables of
    its environment in capitals, and others as variables of its own."""
    homes = iter(range(100))

    def run(program, home=None, **variables):
        environment = {name: variables.pop(name) for name in [*variables] if name.isupper()}
        result = subprocess.run(
            [sys.executable, "-c", f"{PRELUDE}{program}\nprint(json.dumps(said))", json.dumps(variables)],
            env=server.environment(home or tmp_path / f"home{next(homes)}", **environment),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert server.token not in result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return lambda program, *arguments, **options: run(textwrap.dedent(program), *arguments, **options)


def write(folder, contents):
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def statuses(server, method, path):
    """What requests of a kind were answered, in order; None where the connection was dropped."""
    return [request.status for request in server.requests if request.method == method and path in request.path]


@newer_client
def test_a_folder_comes_back_byte_for_byte(server, run, tmp_path):
    """Small files go into git and large ones into the storage; a fresh machine, and later the same one cut off from
    the Hub, reads the same bytes at a branch, a tag and a hash. The token goes to the Hub and nowhere else."""
    server.page_size = 3
    rng = np.random.default_rng(0)
    contents = {
        "README.md": CARD.encode(),
        "config.json": b"{}",
        "empty.txt": b"",
        "samples/0/größe #1.txt": b"text",
        "unet/large.dat": rng.bytes(15_000_000),
        "unet/weights.safetensors": rng.bytes(1000),
    }
    write(tmp_path / "folder", contents)
    said = run(
        """
        said["url"] = hf.create_repo(REPO)
        commit = hf.upload_folder(repo_id=REPO, folder_path=folder, commit_message="All of it")
        said["oid"] = commit.oid
        hf.create_tag(REPO, tag="v1/first", revision=commit.oid)
        said["changed"] = hf.upload_file(repo_id=REPO, path_or_fileobj=b"[]", path_in_repo="config.json").oid
        said["unchanged"] = hf.upload_file(repo_id=REPO, path_or_fileobj=b"[]", path_in_repo="config.json").oid
        """,
        folder=str(tmp_path / "folder"),
    )
    assert said["url"] == f"{server.endpoint}/{REPO}"
    changed, uploaded, initial = server.history(REPO)
    assert (uploaded.title, initial.title) == ("All of it", "initial commit")
    assert said["oid"] == uploaded.oid
    assert said["changed"] == said["unchanged"] == changed.oid, "an unchanged file makes no commit"
    stored = {request.path for request in server.requests if request.method == "PUT"}
    large = ("unet/large.dat", "unet/weights.safetensors")
    assert stored == {f"/storage/{uploaded.files[path].sha256}" for path in large}

    before = len(server.requests)
    download = 'said["folders"] = [hf.snapshot_download(REPO, revision=revision) for revision in revisions]'
    fresh = {"home": tmp_path / "fresh", "revisions": ["main", "v1/first", said["oid"]]}
    folders = run(download, **fresh)["folders"]
    downloads = server.requests[before:]
    assert folders[1] == folders[2] != folders[0]
    initial_files = server.files(REPO, initial.oid)
    assert read(folders[1]) == initial_files | contents
    assert read(folders[0]) == initial_files | contents | {"config.json": b"[]"}
    # Two trees of seven files and three folders, three entries a page.
    assert sum("cursor=" in request.query for request in downloads if "/tree/" in request.path) == 6

    tokens = {(request.origin, request.authorization) for request in server.requests}
    assert tokens == {(server.endpoint, f"Bearer {server.token}"), (server.storage, None)}

    before = len(server.requests)
    assert run(download, **fresh, HF_HUB_OFFLINE="1")["folders"] == folders
    assert len(server.requests) == before


def test_without_a_storage_a_client_with_xet_uploads_large_files(server, run, tmp_path):
    """Xet has no way back to LFS; with everything in git the client need not be told to do without it."""
    server.lfs_threshold = None
    contents = {"large.bin": np.random.default_rng(0).bytes(15_000_000), "small.txt": b"text"}
    write(tmp_path / "folder", contents)
    program = """
        hf.create_repo(REPO)
        hf.upload_folder(repo_id=REPO, folder_path=folder)
        said["folder"] = hf.snapshot_download(REPO, allow_patterns=["large.bin", "small.txt"])
    """
    assert read(run(program, folder=str(tmp_path / "folder"), HF_HUB_DISABLE_XET=None)["folder"]) == contents
    assert {request.origin for request in server.requests} == {server.endpoint}


@newer_client
def test_the_history(run, server):
    """Branches, tags, deletions, listings, single files, ranges."""
    said = run(
        """
        from huggingface_hub.utils import get_session

        hf.create_repo(REPO)
        for path in ("a.txt", "folder/b.txt", "folder/c/d.bin"):
            hf.upload_file(repo_id=REPO, path_or_fileobj=path.encode() * 10, path_in_repo=path)
        hf.create_branch(REPO, branch="feature/x", revision="main")
        hf.create_tag(REPO, tag="v1")
        hf.delete_file("a.txt", REPO)
        hf.delete_folder("folder/c", REPO, revision="feature/x")
        refs = hf.list_repo_refs(REPO)
        said["refs"] = {ref.ref: ref.target_commit for ref in refs.branches + refs.tags}
        revisions = ("main", "feature/x", "v1")
        said["files"] = {revision: hf.list_repo_files(REPO, revision=revision) for revision in revisions}
        said["commits"] = [commit.title for commit in hf.list_repo_commits(REPO)]
        said["folder"] = [entry.path for entry in hf.HfApi().list_repo_tree(REPO, "folder", revision="v1")]
        info = hf.model_info(REPO, revision="v1", files_metadata=True)
        said["info"] = [info.sha, info.private, {s.rfilename: [s.size, s.lfs is not None] for s in info.siblings}]
        path, gone = hf.HfApi().get_paths_info(REPO, ["folder/b.txt", "a.txt"]), hf.file_exists(REPO, "a.txt")
        said["paths"] = [[entry.path for entry in path], gone, hf.file_exists(REPO, "a.txt", revision="v1")]
        with open(hf.hf_hub_download(REPO, "folder/c/d.bin", revision="v1")) as file:
            said["single"] = file.read()
        headers = {"Authorization": "Bearer " + hf.get_token(), "Range": "bytes=2-6"}
        part = get_session().get(hf.hf_hub_url(REPO, "a.txt", revision="v1"), headers=headers)
        said["part"] = [part.status_code, part.text, part.headers["Content-Range"]]
        hf.delete_branch(REPO, branch="feature/x")
        hf.delete_tag(REPO, tag="v1")
        said["gone"] = [
            failure(hf.model_info, REPO, revision="feature/x"),
            failure(hf.hf_hub_download, REPO, "a.txt", revision="v1"),
            failure(hf.hf_hub_download, REPO, "a.txt"),
            failure(hf.delete_file, "a.txt", REPO),
        ]
        """
    )
    main = server.history(REPO)
    titles = [
        "Delete a.txt with huggingface_hub",
        "Upload folder/c/d.bin with huggingface_hub",
        "Upload folder/b.txt with huggingface_hub",
        "Upload a.txt with huggingface_hub",
        "initial commit",
    ]
    assert said["commits"] == [commit.title for commit in main] == titles
    branch = said["refs"].pop("refs/heads/feature/x")
    assert said["refs"] == {"refs/heads/main": main[0].oid, "refs/tags/v1": main[1].oid}
    assert server.history(REPO, branch)[1:] == main[1:]
    assert said["files"] == {
        "main": [".gitattributes", "folder/b.txt", "folder/c/d.bin"],
        "feature/x": [".gitattributes", "a.txt", "folder/b.txt"],
        "v1": [".gitattributes", "a.txt", "folder/b.txt", "folder/c/d.bin"],
    }
    assert said["folder"] == ["folder/b.txt", "folder/c"]
    oid, private, sizes = said["info"]
    assert (oid, private) == (main[1].oid, False)
    del sizes[".gitattributes"]
    assert sizes == {"a.txt": [50, False], "folder/b.txt": [120, False], "folder/c/d.bin": [140, True]}
    assert said["paths"] == [["folder/b.txt"], False, True]
    assert said["single"] == "folder/c/d.bin" * 10
    assert said["part"] == [206, "txta.", "bytes 2-6/50"]
    assert said["gone"] == [
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
    ]


@newer_client
def test_what_the_hub_refuses(run, server):
    """Private repositories without the token, writing without it, what exists already, a parent that has children."""
    said = run(
        """
        said["user"] = hf.whoami()["name"]
        hf.create_repo(REPO, private=True)
        first = hf.model_info(REPO).sha
        hf.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a.txt", parent_commit=first)
        hf.create_tag(REPO, tag="v1")
        said["exists"] = [hf.create_repo(REPO, exist_ok=True).repo_id, hf.repo_exists(REPO)]
        said["refused"] = [
            failure(hf.create_repo, REPO),
            failure(hf.create_repo, "somebody/model"),
            failure(hf.create_tag, REPO, tag="v1"),
            failure(hf.create_branch, REPO, branch="main"),
            failure(
                hf.upload_file, repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", parent_commit=first
            ),
            failure(hf.model_info, "tester/other"),
            failure(hf.whoami, token="hf_wrong"),
            failure(hf.model_info, REPO, token="hf_wrong"),
        ]
        hf.create_repo("tester/public")
        """
    )
    assert said["user"] == "tester"
    assert said["exists"] == [REPO, True]
    assert said["refused"] == [
        ["HfHubHTTPError", 409],
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 409],
        ["HfHubHTTPError", 409],
        ["HfHubHTTPError", 412],
        ["RepositoryNotFoundError", 404],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
    ]
    before = len(server.requests)
    said = run(
        """
        write = {"path_or_fileobj": b"3", "path_in_repo": "a.txt"}
        said["refused"] = [
            failure(hf.model_info, REPO),
            failure(hf.snapshot_download, REPO),
            failure(hf.hf_hub_download, REPO, "a.txt"),
            failure(hf.upload_file, repo_id=REPO, **write),
            failure(hf.upload_file, repo_id="tester/public", **write),
        ]
        said["visible"] = [hf.repo_exists(REPO), hf.repo_exists("tester/public")]
        said["create"] = failure(hf.create_repo, "tester/new")
        """,
        HF_TOKEN=None,
    )
    assert said["refused"] == [["RepositoryNotFoundError", 401]] * 5
    assert said["visible"] == [False, True]
    assert said["create"] == ["HfHubHTTPError", 401]
    assert {request.authorization for request in server.requests[before:]} == {None}
    assert server.files(REPO)["a.txt"] == b"1"
    assert set(server.files("tester/public")) == {".gitattributes"}


def test_cards(run, server):
    """The Hub's check of a card's metadata comes before any upload; no metadata at all is a warning."""
    said = run(
        """
        hf.create_repo(REPO)
        if int(hf.__version__.split(".")[0]) >= 2:
            hf.ModelCard(card).push_to_hub(REPO)
        else:  # asks huggingface.co about the metadata, whatever HF_ENDPOINT says
            hf.upload_file(repo_id=REPO, path_or_fileobj=card.encode(), path_in_repo="README.md")
        loaded, info = hf.ModelCard.load(REPO), hf.model_info(REPO)
        said["loaded"] = [str(loaded), loaded.data.tags]
        said["info"] = [info.tags, info.card_data.license]
        said["errors"] = []
        for metadata in bad:
            try:
                content = "---\\n" + metadata + "\\n---\\n# Card\\n"
                hf.upload_file(repo_id=REPO, path_or_fileobj=content.encode(), path_in_repo="README.md")
            except ValueError as error:
                said["errors"].append(str(error))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hf.upload_file(repo_id=REPO, path_or_fileobj=b"# No metadata", path_in_repo="README.md")
        said["warnings"] = [str(warning.message) for warning in caught if "README.md" in str(warning.message)]
        """,
        card=CARD,
        bad=[
            "license: [",
            "tags: {}",
            'model-index: [{"name": "m", "results": [{"task": {"type": "t"}, "metrics": [{"type": "bits"}]}]}]',
        ],
    )
    assert said["loaded"] == [CARD, ["one", "two"]]
    assert said["info"] == [["one", "two"], "apache-2.0"]
    syntax, tags, results = said["errors"]
    assert "YAML" in syntax
    assert '"tags" must be an array' in tags
    assert '"model-index[0].results[0].dataset" is required' in results
    assert '"model-index[0].results[0].metrics[0].value" is required' in results
    assert len(said["warnings"]) == 1 and "empty or missing yaml metadata" in said["warnings"][0]
    commits = server.history(REPO)[:-1]
    assert [commit.files["README.md"].data for commit in commits] == [b"# No metadata", CARD.encode()]


@newer_client
def test_errors_on_the_way(run, server):
    """What the client does about them: it asks again where asking is harmless, and raises where it is not."""
    run("hf.create_repo(REPO)")
    faults = [
        server.fail("POST", "/preupload/", status=429, headers={"Retry-After": "0"}),
        server.fail("POST", "/commit/"),
        server.fail("GET", "/api/models/", status=503),
        server.fail("POST", "/branch/", status=401),
        server.fail("HEAD", "/resolve/"),
    ]
    said = run(
        """
        write = {"repo_id": REPO, "path_or_fileobj": b"1", "path_in_repo": "a.txt"}
        said["commit"] = failure(hf.upload_file, **write)
        said["info"] = failure(hf.model_info, REPO)
        said["branch"] = failure(hf.create_branch, REPO, branch="other")
        said["before"] = hf.list_repo_files(REPO)
        hf.upload_file(**write)
        hf.snapshot_download(REPO)
        with open(hf.hf_hub_download(REPO, "a.txt")) as file:
            said["after"] = file.read()
        """
    )
    assert [said["commit"], said["info"], said["branch"]] == [["HfHubHTTPError", s] for s in (500, 503, 401)]
    assert said["before"] == [".gitattributes"] and said["after"] == "1"
    assert statuses(server, "POST", "/commit/") == [500, 200]
    assert statuses(server, "POST", "/preupload/") == [429, 200, 200]
    assert statuses(server, "HEAD", "/resolve/")[0] == 500
    assert set(statuses(server, "HEAD", "/resolve/")[1:]) == {200}
    assert [fault.times for fault in faults] == [0] * len(faults)


@newer_client
def test_dropped_connections(run, server, tmp_path):
    """A commit that breaks off is no commit; a large file is sent again, and fetched on from where it broke off."""
    contents = {"text.txt": b"text" * 500_000, "large.bin": np.random.default_rng(0).bytes(15_000_000)}
    write(tmp_path / "folder", contents)
    faults = [
        server.fail("PUT", "^/storage/", drop_connection=True, after_bytes=5_000_000),
        server.fail("POST", "/commit/", drop_connection=True, after_bytes=1_000_000),
        # The client writes 10 MiB at a time.
        server.fail("GET", "^/storage/", drop_connection=True, after_bytes=12_000_000),
    ]
    program = """
        hf.create_repo(REPO, exist_ok=True)
        said["failure"] = failure(hf.upload_folder, repo_id=REPO, folder_path=folder)
        if said["failure"] is None:
            said["folder"] = hf.snapshot_download(REPO, allow_patterns=["*.txt", "*.bin"])
    """
    folder = str(tmp_path / "folder")
    assert run(program, folder=folder)["failure"] in DROPPED
    assert statuses(server, "PUT", "/storage/") == [None, 200]
    assert statuses(server, "POST", "/commit/") == [None]
    assert [commit.title for commit in server.history(REPO)] == ["initial commit"]

    said = run(program, folder=folder)
    assert statuses(server, "PUT", "/storage/") == [None, 200], "what the storage has is not sent again"
    assert read(said["folder"]) == contents
    fetched = [r.headers.get("Range") for r in server.requests if r.method == "GET" and "/storage/" in r.path]
    assert fetched == [None, f"bytes={10 * 2**20}-"]
    assert [fault.times for fault in faults] == [0] * len(faults)


def test_no_commit_is_lost_when_many_come_at_once(run, server):
    """The files are large enough that one commit comes while another is being made."""
    said = run(
        """
        from concurrent.futures import ThreadPoolExecutor

        def upload(i):
            content = f"{i} ".encode() * 300_000
            return hf.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo=f"{i}.txt").oid

        hf.create_repo(REPO)
        with ThreadPoolExecutor(8) as pool:
            said["commits"] = list(pool.map(upload, range(16)))
        """
    )
    history = server.history(REPO)
    assert sorted(commit.oid for commit in history[:-1]) == sorted(said["commits"])
    assert [len(commit.files) for commit in history] == list(range(17, 0, -1))
    files = server.files(REPO)
    del files[".gitattributes"]
    assert files == {f"{i}.txt": f"{i} ".encode() * 300_000 for i in range(16)}


@pytest.mark.slow
def test_diffusers_pushes_and_loads(run, server):
    """A stock pipeline that was pushed loads from the Hub, and from the cache after that, weight for weight."""
    said = run(
        """
        import torch
        from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

        torch.set_num_threads(1)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )
        pushed = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20))
        pushed.push_to_hub(REPO)
        said["loaded"] = []
        for options in ({}, {"local_files_only": True}):
            loaded = DiffusionPipeline.from_pretrained(REPO, **options)
            new, old = loaded.unet.state_dict(), unet.state_dict()
            said["loaded"].append([
                type(loaded).__name__,
                loaded.scheduler.config.num_train_timesteps,
                new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old),
            ])
        """
    )
    assert said["loaded"] == [["DDPMPipeline", 20, True]] * 2
    weights = "unet/diffusion_pytorch_model.safetensors"
    others = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert set(server.files(REPO)) == others | {weights, ".gitattributes"}
    assert server.history(REPO)[0].files[weights].lfs
    assert statuses(server, "HEAD", weights) == [302], "the second time it did not ask"
    assert {request.authorization for request in server.requests if request.origin == server.storage} == {None}
