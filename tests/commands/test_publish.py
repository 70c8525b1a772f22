"""Uploads from the examples: train.py's in the background, publish.py's, and what happens when the Hub fails.

The client is the real huggingface_hub, the Hub is tests/hub_server.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hub_server import HubServer, card_metadata
from networks import pipeline as tiny_pipeline
from processes import reset_accelerate
from sharing_support import client_of
from training_support import TINY, launch_two

from ddpm_vlb import CODE_FILES, DDPMVLBPipeline, SquaredErrors, StoredPath
from ddpm_vlb.commands import publish
from ddpm_vlb.runtime.publisher import Publisher, explain
from ddpm_vlb.runtime.staging import without_folders

ROOT = Path(__file__).parents[2]
OPTIONS = [*TINY, "--cpu", "--max_train_steps", "3", "--validation_steps", "1", "--logger", "none"]
RESULT = {
    "README.md",
    "data.json",
    "metrics.json",
    "model_index.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "training_options.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vlb_terms.png",
}


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


def titles(hub, name="tester/run", revision="main"):
    return [commit.title for commit in hub.history(name, revision)]


def run(hub, home, script, *options, **environment):
    """Run a script of examples/ as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, options)],
        env=hub.environment(home, OMP_NUM_THREADS="1", **environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- the publisher


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
    assert titles(hub) == ["initial commit"]
    gate.set()
    own._running.result()
    assert titles(hub)[0] == "first" and hub.files("tester/run")["model/index.json"] == b"1"
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
    assert titles(hub)[:2] == ["third", "first"]
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
    assert titles(hub) == ["result", "initial commit"]
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
    assert hub.files("tester/run")["a.json"] == b"1" and titles(hub)[0] == "before"
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
    assert titles(hub) == ["result", "initial commit"]
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
    assert titles(hub)[0] == "snapshot"
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
    assert titles(hub) == ["initial commit"]


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


# --- opening the repository


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


def test_paths_are_cut(tmp_path, monkeypatch):
    """Absolute and existing local paths lose their folders; names, numbers and Hub names stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "pictures").mkdir(parents=True)
    content = {
        "output_dir": str(tmp_path / "run"),
        "train_data_dir": "my/pictures",
        "config": "../secret/options.yaml",
        "cache_dir": "~/cache",
        "dataset_name": "ylecun/mnist",
        "widths": [8, 16],
        "none": None,
        "empty": "",
        "list": [str(tmp_path), 1.5],
        "windows": "C:\\Users\\me\\pictures",
        "url": "file:///data/pictures",
        "gone": "runs/secret/digits",
        "nobody": "~nobody-here/x",
        "long": "x" * 5000,
        "text": "1.79 of 17 levels",
    }
    assert without_folders(content) == {
        "output_dir": "./run",
        "train_data_dir": "./pictures",
        "config": "./options.yaml",
        "cache_dir": "./cache",
        "dataset_name": "ylecun/mnist",
        "widths": [8, 16],
        "none": None,
        "empty": "",
        "list": [f"./{tmp_path.name}", 1.5],
        "windows": "./pictures",
        "url": "./pictures",
        "gone": "./digits",
        "nobody": "./x",
        "long": "x" * 5000,
        "text": "1.79 of 17 levels",
    }


# --- train.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py as a command that uploads with its code, and the Hub it went to."""
    folder = tmp_path_factory.mktemp("trained")
    with HubServer() as server:
        options = [*OPTIONS, "--output_dir", folder / "run", "--push_to_hub", "--hub_model_id", "tester/digits"]
        more = ["--hub_private_repo", "--hub_include_code", "--hub_license", "mit"]
        done = run(server, folder / "home", "train.py", *options, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        yield SimpleNamespace(hub=server, folder=folder, done=done, run=folder / "run")


def test_a_run_is_uploaded_as_it_goes(trained):
    """The commits are the snapshots of the validations, in order, then the result, which is tagged."""
    history = titles(trained.hub, "tester/digits")
    assert history[0] == "Step 3, the last: the result" and history[-2:] == ["Begin a run", "initial commit"]
    # A snapshot may be left out where the one before is still on its way, but not the first.
    assert history[-3].startswith("Step 1: validation ") and "bits/dim" in history[-3]
    assert trained.hub.history("tester/digits", "step-3")[0].oid == trained.hub.history("tester/digits")[0].oid
    assert "tag step-3" in trained.done.stdout


def test_a_snapshot_says_that_it_is_one(trained):
    """The first snapshot is whole and loads, but its card says that training goes on, and of what it was scored."""
    commit = trained.hub.history("tester/digits")[-3]
    files = trained.hub.files("tester/digits", commit.oid)
    assert files.keys() >= RESULT
    card = files["README.md"].decode()
    assert "Training is not finished: this is step 1 of 3." in card
    metrics = json.loads(files["metrics.json"])
    assert "test" not in metrics and metrics["validation"]["num_images"] == 64
    (result,) = card_metadata(card)[0]["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation"
    final = trained.hub.files("tester/digits")["README.md"].decode()
    assert "not finished" not in final


def test_the_result_is_what_lies_on_disk(trained):
    """Weights and pictures bit for bit, the metrics but for paths, a card with the test's bound, the code, no logs."""
    files = trained.hub.files("tester/digits")
    assert files.keys() == RESULT | {".gitattributes", *CODE_FILES}
    weights = "unet/diffusion_pytorch_model.safetensors"
    a, b = safetensors.torch.load(files[weights]), safetensors.torch.load_file(trained.run / weights)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for name in ("samples.png", "vlb_terms.png", "model_index.json", "scheduler/scheduler_config.json"):
        own, local = files[name], (trained.run / name).read_bytes()
        if name.endswith(".json"):
            own, local = json.loads(own), json.loads(local)
        assert own == local, name
    local, published = json.loads((trained.run / "metrics.json").read_text()), json.loads(files["metrics.json"])
    assert published["test"] == local["test"] and published["options"]["output_dir"] == "./run"
    metadata, problems = card_metadata(files["README.md"].decode())
    assert problems == [] and metadata["license"] == "mit" and metadata["library_name"] == "diffusers"
    metric = metadata["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "bits_per_dim" and metric["name"] == "Bits/dim (VLB)"
    assert metric["value"] == pytest.approx(local["test"]["bits_per_dim"], abs=1e-6)


def test_neither_the_token_nor_a_path_is_told(trained):
    """Not in what was printed, not on disk, not in any file of any commit; the repository is private."""
    token, place = trained.hub.token, str(trained.folder)
    assert token not in trained.done.stdout + trained.done.stderr
    written = [path.read_bytes() for path in trained.run.rglob("*") if path.is_file()]
    uploaded = [
        content
        for commit in trained.hub.history("tester/digits")
        for content in trained.hub.files("tester/digits", commit.oid).values()
    ]
    assert not any(token.encode() in content for content in written + uploaded)
    assert not any(place.encode() in content for content in uploaded)
    asked = [request for request in trained.hub.requests if "/resolve/" in request.path]
    assert all(request.authorization for request in asked)


LOAD = """
import hashlib, json, sys
if {blocked}:
    sys.modules["ddpm_vlb"] = None
import torch
torch.set_num_threads(1)
{load}
pipe.set_progress_bar_config(disable=True)
for parameter in pipe.unet.parameters():
    parameter.data = parameter.data.clone()  # one alignment in memory, so that sums round alike
weights = {{key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in pipe.unet.state_dict().items()}}
images = pipe(2, generator=torch.Generator().manual_seed(5), num_inference_steps=5, output_type="np").images
print(json.dumps({{"class": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__,
                   "module": type(pipe).__module__.split(".")[0], "weights": weights, "images": images.tolist(),
                   "ours": bool(sys.modules.get("ddpm_vlb"))}}))
"""
WAYS = {
    "stock": (True, "from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained({repo!r})"),
    "ours": (False, "from ddpm_vlb import DDPMVLBPipeline\npipe = DDPMVLBPipeline.from_pretrained({repo!r})"),
    "code": (
        True,
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained({repo!r}, custom_pipeline={repo!r}, trust_remote_code=True)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_one_repository_loads_in_three_ways(trained, tmp_path, where):
    """Each way in a fresh process with empty caches: the run's weights bit for bit, and the same images.

    Ours and the repository's own code give the very same images; stock's tables are float32, some 1e-5 off.
    """
    repo = "tester/digits"
    if where == "folder":
        repo = str(tmp_path / "saved")
        DDPMVLBPipeline.from_pretrained(trained.run).save_pretrained(repo, include_code=True)
    found = {}
    for way, (blocked, load) in WAYS.items():
        code = LOAD.format(blocked=blocked, load=load.format(repo=repo))
        environment = trained.hub.environment(tmp_path / way, OMP_NUM_THREADS="1")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found[way] = json.loads(done.stdout.splitlines()[-1])
    assert [found[way]["class"] for way in WAYS] == ["DDPMPipeline", "DDPMVLBPipeline", "DDPMVLBPipeline"]
    assert [found[way]["scheduler"] for way in WAYS] == ["DDPMScheduler", "DDPMVLBScheduler", "DDPMVLBScheduler"]
    assert [found[way]["module"] for way in WAYS] == ["diffusers", "ddpm_vlb", "diffusers_modules"]
    assert [found[way]["ours"] for way in WAYS] == [False, True, False]
    assert found["stock"]["weights"] == found["ours"]["weights"] == found["code"]["weights"]
    assert found["ours"]["images"] == found["code"]["images"]
    images = {way: torch.tensor(found[way]["images"]) for way in WAYS}
    torch.testing.assert_close(images["stock"], images["ours"], rtol=0, atol=3e-5)
    assert float(((images["ours"] > 0) & (images["ours"] < 1)).float().mean()) > 0.1


@pytest.mark.slow
def test_a_hub_that_fails_kills_no_run(tmp_path):
    """Every commit is refused: training ends as ever, the result is whole on disk, the way to upload it is told."""
    with HubServer() as server:
        # All but the one that begins the run.
        server.fail("POST", "/storage/|/lfs/objects/batch", times=1000, status=403)
        options = [*OPTIONS, "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "tester/digits"]
        options += ["--hub_license", "mit", "--hub_include_code"]
        done = run(server, tmp_path / "home", "train.py", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "NOT UPLOADED" in done.stdout and "this model" in done.stdout
        assert RESULT - {"README.md", "training_options.json"} <= {
            str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")
        }
        assert titles(server, "tester/digits") == ["Begin a run", "initial commit"]
        server._faults.clear()
        (command,) = [shlex.split(line) for line in done.stdout.splitlines() if "ddpm-vlb publish" in line]
        again = run(server, tmp_path / "home", "publish.py", *command[2:])
        assert again.returncode == 0, again.stderr[-3000:]
        files = server.files("tester/digits", "step-3")
        assert files.keys() >= RESULT | set(CODE_FILES) and b"license: mit" in files["README.md"]


@pytest.mark.slow
def test_a_wrong_token_is_told_before_training(tmp_path):
    """One line and an exit code, no step of training, nothing made."""
    with HubServer() as server:
        options = [*OPTIONS, "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "tester/digits"]
        done = run(server, tmp_path / "home", "train.py", *options, HF_TOKEN="hf_wrong")
    assert done.returncode == 1
    assert "hf auth login" in done.stderr and "Traceback" not in done.stderr and "Training" not in done.stderr
    assert "hf_wrong" not in done.stdout + done.stderr
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    "options",
    ["--hub_model_id a/b", "--hub_private_repo", "--hub_include_code", "--hub_license mit", "--hub_overwrite"],
)
def test_hub_options_need_an_upload(tmp_path, capsys, options):
    """An option of the upload without --push_to_hub is a mistake, and is said to be one."""
    from ddpm_vlb.commands import train

    with pytest.raises(SystemExit):
        train.main([*TINY, "--output_dir", str(tmp_path), *options.split()])
    assert "--push_to_hub" in capsys.readouterr().err
    reset_accelerate()


@pytest.mark.slow
def test_two_processes_upload_once(tmp_path, monkeypatch):
    """Only the main process uploads; where it cannot, all processes end."""
    with HubServer() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        options = "--max_train_steps 2 --validation_steps 1 --push_to_hub --hub_model_id tester/two"
        out = launch_two(tmp_path / "run", options)
        assert out.count("Uploading to") == 1
        assert titles(server, "tester/two")[0] == "Step 2, the last: the result"
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        started = time.monotonic()
        with pytest.raises(AssertionError, match="hf auth login"):
            launch_two(tmp_path / "other", options)
        assert time.monotonic() - started < 120


# --- publish.py


def test_any_saved_pipeline_can_be_published(hub, tmp_path):
    """A folder without metrics goes up with a card that claims no result, tagged `result`."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    publish.main([str(tmp_path / "tiny"), "--hub_model_id", "tester/tiny"])
    files = hub.files("tester/tiny", "result")
    assert "metrics.json" not in files and "No likelihood was measured" in files["README.md"].decode()
    assert "model-index" not in card_metadata(files["README.md"].decode())[0]


def test_evaluations_join_the_card(hub, trained, tmp_path):
    """evaluate.py's metrics of a shorter chain become the card's table of few steps."""
    evaluation = {
        "bits_per_dim": 1.25,
        "noise_se": 0.01,
        "image_se": 0.02,
        "prior": 0.05,
        "kl": 1.0,
        "decoder": 0.2,
        "num_images": 8,
        "network_calls_per_image": 8,
        "clip_sample": True,
        "timesteps": [0, 9, 19],
        "data": {"dataset_name": None, "split": "test"},
    }
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(evaluation))
    publish.main([str(trained.run), "--hub_model_id", "tester/again", "--evaluations", str(path)])
    card = hub.files("tester/again", "step-3")["README.md"].decode()
    assert "## Few steps" in card and "| 3 | scikit-learn digits (test split) | 8 | 1.250" in card


def test_an_evaluation_of_another_model_is_refused(hub, trained, tmp_path):
    """Its weights' hash tells; nothing is made."""
    evaluation = {"bits_per_dim": 0.01, "timesteps": [0], "data": {}, "num_images": 1, "network_calls_per_image": 2}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(evaluation | {"model": {"weights_sha256": "0" * 32}}))
    with pytest.raises(SystemExit, match="other weights"):
        publish.main([str(trained.run), "--hub_model_id", "tester/other", "--evaluations", str(path)])
    assert not huggingface_hub.HfApi().repo_exists("tester/other")


def test_publishing_again_undoes_nothing(hub, trained, tmp_path):
    """Once more without its options: the code, the license and another precision's weights stay, and so does fp16."""
    command = [str(trained.run), "--hub_model_id", "tester/twice"]
    publish.main(command)
    assert b"license: mit" in hub.files("tester/twice")["README.md"]  # the run's own
    half = b"half"
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    huggingface_hub.HfApi().upload_file(path_or_fileobj=half, path_in_repo=name, repo_id="tester/twice")
    publish.main(command)
    files = hub.files("tester/twice")
    assert files.keys() >= set(CODE_FILES) and b"license: mit" in files["README.md"] and files[name] == half
    pipe = tiny_pipeline()
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    publish.main([str(tmp_path / "half"), "--hub_model_id", "tester/half"])
    uploaded = safetensors.torch.load(hub.files("tester/half")["unet/diffusion_pytorch_model.safetensors"])
    assert {tensor.dtype for tensor in uploaded.values()} == {torch.float16}


def test_stored_variances_are_those_of_the_last_upload(hub, tmp_path):
    """The file that the configuration names goes with it, and takes the place of the one before."""
    pipe = tiny_pipeline()
    last, shape = len(pipe.scheduler) - 1, (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    for value in (0.1, 0.2):
        pixels = torch.full((2, *shape), value)
        errors = SquaredErrors(torch.tensor([0, last]), torch.full((2,), value, dtype=torch.float64), pixels)
        pipe.scheduler.store_few_steps([StoredPath((last, 0), "per_pixel")], errors)
        pipe.save_pretrained(tmp_path / "few")
        publish.main([str(tmp_path / "few"), "--hub_model_id", "tester/few"])
        stored = [name for name in hub.files("tester/few") if "x_0_mse" in name]
        assert stored == [f"scheduler/{pipe.scheduler.errors_file}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "bits_per_dim"), ("[1]", "bits_per_dim"), ("{", "cannot be read"), (None, "cannot")],
)
def test_bad_evaluations_are_refused_before_anything_is_made(hub, tmp_path, content, message):
    """A file that is none of evaluate.py's is named, and no repository appears."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        publish.main([str(tmp_path / "tiny"), "--hub_model_id", "tester/tiny", "--evaluations", str(path)])
    assert not huggingface_hub.HfApi().repo_exists("tester/tiny")


def test_a_folder_without_a_pipeline_is_refused(hub, tmp_path):
    """Nothing is made for a folder that holds no pipeline."""
    with pytest.raises(SystemExit, match="holds no pipeline"):
        publish.main([str(tmp_path)])
    assert hub.requests == []
