"""Training with sharded parameters or optimizer states, and with a compiled network.

On the CPU Accelerate never shards, and train.py says so. What follows that refusal is tested all the same: run as a
script, this file runs examples/train.py with an Accelerator that was told to shard over two CPU processes.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import launching
import pytest
import torch
import train
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from test_equivalence import difference as difference_of
from test_train import ROOT, TINY, few, free_port, reset_accelerate, same_weights, weights  # noqa: F401
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

CHECKED = "what each process holds was checked"
# With a warm-up, as in test_equivalence.py, and clipping in most steps.
RUN = (*TINY, *"--lr_warmup_steps 100 --max_grad_norm 1 --attention_levels 1".split())
LONG = "--max_train_steps 20 --checkpointing_steps 10 --validation_steps 15"
ASKED = "^FSDP was asked for, but Accelerate runs .* on this device .*on the CPU launch without it"
REFUSED = {"1": f"{ASKED}|^FSDP 1 flattens the parameters.*set fsdp_version: 2", "2": ASKED}
FSDP_KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


# The worker


def shard(accelerator, kind):
    """Give an Accelerator on CPU processes the state that it has where it really shards."""
    state = accelerator.state
    if kind == "zero":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        DeepSpeedPlugin.set_deepspeed_weakref = lambda self: None  # needs transformers
        plugin = DeepSpeedPlugin(zero_stage=2)
        plugin.set_mixed_precision("no")
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
    for value, average in zip(run.unet.parameters(), run.ema.shadow_params, strict=True):
        assert isinstance(value, DTensor) and isinstance(average, DTensor)
        assert value.placements == average.placements == (Shard(0),)
        assert 0 < value.to_local().numel() == average.to_local().numel() < value.numel()
        held += value.to_local().numel()
    assert 2 * held == whole


def check_after_training(run, kind):
    """The optimizer's states are cut too; without an average, what is saved is what Accelerate would gather."""
    if kind == "zero":
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
        assert all(torch.equal(gathered[name].cpu(), network[name]) for name in network)
    print(f"process {run.accelerator.process_index}: {CHECKED}", flush=True)


def work(kind, options):
    """Run train.py with an Accelerator that shards, and with checks on the way."""
    torch.set_num_threads(1)

    def make(**settings):
        accelerator = Accelerator(**settings)
        shard(accelerator, kind)
        return accelerator

    def checked_train(run, validate, original=train.train):
        if kind != "zero":
            check_shards(run)
        return original(run, validate)

    def checked_finish(run, original=train.finish):
        check_after_training(run, kind)
        return original(run)

    launching.Accelerator, train.train, train.finish = make, checked_train, checked_finish
    train.main(options)


def launch(kind, folder, options, code=0):
    """Run the worker on two CPU processes; returns what it printed, and its errors."""
    port = free_port()
    launcher = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    launcher += f"--main_process_port {port} tests/test_sharding.py {kind}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), *options]
    done = subprocess.run(
        [*command, "--output_dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr[-5000:]
    if code == 0:
        assert done.stdout.count(CHECKED) == 2
    return done.stdout, done.stderr


def train_alone(folder, options):
    """Take the same global batches on one process; returns the weights of its pipeline."""
    reset_accelerate()
    train.main([*options, "--cpu", "--train_batch_size", "16", "--output_dir", str(folder)])
    reset_accelerate()
    return weights(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, few):  # noqa: F811
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
    return difference_of(a, b)


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
@pytest.mark.parametrize("version", ["1", "2"])
def test_launched_fsdp_on_the_cpu_is_refused(tmp_path, few, version):  # noqa: F811
    """With the flags of `accelerate launch`, on two processes."""
    port = free_port()
    launcher = f"--use_fsdp --fsdp_version {version} --num_processes 2 --num_machines 1 --mixed_precision no "
    launcher += f"--dynamo_backend no --main_process_port {port} examples/train.py --output_dir {tmp_path / 'run'}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), *TINY, *few]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(REFUSED[version], done.stderr, re.MULTILINE) and 'train.py", line' not in done.stderr
    assert not list((tmp_path / "run").iterdir())


# FSDP 2


def test_fsdp_trains_what_one_process_does(tmp_path, few, alone):  # noqa: F811
    """A whole short run, with every parameter in two parts, ends in the same averaged weights."""
    options = "--max_train_steps 3 --checkpointing_steps 0"
    launch("SHARDED_STATE_DICT", tmp_path, [*RUN, *few, *options.split()])
    assert difference(alone(options), weights(tmp_path)) < 1e-5
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--use_ema", "--no-use_ema --gradient_accumulation_steps 2"])
@pytest.mark.parametrize("kind", FSDP_KINDS)
def test_fsdp_checkpoints(tmp_path, few, alone, kind, more):  # noqa: F811
    """The run ends as one process does, and a resumed one as a straight one does, bit for bit."""
    options = [*RUN, *few, *LONG.split(), *more.split()]
    launch(kind, tmp_path, options)
    straight = weights(tmp_path)
    assert difference(alone(f"{LONG} {more}"), straight) < 1e-5
    shutil.rmtree(tmp_path / "checkpoint-20")
    shutil.rmtree(tmp_path / "unet")
    out, _ = launch(kind, tmp_path, [*options, "--resume_from_checkpoint", "latest"])
    assert "checkpoint-10" in out.partition("Resuming from ")[2].partition("\n")[0]
    assert same_weights(weights(tmp_path), straight)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_not_for_one_process(tmp_path, few):  # noqa: F811
    """It is refused in one message; nothing of it is taken."""
    options = [*RUN, *few, *"--max_train_steps 2 --checkpointing_steps 2".split()]
    launch("SHARDED_STATE_DICT", tmp_path, options)
    with pytest.raises(SystemExit, match="checkpoint-2 is of a run with sharding by FSDP, but this one has nothing"):
        train_alone(tmp_path, [*options, "--resume_from_checkpoint", "latest"])


@pytest.mark.slow
def test_fsdp_skips_steps_that_are_not_finite(tmp_path, few):  # noqa: F811
    """And ends both processes after so many."""
    options = "--max_train_steps 9 --learning_rate 1e20 --lr_warmup_steps 1 --max_skipped_steps 3"
    out, errors = launch(FSDP_KINDS[0], tmp_path, [*RUN, *few, *options.split()], code=1)
    assert (out + errors).count("It is skipped") == 2
    assert "The run has diverged: 3 in a row" in errors


# ZeRO 2

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("more", ["--use_ema", "--no-use_ema --gradient_accumulation_steps 2"])
def test_zero_checkpoints(tmp_path, few, alone, more):  # noqa: F811
    """As with FSDP; the learning rate and the clipping, which the engine keeps by itself, are those of the options."""
    options = [*RUN, *few, *LONG.split(), *more.split()]
    launch("zero", tmp_path, options)
    straight = weights(tmp_path)
    assert difference(alone(f"{LONG} {more}"), straight) < 1e-5
    shutil.rmtree(tmp_path / "checkpoint-20")
    shutil.rmtree(tmp_path / "unet")
    out, _ = launch("zero", tmp_path, [*options, "--resume_from_checkpoint", "latest"])
    assert "checkpoint-10" in out.partition("Resuming from ")[2].partition("\n")[0]
    assert same_weights(weights(tmp_path), straight)


@pytest.mark.slow
@needs_deepspeed
def test_zero_stops_at_a_step_that_is_not_finite(tmp_path, few):  # noqa: F811
    """At the first one, since the engine has taken it by then."""
    options = "--max_train_steps 9 --learning_rate 1e20 --lr_warmup_steps 1 --max_skipped_steps 3"
    out, errors = launch("zero", tmp_path, [*RUN, *few, *options.split()], code=1)
    assert "It is skipped" not in out + errors
    assert "The run has diverged: 1 in a row" in errors


# torch.compile


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_network_is_saved_plain(tmp_path, few):  # noqa: F811
    """With the same names, and nearly the same weights, as one that was not compiled."""
    options = [*RUN, *few, *"--max_train_steps 3 --checkpointing_steps 3".split()]
    plain = train_alone(tmp_path / "plain", options)
    compiled = train_alone(tmp_path / "compiled", [*options, "--compile"])
    assert difference(plain, compiled) < 1e-4
    assert not same_weights(plain, compiled)  # something was compiled


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
