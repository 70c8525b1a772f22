"""Uploads as a user meets them: `ddpm-vlb train --push_to_hub`, `ddpm-vlb publish`, and a Hub that fails.

The client is the real huggingface_hub, the Hub is tests/hub_server.py.
"""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hub_cards import card_metadata
from hub_server import HubServer
from processes import reset_accelerate
from scoring_support import launcher, network
from sharing_support import client_of, titles

from ddpm_vlb import CODE_FILES, DDPMVLBPipeline, DDPMVLBScheduler, SquaredErrors, StoredPath
from ddpm_vlb.commands import publish, train

ROOT = Path(__file__).parents[2]
TINY = (
    "--block_out_channels 8 8 --norm_num_groups 4 --train_batch_size 8 --ddpm_num_steps 20 --lr_warmup_steps 0 "
    "--calls_per_image 8 --num_test_images 8 --eval_batch_size 4 --ddpm_num_inference_steps 4"
).split()
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


def pipeline():
    """A pipeline that has learned nothing."""
    return DDPMVLBPipeline(network(1, 2), DDPMVLBScheduler(variance_type="learned_range"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process' client talks to."""
    with HubServer() as server:
        client_of(server, monkeypatch, tmp_path)
        yield server


def run(hub, home, script, *options, **environment):
    """Run a script of examples/ as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, options)],
        env=hub.environment(home, OMP_NUM_THREADS="1", **environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


# train --push_to_hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that uploads with its code, what it printed, and the Hub it went to."""
    folder, out, err = tmp_path_factory.mktemp("trained"), io.StringIO(), io.StringIO()
    options = [*OPTIONS, "--output_dir", str(folder / "run"), "--push_to_hub", "--hub_model_id", "tester/digits"]
    more = ["--hub_private_repo", "--hub_include_code", "--hub_license", "mit"]
    with HubServer() as server:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            client_of(server, patch, folder)
            reset_accelerate()
            train.main([*options, *more])
        printed = SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
        yield SimpleNamespace(hub=server, folder=folder, done=printed, run=folder / "run")


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
        assert "NOT UPLOADED" in done.stdout and "Test bits/dim" in done.stdout
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
    with pytest.raises(SystemExit):
        train.main([*TINY, "--output_dir", str(tmp_path), *options.split()])
    assert "--push_to_hub" in capsys.readouterr().err
    reset_accelerate()


def train_on_two(folder, options):
    """Train on two processes."""
    command = [*launcher(2), str(ROOT / "examples" / "train.py"), *TINY, "--output_dir", str(folder), *options.split()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_two_processes_upload_once(tmp_path, monkeypatch):
    """Only the main process uploads; where it cannot, all processes end."""
    with HubServer() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        options = "--max_train_steps 2 --validation_steps 1 --push_to_hub --hub_model_id tester/two"
        done = train_on_two(tmp_path / "run", options)
        assert done.returncode == 0 and done.stdout.count("Uploading to") == 1, done.stderr[-3000:]
        assert titles(server, "tester/two")[0] == "Step 2, the last: the result"
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        started = time.monotonic()
        done = train_on_two(tmp_path / "other", options)
        assert done.returncode != 0 and "hf auth login" in done.stderr
        assert time.monotonic() - started < 120


# publish


def test_any_saved_pipeline_can_be_published(hub, tmp_path):
    """A folder without metrics goes up with a card that claims no result, tagged `result`."""
    pipeline().save_pretrained(tmp_path / "tiny")
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
    pipe = pipeline()
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    publish.main([str(tmp_path / "half"), "--hub_model_id", "tester/half"])
    uploaded = safetensors.torch.load(hub.files("tester/half")["unet/diffusion_pytorch_model.safetensors"])
    assert {tensor.dtype for tensor in uploaded.values()} == {torch.float16}


def test_stored_variances_are_those_of_the_last_upload(hub, tmp_path):
    """The file that the configuration names goes with it, and takes the place of the one before."""
    pipe = pipeline()
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
    pipeline().save_pretrained(tmp_path / "tiny")
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
