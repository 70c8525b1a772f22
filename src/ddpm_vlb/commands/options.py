"""The options that several commands have, and how bad ones are answered."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from ddpm_vlb.runtime.stopping import process_index

SWITCH = argparse.BooleanOptionalAction
LARGEST = 2**31 - 1  # integer of the options but seeds; what is counted in tensors stays below 2^63


def _number(
    kind: Callable[[str], Any],
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    why: str = "",
    step: int | None = None,
) -> Callable[[str], Any]:
    """An argparse type: a number in a range, and why it must lie there."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if open_low else low <= value) or value > high:
            raise argparse.ArgumentTypeError(
                f"must lie in {'(' if open_low else '['}{low}, {high}]{why}, but got {text}"
            )
        if step is not None and value % step:
            raise argparse.ArgumentTypeError(f"must be a multiple of {step}{why}, but got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int, not_negative_int = _number(int, 1, LARGEST), _number(int, 0)
multiple_of_four = _number(int, 4, LARGEST, why=" (four a step)", step=4)
positive_float, not_negative_float = _number(float, 0, open_low=True), _number(float, 0)
number_of_levels = _number(int, 2, 2**16)
at_least_two, fraction = _number(int, 2, LARGEST, why=" (one has no spread)"), _number(float, 0, 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is laid out."""


class Parser(argparse.ArgumentParser):
    """The parser of a command; a bad option is one line, from the main process alone.

    Args:
        command: its name behind `ddpm-vlb`.
        description: the module's docstring.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"ddpm-vlb {command}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong; the usage of dozens of options would bury it."""
        self.exit(
            2,
            None
            if process_index()
            else f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n",
        )

    def refuse_idle(self, args: argparse.Namespace, idle: dict[str, bool]) -> None:
        """Refuse options that something else leaves without effect; at their defaults they may stand in a config file.

        Args:
            args: as parsed.
            idle: by "options, why", whether that is so.
        """
        for case, is_so in idle.items():
            names, why = case.split(", ", 1)
            for name in names.split():
                value = getattr(args, name)
                if is_so and value != self.get_default(name):
                    self.error(f"--{'no-' if value is False else ''}{name} has no effect {why}: leave it out")


def add_model_options(parser: argparse.ArgumentParser, verb: str, output: str | None = None) -> None:
    """Options that say which checkpoint is meant, and where the results go.

    Args:
        parser: of the command.
        verb: what it does with the checkpoint.
        output: the help text of --output_dir; None where there is none.
    """
    parser.add_argument("--model", required=True, help=f"Pipeline to {verb}: a folder or a Hub name.")
    parser.add_argument("--revision", help="Its branch, tag or commit on the Hub.")
    if output is not None:
        parser.add_argument("--output_dir", help=output)
    parser.add_argument("--cache_dir", help="Where downloads are kept.")


def add_overwrite_option(parser: Any) -> None:
    """The option that allows to replace a finished pipeline.

    Args:
        parser: a parser or a group of its options.
    """
    what = "Replace the finished pipeline that --output_dir holds, with all that was measured of it."
    parser.add_argument("--overwrite_output_dir", action=SWITCH, default=False, help=what)


def _levels(text: str) -> int | None:
    if text.lower() == "none":
        return None
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, or none for continuous data, but got {text}")
    return value


def add_data_options(parser: argparse.ArgumentParser, verb: str) -> Any:
    """Options that say which images are meant; returns their group.

    Args:
        parser: of the command.
        verb: what it does with the images.
    """
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name", help="Hub name, local folder or file; default: the model's data.json, else the digits."
    )
    data.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    data.add_argument("--split", default="test", help=f"Split to {verb}.")
    data.add_argument(
        "--image_column", help="Column of images, or of arrays (C, H, W); default: data.json's, or image."
    )
    data.add_argument(
        "--label_column", help="Column of labels for a class-conditional network; default: data.json's, or label."
    )
    data.add_argument("--resolution", type=positive_int, help="Resize and crop images to this size.")
    return data


def add_scored_options(parser: argparse.ArgumentParser, verb: str = "score") -> None:
    """Options that say which images to score, and as what.

    Args:
        parser: of the command.
        verb: what it does with the images.
    """
    data = add_data_options(parser, verb)
    what = f"{verb.capitalize()} only the first so many; default: all."
    data.add_argument("--num_images", type=positive_int, help=what)
    data.add_argument(
        "--levels",
        type=_levels,
        default=argparse.SUPPRESS,
        help="Levels of the data on [-1, 1], or none for continuous; default: what the checkpoint says.",
    )
    add_ratios_option(data)


def add_ratios_option(group: Any) -> None:
    """The option that gives a network without a chain of its own one.

    Args:
        group: a parser or a group of its options.
    """
    group.add_argument(
        "--ratios",
        type=positive_float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="First and last noise-to-signal ratio of a flow or EDM network's chain; default: 0.4 bins, 100.",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how to run the network.

    Args:
        parser: of the command.
    """
    machine = parser.add_argument_group("machine")
    machine.add_argument("--eval_batch_size", type=positive_int, help="(image, t) pairs in a network call.")
    machine.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    machine.add_argument("--cpu", action=SWITCH, default=False, help="Use the CPU even if there is a GPU.")


def add_hub_options(group: Any) -> None:
    """The options of an upload, named as in diffusers' scripts where it has them.

    Args:
        group: a parser or a group of its options.
    """
    group.add_argument("--hub_model_id", help="Name of the repository; default: the folder's, in your namespace.")
    group.add_argument(
        "--hub_private_repo", action=SWITCH, help="Make the repository private; default: as the Hub does."
    )
    group.add_argument("--hub_include_code", action=SWITCH, help="Upload the code of DDPMVLBPipeline as well.")
    group.add_argument("--hub_license", help="License of the weights as the Hub names it, mit say; default: unknown.")
    group.add_argument(
        "--hub_overwrite", action=SWITCH, help="Replace another run that the repository holds; its tags stay."
    )
