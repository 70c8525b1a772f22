"""The console command `ddpm-vlb`: what it launches are modules of the package, by `accelerate launch`.

    ddpm-vlb train --num_processes 2 --max_train_steps 1000

is `accelerate launch --num_processes 2 -m ddpm_vlb.commands.train --max_train_steps 1000`: an option that the command
knows is the command's, one that only `accelerate launch` knows is the launch's.
"""

import contextlib
import importlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

LAUNCHED = {
    "train": "train a network, score it, save it as a diffusers pipeline",
    "evaluate": "bits/dim of a checkpoint, with error bars",
    "optimize-timesteps": "find the best few steps and variances of a checkpoint, and store them in it",
    "sample-quality": "how good samples in few steps are",
}
OTHERS = {
    "compress": "images as a file of as many bits as the bound says, without loss",
    "decompress": "the images of such a file, bit for bit",
    "inspect": "what such a file holds, without the network",
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


def split(argv: Sequence[str], own: Container[str], launcher: Container[str]) -> tuple[list[str], list[str]]:
    """The options for `accelerate launch`, and the command's own.

    Args:
        argv: all of them, with their values behind them.
        own: names of the command's options.
        launcher: names of the launcher's, which has each with hyphens and with underscores.
    """
    parts: tuple[list[str], list[str]] = [], []
    chosen = parts[1]
    for word in argv:
        if re.match("--?[A-Za-z]", word):
            name = word.partition("=")[0]
            known = {name, "--" + name[2:].replace("-", "_")}
            chosen = parts[0] if name in launcher and not any(spelt in own for spelt in known) else parts[1]
        chosen.append(word)
    return parts


def launch(name: str, argv: Sequence[str]) -> None:
    """Run a command by `accelerate launch`, once its options are found to be good.

    Args:
        name: of the command.
        argv: its options, and those of the launcher.

    Raises:
        SystemExit: with the exit code of what was launched, or a line that says why nothing was.
    """
    module = f"ddpm_vlb.commands.{name.replace('-', '_')}"
    command = load(module)
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser, own = launch_command_parser(), command.build_parser()
    parser.error = own.error
    # argparse has no public list of a parser's options.
    to_launch, to_command = split(argv, own._option_string_actions, parser._option_string_actions)
    getattr(command, "parse_args", own.parse_args)(to_command)
    args = parser.parse_args([*to_launch, "-m", module, *to_command])
    if args.training_script != module:
        own.error(f"{args.training_script!r} stands behind an option that takes no such value")
    with waiting_at_ctrl_c():
        code = outcome(name, lambda: launch_command(args))
    if code != 0:
        sys.exit(code)


def outcome(name: str, run: Callable[[], object]) -> int | str:
    """What becomes of a launch: 0, the exit code of its processes, or why there are none.

    Args:
        name: of the command.
        run: the launch.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run()
    except subprocess.CalledProcessError as failure:  # the process has said why
        return as_in_a_shell(failure.returncode)
    except ChildFailedError as failure:
        return as_in_a_shell(failure.get_first_failure()[1].exitcode)
    except SignalException as stop:  # the processes were asked to stop, and have
        return 128 + stop.sigval
    except Exception as error:  # of the launcher itself: what it was asked for cannot be
        return f"ddpm-vlb {name}: cannot be launched so. {type(error).__name__}: {' '.join(str(error).split())}"
    return 0


def as_in_a_shell(code: int) -> int:
    """The exit code of a process, 128 and the signal's number where one has killed it."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def waiting_at_ctrl_c() -> Iterator[None]:
    """Leave Ctrl-C to the processes, which save and end, and wait for them."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def load(module: str) -> Any:
    """A command's module; without the `train` extra a line says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(str(error))


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
        sys.exit(f"ddpm-vlb cp: {target} is there already: give another name.")
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
        "--help": lambda: print(usage()),
        "-h": lambda: print(usage()),
    }
    if name in LAUNCHED:
        launch(name, rest)
    elif name in others:
        others[name]()
    elif name in OTHERS:
        load(f"ddpm_vlb.commands.{name}").main(rest)
    else:
        sys.exit(f"ddpm-vlb: there is no command {name!r}; there are {', '.join(LAUNCHED | OTHERS)}.")


if __name__ == "__main__":
    main()
