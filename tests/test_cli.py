"""The console command: whose option is whose, what is launched, what a copied recipe is, how mistakes are answered."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ddpm_vlb import cli

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "src" / "ddpm_vlb" / "recipes" / "train.py"
TINY = "--max_train_steps 2 --train_batch_size 4 --block_out_channels 8 8 --norm_num_groups 4 --ddpm_num_steps 20"
TINY += " --lr_warmup_steps 1 --calls_per_image 2 --eval_batch_size 4 --num_test_images 4 --cpu --logger none"

TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


def command(name):
    return importlib.import_module(f"ddpm_vlb.commands.{name.replace('-', '_')}")


# Whose option is whose


def split(name, line):
    names = (own._option_string_actions for own in (command(name).build_parser(), launch_command_parser()))
    return [" ".join(part) for part in cli.split(line.split(), *names)]


@pytest.mark.parametrize(
    "line, launch, own",
    [
        ("", "", ""),
        ("--num_processes 2 --seed 3", "--num_processes 2", "--seed 3"),
        (
            "--seed 3 --num_processes=2 --block_out_channels 8 16",
            "--num_processes=2",
            "--seed 3 --block_out_channels 8 16",
        ),
        ("--multi_gpu --no-use_ema", "--multi_gpu", "--no-use_ema"),
        ("--config_file fsdp.yaml --config mine.yaml", "--config_file fsdp.yaml", "--config mine.yaml"),
        ("--main-process-port 29501 --cpu", "--main-process-port 29501", "--cpu"),
        ("--unheard_of 1 --machine_rank 1", "--machine_rank 1", "--unheard_of 1"),
        ("--gradient-accumulation-steps 7", "", "--gradient-accumulation-steps 7"),
        ("--num_processes 2 -h", "--num_processes 2", "-h"),
        ("-q --ema_power -1", "-q", "--ema_power -1"),
    ],
)
def test_options_find_their_owner(line, launch, own):
    """In any order and form; what nobody knows goes to the command, which names it."""
    assert split("train", line) == [launch, own]


@pytest.mark.parametrize("name", cli.LAUNCHED)
def test_an_option_of_both_is_the_command_s(name):
    """The command hands these on to Accelerate; there are few, and all of them mean the same."""
    own, launch = (set(p._option_string_actions) for p in (command(name).build_parser(), launch_command_parser()))
    both = {option for option in own & launch if option.startswith("--")} - {"--help"}
    assert both <= {"--cpu", "--mixed_precision", "--gradient_accumulation_steps"}
    assert all(split(name, option) == ["", option] for option in both)


# What is launched


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` is asked for, in place of doing it."""
    asked = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", asked.append)
    return asked


def test_a_command_is_accelerate_launch_of_its_module(launched):
    """`ddpm-vlb optimize-timesteps --num_processes 2 --model a --steps 5`."""
    cli.main("optimize-timesteps --num_processes 2 --model a --steps 5".split())
    (args,) = launched
    assert args.module and args.training_script == "ddpm_vlb.commands.optimize_timesteps"
    assert args.training_script_args == "--model a --steps 5".split() and args.num_processes == 2


@pytest.mark.parametrize("name", cli.LAUNCHED)
def test_bad_options_are_answered_before_anything_is_launched(launched, capsys, name):
    """By one line that names the option; nothing is launched."""
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--seed", "three"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not launched
    assert line.startswith(f"ddpm-vlb {name}: error: ") and "--seed" in line and "'three'" in line


@pytest.mark.parametrize("name", [*cli.LAUNCHED, "publish", "compress", "decompress", "inspect"])
def test_every_command_has_help(launched, capsys, name):
    """Printed at once, with the command as the user types it."""
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and not launched
    assert said.startswith(f"usage: ddpm-vlb {name} ") and f"ddpm-vlb {name}" in said.partition("\n\n")[2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--num_processes two", "argument --num_processes/--num-processes: invalid int value: 'two'"),
        ("--multi_gpu stray.py", "'stray.py' stands behind an option that takes no such value"),
        ("--num_processes 1 stray.py", "'stray.py' stands behind an option that takes no such value"),
        ("--gradient-accumulation-steps 7", "unrecognized arguments: --gradient-accumulation-steps 7"),
    ],
)
def test_bad_launches_are_answered_too(launched, capsys, line, message):
    """As the command's own options are: one line, and nothing is launched, least of all a word that is no command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *line.split()])
    assert stop.value.code == 2 and not launched
    assert capsys.readouterr().err == f"ddpm-vlb train: error: {message} (--help lists the options)\n"


def test_what_the_launcher_cannot_do_is_told_in_a_line():
    """A configuration that is not there; Accelerate itself raises whatever it likes."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config_file", "nowhere.yaml"])
    assert stop.value.code.startswith("ddpm-vlb train: cannot be launched so. ") and "nowhere.yaml" in stop.value.code
    assert len(stop.value.code.splitlines()) == 1


def test_help_lists_the_commands(capsys):
    """Without an argument too."""
    for argv in ([], ["--help"], ["-h"]):
        cli.main(argv)
        said = capsys.readouterr().out
        assert all(f"\n  {name} " in said for name in (*cli.LAUNCHED, *cli.OTHERS))


def test_an_unknown_command_is_named():
    """And those that are there."""
    with pytest.raises(SystemExit, match="no command 'trian'; there are train, evaluate"):
        cli.main(["trian"])


def test_exit_codes_come_through():
    """Those of the process, of one or of several, and those of one that a signal killed as a shell has them."""

    def fails(error):
        raise error

    for code, expected in ((1, 1), (2, 2), (-9, 137)):
        several = ChildFailedError("train", {0: ProcessFailure(0, 1, code, "")})
        for error in (subprocess.CalledProcessError(code, "train"), several):
            assert cli.outcome("train", lambda error=error: fails(error)) == expected
    assert cli.outcome("train", lambda: fails(SignalException("stopped", signal.SIGINT))) == 130
    assert cli.outcome("train", lambda: None) == 0


def test_ctrl_c_is_the_processes_for_as_long_as_they_run():
    """And this process's again when they have ended."""
    before = signal.getsignal(signal.SIGINT)
    with cli.waiting_at_ctrl_c():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Recipes


def test_a_recipe_is_copied(tmp_path, capsys):
    """As it is, and never over something else."""
    target = tmp_path / "mine.py"
    cli.main(["cp", "train", str(target)])
    assert target.read_bytes() == RECIPE.read_bytes() and f"accelerate launch {target}" in capsys.readouterr().out
    target.write_text("my work")
    with pytest.raises(SystemExit, match=f"{target} is there already"):
        cli.main(["cp", "train", str(target)])
    assert target.read_text() == "my work"


@pytest.mark.parametrize("argv", [[], ["train"], ["nothing", "a.py"], ["train", "a.py", "b.py"], ["__init__", "a.py"]])
def test_copying_says_what_there_is(argv, tmp_path, monkeypatch):
    """A recipe that is not there, or no file to write."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"usage: ddpm-vlb cp RECIPE FILE.*\['train'\]"):
        cli.main(["cp", *argv])
    assert not list(tmp_path.iterdir())


def test_a_copy_that_cannot_be_written(tmp_path):
    """Is told in a line."""
    with pytest.raises(SystemExit, match="cannot be written"):
        cli.main(["cp", "train", str(tmp_path / "nowhere" / "mine.py")])


def test_the_recipe_is_a_file_to_read():
    """Under 200 lines, with the loop in it."""
    text = RECIPE.read_text()
    assert len(text.splitlines()) < 200
    for part in (
        ".diffuse(",
        "run.network(",
        "vlb_loss(",
        ".backward(",
        "optimizer.step()",
        "ema.step(",
        "accelerator.log(",
    ):
        assert part in text, part


# Processes of their own


def run(folder, *argv, code=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_shim_module_command_and_copy_are_one(tmp_path):
    """examples/train.py, the module, the console command and a copied recipe end with the same bits."""
    cli.main(["cp", "train", str(tmp_path / "mine.py")])
    ways = {
        "shim": [str(ROOT / "examples" / "train.py")],
        "module": ["-m", "ddpm_vlb.commands.train"],
        "command": ["-m", "ddpm_vlb.cli", "train", "--num_processes", "1"],
        "copy": [str(tmp_path / "mine.py")],
    }
    weights = set()
    for name, way in ways.items():
        run(tmp_path, *way, *TINY.split(), "--output_dir", name)
        weights.add((tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len(weights) == 1


@pytest.mark.slow
def test_a_command_that_ends_badly_says_one_line(tmp_path):
    """No traceback, not of the launcher either; on several processes the main one alone speaks."""
    options = [*TINY.split(), "--block_out_channels", "8", "8", "8", "8", "8"]
    said = run(tmp_path, "-m", "ddpm_vlb.cli", "train", *options, code=1)
    assert "Traceback" not in said and said.count("A U-Net of 5 levels needs image sides") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        said = run(tmp_path, "-m", "ddpm_vlb.cli", "train", *TWO.split(), *options, code=1)
    assert "Traceback" not in said and said.count("A U-Net of 5 levels needs image sides") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launch, code", [("", 0), (TWO, 128 + signal.SIGINT)], ids=["one process", "two processes"])
def test_ctrl_c_saves_and_ends(tmp_path, launch, code):
    """From a terminal it reaches the command and its processes alike: these save, and the command waits for them."""
    options = [*launch.split(), *TINY.split(), "--max_train_steps", "100000", "--output_dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "ddpm_vlb.cli", "train", *options],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        started = time.monotonic()
        while "/100000 [" not in (tmp_path / "said").read_text() and time.monotonic() - started < 120:
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == code
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text and "by SIGINT" in text and list((tmp_path / "run").glob("checkpoint-*"))
