"""Uploads: in the background, again where they fail, and what is told at the start.

The client is the real huggingface_hub, the Hub is tests/hub_server.py.
"""

import json
import os
import re
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import HubServer
from sharing_support import client_of, titles

from ddpm_vlb.runtime.publisher import Publisher, explain


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process' client talks to."""
    with HubServer() as server:
        client_of(server, monkeypatch, tmp_path)
        yield server


def write(**files):
    """What makes a folder of these files; a __ in a name stands for the folder's /, a _ before its end for the dot."""

    def make(folder):
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return make


def options(**changed):
    """The options of an upload."""
    given = {"private_repo": None, "include_code": None, "license": "unknown", "overwrite": None}
    return SimpleNamespace(**{f"hub_{name}": value for name, value in (given | changed).items()})


def publisher(hub, said, name="tester/run", waits=(0.01, 0.01)):
    """A publisher to a new repository, and what it reports in `said`."""
    return Publisher.open(name, {}, options(), said.append, waits=waits)


# The publisher


def test_a_snapshot_is_uploaded_while_the_caller_goes_on(hub):
    """`offer` returns at once; the folder's content at that moment arrives in one commit, and the copy is removed."""
    said, gate, folders = [], threading.Event(), []
    own = publisher(hub, said)
    upload = own.api.upload_folder
    own.api.upload_folder = lambda **arguments: gate.wait(30) and upload(**arguments)

    def make(folder):
        folders.append(folder)
        write(model__index_json=b"1")(folder)

    own.offer(make, "first")
    assert titles(hub, "tester/run") == ["initial commit"]
    gate.set()
    own._running.result()
    assert titles(hub, "tester/run")[0] == "first" and hub.files("tester/run")["model/index.json"] == b"1"
    assert not folders[0].exists()


def test_a_snapshot_that_comes_too_early_is_left_out(hub):
    """While an upload runs the next snapshot is not made at all, and this is said; the one after it is."""
    said, gate = [], threading.Event()
    own = publisher(hub, said)
    upload = own.api.upload_folder
    own.api.upload_folder = lambda **arguments: gate.wait(30) and upload(**arguments)
    own.offer(write(a_txt=b"1"), "first")
    own.offer(lambda folder: pytest.fail("made"), "second")
    gate.set()
    own._running.result()
    own.offer(write(a_txt=b"3"), "third")
    own._running.result()
    assert titles(hub, "tester/run")[:2] == ["third", "first"]
    assert [line for line in said if "second" in line and "still running" in line]


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        ({"method": "POST", "path_regex": "/commit/", "status": 500, "times": 2}, 2),
        ({"method": "POST", "path_regex": "/commit/", "drop_connection": True, "times": 2}, 2),
        # Here the client tries again by itself, five times, before it fails.
        ({"method": "PUT", "path_regex": "/storage/", "drop_connection": True, "after_bytes": 1000, "times": 8}, 1),
    ],
    ids=["500", "dropped", "dropped-in-a-file"],
)
def test_a_failed_upload_is_retried(hub, monkeypatch, fault, failures):
    """What the Hub could not do it does at a later attempt: one commit with the whole content, and a tag."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own pauses
    said = []
    own = publisher(hub, said)
    injected = hub.fail(**fault)
    weights = os.urandom(50_000)
    assert own.finish(write(unet__a_safetensors=weights, b_json=b"{}"), "result", "step-1") == "step-1"
    assert injected.times == 0
    assert len([line for line in said if "failed, trying again" in line]) == failures
    answers = {request.status for request in hub.requests if re.search(fault["path_regex"], request.path)}
    assert (None in answers) == ("drop_connection" in fault)  # a dropped one is answered with nothing
    assert titles(hub, "tester/run") == ["result", "initial commit"]
    files = hub.files("tester/run", "step-1")
    assert files["unet/a.safetensors"] == weights and files["b.json"] == b"{}"


@pytest.mark.parametrize("status", [500, 403, 401])
def test_a_hub_that_goes_on_failing(hub, status):
    """It is reported and given up, at once where the Hub says no; no exception, the branch as it was, no tag."""
    said = []
    own = publisher(hub, said)
    assert own.finish(write(a_json=b"1"), "before", "step-1") == "step-1"
    injected = hub.fail("POST", "/commit/", times=1000, status=status)
    assert own.finish(write(a_json=b"2"), "after", "step-2") is None
    assert hub.files("tester/run")["a.json"] == b"1" and titles(hub, "tester/run")[0] == "before"
    assert [ref.name for ref in own.api.list_repo_refs("tester/run").tags] == ["step-1"]
    failures = [line for line in said if "'after' failed" in line]
    assert len(failures) == (3 if status == 500 else 1) and "given up" in failures[-1]
    if status == 500:
        assert injected.times < 998  # it was asked again


def test_a_failed_snapshot_does_not_disturb(hub):
    """A snapshot that fails for good is reported, and the result is uploaded all the same."""
    said = []
    own = publisher(hub, said)
    injected = hub.fail("POST", "/commit/", times=1000, status=500)
    own.offer(write(a_json=b"1"), "snapshot")
    own._running.result()
    injected.times = 0
    assert own.finish(write(a_json=b"2"), "result", "step-2") == "step-2"
    assert titles(hub, "tester/run") == ["result", "initial commit"]
    assert any("snapshot" in line and "given up" in line for line in said)


@pytest.mark.parametrize("what", ["no folder", "closed terminal"])
def test_nothing_around_an_upload_kills_a_run(hub, tmp_path, what):
    """Neither a place for snapshots that is gone, nor a report that nobody can read."""

    def report(message):
        if what == "closed terminal":
            raise BrokenPipeError

    own = publisher(hub, [])
    own.report = report
    if what == "no folder":
        own.staging = tmp_path / "gone"
    own.offer(write(a_json=b"1"), "snapshot")
    hub.fail("POST", "/commit/", times=1000, status=403)
    assert own.finish(write(a_json=b"2"), "result", "step-1") is None


def test_an_early_end_waits_for_one_attempt_only(hub, tmp_path):
    """`close` lets what is on its way arrive; a failure is not tried again, however long the pause would be."""
    said = []
    own = publisher(hub, said, waits=(1000.0,))
    own.offer(write(a_json=b"1"), "snapshot")
    own.close()
    assert titles(hub, "tester/run")[0] == "snapshot"
    own = publisher(hub, said, "tester/other", waits=(1000.0,))
    hub.fail("POST", "/commit/", times=1000, status=500)
    own.offer(write(a_json=b"1"), "snapshot")
    started = time.monotonic()
    own.close()
    assert time.monotonic() - started < 60 and titles(hub, "tester/other") == ["initial commit"]


def test_what_a_killed_run_left_is_removed(hub, tmp_path):
    """Snapshots lie in the output folder on their way; the next run removes those of one that was killed."""
    (tmp_path / ".upload-old").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    own = Publisher.open("tester/run", {}, options(), print, staging=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    seen = []
    assert own.finish(lambda folder: (seen.append(folder.parent), write(a_json=b"1")(folder)), "result", "step-1")
    assert seen == [tmp_path] and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("when", ["snapshot", "result"])
def test_a_folder_that_cannot_be_written(hub, when):
    """A full disk ends no training: it is reported, and the repository stays as it is."""
    said = []
    own = publisher(hub, said)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    if when == "snapshot":
        own.offer(full, "snapshot")
    else:
        assert own.finish(full, "result", "step-1") is None
    assert any("No space left on device" in line for line in said)
    assert titles(hub, "tester/run") == ["initial commit"]


def test_files_of_an_earlier_run_do_not_stay(hub):
    """What an upload does not bring is removed if it is ours, in the same commit, and kept if it is not."""
    said = []
    own = publisher(hub, said)
    weights = "unet/diffusion_pytorch_model"
    old = [f"{weights}-00001-of-00002.safetensors", f"{weights}.fp16.safetensors", "samples.png"]
    users = ["notes.txt", "unet/model.onnx"]

    def make(folder):
        (folder / "unet").mkdir()
        for name in old + users:
            (folder / name).write_text("old")

    assert own.finish(make, "old", "step-1")
    assert own.finish(lambda folder: (folder / "training_options.json").write_text("{}"), "new", "step-2")
    assert hub.files("tester/run").keys() == {".gitattributes", "training_options.json", *users}
    assert hub.files("tester/run", "step-1").keys() >= {*old, *users}


def test_a_tag_never_moves(hub):
    """The same tag again gets the commit's hash behind it; a result that changes nothing keeps its tag."""
    own = publisher(hub, [])
    assert own.finish(write(a_json=b"1"), "first", "step-1") == "step-1"
    assert own.finish(write(a_json=b"1"), "the same", "step-1") == "step-1"
    name = own.finish(write(a_json=b"2"), "second", "step-1")
    assert name == f"step-1-{hub.history('tester/run')[0].oid[:7]}"
    assert hub.files("tester/run", "step-1")["a.json"] == b"1" and hub.files("tester/run", name)["a.json"] == b"2"


# Opening the repository


def test_a_name_without_a_user_is_completed(hub):
    """`digits` means the token's own namespace, and the full name is said."""
    said = []
    assert Publisher.open("digits", {}, options(), said.append).repo_id == "tester/digits"
    assert said == [f"Uploading to {hub.endpoint}/tester/digits."]


def test_a_private_repository(hub):
    """--hub_private_repo makes a private one, and refuses one that is public; without it the Hub decides."""
    Publisher.open("tester/secret", {}, options(private_repo=True), print)
    assert huggingface_hub.HfApi().model_info("tester/secret").private
    huggingface_hub.HfApi().create_repo("tester/open")
    with pytest.raises(SystemExit, match="public"):
        Publisher.open("tester/open", {}, options(private_repo=True), print)
    seen = []
    own = huggingface_hub.HfApi.create_repo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "create_repo", lambda *a, **k: seen.append(k["private"]) or own(*a, **k))
        Publisher.open("tester/either", {}, options(), print)
    assert seen == [None]


def test_a_repository_with_other_content_is_refused(hub):
    """Its files are named and stay; one with a README alone, as the website makes it, is taken."""
    api = huggingface_hub.HfApi()
    api.create_repo("tester/other")
    api.upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="tester/other")
    assert Publisher.open("tester/other", {}, options(), print).repo_id == "tester/other"
    api.upload_file(path_or_fileobj=b"x", path_in_repo="pytorch_model.bin", repo_id="tester/other")
    with pytest.raises(SystemExit, match=r"something else already \(README\.md, pytorch_model\.bin\)"):
        Publisher.open("tester/other", {}, options(overwrite=True), print)
    assert hub.files("tester/other")["pytorch_model.bin"] == b"x"


def test_another_run_is_not_overwritten(hub):
    """The same run goes on in its repository; another one is refused, unless --hub_overwrite is given."""
    run = {"seed": 0, "output_dir": "/a/run", "max_train_steps": 10, "hub_license": "mit"}
    Publisher.open("tester/run", run, options(), print).begin(run)
    assert json.loads(hub.files("tester/run")["training_options.json"])["output_dir"] == "./run"
    longer = {**run, "output_dir": "/b/run", "max_train_steps": 20, "hub_license": None}
    Publisher.open("tester/run", longer, options(), print)
    other = {**run, "seed": 1}
    with pytest.raises(SystemExit, match="another run already.*--hub_overwrite"):
        Publisher.open("tester/run", other, options(), print)
    Publisher.open("tester/run", other, options(overwrite=True), print)


def test_no_right_to_write_is_told_at_the_start(hub):
    """A repository that one may read but not write passes as far as its name does; the first file is refused."""
    Publisher.open("tester/run", {}, options(), print)
    own = Publisher.open("tester/run", {}, options(), print)
    hub.fail("POST", "/preupload/|/commit/", times=1000, status=403)
    with pytest.raises(SystemExit, match="--hub_model_id tester/run: your token may not do this"):
        own.begin({})


@pytest.mark.skipif(huggingface_hub.__version__ < "1", reason="older clients ask huggingface.co about a card")
def test_a_license_that_the_hub_does_not_know(hub):
    """It is refused before anything is made."""
    with pytest.raises(SystemExit, match="--hub_license Apache 2.0.*license"):
        Publisher.open("tester/run", {}, options(license="Apache 2.0"), print)
    assert not huggingface_hub.HfApi().repo_exists("tester/run")


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("tester/run", "hf_wrong", "hf auth login.*HF_TOKEN"),
        ("tester/run", None, "hf auth login.*HF_TOKEN|Token is required"),
        ("somebody/run", "right", "somebody/run"),
        ("tester/run/more", "right", "tester/run/more.*(?i:repo)"),
        ("tester/" + "x" * 100, "right", "(?i:repo)"),
        ("", "right", "hub_model_id"),
    ],
    ids=["wrong-token", "no-token", "foreign", "too-many-parts", "too-long", "empty"],
)
def test_what_the_hub_refuses_is_said_at_the_start(hub, monkeypatch, tmp_path, name, token, message):
    """One line that names the option and the way out, and neither a traceback nor the token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    elif token != "right":
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=message) as refusal:
        Publisher.open(name, {}, options(), print)
    said = str(refusal.value.code)
    assert said.startswith("--hub_model_id") and "\n" not in said
    assert hub.token not in said and (token in (None, "right") or token not in said)


def test_a_hub_that_is_not_there(hub, monkeypatch):
    """A connection that is refused is one line as well."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="--hub_model_id tester/run"):
        Publisher.open("tester/run", {}, options(), print)


def test_signed_addresses_are_not_told():
    """The storage's addresses hold credentials: what is said of an error ends where their query begins."""
    error = OSError("403 for url: https://storage/file?X-Amz-Signature=secret&b=c\n\nand more")
    assert explain(error) == "403 for url: https://storage/file and more"
    assert explain(ValueError()) == "ValueError"
