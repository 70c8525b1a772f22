"""Training with sharded parameters or optimizer states, and with a compiled network.

On the CPU Accelerate never shards, and the command says so. What follows that refusal is tested all the same, with an
Accelerator that was told to shard over two CPU processes. For FSDP they are forked; for DeepSpeed this file, run as a
script, is launched.
"""

import errno
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate.accelerator
import pytest
import torch
import training_support
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, patch_environment
from diffusers import UNet2DModel
from processes import PYTHONPATH, ROOT, Forked, as_rank, environment, free_port, reset_accelerate
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from training_support import TINY, same_weights, weights

from ddpm_vlb import DDPMVLBPipeline, evaluate_vlb
from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.runtime import launching
from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.training.average import full

CHECKED = "what each process holds was checked"
# With a warm-up, as in test_equivalence.py, and clipping in most steps.
RUN = (*TINY, *"--lr_warmup_steps 100 --max_grad_norm 1 --attention_levels 1".split())
LONG = "--max_train_steps 20 --checkpointing_steps 10 --validation_steps 15"
ASKED = "^ddpm-vlb train: FSDP was asked for, but Accelerate runs .* on this device .*on the CPU launch without it"
REFUSED = {"1": f"{ASKED}|^ddpm-vlb train: FSDP 1 flattens the parameters.*set fsdp_version: 2", "2": ASKED}
FSDP_KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
ZERO = {"zero": "no", "zero-bf16": "bf16", "zero-fp16": "fp16"}
HISTORY = "--timestep_sampler loss_second_moment --lr_scheduler constant"
PLAIN = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
SHIPPED = f"--config_file {ROOT / 'examples' / 'configs' / 'deepspeed_zero2.yaml'}"


# The worker


def shard(accelerator, kind):
    """Give an Accelerator on CPU processes the state that it has where it really shards."""
    state = accelerator.state
    if kind in ZERO:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        import deepspeed

        DeepSpeedPlugin.set_deepspeed_weakref = lambda self: None  # needs transformers
        plugin = DeepSpeedPlugin(zero_stage=2) if kind == "zero" else DeepSpeedPlugin()  # as the launcher says
        plugin.set_mixed_precision(ZERO[kind])
        plugin.deepspeed_config["fp16"].setdefault("initial_scale_power", 4)  # else the first steps overflow
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # slowly, but the CPU does
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins, accelerator.deepspeed_engine_wrapped = plugin, None
        distributed_type = DistributedType.DEEPSPEED
    else:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        distributed_type = DistributedType.FSDP
    state.distributed_type = distributed_type
    PartialState._shared_state["distributed_type"] = distributed_type  # each AcceleratorState() copies it back


def check_shards(run):
    """Each process holds a part of every parameter, all parts are the network, and the averages are cut alike."""
    whole = sum(value.numel() for value in UNet2DModel.from_config(run.network_config).parameters())
    held = 0
    averages = run.unet.parameters() if run.ema is None else run.ema.shadow_params
    for value, average in zip(run.unet.parameters(), averages, strict=True):
        assert isinstance(value, DTensor) and isinstance(average, DTensor)
        assert value.placements == average.placements == (Shard(0),)
        assert 0 < value.to_local().numel() == average.to_local().numel() < value.numel()
        held += value.to_local().numel()
    assert 2 * held == whole


def check_after_training(run, kind):
    """The optimizer's states are cut too; without an average, what is saved is what Accelerate would gather."""
    if kind in ZERO:
        assert run.accelerator.mixed_precision == ZERO[kind]
        assert type(run.optimizer.optimizer).__name__ == "DeepSpeedZeroOptimizer"
        held = sum(value.numel() for value in run.optimizer.optimizer.single_partition_of_fp32_groups)
        whole = sum(value.numel() for value in run.unet.parameters())
        assert whole <= 2 * held < whole + 1000  # padded
    else:
        states = [entry["exp_avg"] for entry in run.optimizer.state.values()]
        assert states and all(isinstance(value, DTensor) and value.placements == (Shard(0),) for value in states)
    gathered, network = run.accelerator.get_state_dict(run.unet), run.averaged_network().state_dict()
    if run.accelerator.is_main_process and not run.args.use_ema:
        assert gathered.keys() == network.keys()
        assert all(torch.equal(gathered[name].cpu().float(), network[name]) for name in network)
    print(f"process {run.accelerator.process_index}: {CHECKED}", flush=True)


def spoil(what):
    """Of the third step the gradient alone is not finite, or the loss alone."""

    def broken(run, output, diffused, original=recipe.loss_terms):
        terms = original(run, output, diffused)
        if run.progress.step != 2:
            return terms
        sums = output.float().flatten(1).sum(1)
        extra = (sums - sums.detach()).sqrt() if what == "gradient" else torch.full_like(sums, torch.inf)
        return terms + extra[:, None]

    recipe.loss_terms = broken


def watch(seen):
    """Note of each step whether the loss was finite, and whether weights, averages and history moved, by name."""
    last = {}

    def watched(run, statistics, original=recipe.settle):
        sent = statistics.pending
        original(run, statistics)
        if sent is None:
            return
        groups = {
            "weights": list(run.unet.parameters()),
            "average": run.ema.shadow_params,
            "history": [value for value in run.sampler.state_dict().values() if isinstance(value, torch.Tensor)],
        }
        now = {name: [full(value.detach()).clone() for value in values] for name, values in groups.items()}
        same = {name: all(map(torch.equal, last.get(name, values), values)) for name, values in now.items()}
        last.update(now)
        assert now["history"] and math.isfinite(sent.read().norm) != run.optimizer.step_was_skipped
        seen.append("".join(name[0] for name in now if not same[name]) or "-")

    recipe.settle = watched


def refuse_files(name, rank):
    """From checkpoint-4 on the system lets one process write no file, once it comes to a part of the state."""
    write = getattr(accelerate.accelerator, name)

    def full(*args, **kwargs):
        if PartialState().process_index == rank and any("checkpoint-4" in str(value) for value in args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return write(*args, **kwargs)

    setattr(accelerate.accelerator, name, full)


def refuse_folder(part, rank):
    """From checkpoint-4 on the system lets one process make no folder for a part of the state."""

    def refused(path, *args, original=os.makedirs, **kwargs):
        if PartialState().process_index == rank and "checkpoint-4" in str(path) and Path(path).name.startswith(part):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(path, *args, **kwargs)

    os.makedirs = refused


def refuse_to_read(name, rank):
    """One process can read no file of a name."""

    def refused(file, *args, original=torch.load, **kwargs):
        if PartialState().process_index == rank and Path(file).name == name:
            raise MemoryError("no room")
        return original(file, *args, **kwargs)

    torch.load = refused


FAULTS = {
    "weights": (refuse_files, "save_fsdp_model"),
    "optimizer": (refuse_files, "save_fsdp_optimizer"),
    "rest": (refuse_files, "save_accelerator_state"),
    "weights-folder": (refuse_folder, "pytorch_model_fsdp"),
    "optimizer-folder": (refuse_folder, "optimizer"),
    "read": (refuse_to_read, "pytorch_model_fsdp.bin"),
}


def work(kind, options):
    """Run train.py with an Accelerator that shards, and with checks on the way."""
    torch.set_num_threads(1)
    seen = []
    if os.environ["BAD_STEP"]:
        spoil(os.environ["BAD_STEP"])
        watch(seen)
    kind, *fault = kind.split(":")
    if fault:
        refuse, what = FAULTS[fault[0]]
        refuse(what, int(fault[1]))

    def make(**settings):
        # On the CPU it would take half precision for its own business, not DeepSpeed's.
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false", ACCELERATE_MIXED_PRECISION="no"):
            return Accelerator(**settings)

    def checked_sharding(accelerator, original=launching.check_sharding):
        shard(accelerator, kind)  # after fp16 was found to need a GPU, which is too much said
        original(accelerator)

    def checked_train(run, validate, original=recipe.train):
        if kind not in ZERO:
            check_shards(run)
        return original(run, validate)

    def checked_finish(run, original=train.finish):
        if seen:
            print(f"moved {' '.join(seen[1:])}, skipped {run.progress.skipped}.", flush=True)
        check_after_training(run, kind)
        return original(run)

    launching.Accelerator, launching.check_sharding = make, checked_sharding
    recipe.train, train.finish = checked_train, checked_finish
    train.main(options)


def work_as(rank, port, kind, options, bad):
    """Run the worker as one of two forked processes."""
    as_rank(rank, port)
    os.environ["BAD_STEP"] = bad
    work(kind, options)


def fork(kind, options, code, bad):
    """The worker in two forked processes; returns what they printed, and their errors."""
    port = free_port()
    processes = [Forked(work_as, rank, port, kind, options, bad) for rank in (0, 1)]
    codes = [process.end(300) for process in processes]
    out, err = ("".join(getattr(process, name) for process in processes) for name in ("out", "err"))
    assert codes == [code, code], err[-5000:]
    return out, err


def start(kind, options, code, launcher, bad):
    """The worker under `accelerate launch`; returns what it printed, and its errors."""
    launcher += f" --main_process_port {free_port()} {Path(__file__)} {kind}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), *options]
    told = environment(ACCELERATE_USE_CPU="true", BAD_STEP=bad, PYTHONPATH=PYTHONPATH)
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-5000:]
    return done.stdout, done.stderr


def run_two(kind, folder, options, code=0, launcher=PLAIN, bad=""):
    """Run the worker on two CPU processes; returns what it printed, and its errors."""
    options = [*map(str, options), "--output_dir", str(folder)]
    out, err = start(kind, options, code, launcher, bad) if kind in ZERO else fork(kind, options, code, bad)
    if code == 0:
        assert out.count(CHECKED) == 2
    return out, err


def train_alone(folder, options):
    """Take the same global batches on one process; returns the weights of its pipeline."""
    reset_accelerate()
    train.main([*map(str, options), "--cpu", "--train_batch_size", "16", "--output_dir", str(folder)])
    reset_accelerate()
    return weights(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, few):
    """The weights that one process ends with, by its options."""
    done = {}

    def of(options):
        if options not in done:
            done[options] = train_alone(tmp_path_factory.mktemp("alone"), [*RUN, *few, *options.split()])
        return done[options]

    return of


def difference(a, b):
    """Without the bias of the keys: softmax ignores it, and Adam scales up the rounding that is its gradient."""
    a, b = ({name: value for name, value in own.items() if not name.endswith("to_k.bias")} for own in (a, b))
    return training_support.difference(a, b)


FSDP_OPTIONS = inspect.signature(FullyShardedDataParallelPlugin).parameters
needs_fsdp2 = pytest.mark.skipif("fsdp_version" not in FSDP_OPTIONS, reason="needs Accelerate 1.6")

# What is refused


@pytest.fixture
def one_process(monkeypatch):
    """Accelerate as if nothing had run before in this process."""
    reset_accelerate()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    reset_accelerate()


@pytest.mark.parametrize("version", ["1", "2"])
def test_fsdp_on_the_cpu_is_refused(tmp_path, monkeypatch, one_process, version):
    """Accelerate runs without it and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(SystemExit, match=REFUSED[version]):
        train.main([*TINY, "--output_dir", str(tmp_path)])


def test_deepspeed_on_the_cpu_is_refused(tmp_path, monkeypatch, one_process):
    """Or, where it is not installed, in one sentence of what is missing."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit, match="(?i)deepspeed") as end:
        train.main([*TINY, "--output_dir", str(tmp_path)])
    assert isinstance(end.value.code, str)


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize("version", ["1", "2"])
def test_launched_fsdp_on_the_cpu_is_refused(tmp_path, few, version):
    """With the flags of `accelerate launch`, on two processes."""
    port = free_port()
    launcher = f"--use_fsdp --fsdp_version {version} --num_processes 2 --num_machines 1 --mixed_precision no "
    launcher += f"--dynamo_backend no --main_process_port {port} examples/train.py --output_dir {tmp_path / 'run'}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), *TINY, *few]
    told = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(REFUSED[version], done.stderr, re.MULTILINE) and 'train.py", line' not in done.stderr
    assert not (tmp_path / "run").exists()


# FSDP 2


@needs_fsdp2
def test_fsdp_trains_what_one_process_does(tmp_path, few, alone):
    """A whole short run, with every parameter in two parts, ends in the same averaged weights."""
    options = "--max_train_steps 3 --checkpointing_steps 0"
    run_two("SHARDED_STATE_DICT", tmp_path, [*RUN, *few, *options.split()])
    assert difference(alone(options), weights(tmp_path)) < 1e-5
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize("more", ["--use_ema", "--no-use_ema --gradient_accumulation_steps 2"])
@pytest.mark.parametrize("kind", FSDP_KINDS)
def test_fsdp_checkpoints(tmp_path, few, alone, kind, more):
    """The run ends as one process does, and a resumed one as a straight one does, bit for bit."""
    options = [*RUN, *few, *LONG.split(), *more.split()]
    run_two(kind, tmp_path, options)
    straight = weights(tmp_path)
    assert difference(alone(f"{LONG} {more}"), straight) < 1e-5
    shutil.rmtree(tmp_path / "checkpoint-20")
    shutil.rmtree(tmp_path / "unet")
    out, _ = run_two(kind, tmp_path, [*options, "--resume_from_checkpoint", "latest"])
    assert "checkpoint-10" in out.partition("Resuming from ")[2].partition("\n")[0]
    assert same_weights(weights(tmp_path), straight)


@pytest.mark.slow
@needs_fsdp2
def test_a_sharded_checkpoint_is_not_for_one_process(tmp_path, few):
    """It is refused in one message; nothing of it is taken."""
    options = [*RUN, *few, *"--max_train_steps 2 --checkpointing_steps 2".split()]
    run_two("SHARDED_STATE_DICT", tmp_path, options)
    with pytest.raises(SystemExit, match="checkpoint-2 is of a run with sharding by FSDP, but this one has nothing"):
        train_alone(tmp_path, [*options, "--resume_from_checkpoint", "latest"])


@pytest.mark.slow
@needs_fsdp2
def test_fsdp_skips_steps_that_are_not_finite(tmp_path, few):
    """And ends both processes after so many."""
    options = "--max_train_steps 9 --learning_rate 1e20 --lr_warmup_steps 1 --max_skipped_steps 3"
    out, errors = run_two(FSDP_KINDS[0], tmp_path, [*RUN, *few, *options.split()], code=1)
    assert (out + errors).count("It is skipped") == 2
    assert "The run has diverged: 3 in a row" in errors


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize(
    "kind, where, rank",
    [
        *((FSDP_KINDS[0], f"{part}-folder", rank) for part in ("weights", "optimizer") for rank in (0, 1)),
        *((FSDP_KINDS[0], *fault) for fault in (("weights", 1), ("optimizer", 0), ("rest", 0), ("rest", 1))),
        *((FSDP_KINDS[1], *fault) for fault in (("weights", 0), ("optimizer", 0), ("rest", 0), ("rest", 1))),
    ],
)
def test_a_checkpoint_that_one_process_cannot_write(tmp_path, few, kind, where, rank):
    """All end with its error, and the checkpoint before is whole."""
    options = [*RUN, *few, *"--max_train_steps 4 --checkpointing_steps 2 --ddp_timeout 60".split()]
    _, errors = run_two(f"{kind}:{where}:{rank}", tmp_path, options, code=1)
    together = kind == FSDP_KINDS[0] and where in ("weights", "optimizer")  # which PyTorch tells all processes
    said = r"OSError: .*File too large" if together else r"\w+Error: .*"
    said = r"OSError: \[Errno 116\].*" if where.endswith("folder") else said
    assert re.search(rf"checkpoint-4 could not be written: {said}.*checkpoint-2, is whole", errors), errors[-5000:]
    assert errors.count("could not be written") == 1 and 'checkpoints.py", line' not in errors
    assert not together or "Another process" not in errors
    assert not (tmp_path / "checkpoint-4").exists() and not list(tmp_path.glob(".checkpoint-*"))
    out, _ = run_two(kind, tmp_path, [*options, "--resume_from_checkpoint", "latest"])
    assert "checkpoint-2." in out and (tmp_path / "checkpoint-4").is_dir()


@pytest.mark.slow
@needs_fsdp2
def test_a_checkpoint_that_one_process_cannot_load(tmp_path, few):
    """The others wait for its part: all end with its error, and nobody is sent to that checkpoint again."""
    options = [*RUN, *few, *"--max_train_steps 2 --checkpointing_steps 1 --ddp_timeout 60".split()]
    run_two(FSDP_KINDS[1], tmp_path, options)
    _, errors = run_two(f"{FSDP_KINDS[1]}:read:0", tmp_path, [*options, "--resume_from_checkpoint", "latest"], code=1)
    assert re.search("checkpoint-2 cannot be loaded: MemoryError: no room$", errors, re.MULTILINE), errors[-5000:]
    assert "go on with" not in errors and 'checkpoints.py", line' not in errors
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


# ZeRO 2

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("more", ["--use_ema", "--no-use_ema --gradient_accumulation_steps 2"])
def test_zero_checkpoints(tmp_path, few, alone, more):
    """As with FSDP; the learning rate and the clipping, which the engine keeps by itself, are those of the options."""
    options = [*RUN, *few, *LONG.split(), *more.split()]
    run_two("zero", tmp_path, options)
    straight = weights(tmp_path)
    assert difference(alone(f"{LONG} {more}"), straight) < 1e-5
    shutil.rmtree(tmp_path / "checkpoint-20")
    shutil.rmtree(tmp_path / "unet")
    out, _ = run_two("zero", tmp_path, [*options, "--resume_from_checkpoint", "latest"])
    assert "checkpoint-10" in out.partition("Resuming from ")[2].partition("\n")[0]
    assert same_weights(weights(tmp_path), straight)


@pytest.mark.slow
@needs_deepspeed
def test_zero_with_the_shipped_configuration(tmp_path, few):
    """In bf16: the bound falls, a resumed run ends as the straight one, the pipeline is plain and has its score."""
    options = [*TINY, *few, *"--lr_scheduler constant --num_test_images 18 --checkpointing_steps 30".split()]
    begun, folder = tmp_path / "begun", tmp_path / "run"
    run_two("zero-bf16", begun, [*options, "--max_train_steps", "1"], launcher=SHIPPED)
    run_two("zero-bf16", folder, [*options, "--max_train_steps", "60"], launcher=SHIPPED)
    straight = weights(folder)
    before, after = (json.loads((run / "metrics.json").read_text())["test"] for run in (begun, folder))
    errors = math.hypot(*(score[name] for score in (before, after) for name in ("noise_se", "image_se")))
    assert before["bits_per_dim"] - after["bits_per_dim"] > 5 * errors
    shutil.rmtree(folder / "checkpoint-60")
    shutil.rmtree(folder / "unet")
    again = [*options, "--max_train_steps", "60", "--resume_from_checkpoint", "latest"]
    out, _ = run_two("zero-bf16", folder, again, launcher=SHIPPED)
    assert "checkpoint-30" in out.partition("Resuming from ")[2].partition("\n")[0]
    assert same_weights(weights(folder), straight)
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    assert {value.dtype for value in straight.values()} == {torch.float32} and type(pipeline.unet) is UNet2DModel
    images = torch.stack([load_image_data(few[1], cache_dir=few[3]).test[i] for i in range(18)])
    reverse = pipeline.scheduler.reverse_process()
    with torch.no_grad():
        model = lambda x_t, timesteps: pipeline.unet(x_t, timesteps).sample  # noqa: E731
        exact = evaluate_vlb(model, reverse, images).bits_per_dim.mean()
    assert abs(float(exact) - after["bits_per_dim"]) < 5 * after["noise_se"]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", ZERO)
def test_zero_skips_a_gradient_that_is_not_finite(tmp_path, few, kind):
    """The engine does, and so do the average, the history, and the count."""
    if kind != "zero-fp16" and tuple(map(int, importlib.metadata.version("deepspeed").split(".")[:2])) < (0, 19):
        pytest.skip("this DeepSpeed takes such steps in bf16 and float32")
    options = [
        *TINY,
        *few,
        *"--max_train_steps 5 --timestep_sampler loss_second_moment --lr_scheduler constant".split(),
    ]
    launcher = PLAIN if kind == "zero" else f"{SHIPPED} --mixed_precision {ZERO[kind]}"
    out, errors = run_two(kind, tmp_path, options, launcher=launcher, bad="gradient")
    assert "moved wah - wah wah, skipped 1." in out


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", ["zero", "zero-bf16"])
def test_zero_stops_at_a_loss_that_is_not_finite(tmp_path, few, kind):
    """At the first one whose gradient is finite, since the engine has taken it by then."""
    launcher = PLAIN if kind == "zero" else SHIPPED
    options = [*TINY, *few, *HISTORY.split(), "--max_train_steps", "9"]
    out, errors = run_two(kind, tmp_path, options, code=1, launcher=launcher, bad="loss")
    assert "It is skipped" not in out + errors
    assert "The run has diverged: 1 in a row" in errors


@pytest.mark.slow
@needs_deepspeed
def test_zero_stops_after_many_steps_that_are_not_finite(tmp_path, few):
    """As without it, where the gradients are what is not finite."""
    options = "--max_train_steps 9 --learning_rate 1e20 --lr_warmup_steps 1 --max_skipped_steps 3"
    out, errors = run_two("zero", tmp_path, [*RUN, *few, *options.split()], code=1)
    assert (out + errors).count("It is skipped") == 2
    assert "The run has diverged: 3 in a row" in errors


# torch.compile


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_network_is_saved_plain(tmp_path, few):
    """With the same names, and nearly the same weights, as one that was not compiled."""
    options = [*RUN, *few, *"--max_train_steps 3 --checkpointing_steps 3".split()]
    plain = train_alone(tmp_path / "plain", options)
    compiled = train_alone(tmp_path / "compiled", [*options, "--compile"])
    assert difference(plain, compiled) < 1e-4
    assert not same_weights(plain, compiled)  # something was compiled


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
