"""The options of `ddpm-vlb train`; those that diffusers' train_unconditional.py has too are named as there."""

import argparse
import codecs
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from diffusers.optimization import SchedulerType

from ddpm_vlb import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS, VARIANCE_TYPES
from ddpm_vlb.commands.options import (
    SWITCH,
    Parser,
    add_hub_options,
    add_overwrite_option,
    at_least_two,
    fraction,
    not_negative_float,
    not_negative_int,
    number_of_levels,
    positive_float,
    positive_int,
)

DESCRIPTION = """\
Train a likelihood-based DDPM on images, score its test bits/dim, sample it, and save it as a diffusers pipeline.

Without options: scikit-learn's 8x8 digits with their own 17 levels, in a few minutes on a CPU.

    ddpm-vlb train
    ddpm-vlb train --dataset_name ylecun/mnist --block_out_channels 32 64 --max_train_steps 20000
    ddpm-vlb train --path flow
    ddpm-vlb train --pretrained google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --image_column img
"""
PATHS = ("ddpm", "flow", "edm")
# "piecewise_constant" needs rules that no option holds.
LR_SCHEDULERS = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


def build_parser() -> Parser:
    """The options and their help texts."""
    parser = Parser("train", DESCRIPTION)
    parser.add_argument("--config", help="YAML or JSON file of options; the command line overrides it.")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub name, local folder or file for `datasets`; default: the digits.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    data.add_argument("--train_data_dir", help="Folder of image files, in place of --dataset_name.")
    data.add_argument("--image_column", default="image", help="Column of images, or of arrays (C, H, W) of levels.")
    data.add_argument("--label_column", default="label", help="Column of class labels, for --class_conditional.")
    data.add_argument("--train_split", default="train", help="Name of the training split.")
    data.add_argument("--test_split", help="Name of the test split; default: test, validation, or a made one.")
    data.add_argument("--resolution", type=positive_int, help="Resize and crop to this size; default: as they are.")
    data.add_argument("--levels", type=number_of_levels, help="Levels 0 .. N - 1 that are stored; default: as stored.")
    data.add_argument("--channels", type=int, choices=(1, 3), help="Grey or colour; default: as 64 of the images are.")
    data.add_argument("--random_flip", action=SWITCH, default=False, help="Mirror half of the training images.")
    data.add_argument("--cache_dir", help="Where `datasets` keeps its files.")
    data.add_argument(
        "--dataloader_num_workers", type=not_negative_int, help="Worker processes; default: 4 at most with a GPU."
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained", help="Pipeline of fixed variance, a folder or a Hub name: its network gains a learned one."
    )
    model.add_argument("--revision", help="Its branch, tag or commit on the Hub.")
    model.add_argument(
        "--freeze_mean", action=SWITCH, default=False, help="Train the variance half of its last layer alone."
    )
    model.add_argument("--model_config_name_or_path", help="A UNet2DModel config in place of the size flags.")
    model.add_argument("--block_out_channels", type=positive_int, nargs="+", default=[32, 64], help="U-Net widths.")
    model.add_argument("--layers_per_block", type=positive_int, default=1, help="ResNet blocks in each level.")
    model.add_argument("--norm_num_groups", type=positive_int, default=8, help="Groups of the group norms.")
    model.add_argument(
        "--attention_levels", type=not_negative_int, nargs="*", default=[], help="Levels with attention."
    )
    model.add_argument("--dropout", type=fraction, default=0.0, help="Dropout of the ResNet blocks.")
    model.add_argument("--class_conditional", action=SWITCH, default=False, help="A network that is told the classes.")
    model.add_argument(
        "--label_dropout", type=fraction, default=0.0, help="Share of labels that are not told, for guidance."
    )

    process = parser.add_argument_group("diffusion process")
    process.add_argument(
        "--path", choices=PATHS, default="ddpm", help="A chain of betas, or flow matching or EDM, even in log SNR."
    )
    process.add_argument("--ddpm_num_steps", type=positive_int, default=1000, help="T.")
    process.add_argument("--ddpm_beta_schedule", choices=BETA_SCHEDULES, default="linear", help="Noise schedule.")
    process.add_argument(
        "--ddpm_beta_start", type=positive_float, help="beta_1; default: 1e-4, or more for data of few levels."
    )
    process.add_argument("--ddpm_beta_end", type=positive_float, default=0.02, help="beta_T.")
    process.add_argument("--rescale_betas_zero_snr", action=SWITCH, default=False, help="Zero-terminal SNR.")
    process.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="What the mean is.")
    process.add_argument(
        "--variance_type", choices=VARIANCE_TYPES, help="default: fixed_small for simple, else learned_range."
    )
    process.add_argument("--timestep_spacing", choices=TIMESTEP_SPACINGS, default="linspace", help="Of short chains.")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--objective",
        choices=("simple", "hybrid", "vlb"),
        help="The loss; default: vlb, or hybrid of --pretrained without --freeze_mean.",
    )
    training.add_argument(
        "--timestep_sampler",
        choices=("uniform", "low_discrepancy", "loss_second_moment", "gaussian", "sigma"),
        help="Which t to train on; default: gaussian for vlb, else low_discrepancy, or sigma of another --path.",
    )
    training.add_argument(
        "--sigma_sampling", choices=("uniform", "logit_normal"), default="uniform", help="Of a flow's L_simple."
    )
    training.add_argument("--vlb_weight", type=not_negative_float, default=0.001, help="Of L_vlb in hybrid.")
    training.add_argument("--snr_gamma", type=positive_float, help="Min-SNR weighting of L_simple; 5 is usual.")
    training.add_argument(
        "--train_batch_size", type=positive_int, default=64, help="Images for each process and step."
    )
    training.add_argument(
        "--max_train_steps", type=positive_int, help="Optimizer steps; default: 1000, or --num_epochs."
    )
    training.add_argument("--num_epochs", type=positive_int, help="Epochs, in place of --max_train_steps.")
    training.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches for each step.")
    training.add_argument(
        "--learning_rate",
        type=positive_float,
        help="Peak learning rate of AdamW; default: 2e-3, or 1e-4 of --pretrained without --freeze_mean.",
    )
    training.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="cosine", help="Its schedule.")
    training.add_argument("--lr_warmup_steps", type=not_negative_int, default=100, help="Its warm-up.")
    training.add_argument("--adam_beta1", type=fraction, default=0.9, help="AdamW's beta_1.")
    training.add_argument("--adam_beta2", type=fraction, default=0.99, help="AdamW's beta_2.")
    training.add_argument("--adam_weight_decay", type=not_negative_float, default=1e-6, help="AdamW's weight decay.")
    training.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon.")
    training.add_argument("--max_grad_norm", type=positive_float, default=10.0, help="Gradient clipping.")
    training.add_argument("--use_ema", action=SWITCH, default=True, help="Score and save averaged weights.")
    training.add_argument("--ema_inv_gamma", type=positive_float, default=1.0, help="EMA warm-up: inverse gamma.")
    training.add_argument("--ema_power", type=positive_float, default=0.75, help="EMA warm-up: power.")
    training.add_argument("--ema_max_decay", type=fraction, default=0.9999, help="EMA: largest decay.")
    training.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    training.add_argument("--compile", action=SWITCH, default=False, help="torch.compile the network and its loss.")
    training.add_argument(
        "--allow_tf32", action=SWITCH, default=False, help="Matrix products of float32 in TF32, on an NVIDIA GPU."
    )
    training.add_argument("--channels_last", action=SWITCH, default=False, help="Memory format of the network.")
    training.add_argument(
        "--max_skipped_steps",
        type=positive_int,
        default=20,
        help="End after so many steps in a row that are not finite.",
    )
    training.add_argument(
        "--ddp_timeout", type=positive_int, default=1800, help="Seconds to wait for another process before giving up."
    )
    training.add_argument("--seed", type=not_negative_int, default=0, help="Of weights, data order, t and noise.")
    training.add_argument("--cpu", action=SWITCH, default=False, help="Train on the CPU even if there is a GPU.")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="runs/digits", help="Where everything is written.")
    add_overwrite_option(output)
    output.add_argument("--logger", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="Tracker.")
    output.add_argument("--logging_dir", default="logs", help="Its folder, inside --output_dir.")
    output.add_argument("--validation_steps", type=positive_int, default=500, help="Validate every so many steps.")
    output.add_argument(
        "--validation_calls", type=at_least_two, default=16, help="Network calls for each of 64 validation images."
    )
    output.add_argument(
        "--keep_best", action=SWITCH, help="Keep the network of the best validation, not the last; on with --patience."
    )
    output.add_argument(
        "--patience",
        type=positive_int,
        help="End after so many validations in a row that are surely worse than the best; keeps it.",
    )
    output.add_argument(
        "--checkpointing_steps",
        type=not_negative_int,
        default=500,
        help="Save the state every so many steps, and after the last; 0: only that.",
    )
    output.add_argument("--checkpoints_total_limit", type=positive_int, help="Keep only the last so many.")
    output.add_argument("--resume_from_checkpoint", help="A checkpoint folder's name, or `latest`.")
    output.add_argument("--eval_batch_size", type=positive_int, default=64, help="Number of images to sample.")
    output.add_argument(
        "--num_test_images",
        type=not_negative_int,
        help="Score the first so many, 0 for none; default: all, or as many as 16384 network calls allow.",
    )
    output.add_argument(
        "--calls_per_image",
        type=at_least_two,
        help="Network calls to score a test image, at least 2; default: 20, and 80 more where noise hides the images.",
    )
    output.add_argument(
        "--ddpm_num_inference_steps", type=positive_int, help="Steps of the sampled pictures; default: 250, or all."
    )

    hub = parser.add_argument_group("upload")
    hub.add_argument("--push_to_hub", action=SWITCH, default=False, help="Upload to the Hub while training.")
    add_hub_options(hub)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options; --config becomes options of its own, in front of the given ones."""
    parser = build_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(given)[0].config
    args = parser.parse_args([*_config_as_options(path, parser), *given])
    if args.dataset_name is not None and args.train_data_dir is not None:
        parser.error("pass only one of --dataset_name and --train_data_dir")
    if args.max_train_steps is not None and args.num_epochs is not None:
        parser.error("pass only one of --max_train_steps and --num_epochs")
    started = args.pretrained is not None
    moves_the_mean = started and not args.freeze_mean
    if args.objective is None:
        args.objective = "hybrid" if moves_the_mean else "vlb"
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if moves_the_mean else 2e-3
    parser.refuse_idle(args, _idle(args))
    if started and Path(args.pretrained).resolve() == Path(args.output_dir).resolve():
        parser.error(f"--pretrained {args.pretrained} is --output_dir, which the result would replace: give another")
    if args.freeze_mean:
        args.adam_weight_decay = 0.0  # which would move a mean without a gradient
        if args.objective != "vlb":
            parser.error(f"--freeze_mean leaves L_simple of --objective {args.objective} nothing to train: take vlb")
    if args.keep_best is None:  # what ends a run as overfitted must not keep that network
        args.keep_best = args.patience is not None
    if args.variance_type is None:
        args.variance_type = "fixed_small" if args.objective == "simple" and not started else "learned_range"
    if args.objective == "hybrid" and not args.variance_type.startswith("learned"):
        parser.error(f"--objective hybrid trains the variance, but --variance_type {args.variance_type} has none")
    if args.objective == "simple" and args.variance_type.startswith("learned"):
        parser.error(f"--objective simple does not train the variance of --variance_type {args.variance_type}")
    if args.label_dropout == 1:
        parser.error("--label_dropout 1 tells no label at all: give less, or leave --class_conditional out")
    if args.ddpm_beta_start is not None and args.ddpm_beta_start > args.ddpm_beta_end:
        parser.error(
            f"--ddpm_beta_start {args.ddpm_beta_start} is above --ddpm_beta_end {args.ddpm_beta_end}: noise would fall"
        )
    if args.rescale_betas_zero_snr and args.prediction_type == "epsilon":
        parser.error("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample")
    other_path = args.path != "ddpm"
    if args.timestep_sampler is None:
        as_simple = "sigma" if other_path else "low_discrepancy"
        args.timestep_sampler = "gaussian" if args.objective == "vlb" else as_simple
    if args.timestep_sampler == "sigma" and (args.objective == "vlb" or not other_path):
        parser.error("--timestep_sampler sigma draws as L_simple of --path flow or edm does: take another")
    if args.ddpm_num_inference_steps is None and not started:
        args.ddpm_num_inference_steps = min(250, args.ddpm_num_steps)
    if not started and args.ddpm_num_inference_steps > args.ddpm_num_steps:
        parser.error(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps} is more than the chain's "
            f"--ddpm_num_steps {args.ddpm_num_steps}"
        )
    if args.push_to_hub:
        args.hub_license = args.hub_license or "unknown"
        args.hub_model_id = args.hub_model_id or Path(args.output_dir).resolve().name
    return args


def _idle(args: argparse.Namespace) -> dict[str, bool]:
    """Options that others leave without effect."""
    named, size = args.model_config_name_or_path is not None, "block_out_channels layers_per_block norm_num_groups"
    betas, started = "ddpm_beta_schedule ddpm_beta_start ddpm_beta_end", args.pretrained is not None
    decided = f"model_config_name_or_path {size} attention_levels dropout path ddpm_num_steps {betas}"
    decided += " rescale_betas_zero_snr prediction_type variance_type timestep_spacing class_conditional"
    hub = "hub_model_id hub_private_repo hub_include_code hub_license hub_overwrite"
    return {
        "dataset_config_name, without --dataset_name": args.dataset_name is None,
        "label_column label_dropout, without --class_conditional": not args.class_conditional,
        f"{decided}, beside --pretrained, whose checkpoint decides": started,
        "revision freeze_mean, without --pretrained": not started,
        "adam_weight_decay, with --freeze_mean": args.freeze_mean,
        f"{size} attention_levels dropout, beside --model_config_name_or_path": named,
        f"ddpm_beta_start ddpm_beta_end, on --ddpm_beta_schedule {args.ddpm_beta_schedule}": args.ddpm_beta_schedule
        in ("squaredcos_cap_v2", "laplace"),
        "vlb_weight, without --objective hybrid": args.objective != "hybrid",
        "snr_gamma sigma_sampling, with --objective vlb, which has no L_simple": args.objective == "vlb",
        f"{betas} rescale_betas_zero_snr prediction_type snr_gamma, on --path {args.path}": args.path != "ddpm",
        f"sigma_sampling, on --path {args.path}": args.path != "flow",
        "lr_warmup_steps, with --lr_scheduler constant": args.lr_scheduler == "constant" and args.lr_warmup_steps > 0,
        "ema_inv_gamma ema_power ema_max_decay, with --no-use_ema": not args.use_ema,
        "logging_dir, with --logger none": args.logger == "none",
        "calls_per_image, with --num_test_images 0": args.num_test_images == 0,
        f"{hub}, without --push_to_hub": not args.push_to_hub,
    }


def _config_as_options(path: str | None, parser: argparse.ArgumentParser) -> list[str]:
    """A config file as command-line options, so that argparse checks names, types and choices in one place."""
    if path is None:
        return []
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        content = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        parser.error(f"--config {path} is no text in UTF-8 ({error}): save it as UTF-8")
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {path} must hold options by name, but holds {type(content).__name__}")
    switches = {action.dest for action in parser._actions if isinstance(action, argparse.BooleanOptionalAction)}
    options: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        if isinstance(value, bool) and name in switches:
            options.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, bool):  # YAML's reading of a plain `no`
            options.append(f"--{name}={'yes' if value else 'no'}")
        elif isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        else:
            options.append(f"--{name}={value}")
    return options
