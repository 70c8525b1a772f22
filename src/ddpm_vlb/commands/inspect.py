"""What is in a compressed file: images, bytes, bits/dim, what it was made with, and whether it is whole.

    ddpm-vlb inspect digits.dvlb
    ddpm-vlb inspect a.dvlb b.dvlb

Needs no checkpoint. All bytes are looked at; a damaged chunk is named.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from ddpm_vlb import CompressedFile
from ddpm_vlb.commands.options import Parser
from ddpm_vlb.runtime.stopping import refused
from ddpm_vlb.scoring.codec import named_file, read_compressed


def build_parser() -> Parser:
    """The options and their help texts."""
    parser = Parser("inspect", __doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="Of `ddpm-vlb compress`.")
    return parser


def describe(file: CompressedFile, name: str) -> list[str]:
    """What a file's header says, in lines.

    Args:
        file: the file.
        name: of it.
    """
    header, images = file.header, file.images
    shape = " x ".join(map(str, header.shape))
    return [
        f"{name}: {images} images of {shape} in {header.levels} levels, {_size(len(file.data), images, header.shape)}",
        f"  network {header.network.hex()}, chain {header.chain.hex()} of {header.steps} steps, in {header.dtype}",
        f"  made with torch {header.environment}",
    ]


def _size(size: int, images: int, shape: Sequence[int]) -> str:
    dims = images * math.prod(shape)
    return f"{size} bytes" + (f", {8 * size / dims:.3f} bits/dim" if dims else "")


def chunks(file: CompressedFile) -> tuple[list[str], list[int]]:
    """A line on each chunk, and the numbers of those that are damaged.

    Args:
        file: the file.
    """
    lines, damaged, start = list[str](), list[int](), 0
    for index, (begin, end, images) in enumerate(file.places):
        which = f"number {start} to {start + images - 1}" if images else "none"
        start += images
        line = f"  chunk {index}: images {which}, {_size(end - begin, images, file.header.shape)}"
        try:
            own = file.chunk(index)
        except ValueError as error:
            damaged.append(index)
            lines.append(f"{line}, DAMAGED: {error}")
            continue
        told = [what for what, there in (("names", own.names), ("class labels", own.labels)) if there]
        lines.append(f"{line}, lanes {len(own.stacks)}{', with ' if told else ''}{' and '.join(told)}")
    return lines, damaged


@refused("inspect")
def main(argv: Sequence[str] | None = None) -> None:
    """Tell what files are."""
    args = build_parser().parse_args(argv)
    broken = []
    for path in args.files:
        with named_file(path):
            file = read_compressed(path)
        lines, damaged = chunks(file)
        print("\n".join([*describe(file, str(path)), *lines]))
        if damaged:
            broken.append(f"{path}: damaged in chunks {damaged} of {len(file.places)}.")
    if broken:
        raise ValueError(" ".join(broken))


if __name__ == "__main__":
    main()
