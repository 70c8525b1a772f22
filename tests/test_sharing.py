"""Sharing: what a push leaves on the Hub, and who loads it how.

The client is the real huggingface_hub, the Hub is tests/hub_server.py. Each way to load runs in a process of its own
with empty caches, and the ways that need no installation in one where `import ddpm_vlb` is impossible.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DDPMPipeline
from hub_cards import card_metadata
from hub_server import FAILURE, HubServer
from networks import pipeline, quiet, tiny_unet
from sharing_support import CONFIG, OURS_ONLY, PLAIN, REPO, WEIGHTS, assert_no_token, client_of, digits, images, titles

from ddpm_vlb import DDPMVLBScheduler
from ddpm_vlb.repositories import CODE_FILES

# Before 0.38 stock runs what `custom_pipeline=` names without `trust_remote_code`.
STOCK_ASKS = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 38)
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


def assert_same(loaded: Path, original, tolerance: float = 0.0, **arguments):
    """The same weights bit for bit, and the same images; not all black and white, which any algorithm could give."""
    found, weights = torch.load(loaded), original.unet.state_dict()
    assert found["weights"].keys() == weights.keys()
    assert all(torch.equal(found["weights"][name], weights[name]) for name in weights)
    expected = images(original, **arguments)
    torch.testing.assert_close(found["images"], expected, rtol=0, atol=tolerance)
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.2


PUSH = """
sys.path.insert(0, tests)
from sharing_support import digits

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
