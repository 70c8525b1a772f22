"""Sharing: what a push leaves on the Hub, and who loads it how.

The client is the real huggingface_hub, the Hub is tests/hub_server.py. Each way to load runs in a process of its own
with empty caches, and the ways that need no installation in one where `import ddpm_vlb` is impossible.
"""

import ast
import json
import logging
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import check_imports, get_relative_import_files
from hub_server import FAILURE, HubServer, card_metadata
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from test_pipeline_ddpm_vlb import pipeline, quiet, sample, tiny_unet

import ddpm_vlb
from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler
from ddpm_vlb.repositories import CODE_FILES

# Before 0.38 stock runs what `custom_pipeline=` names without `trust_remote_code`.
STOCK_ASKS = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 38)
REPO = "tester/digits"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PLAIN = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}
CONFIG = {"levels": 17, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
# What stock cannot sample: the second format.
OURS_ONLY = {
    "tester/learned": ({}, {"variance_type": "learned"}),
    "tester/classes": ({"classes": 4}, {}),
}
DROPPED = ("ReadError", "RemoteProtocolError", "WriteError", "ConnectionError", "ChunkedEncodingError")
# Every program begins with this; what it has to say it puts into `said`, tensors under `out`.
PRELUDE = """
import json, sys
globals().update(json.loads(sys.argv[1]))
for name in impossible:
    sys.modules[name] = None
import torch
import huggingface_hub as hf
from diffusers import DDPMPipeline, DiffusionPipeline

torch.set_num_threads(1)
said = {}
"""
PRELUDE += FAILURE
PRELUDE += """
def report(name, pipe, **arguments):
    # Cloned: loaded weights lie where the file has them, and another alignment may round sums otherwise.
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=10, generator=generator, output_type="np", **arguments).images
    torch.save({"weights": pipe.unet.state_dict(), "images": torch.from_numpy(images)}, f"{out}/{name}.pt")
    kinds = [type(part) for part in (pipe, pipe.scheduler)]
    said[name] = [[kind.__name__, kind.__module__.split(".")[0]] for kind in kinds]
    said[name + ".config"] = {key: pipe.scheduler.config.get(key) for key in config}
"""
STOCK = [["DDPMPipeline", "diffusers"], ["DDPMScheduler", "diffusers"]]
OURS = [["DDPMVLBPipeline", "ddpm_vlb"], ["DDPMVLBScheduler", "ddpm_vlb"]]
REMOTE = [["DDPMVLBPipeline", "diffusers_modules"], ["DDPMVLBScheduler", "diffusers_modules"]]


def digits(seed: int = 0) -> DDPMVLBPipeline:
    return pipeline(tiny_unet(seed=seed), **CONFIG)


def images(pipe, **arguments) -> torch.Tensor:
    return torch.from_numpy(sample(pipe, batch_size=2, steps=10, output_type="np", **arguments))


def labels(name: str) -> dict:
    return {"class_labels": [1, 2]} if "classes" in name else {}


def run(server, home, out, program, impossible=(), **variables):
    """What a program says in a process that knows this Hub and has the caches of `home`."""
    environment = {name: variables.pop(name) for name in [*variables] if name.isupper()}
    environment = {"OMP_NUM_THREADS": "1"} | environment
    variables |= {"impossible": list(impossible), "out": str(out), "config": CONFIG, "REPO": REPO}
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{PRELUDE}{textwrap.dedent(program)}\nprint(json.dumps(said))",
            json.dumps(variables),
        ],
        env=server.environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert server.token not in result.stdout + result.stderr
    return SimpleNamespace(said=json.loads(result.stdout.splitlines()[-1]), log=result.stdout + result.stderr)


def client_of(server, patch, home):
    """Let this process' client talk to the Hub."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # older clients read their own copy
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)  # older clients have no Xet
    patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "no-token"))
    patch.setenv("HF_TOKEN", server.token)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that this process' client talks to."""
    with HubServer() as server:
        client_of(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def log():
    """The messages of warning level and above of diffusers and of this package."""
    messages: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "ddpm_vlb")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def titles(server, repo, revision="main"):
    return [commit.title for commit in server.history(repo, revision)]


def repositories(server):
    return sorted(repo_id for _, repo_id in server._repositories)


def assert_no_token(server):
    """The token is in no file of any commit, and was shown to nobody but the Hub."""
    for repo in server._repositories.values():
        for commit in repo.commits.values():
            assert not any(server.token.encode() in blob.data for blob in commit.files.values())
            assert server.token not in commit.title + commit.message
    storage = [request for request in server.requests if request.origin == server.storage]
    assert {request.authorization for request in storage} <= {None}
    assert not any(server.token in request.path + request.query for request in server.requests)


def assert_same(loaded: Path, original, tolerance: float = 0.0, **arguments):
    """The same weights bit for bit, and the same images; not all black and white, which any algorithm could give."""
    found, weights = torch.load(loaded), original.unet.state_dict()
    assert found["weights"].keys() == weights.keys()
    assert all(torch.equal(found["weights"][name], weights[name]) for name in weights)
    expected = images(original, **arguments)
    torch.testing.assert_close(found["images"], expected, rtol=0, atol=tolerance)
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.2


# --- one Hub, filled once; who loads from it

PUSH = """
sys.path.insert(0, tests)
from test_sharing import digits

commits = [digits().push_to_hub(REPO, include_code=True)]
hf.create_tag(REPO, tag="v1")
commits += [digits(1).push_to_hub(REPO), digits().to(torch.float16).push_to_hub(REPO, variant="fp16")]
said["commits"] = [commit.oid for commit in commits]
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A Hub with repositories of both formats, and the same as folders.

    Of tester/digits the tag v1 has the weights of seed 0 and the code; main has those of seed 1, and beside them the
    variant fp16 of seed 0.
    """
    root = tmp_path_factory.mktemp("shared")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        verbose = {"DIFFUSERS_VERBOSITY": "debug", "HF_HUB_VERBOSITY": "debug"}
        pushed = run(server, root / "pusher", root, PUSH, tests=str(Path(__file__).parent), **verbose)
        client_of(server, patch, root)
        for name, (network, config) in OURS_ONLY.items():
            own = pipeline(tiny_unet(**network), **config)
            own.push_to_hub(name, include_code=True)
            own.save_pretrained(root / name, include_code=True)
        digits().push_to_hub("tester/pickled", safe_serialization=False)
        digits().push_to_hub("tester/private", private=True)
        quiet(DDPMPipeline(tiny_unet(), DDPMVLBScheduler(variance_type="learned_range"))).save_pretrained(
            root / "mixed"
        )
        huggingface_hub.create_repo("tester/mixed")
        huggingface_hub.upload_folder(repo_id="tester/mixed", folder_path=root / "mixed")
        digits().save_pretrained(root / REPO, include_code=True)
        yield SimpleNamespace(server=server, root=root, pushed=pushed, commits=pushed.said["commits"])


def load(shared, name, program, **variables):
    """Run a program that loads; `out` is a folder of its own."""
    out = shared.root / f"out-{name}"
    out.mkdir()
    variables = {"home": f"home-{name}", "folder": str(shared.root / REPO), "root": str(shared.root)} | variables
    variables |= {"others": list(OURS_ONLY), "commits": shared.commits}
    home = shared.root / variables.pop("home")
    return out, run(shared.server, home, out, program, **variables).said


def test_a_push_is_one_commit_with_all_files(shared):
    """Network, scheduler, index, code and a card that the Hub accepts, in one commit each; the token is nowhere."""
    server = shared.server
    assert titles(server, REPO) == ["Upload DDPMVLBPipeline"] * 3 + ["initial commit"]
    files = server.files(REPO, shared.commits[0])
    assert set(files) == PLAIN | set(CODE_FILES) | {"README.md", ".gitattributes"}
    metadata, problems = card_metadata(files["README.md"].decode())
    assert problems == [] and metadata["library_name"] == "diffusers"
    assert "trust_remote_code=True" in files["README.md"].decode()
    second, third = (server.files(REPO, commit) for commit in shared.commits[1:])
    assert {name for name in second if second[name] != files[name]} == {WEIGHTS}
    variant = WEIGHTS.replace("model.", "model.fp16.")
    assert third.pop(variant) and third == second
    assert_no_token(server)


def test_stock_diffusers_loads_it(shared):
    """Without this package: stock classes, the tensors bit for bit, the samples of the same generator; no code run.

    Ten steps with stock's float32 tables are off by some 1e-5, any other algorithm, seed or weights by order 1.
    """
    out, said = load(
        shared,
        "stock",
        """
        report("hub", DiffusionPipeline.from_pretrained(REPO, revision="v1"))
        report("folder", DiffusionPipeline.from_pretrained(folder))
        report("main", DiffusionPipeline.from_pretrained(REPO))
        said["untrusted"] = [
            failure(DiffusionPipeline.from_pretrained, name, custom_pipeline=name) for name in (REPO, folder)
        ]
        said["refused"] = [failure(DiffusionPipeline.from_pretrained, name) for name in others]
        said["refused"] += [failure(DiffusionPipeline.from_pretrained, f"{root}/{name}") for name in others]
        said["mixed"] = failure(DiffusionPipeline.from_pretrained, "tester/mixed")
        said["modules"] = [name for name in sys.modules if "diffusers_modules" in name or "ddpm_vlb" in name]
        said["package"] = repr(sys.modules["ddpm_vlb"])
        """,
        impossible=["ddpm_vlb"],
    )
    for name, seed in (("hub", 0), ("folder", 0), ("main", 1)):
        assert said[name] == STOCK
        assert said[f"{name}.config"] == CONFIG
        assert_same(out / f"{name}.pt", digits(seed), tolerance=3e-5)
    if STOCK_ASKS:
        assert [kind for kind, _ in said["untrusted"]] == ["ValueError"] * 2
        assert all("trust_remote_code" in message for _, message in said["untrusted"])
        assert said["modules"] == ["ddpm_vlb"]
    assert said["package"] == "None"
    assert [kind for kind, _ in said["refused"]] == ["AttributeError"] * 4
    assert all("DDPMVLBPipeline" in message for _, message in said["refused"])
    assert said["mixed"] is not None


def test_the_repository_s_own_code_loads_it(shared):
    """With trust_remote_code and without this package: our class, and our samples bit for bit, of both formats."""
    out, said = load(
        shared,
        "remote",
        """
        trusted = {"trust_remote_code": True}
        report("hub", DiffusionPipeline.from_pretrained(REPO, custom_pipeline=REPO, revision="v1", **trusted))
        report("folder", DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, **trusted))
        for name in others:
            arguments = {"class_labels": [1, 2]} if "classes" in name else {}
            for label, place in (("hub-", name), ("folder-", f"{root}/{name}")):
                pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, **trusted)
                report(label + name.split("/")[1], pipe, **arguments)
        said["package"] = repr(sys.modules["ddpm_vlb"])
        """,
        impossible=["ddpm_vlb"],
    )
    for place in ("hub", "folder"):
        assert said[place] == REMOTE and said[f"{place}.config"] == CONFIG
        assert_same(out / f"{place}.pt", digits())
        for name, (network, config) in OURS_ONLY.items():
            label = f"{place}-{name.split('/')[1]}"
            assert said[label] == REMOTE
            assert_same(out / f"{label}.pt", pipeline(tiny_unet(**network), **config), **labels(name))
    assert said["package"] == "None"


@pytest.fixture(scope="module")
def ours(shared):
    """What a process with this package loads; its cache is kept for the tests without a network."""
    out, said = load(
        shared,
        "ours",
        """
        from pathlib import Path
        from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler

        for name, options in {
            "tag": {"revision": "v1"},
            "commit": {"revision": commits[0]},
            "main": {},
            "fp16": {"variant": "fp16", "torch_dtype": torch.float16},
            "elsewhere": {"cache_dir": f"{out}/cache"},
        }.items():
            report(name, DDPMVLBPipeline.from_pretrained(REPO, **options))
        said["cached"] = [path.name for path in Path(out, "cache").glob("models--*")]
        scheduler = DDPMVLBScheduler.from_pretrained(REPO, subfolder="scheduler")
        report("passed", DiffusionPipeline.from_pretrained(REPO, scheduler=scheduler))
        report("folder", DDPMVLBPipeline.from_pretrained(Path(folder)))
        for name in others:
            arguments = {"class_labels": [1, 2]} if "classes" in name else {}
            report("hub-" + name.split("/")[1], DDPMVLBPipeline.from_pretrained(name), **arguments)
            report("folder-" + name.split("/")[1], DDPMVLBPipeline.from_pretrained(f"{root}/{name}"), **arguments)
        report("private", DDPMVLBPipeline.from_pretrained("tester/private"))
        said["pickled"] = failure(DDPMVLBPipeline.from_pretrained, "tester/pickled")
        report("pickled-anyway", DDPMVLBPipeline.from_pretrained("tester/pickled", use_safetensors=False))
        said["mixed"] = failure(DDPMVLBPipeline.from_pretrained, "tester/mixed")
        said["wrong"] = [
            failure(DDPMVLBPipeline.from_pretrained, "tester/nothing"),
            failure(DDPMVLBPipeline.from_pretrained, REPO, revision="v9"),
            failure(DDPMVLBPipeline.from_pretrained, REPO, variant="bf16"),
            failure(DDPMVLBPipeline.from_pretrained, "tester/private", token=False, force_download=True),
        ]
        """,
    )
    return SimpleNamespace(out=out, said=said)


def test_ours_loads_it(ours):
    """With this package: our classes from the same files, of the Hub and of a folder, bit for bit."""
    for name, seed in {"main": 1, "folder": 0, "private": 0}.items():
        assert ours.said[name] == OURS and ours.said[f"{name}.config"] == CONFIG
        assert_same(ours.out / f"{name}.pt", digits(seed))
    for name, (network, config) in OURS_ONLY.items():
        for place in ("hub", "folder"):
            label = f"{place}-{name.split('/')[1]}"
            assert ours.said[label] == OURS
            assert_same(ours.out / f"{label}.pt", pipeline(tiny_unet(**network), **config), **labels(name))


def test_our_scheduler_in_stock_s_pipeline(ours):
    """Our scheduler, loaded from the same repository and passed in, is what the stock pipeline samples with."""
    assert ours.said["passed"] == [STOCK[0], OURS[1]] and ours.said["passed.config"] == CONFIG
    assert_same(ours.out / "passed.pt", digits(1), tolerance=1e-5)


def test_revision_variant_and_cache(ours):
    """A tag, a commit, half weights beside the full ones and another cache mean what they mean in diffusers."""
    for name, seed in {"tag": 0, "commit": 0, "elsewhere": 1}.items():
        assert ours.said[name] == OURS
        assert_same(ours.out / f"{name}.pt", digits(seed))
    half = digits().to(torch.float16)
    assert half.unet.dtype == torch.float16 and ours.said["fp16"] == OURS
    assert_same(ours.out / "fp16.pt", half)
    assert ours.said["cached"] == ["models--tester--digits"]


def test_pickles_are_refused(ours):
    """A repository with pickled weights alone is refused unless asked for."""
    kind, message = ours.said["pickled"]
    assert kind in ("OSError", "ValueError") and "safetensors" in message
    assert_same(ours.out / "pickled-anyway.pt", digits())


def test_what_is_not_there(ours):
    """No repository, revision or variant of that name, no right to see it: an error that says which."""
    words = ("tester/nothing", "v9", "bf16", "tester/private")
    for (kind, message), word in zip(ours.said["wrong"], words, strict=True):
        assert kind in ("OSError", "ValueError") and word in message


def test_a_stock_pipeline_that_holds_our_scheduler_loads_from_nowhere(ours):
    """The reason for the warning at its save: its index cannot be loaded, by our class either."""
    assert ours.said["mixed"] is not None


@pytest.mark.slow
def test_offline(shared, ours):
    """Cut off from the Hub, what was loaded once loads again, and what was not is a clear error; nobody is asked."""
    before = len(shared.server.requests)
    out, said = load(
        shared,
        "offline",
        """
        from ddpm_vlb import DDPMVLBPipeline

        report("stock", DiffusionPipeline.from_pretrained(REPO))
        report("ours", DDPMVLBPipeline.from_pretrained(REPO))
        report("tag", DDPMVLBPipeline.from_pretrained(REPO, revision="v1"))
        said["absent"] = [
            failure(kind.from_pretrained, name, **options)
            for kind in (DDPMVLBPipeline, DiffusionPipeline)
            for name, options in (("tester/elsewhere", {}), (REPO, {"cache_dir": f"{out}/empty"}))
        ]
        """,
        home="home-ours",
        HF_HUB_OFFLINE="1",
    )
    assert len(shared.server.requests) == before
    assert said["stock"] == STOCK and said["ours"] == said["tag"] == OURS
    assert_same(out / "stock.pt", digits(1), tolerance=3e-5)
    assert_same(out / "ours.pt", digits(1))
    assert_same(out / "tag.pt", digits())
    for kind, message in said["absent"]:
        assert kind in ("OSError", "LocalEntryNotFoundError", "OfflineModeIsEnabled")
        assert "offline" in message.lower() or "cache" in message.lower()
        assert "tester/elsewhere" in message or REPO in message


# --- pushing


def test_where_a_push_goes(hub, tmp_path, capfd):
    """A bare name is in the user's namespace, private is private, a folder's name is the repository's by default."""
    own = digits()
    own.push_to_hub("bare", private=True, commit_message="First")
    own.save_pretrained(tmp_path / "folder", push_to_hub=True)
    own.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="tester/saved", include_code=True, private=True)
    own.push_to_hub("tester/saved", subfolder="checkpoints/1")
    assert repositories(hub) == ["tester/bare", "tester/folder", "tester/saved"]
    private = {repo.id: repo.private for repo in hub._repositories.values()}
    assert private == {"tester/bare": True, "tester/folder": False, "tester/saved": True}
    assert titles(hub, "tester/bare") == ["First", "initial commit"]
    assert set(hub.files("tester/bare")) == PLAIN | {"README.md", ".gitattributes"}
    assert set(hub.files("tester/folder")) == PLAIN | {"README.md", ".gitattributes"}
    saved = PLAIN | {"README.md", ".gitattributes", *CODE_FILES}
    assert set(hub.files("tester/saved")) == saved | {f"checkpoints/1/{path}" for path in PLAIN}
    for name in ("folder", "other"):
        local = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert local == PLAIN | (set(CODE_FILES) if name == "other" else set())
    assert 'from_pretrained("tester/bare")' in hub.files("tester/bare")["README.md"].decode()
    assert_no_token(hub)
    assert hub.token not in "".join(capfd.readouterr())


def test_a_card_is_kept_unless_another_is_given(hub):
    """The repository's own README survives a push, and goes where card= brings one."""
    own = digits()
    own.push_to_hub(REPO)
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    huggingface_hub.upload_file(repo_id=REPO, path_or_fileobj=mine, path_in_repo="README.md")
    digits(1).push_to_hub(REPO, include_code=True)
    assert hub.files(REPO)["README.md"] == mine
    own.push_to_hub(REPO, card=ModelCard("---\nlicense: apache-2.0\n---\n# Given\n"))
    assert b"# Given" in hub.files(REPO)["README.md"]
    own.push_to_hub(REPO, card=ModelCard("---\nlicense: apache-2.0\n---\n# Given\n"))
    assert len(hub.history(REPO)) == 5  # what changes nothing is no commit


def test_no_path_of_the_machine_is_uploaded(hub, tmp_path):
    """diffusers notes in a configuration where it was loaded from; what is pushed from a folder does not tell it."""
    digits().save_pretrained(tmp_path / "of-somebody")
    loaded = DDPMVLBPipeline.from_pretrained(tmp_path / "of-somebody")
    loaded.push_to_hub(REPO, include_code=True)
    loaded.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="tester/again")
    for repo in (REPO, "tester/again"):
        assert [path for path, data in hub.files(repo).items() if b"of-somebody" in data] == []
        assert [path for path, data in hub.files(repo).items() if str(tmp_path).encode() in data] == []


def test_a_push_needs_no_template_engine(hub, monkeypatch):
    """huggingface_hub fills its own card templates with jinja2, which this package does not ask for."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    digits().push_to_hub(REPO, include_code=True)
    metadata, problems = card_metadata(hub.files(REPO)["README.md"].decode())
    assert metadata["library_name"] == "diffusers" and problems == []


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_right_to_write(hub, monkeypatch, token):
    """No token or a wrong one is an error of the Hub's with its status, and nothing is created."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError) as error:
        digits().push_to_hub(REPO, include_code=True, token=token)
    assert error.value.response.status_code == 401 and "401" in str(error.value)
    assert repositories(hub) == []
    digits().push_to_hub(REPO, token=hub.token)  # handed over, it reaches every request that needs it
    assert set(hub.files(REPO)) == PLAIN | {"README.md", ".gitattributes"}
    assert_no_token(hub)


def test_a_stranger_s_namespace_and_a_wrong_name(hub):
    """403 for what is another's; a name that no repository can have is refused before anything is asked."""
    with pytest.raises(HfHubHTTPError) as error:
        digits().push_to_hub("somebody/digits")
    assert error.value.response.status_code == 403
    asked = len(hub.requests)
    with pytest.raises(HFValidationError):
        digits().push_to_hub("a/b/c")
    assert repositories(hub) == [] and len(hub.requests) == asked


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "PUT", "path_regex": "^/storage/", "drop_connection": True, "after_bytes": 4000, "times": 6},
        {"method": "POST", "path_regex": "/commit/", "drop_connection": True, "after_bytes": 4000},
        {"method": "POST", "path_regex": "/commit/", "status": 500},
        {"method": "POST", "path_regex": "/commit/", "status": 403},
    ],
    ids=["dropped-in-the-weights", "dropped-in-the-commit", "500", "403"],
)
def test_a_failed_push_leaves_the_branch_as_it_was(hub, monkeypatch, fault):
    """An error, and the repository as before it, card and all; the next push brings everything."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries a dropped upload five more times
    digits().push_to_hub(REPO)
    before = hub.files(REPO)
    injected = hub.fail(**fault)
    with pytest.raises(Exception) as error:
        digits(1).push_to_hub(REPO, include_code=True)
    cause = error.value.__cause__ or error.value
    assert getattr(getattr(cause, "response", None), "status_code", None) == fault.get("status")
    assert "status" in fault or type(cause).__name__ in DROPPED
    assert injected.times == 0
    assert hub.files(REPO) == before and len(hub.history(REPO)) == 2
    digits(1).push_to_hub(REPO, include_code=True)
    assert set(hub.files(REPO)) == set(before) | set(CODE_FILES) and hub.files(REPO)[WEIGHTS] != before[WEIGHTS]
    assert_no_token(hub)


def test_a_busy_hub_is_asked_again(hub):
    """A 5xx where asking again is harmless passes unnoticed: the client retries the weights' upload."""
    fault = hub.fail("PUT", "^/storage/", status=503)
    digits().push_to_hub(REPO)
    assert fault.times == 0 and titles(hub, REPO) == ["Upload DDPMVLBPipeline", "initial commit"]


# --- a stock pipeline that holds our scheduler


def mixed() -> DDPMPipeline:
    return quiet(DDPMPipeline(tiny_unet(), DDPMVLBScheduler(variance_type="learned_range", levels=17)))


def ways_out(message: str) -> list[str]:
    """The code that the warning proposes."""
    return [code for code in re.findall(r"`([^`]+)`", message) if "(" in code]


def test_saving_a_stock_pipeline_with_our_scheduler_warns(tmp_path, hub, log):
    """Once for each save, in a folder and on the way to the Hub, with two ways out in code."""
    mixed().save_pretrained(tmp_path / "mixed")
    (message,) = log
    assert "ddpm_vlb" in (tmp_path / "mixed" / "model_index.json").read_text() and "model_index.json" in message
    assert len(ways_out(message)) == 2
    log.clear()
    mixed().push_to_hub("tester/mixed")
    assert len([message for message in log if "DDPMVLBScheduler" in message]) == 1


def test_the_warning_obeys_diffusers_verbosity(tmp_path, log):
    """Who silences diffusers does not hear it."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        mixed().save_pretrained(tmp_path / "mixed")
    finally:
        diffusers.utils.logging.set_verbosity(before)
    assert log == []


@pytest.mark.parametrize("way", [0, 1])
def test_the_ways_out_of_the_warning_work(tmp_path, log, way):
    """Followed to the letter, each gives a pipeline that is saved without a warning and that stock loads as it was."""
    stock = mixed()
    stock.save_pretrained(tmp_path / "before")
    code = ways_out(log.pop())[way]
    names = {"pipeline": stock, "DDPMScheduler": DDPMScheduler, "DDPMVLBPipeline": DDPMVLBPipeline}
    expected = images(stock)
    followed = eval(code, names)
    log.clear()  # what diffusers says of changing classes
    (followed or stock).save_pretrained(tmp_path / "after")
    assert log == []
    assert "ddpm_vlb" not in (tmp_path / "after" / "model_index.json").read_text()
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "after"))
    assert type(loaded) is DDPMPipeline and type(loaded.scheduler) is DDPMScheduler
    assert loaded.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(images(loaded), expected, rtol=0, atol=3e-5)
    again = quiet(DDPMVLBPipeline.from_pretrained(tmp_path / "after"))
    assert again.scheduler.config.levels == 17


def test_our_own_saves_do_not_warn(tmp_path, hub, log):
    """Neither a folder nor a push, of either format, with a swapped-in scheduler too; nor the scheduler by itself."""
    swapped = digits()
    swapped.scheduler = DDIMScheduler.from_config(swapped.scheduler.config)
    log.clear()  # DDIM does not know our keys
    others = [pipeline(tiny_unet(**network), **config) for network, config in OURS_ONLY.values()]
    for i, own in enumerate([digits(), swapped, *others]):
        own.save_pretrained(tmp_path / f"{i}", include_code=True)
        own.push_to_hub(f"tester/{i}", include_code=True)
    digits().scheduler.save_pretrained(tmp_path / "alone")
    assert log == []


def test_a_failed_save_leaves_the_warning_on(tmp_path, log):
    """Our own save that fails halfway does not silence a later one of a stock pipeline."""
    (tmp_path / "full").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        digits().save_pretrained(tmp_path / "full" / "inside")
    log.clear()
    mixed().save_pretrained(tmp_path / "mixed")
    assert len(log) == 1


# --- the code that a repository carries


def relative_imports(path: Path) -> set[str]:
    """The siblings that a module imports, by syntax and not by pattern."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module for node in nodes)
    return {node.module for node in nodes}


def closure(path: Path) -> set[str]:
    """A module's file name and those of all that it imports beside it."""
    found, waiting = set(), {path.stem}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= relative_imports(path.with_name(f"{name}.py")) - found
    return {f"{name}.py" for name in found}


def test_the_code_is_whole(tmp_path):
    """CODE_FILES is what pipeline_ddpm_vlb.py needs and no more; the files are the package's, byte for byte."""
    package = Path(ddpm_vlb.__file__).parent
    assert set(CODE_FILES) == closure(package / "pipeline_ddpm_vlb.py") | {"pipeline.py"}
    assert max(Counter(CODE_FILES).values()) == 1
    digits().save_pretrained(tmp_path, include_code=True)
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE_FILES)
    for name in set(CODE_FILES) - {"pipeline.py"}:
        assert (tmp_path / name).read_bytes() == (package / name).read_bytes()


def test_diffusers_finds_all_of_the_code(tmp_path, log, monkeypatch):
    """By its own two ways: what pipeline.py imports (a folder), and what that imports in turn (the Hub).

    It looks for lines that look like imports, in strings too; none of ours may ask for this package, which is not
    there (a warning, and in older versions the end).
    """
    digits().save_pretrained(tmp_path, include_code=True)
    siblings = set(CODE_FILES) - {"pipeline.py"}
    assert {Path(path).name for path in get_relative_import_files(tmp_path / "pipeline.py")} == siblings
    assert relative_imports(tmp_path / "pipeline.py") == {Path(name).stem for name in siblings}
    monkeypatch.setitem(sys.modules, "ddpm_vlb", None)
    found = {name: {f"{own}.py" for own in check_imports(tmp_path / name)} for name in CODE_FILES}
    assert found["pipeline.py"] == set().union(*found.values()) == siblings
    assert log == []


def test_a_kept_card_is_said_to_be_kept(hub, log):
    """It may describe other weights; what is no card is refused before anything is made."""
    digits().push_to_hub("tester/digits")
    assert log == []
    digits(1).push_to_hub("tester/digits")
    assert len(log) == 1 and "keeps its model card" in log[0] and "card=" in log[0]
    with pytest.raises(ValueError, match="`card` must be"):
        digits().push_to_hub("tester/other", card="# hello")
    assert not huggingface_hub.HfApi().repo_exists("tester/other")


def test_shards_go_up_as_shards(hub, tmp_path):
    """max_shard_size holds for the upload as for the folder."""
    digits().save_pretrained(tmp_path / "digits", max_shard_size="20KB", push_to_hub=True)
    local = {path.name for path in (tmp_path / "digits" / "unet").iterdir()}
    assert len(local) > 3
    assert {name.partition("unet/")[2] for name in hub.files("tester/digits") if name.startswith("unet/")} == local


def test_a_pipeline_in_a_subfolder(hub, tmp_path):
    """What was pushed into a subfolder is loaded from it, from the Hub and from a folder, and not the root's."""
    digits(0).push_to_hub("tester/digits")
    digits(1).push_to_hub("tester/digits", subfolder="second")
    digits(0).save_pretrained(tmp_path)
    digits(1).save_pretrained(tmp_path / "second")
    for name in ("tester/digits", tmp_path):
        loaded = DDPMVLBPipeline.from_pretrained(name, subfolder="second", cache_dir=tmp_path / "cache")
        for own, other in zip(loaded.unet.parameters(), digits(1).unet.parameters(), strict=True):
            assert torch.equal(own, other)


def test_all_files_are_of_one_commit(hub, tmp_path, monkeypatch):
    """A push while a pipeline is being loaded does not mix two states: scheduler and weights are the first's."""
    pipeline(tiny_unet(seed=0), num_train_timesteps=20).push_to_hub("tester/digits")
    loaded = DDPMVLBScheduler.from_pretrained

    def and_push(*args, **kwargs):
        scheduler = loaded(*args, **kwargs)
        pipeline(tiny_unet(seed=1), num_train_timesteps=77).push_to_hub("tester/digits")
        return scheduler

    monkeypatch.setattr(DDPMVLBScheduler, "from_pretrained", and_push)
    pipe = DDPMVLBPipeline.from_pretrained("tester/digits", cache_dir=tmp_path)
    assert len(pipe.scheduler) == 20
    for own, other in zip(pipe.unet.parameters(), tiny_unet(seed=0).parameters(), strict=True):
        assert torch.equal(own, other)
    assert len(hub.history("tester/digits")) == 3


def test_another_kind_of_pipeline_is_refused(tmp_path):
    """An index with more parts, a VAE say, is no DDPM's: without it the samples would be latents."""
    digits().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ValueError, match="vqvae.*another kind"):
        DDPMVLBPipeline.from_pretrained(tmp_path)
