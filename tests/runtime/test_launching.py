"""What the options ask for is what Accelerate runs, whatever its environment says; else one line names both."""

import argparse
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from processes import ROOT, environment, fresh_accelerate, reset_accelerate  # noqa: F401

from ddpm_vlb.commands.train_options import parse_args
from ddpm_vlb.runtime import figures, launching
from ddpm_vlb.runtime.launching import check_asked, check_sharding, make_accelerator, patient_accelerator

CONTRADICTIONS = [
    ("GRADIENT_ACCUMULATION_STEPS", "3", "", "--gradient_accumulation_steps 1, .*STEPS says 3"),
    ("GRADIENT_ACCUMULATION_STEPS", "1", "--gradient_accumulation_steps 2", "_steps 2, .*STEPS says 1"),
    ("DYNAMO_BACKEND", "EAGER", "", "ACCELERATE_DYNAMO_BACKEND=EAGER .* no --compile"),
    ("DYNAMO_BACKEND", "EAGER", "--compile", "ACCELERATE_DYNAMO_BACKEND=EAGER .* but --compile"),
    ("MIXED_PRECISION", "fp16", "", "ACCELERATE_MIXED_PRECISION.* needs a GPU"),
    ("USE_FSDP", "True", "", "FSDP 1 flattens"),
]


@pytest.mark.parametrize("name, value, options, pattern", CONTRADICTIONS)
def test_an_environment_that_says_otherwise_is_refused(monkeypatch, tmp_path, name, value, options, pattern):
    """Accelerate would take it in place of the option, without a word."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=pattern):
        make_accelerator(parse_args(["--cpu", "--logger", "none", *options.split()]), tmp_path)


@pytest.mark.parametrize("allow, precision", [(False, "highest"), (True, "high")])
def test_a_gpu_chooses_its_convolutions_and_takes_tf32_if_it_may(monkeypatch, allow, precision):
    """And a CPU, which has no TF32, says so."""
    told = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    launching.tune(torch.device("cpu"), False)
    assert not torch.backends.cudnn.benchmark and told == []
    launching.tune(torch.device("cuda"), allow)
    assert torch.backends.cudnn.benchmark and told == [precision]


def test_tf32_is_refused_without_a_gpu_for_it(tmp_path):
    """It would be an option without effect."""
    with pytest.raises(ValueError, match="--allow_tf32 needs an NVIDIA GPU, but the device is cpu: drop it"):
        make_accelerator(parse_args(["--cpu", "--logger", "none", "--allow_tf32"]), tmp_path)


def test_gradients_are_summed_where_they_are(tmp_path):
    """Several processes' gradients are views of the buckets that they are summed in: no copy there and back."""
    accelerator = make_accelerator(parse_args(["--cpu", "--logger", "none"]), tmp_path)
    assert accelerator.ddp_handler.gradient_as_bucket_view


AGREEMENTS = [
    ("GRADIENT_ACCUMULATION_STEPS", "2", "--gradient_accumulation_steps 2"),
    ("DYNAMO_BACKEND", "NO", "--compile"),
    ("MIXED_PRECISION", "bf16", ""),
    ("MIXED_PRECISION", "fp16", "--mixed_precision no"),
    ("USE_CPU", "true", ""),
    ("USE_CPU", "true", "--logger tensorboard"),
]


@pytest.mark.parametrize("name, value, options", AGREEMENTS)
def test_an_environment_that_says_the_same_is_not(monkeypatch, tmp_path, name, value, options):
    """As `accelerate launch` fills it in, and what it alone says."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    args = parse_args(["--cpu", "--logger", "none", *options.split()])
    accelerator = make_accelerator(args, tmp_path)
    assert accelerator.gradient_accumulation_steps == args.gradient_accumulation_steps
    assert accelerator.mixed_precision == (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))


@pytest.mark.parametrize(
    "config, pattern",
    [
        ({"gradient_clipping": 1.0}, "--max_grad_norm 10.0, but DeepSpeed's gradient_clipping says 1.0"),
        ({"train_micro_batch_size_per_gpu": 8}, "--train_batch_size 64, but DeepSpeed's .* says 8"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps 1, but DeepSpeed's .* says 4"),
        ({"gradient_clipping": "auto", "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 64}, None),
    ],
)
def test_a_configuration_of_deepspeed_that_says_otherwise_is_refused(config, pattern):
    """A file's values would else be replaced without a word."""
    accelerator = SimpleNamespace(
        mixed_precision="no",
        gradient_accumulation_steps=1,
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)),
    )
    args = parse_args(["--logger", "none"])
    if pattern is None:
        return check_asked(accelerator, args)
    with pytest.raises(ValueError, match=pattern):
        check_asked(accelerator, args)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_is_asked_for_in_any_spelling(monkeypatch, kind):
    """Accelerate takes `True` for true."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "True")
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO, device=SimpleNamespace(type="cpu"), state=SimpleNamespace()
    )
    with pytest.raises(ValueError, match=f"{kind} was asked for"):
        check_sharding(accelerator)


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tmp_path, logger):
    """Accelerate runs without any; nothing is written by then."""
    monkeypatch.setattr(launching, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=f"--logger {logger} .*not installed: `pip install {logger}`"):
        make_accelerator(parse_args(["--cpu", "--logger", logger]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", ["option", "environment"])
def test_scoring_refuses_a_precision_that_is_not_computed_in(monkeypatch, told):
    """On the CPU fp16 would be float32, recorded as fp16; a command without the option does not look at it."""
    if told == "environment":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        patient_accelerator(argparse.Namespace(cpu=True))
        reset_accelerate()
    args = argparse.Namespace(cpu=True, mixed_precision="fp16" if told == "option" else None)
    with pytest.raises(ValueError, match="--mixed_precision fp16 .*needs a GPU"):
        patient_accelerator(args)


BACKENDS = """
import os, runpy, sys
runpy.run_path(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
print(os.environ["MPLBACKEND"], sys.modules["matplotlib"].get_backend(auto_select=False))
"""


@pytest.mark.parametrize("backend, kept", [("no_backend_of_this_name", "None"), ("svg", "svg")])
def test_an_inherited_backend_breaks_no_import(backend, kept):
    """And one that works stays that of the process, whose own pictures it is for."""
    command = [sys.executable, "-c", BACKENDS, figures.__file__]
    done = subprocess.run(command, env=environment(MPLBACKEND=backend), capture_output=True, text=True)
    assert done.stdout.split() == [backend, kept], done.stderr


def test_no_picture_depends_on_a_backend():
    """Nor does anything but figures.py import matplotlib, whose import is mended there."""
    sources = (ROOT / "src" / "ddpm_vlb").rglob("*.py")
    lines = {path.name: re.findall(r"^\s*(?:from|import) matplotlib.*", path.read_text(), re.M) for path in sources}
    assert {name for name, found in lines.items() if found} == {"figures.py"}
    assert not any("pyplot" in line for found in lines.values() for line in found)
