"""The network that is trained: of the size options, or of a configuration."""

import argparse
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_vlb.runtime.image_data import ImageData


def labels_needed(args: argparse.Namespace, data: ImageData) -> int | None:
    """The number of labels that the network takes: the classes, and the last for none of them under --label_dropout.

    Args:
        args: the options.
        data: the images.

    Returns:
        None for a network without classes.
    """
    return None if data.classes is None else data.classes + (args.label_dropout > 0)


def _check_classes(config: dict[str, Any], option: str, needed: int | None) -> None:
    """Refuse a configuration that takes no such labels, or is told none."""
    embeds = config.get("num_class_embeds")
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"{option} takes embeddings of classes (class_embed_type), but labels are numbers in `ddpm-vlb train`: "
            "leave it out, and give num_class_embeds."
        )
    if needed is None and embeds is not None:
        raise ValueError(
            f"{option} takes classes (num_class_embeds), but no labels are told: give --class_conditional, or leave "
            "them out."
        )
    if needed is not None and (type(embeds) is not int or embeds < needed):
        raise ValueError(
            f"{option} has num_class_embeds {embeds}, but the classes of this data, and the label for none under "
            f"--label_dropout, need at least {needed}."
        )


def configured_unet(name: str, data: ImageData, out_channels: int, labels: int | None) -> UNet2DModel:
    """The network of a configuration, if it is one that is trained here.

    Args:
        name: --model_config_name_or_path.
        data: the images.
        out_channels: that this data and the variance type need.
        labels: how many it must take; None for a network without classes.

    Raises:
        ValueError: it is no `UNet2DModel`, takes other labels, has other channels, or does not take these images.
    """
    config, option = dict(UNet2DModel.load_config(name)), f"--model_config_name_or_path {name}"
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{option} is of a {kind}, but `ddpm-vlb train` trains a UNet2DModel: give one's config.")
    _check_classes(config, option, labels)
    x_t = torch.zeros(1, data.channels, *data.size, device="meta")
    told = {} if labels is None else {"class_labels": x_t.new_zeros(1, dtype=torch.long)}
    try:
        with torch.device("meta"):  # shapes alone
            empty = UNet2DModel.from_config(config)
        channels = empty.config.in_channels, empty.config.out_channels
        shape = empty(x_t, x_t.new_zeros(1), **told).sample.shape if channels[0] == data.channels else None
    except Exception as error:  # whatever diffusers and torch say of values that make no network
        raise ValueError(
            f"{option} makes no network of images of {data.size[0]} x {data.size[1]}: {str(error)[:300]}"
        ) from error
    if channels != (data.channels, out_channels):
        raise ValueError(
            f"{option} has {channels[0]} input and {channels[1]} output channels, but this data and variance type "
            f"need {data.channels} and {out_channels}."
        )
    if shape != (1, out_channels, *data.size):
        raise ValueError(f"{option} makes {tuple(shape or ())[2:]} of images of {data.size}: give a fitting config.")
    return UNet2DModel.from_config(config)


def build_unet(args: argparse.Namespace, data: ImageData) -> UNet2DModel:
    """The network: the mean's channels, and as many again for a learned variance."""
    out_channels = data.channels * (2 if args.variance_type.startswith("learned") else 1)
    labels = labels_needed(args, data)
    if args.model_config_name_or_path is not None:
        return configured_unet(args.model_config_name_or_path, data, out_channels, labels)
    depth = len(args.block_out_channels)
    factor = 2 ** (depth - 1)
    if any(side % factor for side in data.size):
        raise ValueError(
            f"A U-Net of {depth} levels needs image sides that {factor} divides, but they are {data.size}. Give fewer "
            "--block_out_channels, or a fitting --resolution."
        )
    for level in args.attention_levels:
        if level >= depth:
            raise ValueError(f"--attention_levels {level} is not below the {depth} levels of --block_out_channels.")
    if any(width % args.norm_num_groups for width in args.block_out_channels):
        raise ValueError(f"--norm_num_groups {args.norm_num_groups} must divide all of {args.block_out_channels}.")
    attention = [level in args.attention_levels for level in range(depth)]
    return UNet2DModel(
        sample_size=data.size[0] if data.size[0] == data.size[1] else data.size,
        in_channels=data.channels,
        out_channels=out_channels,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=args.norm_num_groups,
        add_attention=any(attention),
        dropout=args.dropout,
        num_class_embeds=labels,
    )
