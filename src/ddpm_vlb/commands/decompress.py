"""Write the images of a compressed file as PNG files, with the checkpoint that it was made with.

    ddpm-vlb decompress images.dvlb out/ --model runs/pictures
    ddpm-vlb decompress digits.dvlb out/ --model runs/digits --overwrite

Pixels are those that went in, and names but for their suffix; images of a data set, which have none, are numbered.
Class labels are written to metadata.jsonl, where `ddpm-vlb compress` and `datasets` find them. The number of steps is
the file's own; the checkpoint, its stored path of so many steps and --ratios must be as they were. Where a part of the
file is damaged the others are written all the same.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_vlb import BitsBackCodec, CompressedFile, DDPMVLBPipeline, Decompressed
from ddpm_vlb.commands.options import SWITCH, Parser, add_model_options, add_ratios_option
from ddpm_vlb.runtime.files import hidden
from ddpm_vlb.runtime.image_sets import as_stored
from ddpm_vlb.runtime.stopping import refused
from ddpm_vlb.scoring.codec import (
    codec_device,
    codec_pipeline,
    codec_process,
    coding,
    make_codec,
    named_file,
    read_compressed,
)
from ddpm_vlb.scoring.image_files import METADATA, as_png, check_png, metadata_rows, move_into, png_names


def build_parser() -> Parser:
    """The options and their help texts."""
    parser = Parser("decompress", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="Of `ddpm-vlb compress`.")
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER", help="Where the images shall lie.")
    add_model_options(parser, "decompress with")
    add_ratios_option(parser)
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="Replace files of the same names.")
    parser.add_argument("--cpu", action=SWITCH, default=False, help="Use the CPU even if there is a GPU.")
    return parser


class Targets:
    """Where the images of each chunk go, and what is known to be lost.

    Args:
        file: the compressed file.
    """

    def __init__(self, file: CompressedFile):
        self.file, self.lost = file, dict[int, str]()
        self.starts, self.labelled = list[int](), False
        told, start, width = dict[int, tuple[str, ...]](), 0, len(str(max(file.images - 1, 0)))
        for index, (_, _, images) in enumerate(file.places):
            self.starts.append(start)
            try:
                chunk = file.chunk(index)
            except ValueError as error:
                self.lost[index] = str(error)
            else:
                self.labelled |= bool(chunk.labels)
                told[index] = chunk.names or tuple(f"{start + i:0{width}d}.png" for i in range(images))
            start += images
        names = iter(png_names([name for own in told.values() for name in own]))
        self.names = {index: [next(names) for _ in own] for index, own in told.items()}
        self.others: list[dict[str, Any]] = []  # what metadata.jsonl says of other images

    def check(self, folder: Path, overwrite: bool) -> None:
        """Refuse to replace files without a word.

        Args:
            folder: of OUT_FOLDER.
            overwrite: --overwrite was given.

        Raises:
            ValueError: some are there, or the folder is a file.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"OUT_FOLDER {folder} is a file: give a folder.")
        own = [name for names in self.names.values() for name in names] + [METADATA] * self.labelled
        there = [name for name in own if (folder / name).exists()]
        if there and not overwrite:
            raise ValueError(
                f"{folder / there[0]} is there already: give another folder, or --overwrite to replace {len(there)} "
                "files."
            )
        if METADATA in there:
            self.others = [row for row in metadata_rows(folder / METADATA) if row.get("file_name") not in own]

    def message(self, index: int) -> str:
        """That a chunk is lost, with its images."""
        start, images = self.starts[index], self.file.places[index][2]
        which = f"number {start} to {start + images - 1}"
        if index in self.names:
            which += f", {self.names[index][0]} to {self.names[index][-1]}"
        return f"chunk {index} of {len(self.starts)} (images {which}) is lost: {self.lost[index]}"


def write_part(own: Decompressed, names: Sequence[str], levels: int, stage: Path) -> None:
    """Write images of a chunk, and their labels.

    Args:
        own: the images.
        names: of their files.
        levels: of the data.
        stage: folder that is not looked at yet.
    """
    for k, name in zip(as_stored(own.x_0, levels), names, strict=True):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        as_png(k, levels).save(stage / name, "PNG", optimize=True)
    if own.class_labels is not None:
        rows = zip(names, own.class_labels.tolist(), strict=True)
        add_rows(stage, [{"file_name": name, "label": label} for name, label in rows])


def add_rows(stage: Path, rows: list[dict[str, Any]]) -> None:
    """Tell more of a folder's images.

    Args:
        stage: the folder.
        rows: lines of its metadata.jsonl.
    """
    if rows:
        with open(stage / METADATA, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def decode(codec: BitsBackCodec, targets: Targets, stage: Path) -> int:
    """Decode all chunks that can be, into a folder; returns the number of images."""
    file, done = targets.file, 0
    with coding("Decompressing", file.images) as progress:
        for index, start in enumerate(targets.starts):
            if index in targets.lost:
                continue
            try:
                told = lambda number, start=start: progress(start + number)  # noqa: E731
                own = codec.decode_part(file.part(index), file.header.shape, told)
            except ValueError as error:
                targets.lost[index] = str(error)
                continue
            write_part(own, targets.names[index], file.header.levels, stage)
            done += len(own.x_0)
    return done


def check_shape(pipeline: DDPMVLBPipeline, shape: tuple[int, ...]) -> None:
    """Refuse a file of images that the network does not take."""
    own = pipeline.sample_shape
    if (own is not None and shape != own) or shape[0] != pipeline.unet.config.in_channels:
        raise ValueError(f"`data` holds images of shape {shape}, but --model takes {own}.")


@refused("decompress")
def main(argv: Sequence[str] | None = None) -> int:
    """Decompress a file. Returns the number of images."""
    args = build_parser().parse_args(argv)
    with named_file(args.file):
        file = read_compressed(args.file)
        header = file.header
        check_png(header.shape, header.levels)
        targets = Targets(file)
        targets.check(args.folder, args.overwrite)
        pipeline = codec_pipeline(args, codec_device(args))
        check_shape(pipeline, header.shape)
        reverse = codec_process(pipeline, args, header.levels, header.steps)
        codec = make_codec(pipeline, reverse, header.dtype)
        codec.check(header)
        # On the folder's own disk.
        stage = hidden(args.folder / "images" if args.folder.exists() else args.folder.absolute(), "partial")
        stage.mkdir(parents=True)
        try:
            done = decode(codec, targets, stage)
            add_rows(stage, targets.others)
            if done or not targets.lost:
                move_into(stage, args.folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        if targets.lost:
            lost = "; ".join(map(targets.message, sorted(targets.lost)))
            others = f"The other {done} images are in {args.folder}." if done else "There are no others."
            raise ValueError(f"`data`: {lost} {others}")
    print(f"Wrote {done} images to {args.folder}.")
    return done


if __name__ == "__main__":
    main()
