"""Repositories of strangers: no code of theirs runs unasked, and no configuration of theirs breaks more than itself.

Whatever could run code or eat memory is loaded in processes of their own.
"""

import json
import math
import pickle
import shutil
import subprocess
import sys
import textwrap
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers.utils.dynamic_modules_utils import get_cached_module_file
from hub_server import FAILURE, HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import pipeline, tiny_unet

from ddpm_vlb import DDPMVLBScheduler

PRELUDE = """
import json, os, resource, sys, time, tracemalloc
globals().update(json.loads(sys.argv[1]))
import torch
import huggingface_hub as hf
from diffusers import DiffusionPipeline
from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler

torch.set_num_threads(1)
said = {}
"""
PRELUDE += FAILURE
MEGABYTE = 1 << 20


def run(program, environment, cwd=None, **variables):
    """What a program says in a process of its own."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{PRELUDE}{textwrap.dedent(program)}\nprint(json.dumps(said))",
            json.dumps(variables),
        ],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def saved(folder: Path) -> Path:
    pipeline(tiny_unet(), num_train_timesteps=20).save_pretrained(folder)
    return folder


def rewrite(path: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- code

EVIL = """\
import os
open(os.environ["MARKER"], "a").write({who!r})
from diffusers import {base}

class Evil({base}):
    {body}
"""


class Payload:
    """What a pickle does when it is read."""

    def __reduce__(self):
        return exec, ("import os; open(os.environ['MARKER'], 'a').write('pickle')",)


def evil_pipeline(folder: Path) -> None:
    body = "def __init__(self, unet, scheduler):\n        super().__init__(unet, scheduler)"
    (folder / "pipeline.py").write_text(EVIL.format(who="pipeline", base="DDPMPipeline", body=body))
    rewrite(folder / "model_index.json", _class_name=["pipeline", "Evil"])


def evil_component(folder: Path) -> None:
    (folder / "unet" / "evil.py").write_text(EVIL.format(who="component", base="UNet2DModel", body="pass"))
    rewrite(folder / "model_index.json", unet=["evil", "Evil"])


def evil_disguised(folder: Path) -> None:
    """A component's own file with the name of the library that a plain index gives."""
    (folder / "unet" / "diffusers.py").write_text(EVIL.format(who="disguised", base="UNet2DModel", body="pass"))


def evil_scheduler(folder: Path) -> None:
    (folder / "scheduler" / "evil.py").write_text(EVIL.format(who="scheduler", base="DDPMScheduler", body="pass"))
    rewrite(folder / "model_index.json", scheduler=["evil", "Evil"])


def evil_beside(folder: Path) -> None:
    """A module at the root, which Python finds where the reader works in that folder."""
    (folder / "evil_beside.py").write_text(EVIL.format(who="beside", base="UNet2DModel", body="pass"))
    rewrite(folder / "model_index.json", unet=["evil_beside", "Evil"])


def evil_extra(folder: Path) -> None:
    (folder / "extra").mkdir()
    (folder / "extra" / "evil.py").write_text(EVIL.format(who="extra", base="UNet2DModel", body="pass"))
    shutil.copytree(folder / "unet", folder / "extra", dirs_exist_ok=True)
    rewrite(folder / "model_index.json", extra=["evil", "Evil"])


def bystander(folder: Path) -> None:
    """Code that nothing asks for: a pipeline.py and modules with the names of ours."""
    for name in ("pipeline", "pipeline_ddpm_vlb", "scheduling_ddpm_vlb", "model_card", "unet/unet", "diffusers"):
        (folder / f"{name}.py").write_text(EVIL.format(who=name, base="DDPMPipeline", body="pass"))


def evil_pickle(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with open(folder / "unet" / "diffusion_pytorch_model.bin", "wb") as file:
        pickle.dump(Payload(), file)


MAKERS = (
    evil_pipeline,
    evil_component,
    evil_disguised,
    evil_scheduler,
    evil_beside,
    evil_extra,
    evil_pickle,
)
HOSTILE = {make.__name__: make for make in MAKERS}
LOADERS = """
def marked():
    open(os.environ["MARKER"], "a").close()
    who = open(os.environ["MARKER"]).read()
    os.remove(os.environ["MARKER"])
    return who

for name in names:
    hf.create_repo(f"tester/{name}")
    hf.upload_folder(repo_id=f"tester/{name}", folder_path=f"{root}/{name}")
for place, where in (("folder", root), ("hub", "tester")):
    said[place] = {}
    for kind in (DDPMVLBPipeline, DiffusionPipeline):
        for name in names:
            said[place][f"{kind.__name__} {name}"] = [failure(kind.from_pretrained, f"{where}/{name}"), marked()]
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Hostile folders, and what two loaders made of them without trust_remote_code, from the disk and from a Hub."""
    root = tmp_path_factory.mktemp("hostile")
    for name, make in (HOSTILE | {"bystander": bystander}).items():
        make(saved(root / name))
    with HubServer() as server:
        environment = server.environment(root / "home", MARKER=str(root / "marker"))
        names = [*HOSTILE, "bystander"]
        said = run(LOADERS, environment, cwd=root / "evil_beside", root=str(root), names=names)
    return root, said


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("kind", ["DDPMVLBPipeline", "DiffusionPipeline"])
def test_no_code_of_a_repository_runs_unasked(hostile, kind, place):
    """A pipeline, components, modules in reach, pickles: our loader and stock's refuse or ignore them all, unrun.

    Pickles stock reads itself, with torch's reader of tensors alone, which refuses this one.
    """
    if kind == "DiffusionPipeline" and "trust_remote_code" not in signature(get_cached_module_file).parameters:
        pytest.skip("this version of diffusers runs what a folder holds; ours must not, with any version")
    for name in HOSTILE:
        refusal, marked = hostile[1][place][f"{kind} {name}"]
        assert marked == "", f"{kind} ran the code of {name} from {place}"
        # An entry that no DDPM has may be ignored.
        assert refusal is not None or name == "evil_extra", f"{kind} loaded {name} from {place}"


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("kind", ["DDPMVLBPipeline", "DiffusionPipeline"])
def test_code_that_nothing_names_is_left_alone(hostile, kind, place):
    """A plain repository that also has code in it loads, and the code does not run."""
    assert hostile[1][place][f"{kind} bystander"] == [None, ""]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_our_loader_refuses_in_clear_words(hostile, place):
    """What a stranger's repository asks for is in the message, or what to pass for it."""
    words = {"evil_pipeline": "trust_remote_code", "evil_component": "trust_remote_code"}
    words |= {"evil_scheduler": "trust_remote_code", "evil_pickle": "safetensors"}
    words |= {"evil_beside": "evil_beside", "evil_disguised": "trust_remote_code"}
    for name, word in words.items():
        kind, message = hostile[1][place][f"DDPMVLBPipeline {name}"][0]
        assert kind in ("ValueError", "OSError") and word in message


def test_the_code_runs_when_it_is_trusted(hostile, tmp_path):
    """The tests above can fail: with trust_remote_code=True, or read as a pickle, each payload leaves its mark."""
    root, _ = hostile
    said = run(
        """
        import pickle
        for name in names:
            failure(DiffusionPipeline.from_pretrained, f"{root}/{name}", trust_remote_code=True)
        said["first"] = open(os.environ["MARKER"]).read()
        failure(pickle.load, open(f"{root}/evil_pickle/unet/diffusion_pytorch_model.bin", "rb"))
        failure(DiffusionPipeline.from_pretrained, bystander, custom_pipeline=bystander, trust_remote_code=True)
        sys.path.insert(0, f"{root}/evil_beside")
        import evil_beside
        said["marked"] = open(os.environ["MARKER"]).read()
        """,
        HubServer().environment(tmp_path / "home", MARKER=str(tmp_path / "marker"), HF_HUB_OFFLINE="1"),
        root=str(root),
        names=[name for name in HOSTILE if name != "evil_pickle"],
        bystander=str(root / "bystander"),
    )
    # A scheduler in a file of its own is more than some versions of diffusers can load.
    for who in ("pipeline", "component", "disguised"):
        assert who in said["first"]
    assert "pickle" in said["marked"] and "beside" in said["marked"]
    assert said["marked"].count("pipeline") > said["first"].count("pipeline")


# --- configurations

BETAS = [0.01 * (i + 1) for i in range(20)]
SCHEDULERS = {
    # What is changed, and the words that the error must hold.
    "a million betas": ({"trained_betas": [0.001] * 1_000_000}, ["8000000|betas"]),
    "betas beyond the limit": ({"trained_betas": [0.001] * 100_001}, ["betas", "100000"]),
    "nested betas": ({"trained_betas": [BETAS] * 1000}, ["betas"]),
    "NaN": ({"trained_betas": [math.nan, *BETAS]}, ["betas", "nan"]),
    "Infinity": ({"trained_betas": [*BETAS, math.inf]}, ["betas", "inf"]),
    "-Infinity": ({"beta_start": -math.inf}, ["beta_start", "inf"]),
    "NaN as a start": ({"beta_start": math.nan}, ["beta_start", "nan"]),
    "NaN as an end": ({"beta_end": math.nan}, ["beta_end", "nan"]),
    "negative betas": ({"trained_betas": [-b for b in BETAS]}, ["betas"]),
    "no betas": ({"trained_betas": []}, ["betas"]),
    "text for betas": ({"trained_betas": "0.1 0.2"}, ["betas"]),
    "huge betas": ({"trained_betas": [10**400, 0.1]}, ["betas"]),
    "null betas": ({"trained_betas": [None, 0.1]}, ["betas"]),
    "a huge chain": ({"num_train_timesteps": 10**12}, ["num_train_timesteps"]),
    "a huge cosine chain": ({"num_train_timesteps": 10**12, "beta_schedule": "squaredcos_cap_v2"}, ["num_train"]),
    "an infinite chain": ({"num_train_timesteps": math.inf}, ["num_train_timesteps", "inf"]),
    "no chain": ({"num_train_timesteps": 0}, ["num_train_timesteps"]),
    "an unknown variance": ({"variance_type": "os.system"}, ["variance_type", "os.system"]),
    "an unknown schedule": ({"beta_schedule": "../../x"}, ["beta_schedule"]),
    "huge levels": ({"levels": 10**400}, ["levels"]),
    "levels of 1": ({"levels": 1}, ["levels"]),
    "NaN clip": ({"clip_sample_range": math.nan}, ["clip_sample_range"]),
    "huge clip": ({"clip_sample_range": 10**400}, ["clip_sample_range"]),
    "no float32": ({"clip_sample_range": 1e300}, ["clip_sample_range"]),
    "a long name": ({"variance_type": "x" * 7_000_000}, ["variance_type"]),
    "a long number as text": ({"num_train_timesteps": "9" * 7_000_000}, ["num_train_timesteps"]),
    "a long list": ({"beta_schedule": [0] * 2_000_000}, ["beta_schedule"]),
    "a long truth": ({"clip_sample": "x" * 7_000_000}, ["clip_sample"]),
}
# What diffusers keeps in a configuration for itself: to load is no error.
INNER = {
    "defaults as a number": {"_use_default_values": 3},
    "defaults as lists": {"_use_default_values": [[]]},
    "all at their defaults": {"_use_default_values": ["num_train_timesteps", "beta_schedule", "variance_type"]},
    "a class that leaves the folder": {"_class_name": "../../x"},
    "a class as a list": {"_class_name": ["a", "b"]},
    "a class as an object": {"_class_name": {"a": 1}},
    "a version as a list": {"_diffusers_version": []},
    "dunders": {"__class__": "x", "__init__": None, "self": 1, "cls": 2, "kwargs": {}},
}
INDICES = {
    "a component that leaves the folder": ({"../../x": ["diffusers", "UNet2DModel"]}, ["model_index.json", "../../x"]),
    "a library that leaves the folder": ({"unet": ["../../x", "UNet2DModel"]}, ["model_index.json", "../../x"]),
    "an absolute library": ({"unet": ["/elsewhere/x", "UNet2DModel"]}, ["model_index.json", "/elsewhere/x"]),
    "a class that leaves the folder": ({"unet": ["diffusers", "../../x"]}, ["model_index.json", "../../x"]),
    "a name with an end of line": ({"unet": ["diffusers\n", "UNet2DModel"]}, ["model_index.json", "diffusers"]),
    "a null byte": ({"unet": ["diffusers", "UNet2DModel\0"]}, ["model_index.json", "UNet2DModel"]),
    "a module that runs things": ({"unet": ["os", "system"]}, ["system"]),
    "another module's class": ({"unet": ["subprocess", "Popen"]}, ["Popen"]),
    "a scheduler of another module": ({"scheduler": ["subprocess", "Popen"]}, ["Popen"]),
    "a component as text": ({"unet": "diffusers"}, ["model_index.json", "unet"]),
    "a component as a number": ({"scheduler": 3}, ["model_index.json", "scheduler"]),
    "a component as an object": ({"scheduler": {"diffusers": "DDPMScheduler"}}, ["model_index.json", "scheduler"]),
    "a component as numbers": ({"unet": [1, 2]}, ["model_index.json", "unet"]),
    "three names": ({"scheduler": ["diffusers", "DDPMScheduler", "x"]}, ["model_index.json", "scheduler"]),
    "an empty component": ({"scheduler": [None, None]}, ["model_index.json", "scheduler"]),
    "no unet": ({"unet": None}, ["model_index.json", "unet"]),
    "no scheduler": ({"scheduler": None}, ["model_index.json", "scheduler"]),
    "an unknown pipeline": ({"_class_name": "os.system"}, None),
    "a pipeline as a number": ({"_class_name": 3}, None),
    "a pipeline in pieces": ({"_class_name": ["../../x", "Evil"]}, None),
    "a version that is none": ({"_diffusers_version": {"a": 1}}, None),
}
FILES = {
    "not JSON": (b"{", ["JSON"]),
    "empty": (b"", ["JSON"]),
    "bytes": (b"\xff\xfe\x00\x80" * 100, ["JSON"]),
    "a list": (b"[]", ["object", "list"]),
    "null": (b"null", ["object"]),
    "a number": (b"1e999", ["object"]),
    "an empty object": (b"{}", None),
    "deeply nested": (b"[" * 1_000_000, ["JSON"]),
    "deeply nested objects": (b'{"a":' * 500_000 + b"1" + b"}" * 500_000, ["JSON"]),
    "10 MB": (b'{"a": "' + b"x" * 10_000_000 + b'"}', ["bytes"]),
    "a long number": (b'{"num_train_timesteps": ' + b"9" * 100_000 + b"}", None),
}
# A process' memory after the first load may grow by this much, for whatever comes.
GROWTH = 256
LOAD_EACH = """
failure(DDPMVLBPipeline.from_pretrained, plain)  # what is imported late does not count
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + growth, in_use + growth))
for name, (loader, folder) in cases.items():
    function = DDPMVLBPipeline.from_pretrained if loader == "pipeline" else DDPMVLBScheduler.from_pretrained
    tracemalloc.start()
    started = time.process_time()
    told = failure(function, folder, **({"subfolder": "scheduler"} if loader == "scheduler" else {}))
    said[name] = [told, time.process_time() - started, tracemalloc.get_traced_memory()[1] / 2**20]
    tracemalloc.stop()
"""


@pytest.fixture(scope="module")
def malicious(tmp_path_factory):
    """What became of each malicious configuration: the error, the seconds and the megabytes that it took.

    All in one process whose address space may not grow by more than `GROWTH` megabytes.
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux to know the size of a process")
    root = tmp_path_factory.mktemp("malicious")
    plain, cases = saved(root / "plain"), {}

    def case(name, loader="pipeline"):
        folder = root / str(len(cases))
        shutil.copytree(plain, folder)
        cases[name] = [loader, str(folder)]
        return folder

    for name, (changes, _) in SCHEDULERS.items():
        rewrite(case(name) / "scheduler" / "scheduler_config.json", **changes)
    for name, changes in INNER.items():
        rewrite(case(f"inner: {name}") / "scheduler" / "scheduler_config.json", **changes)
    for name, (changes, _) in INDICES.items():
        rewrite(case(name) / "model_index.json", **changes)
    for name, (content, _) in FILES.items():
        (case(f"index: {name}") / "model_index.json").write_bytes(content)
        (case(f"scheduler: {name}", "scheduler") / "scheduler" / "scheduler_config.json").write_bytes(content)
        (case(f"pipeline's scheduler: {name}") / "scheduler" / "scheduler_config.json").write_bytes(content)
    shutil.rmtree(case("no folder of the scheduler") / "scheduler")
    shutil.rmtree(case("no folder of the network") / "unet")
    (case("no index") / "model_index.json").unlink()
    environment = HubServer().environment(root / "home", HF_HUB_OFFLINE="1")
    return run(LOAD_EACH, environment, plain=str(plain), cases=cases, growth=GROWTH * MEGABYTE)


def refused(outcome, words):
    """A ValueError or an OSError that holds the words, each within alternatives."""
    assert outcome is not None, "it was loaded"
    kind, message = outcome
    assert kind in ("ValueError", "OSError"), outcome
    for word in words:
        assert any(own in message for own in word.split("|")), outcome


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_malicious_scheduler_is_refused(malicious, name):
    """Betas that are none, too many or not finite, impossible lengths and numbers: an error that names the key."""
    refused(malicious[name][0], SCHEDULERS[name][1])


@pytest.mark.parametrize("name", INDICES)
def test_a_malicious_index_is_refused(malicious, name):
    """Names that are paths, entries of another shape, what no pipeline has: an error that quotes it."""
    outcome, words = malicious[name][0], INDICES[name][1]
    if outcome is not None or words is not None:
        refused(outcome, words or [])


@pytest.mark.parametrize("name", INNER)
def test_what_diffusers_keeps_for_itself(malicious, name):
    """Keys of a scheduler's file that are not its arguments are ignored or refused, and end in nothing else."""
    outcome = malicious[f"inner: {name}"][0]
    if outcome is not None:
        refused(outcome, [])


@pytest.mark.parametrize("name", [name for name, (_, words) in FILES.items() if words])
@pytest.mark.parametrize("file", ["index", "scheduler", "pipeline's scheduler"])
def test_a_file_that_is_no_configuration_is_refused(malicious, file, name):
    """Not JSON, not an object, larger or deeper than any configuration: an error that names the file."""
    where = "model_index.json" if file == "index" else "scheduler_config.json"
    refused(malicious[f"{file}: {name}"][0], [where, *FILES[name][1]])


def test_a_number_of_100000_digits(malicious):
    """It is refused, or never converted."""
    for file in ("scheduler", "pipeline's scheduler"):
        refused(malicious[f"{file}: a long number"][0], ["scheduler_config.json|num_train_timesteps"])


def test_missing_parts_are_named(malicious):
    """No index, no folder of the scheduler or of the network, an empty index: an error that says which."""
    refused(malicious["no index"][0], ["model_index.json"])
    refused(malicious["no folder of the scheduler"][0], ["scheduler"])
    refused(malicious["no folder of the network"][0], ["unet|config.json"])
    refused(malicious["index: an empty object"][0], ["model_index.json", "scheduler", "unet"])


def test_an_empty_scheduler_configuration_is_the_defaults(malicious):
    """Nothing is required of it."""
    assert malicious["scheduler: an empty object"][0] is None


def test_time_and_memory_are_bounded(malicious):
    """No case takes seconds of the processor or half of the memory that was allowed, and none fails for memory."""
    assert {name: seconds for name, (_, seconds, _) in malicious.items() if seconds > 5} == {}
    assert {name: grown for name, (_, _, grown) in malicious.items() if grown > GROWTH / 2} == {}
    assert [name for name, (told, _, _) in malicious.items() if told and "emory" in "".join(told)] == []


def test_errors_are_no_longer_than_a_page(malicious):
    """A value of megabytes is not repeated in the message, which ends up in logs."""
    assert {name: len(told[1]) for name, (told, _, _) in malicious.items() if told and len(told[1]) > 4000} == {}


# --- any value for any key

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["linear", "fixed_small", "learned", "learned_range", "epsilon", "sample", "leading", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.one_of(
    st.integers(-3, 30), st.floats(-1, 2), st.sampled_from([1e-320, 5e-324, 1 - 1e-16, 1e300, 10**400, 2**63, -0.0])
)
KEYS = sorted(set(DDPMVLBScheduler().config) - {"_use_default_values"})


def is_named(error: ValueError) -> bool:
    """A key is; a value may be wrong only beside another, whose key is named then; `trained_betas` are betas."""
    return any(f"`{key}" in str(error) for key in ("betas", *KEYS))


def assert_works(scheduler: DDPMVLBScheduler) -> None:
    """The schedule is one, no table holds a NaN, and a step is finite; or the use of it is refused by name."""
    assert isinstance(scheduler.betas, torch.Tensor) and len(scheduler) == scheduler.config.num_train_timesteps
    for table in (scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod):
        assert table.isfinite().all() and (table >= 0).all() and (table <= 1).all()
    assert json.loads(scheduler.to_json_string())["num_train_timesteps"] == len(scheduler)
    try:
        reverse = scheduler.reverse_process()
        scheduler.set_timesteps(1)
    except ValueError as error:
        # An offset is within the chain or not for each number of steps; epsilon is none at a zero SNR.
        assert "`steps_offset" in str(error) or "`prediction_type" in str(error)
        return
    tables = {name: value for name, value in vars(reverse.forward).items() if isinstance(value, torch.Tensor)}
    assert len(tables) > 3
    assert [name for name, value in tables.items() if value.isnan().any()] == []
    scheduler.set_timesteps(timesteps=range(len(scheduler))[::-1])
    sample, output = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2 if reverse.learns_variance else 1, 2, 2)
    for t in {0, len(scheduler) // 2, len(scheduler) - 1}:
        assert scheduler.step(output, t, sample).prev_sample.isfinite().all()


def build(config: dict):
    """A scheduler from a file's content, as `from_pretrained` makes one; None where it is refused."""
    try:
        return DDPMVLBScheduler.from_config(json.loads(json.dumps(config)))
    except ValueError as error:
        assert is_named(error), str(error)
        return None


SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@SETTINGS
@given(st.sampled_from(KEYS), JSON | NUMBERS)
def test_any_value_works_or_is_refused_by_name(key, value):
    """For each key any JSON gives a scheduler that works or a ValueError that names the key; never a NaN table."""
    scheduler = build({"num_train_timesteps": 20, key: value} if key != "num_train_timesteps" else {key: value})
    if scheduler is not None:
        assert_works(scheduler)


@SETTINGS
@given(st.dictionaries(st.sampled_from(KEYS), NUMBERS | JSON, min_size=2, max_size=4))
def test_any_values_together(config):
    """The same for some keys at once, which may contradict each other."""
    scheduler = build({"num_train_timesteps": 20} | config)
    if scheduler is not None:
        assert_works(scheduler)


@SETTINGS
@given(
    st.lists(st.floats(0, 1, exclude_min=True) | st.sampled_from([5e-324, 1e-320, 1 - 1e-16, 1.0]), min_size=1),
    st.booleans(),
    st.sampled_from(["fixed_small", "fixed_large", "learned_range", "learned"]),
    st.sampled_from(["epsilon", "sample", "v_prediction"]),
)
def test_extreme_betas(betas, rescale, variance_type, prediction_type):
    """Betas within (0, 1], tiny and almost 1 among them: tables without a NaN, or a refusal."""
    config = {"trained_betas": betas, "rescale_betas_zero_snr": rescale, "variance_type": variance_type}
    scheduler = build(config | {"prediction_type": prediction_type})
    if scheduler is not None:
        assert_works(scheduler)
