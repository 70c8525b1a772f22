"""The console command `ddpm-vlb`: what it launches are modules of the package, by `accelerate launch`.

    ddpm-vlb train --num_processes 2 --max_train_steps 1000

is `accelerate launch --num_processes 2 -m ddpm_vlb.commands.train --max_train_steps 1000`: an option that the command
knows is the command's, one that only `accelerate launch` knows is the launch's.
"""

import importlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path

LAUNCHED = {
    "train": "train a network, score it, save it as a diffusers pipeline",
    "evaluate": "bits/dim of a checkpoint, with error bars",
    "optimize-timesteps": "find the best few steps and variances of a checkpoint, and store them in it",
    "sample-quality": "how good samples in few steps are",
}
OTHERS = {
    "publish": "upload a finished run to the Hub",
    "cp": "copy a recipe to a file of yours: ddpm-vlb cp train my_train.py",
}
RECIPES = Path(__file__).with_name("recipes")


def usage() -> str:
    """What `ddpm-vlb --help` prints."""
    lines = [f"  {name:20}{what}" for name, what in (LAUNCHED | OTHERS).items()]
    return "\n".join(
        [
            "usage: ddpm-vlb COMMAND [options]\n",
            *lines,
            "\n`ddpm-vlb COMMAND --help` lists a command's options. The first four also take those of",
            "`accelerate launch`, such as --num_processes 8 or --config_file fsdp.yaml.",
        ]
    )


def split(argv: Sequence[str], own: Container[str], launch: Container[str]) -> tuple[list[str], list[str]]:
    """The options for `accelerate launch`, and the command's own.

    Args:
        argv: all of them, with their values behind them.
        own: names of the command's options.
        launch: names of the launch's options.
    """
    parts: tuple[list[str], list[str]] = [], []
    chosen = parts[1]
    for word in argv:
        name = word.partition("=")[0]
        if word.startswith("--"):
            chosen = parts[0] if name not in own and name in launch else parts[1]
        chosen.append(word)
    return parts


def launch(name: str, argv: Sequence[str]) -> None:
    """Run a command by `accelerate launch`, once its options are found to be good.

    Args:
        name: of the command.
        argv: its options, and those of the launch.

    Raises:
        SystemExit: with the exit code of what was launched.
    """
    module = f"ddpm_vlb.commands.{name.replace('-', '_')}"
    command = importlib.import_module(module)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser, own = launch_command_parser(), command.build_parser()
    to_launch, to_command = split(argv, own._option_string_actions, parser._option_string_actions)
    getattr(command, "parse_args", own.parse_args)(to_command)
    # Ctrl-C is for the processes, which save and end; this one waits for them.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        launch_command(parser.parse_args([*to_launch, "-m", module, *to_command]))
    except subprocess.CalledProcessError as failure:  # the process has said why
        sys.exit(failure.returncode if failure.returncode > 0 else 128 - failure.returncode)
    except ChildFailedError as failure:
        sys.exit(next(iter(failure.failures.values())).exitcode)
    except SignalException as stop:  # the processes were asked to stop, and have
        sys.exit(128 + stop.sigval)


def copy(argv: Sequence[str]) -> None:
    """Copy a recipe.

    Args:
        argv: the recipe's name, and the file to write, which must not be there.

    Raises:
        SystemExit: no such recipe, or the file cannot be written.
    """
    names = sorted(path.stem for path in RECIPES.glob("[!_]*.py"))
    if len(argv) != 2 or argv[0] not in names:
        sys.exit(f"usage: ddpm-vlb cp RECIPE FILE, where RECIPE is one of {names}")
    target = Path(argv[1])
    if target.exists():
        sys.exit(f"ddpm-vlb cp: {target} is there already: give another name, or remove it.")
    try:
        shutil.copyfile(RECIPES / f"{argv[0]}.py", target)
    except OSError as error:
        sys.exit(f"ddpm-vlb cp: {target} cannot be written: {error}")
    print(f"Wrote {target}. It runs as it is: accelerate launch {target} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: its name and options; those of the command line when None.

    Raises:
        SystemExit: an unknown command, or the command's own end.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    others: dict[str, Callable[[], object]] = {
        "cp": lambda: copy(rest),
        "publish": lambda: importlib.import_module("ddpm_vlb.commands.publish").main(rest),
        "--help": lambda: print(usage()),
        "-h": lambda: print(usage()),
    }
    if name in LAUNCHED:
        launch(name, rest)
    elif name in others:
        others[name]()
    else:
        sys.exit(f"ddpm-vlb: there is no command {name!r}; there are {', '.join(LAUNCHED | OTHERS)}.")


if __name__ == "__main__":
    main()
