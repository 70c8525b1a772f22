"""Train a likelihood-based DDPM on images, score its test bits/dim, sample it, and save it as a diffusers pipeline.

Without options: scikit-learn's 8x8 digits with their own 17 levels, in a few minutes on a CPU.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --dataset_name ylecun/mnist --block_out_channels 32 64 128 --max_train_steps 20000
"""

import argparse
import hashlib
import importlib.metadata
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import UNet2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from image_data import ImageData, Images, load_image_data
from reporting import baselines, plot_samples, plot_vlb_terms, score, write_json
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    ReverseProcess,
    UniformTimesteps,
    VLBEstimate,
    beta_start_for_levels,
    covariance_eigenvalues,
    estimate_vlb,
    hybrid_loss,
    pilot_probabilities,
    simple_loss,
    vlb_loss,
)
from ddpm_vlb.respacing import TIMESTEP_SPACINGS
from ddpm_vlb.reverse_process import PREDICTION_TYPES, VARIANCE_TYPES
from ddpm_vlb.schedules import BETA_SCHEDULES

TimestepSampler = UniformTimesteps | ImportanceTimesteps | LossSecondMomentTimesteps


def _number(kind: Callable[[str], Any], low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number in a range."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if open_low else low <= value) or value > high:
            raise argparse.ArgumentTypeError(f"must lie in {'(' if open_low else '['}{low}, {high}], but got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int, not_negative_int = _number(int, 1), _number(int, 0)
positive_float, not_negative_float = _number(float, 0, open_low=True), _number(float, 0)
fraction = _number(float, 0, 1)


def build_parser() -> argparse.ArgumentParser:
    """The options; those that diffusers' train_unconditional.py has too are named as there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", help="YAML or JSON file of options; the command line overrides it.")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub name, local folder or file for `datasets`; default: the digits.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    data.add_argument("--train_data_dir", help="Folder of image files, in place of --dataset_name.")
    data.add_argument("--image_column", default="image", help="Column that holds the images.")
    data.add_argument("--train_split", default="train", help="Name of the training split.")
    data.add_argument("--test_split", help="Name of the test split; default: test, validation, or a made one.")
    data.add_argument("--resolution", type=positive_int, help="Resize and crop to this size; default: as they are.")
    data.add_argument("--random_flip", action=switch, default=False, help="Mirror half of the training images.")
    data.add_argument("--cache_dir", help="Where `datasets` keeps its files.")
    data.add_argument("--dataloader_num_workers", type=not_negative_int, default=0, help="Worker processes.")

    model = parser.add_argument_group("model")
    model.add_argument("--model_config_name_or_path", help="A UNet2DModel config in place of the size flags.")
    model.add_argument("--block_out_channels", type=positive_int, nargs="+", default=[32, 64], help="U-Net widths.")
    model.add_argument("--layers_per_block", type=positive_int, default=1, help="ResNet blocks in each level.")
    model.add_argument("--norm_num_groups", type=positive_int, default=8, help="Groups of the group norms.")
    model.add_argument("--attention_levels", type=not_negative_int, nargs="*", default=[], help="Levels with attention.")
    model.add_argument("--dropout", type=fraction, default=0.0, help="Dropout of the ResNet blocks.")

    process = parser.add_argument_group("diffusion process")
    process.add_argument("--ddpm_num_steps", type=positive_int, default=1000, help="T.")
    process.add_argument("--ddpm_beta_schedule", choices=BETA_SCHEDULES, default="linear", help="Noise schedule.")
    process.add_argument(
        "--ddpm_beta_start", type=positive_float, help="beta_1; default: 1e-4, or more for data of few levels."
    )
    process.add_argument("--ddpm_beta_end", type=positive_float, default=0.02, help="beta_T.")
    process.add_argument("--rescale_betas_zero_snr", action=switch, default=False, help="Zero-terminal SNR.")
    process.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="What the mean is.")
    process.add_argument(
        "--variance_type", choices=VARIANCE_TYPES, help="default: fixed_small for simple, else learned_range."
    )
    process.add_argument("--timestep_spacing", choices=TIMESTEP_SPACINGS, default="linspace", help="Of short chains.")

    training = parser.add_argument_group("training")
    training.add_argument("--objective", choices=("simple", "hybrid", "vlb"), default="vlb", help="The loss.")
    training.add_argument(
        "--timestep_sampler",
        choices=("uniform", "low_discrepancy", "loss_second_moment", "gaussian"),
        help="Which t to train on; default: gaussian for vlb, else low_discrepancy.",
    )
    training.add_argument("--vlb_weight", type=not_negative_float, default=0.001, help="Of L_vlb in hybrid.")
    training.add_argument("--snr_gamma", type=positive_float, help="Min-SNR weighting of L_simple; 5 is usual.")
    training.add_argument("--train_batch_size", type=positive_int, default=64, help="Images for each process and step.")
    training.add_argument("--max_train_steps", type=positive_int, help="Optimizer steps; default: 1000, or --num_epochs.")
    training.add_argument("--num_epochs", type=positive_int, help="Epochs, in place of --max_train_steps.")
    training.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches for each step.")
    training.add_argument("--learning_rate", type=positive_float, default=2e-3, help="Peak learning rate of AdamW.")
    training.add_argument(
        "--lr_scheduler", choices=[s.value for s in SchedulerType], default="cosine", help="Its schedule."
    )
    training.add_argument("--lr_warmup_steps", type=not_negative_int, default=100, help="Its warm-up.")
    training.add_argument("--adam_beta1", type=fraction, default=0.9, help="AdamW's beta_1.")
    training.add_argument("--adam_beta2", type=fraction, default=0.99, help="AdamW's beta_2.")
    training.add_argument("--adam_weight_decay", type=not_negative_float, default=1e-6, help="AdamW's weight decay.")
    training.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon.")
    training.add_argument("--max_grad_norm", type=positive_float, default=10.0, help="Gradient clipping.")
    training.add_argument("--use_ema", action=switch, default=True, help="Score and save averaged weights.")
    training.add_argument("--ema_inv_gamma", type=positive_float, default=1.0, help="EMA warm-up: inverse gamma.")
    training.add_argument("--ema_power", type=positive_float, default=0.75, help="EMA warm-up: power.")
    training.add_argument("--ema_max_decay", type=fraction, default=0.9999, help="EMA: largest decay.")
    training.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    training.add_argument("--seed", type=not_negative_int, default=0, help="Of weights, data order, t and noise.")
    training.add_argument("--cpu", action=switch, default=False, help="Train on the CPU even if there is a GPU.")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="runs/digits", help="Where everything is written.")
    output.add_argument("--logger", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="Tracker.")
    output.add_argument("--logging_dir", default="logs", help="Its folder, inside --output_dir.")
    output.add_argument("--validation_steps", type=positive_int, default=500, help="Validate every so many steps.")
    output.add_argument("--checkpointing_steps", type=positive_int, help="Save the state every so many; default: never.")
    output.add_argument("--checkpoints_total_limit", type=positive_int, help="Keep only the last so many.")
    output.add_argument("--resume_from_checkpoint", help="A checkpoint folder's name, or `latest`.")
    output.add_argument("--eval_batch_size", type=positive_int, default=64, help="Number of images to sample.")
    output.add_argument("--num_test_images", type=positive_int, help="Score only the first so many; default: all.")
    output.add_argument("--calls_per_image", type=positive_int, default=64, help="Network calls to score a test image.")
    output.add_argument(
        "--ddpm_num_inference_steps", type=positive_int, default=250, help="Steps of the sampled pictures."
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the options; --config becomes options of its own, in front of the given ones."""
    import sys

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
    if args.variance_type is None:
        args.variance_type = "fixed_small" if args.objective == "simple" else "learned_range"
    if args.objective == "hybrid" and not args.variance_type.startswith("learned"):
        parser.error(f"--objective hybrid trains the variance, but --variance_type {args.variance_type} has none")
    if args.objective == "simple" and args.variance_type.startswith("learned"):
        parser.error(f"--objective simple does not train the variance of --variance_type {args.variance_type}")
    if args.snr_gamma is not None and args.objective == "vlb":
        parser.error("--snr_gamma weights L_simple, which --objective vlb does not have")
    if args.rescale_betas_zero_snr and args.prediction_type == "epsilon":
        parser.error("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample")
    if args.timestep_sampler is None:
        args.timestep_sampler = "gaussian" if args.objective == "vlb" else "low_discrepancy"
    args.ddpm_num_inference_steps = min(args.ddpm_num_inference_steps, args.ddpm_num_steps)
    args.calls_per_image = max(2, args.calls_per_image - args.calls_per_image % (2 if args.calls_per_image < 8 else 4))
    return args


def _config_as_options(path: str | None, parser: argparse.ArgumentParser) -> list[str]:
    """A config file as command-line options, so that argparse checks names, types and choices in one place."""
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {path} must hold options by name, but holds {type(content).__name__}")
    options: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        else:
            options.append(f"--{name}={value}")
    return options


def build_scheduler(args: argparse.Namespace, levels: int) -> DDPMVLBScheduler:
    """The chain to train; its first noise matches the bin width of data with few levels."""
    beta_start = args.ddpm_beta_start or max(1e-4, beta_start_for_levels(levels))
    return DDPMVLBScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        beta_start=beta_start,
        beta_end=args.ddpm_beta_end,
        rescale_betas_zero_snr=args.rescale_betas_zero_snr,
        prediction_type=args.prediction_type,
        variance_type=args.variance_type,
        timestep_spacing=args.timestep_spacing,
        levels=levels,
    )


def build_unet(args: argparse.Namespace, data: ImageData) -> UNet2DModel:
    """The network: the mean's channels, and as many again for a learned variance."""
    out_channels = data.channels * (2 if args.variance_type.startswith("learned") else 1)
    if args.model_config_name_or_path is not None:
        config = UNet2DModel.load_config(args.model_config_name_or_path)
        unet = UNet2DModel.from_config(config)
        if (unet.config.in_channels, unet.config.out_channels) != (data.channels, out_channels):
            raise ValueError(
                f"The model config has {unet.config.in_channels} input and {unet.config.out_channels} output channels, "
                f"but this data and variance type need {data.channels} and {out_channels}."
            )
        return unet
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
    )


def build_sampler(args: argparse.Namespace, reverse: ReverseProcess, train: Images, rank: int, world_size: int):
    """The timestep sampler of --timestep_sampler."""
    steps = len(reverse.forward)
    if args.timestep_sampler == "gaussian":
        x_0 = torch.cat(list(train.batches(256, limit=2048)))
        eigenvalues = covariance_eigenvalues(x_0)
        alphas_cumprod = reverse.forward.log_alphas_cumprod.exp()
        return ImportanceTimesteps.from_gaussian_model(alphas_cumprod, eigenvalues, 0.1, rank, world_size)
    kinds = {
        "uniform": UniformTimesteps,
        "low_discrepancy": LowDiscrepancyTimesteps,
        "loss_second_moment": LossSecondMomentTimesteps,
    }
    return kinds[args.timestep_sampler](steps, rank=rank, world_size=world_size)


def build_loss(args: argparse.Namespace) -> Callable[..., Tensor]:
    """The loss of --objective, called as loss(reverse, model_output, diffused) -> (B,)."""
    if args.objective == "simple":
        return lambda *a: simple_loss(*a, snr_gamma=args.snr_gamma)
    if args.objective == "hybrid":
        return lambda *a: hybrid_loss(*a, vlb_weight=args.vlb_weight, snr_gamma=args.snr_gamma)
    return vlb_loss


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose draws depend on the key (seed, step, ...) alone, so that a resumed run repeats them."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))


def prepare_output_dir(args: argparse.Namespace) -> Path:
    """Make the output folder and make sure that it can be written, before hours are spent."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise SystemExit(f"--output_dir {args.output_dir} cannot be written: {error}") from error
    return folder


class Progress:
    """The number of optimizer steps done, kept in checkpoints."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """From a checkpoint."""
        self.step = state_dict["step"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int | None) -> None:
    """Save the whole training state from all processes, then remove the oldest beyond the limit."""
    accelerator.save_state(str(folder / f"checkpoint-{step}"))
    if accelerator.is_main_process and limit is not None:
        for old in checkpoints(folder)[:-limit]:
            shutil.rmtree(old)


def resume(accelerator: Accelerator, folder: Path, name: str | None) -> None:
    """Load a checkpoint; `latest` with none there starts anew, as in diffusers' scripts."""
    if name is None:
        return
    found = checkpoints(folder)
    if name == "latest" and not found:
        accelerator.print(f"No checkpoint in {folder}: starting anew.")
        return
    path = found[-1] if name == "latest" else folder / Path(name).name
    if not path.is_dir():
        raise SystemExit(f"--resume_from_checkpoint {name}: there is no {path}.")
    accelerator.print(f"Resuming from {path}.")
    accelerator.load_state(str(path))


class Run:
    """What the parts of a training run share."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, data: ImageData, folder: Path):
        self.args, self.accelerator, self.data, self.folder = args, accelerator, data, folder
        self.scheduler = build_scheduler(args, data.levels)
        self.reverse = self.scheduler.reverse_process(accelerator.device)
        self.sampler = build_sampler(
            args, self.reverse, data.train, accelerator.process_index, accelerator.num_processes
        )
        self.loss = build_loss(args)
        unet = build_unet(args, data)
        self.optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        data.train.random_flip = args.random_flip
        loader = torch.utils.data.DataLoader(
            data.train,
            batch_size=args.train_batch_size,
            shuffle=True,
            drop_last=len(data.train) >= args.train_batch_size * accelerator.num_processes,
            num_workers=args.dataloader_num_workers,
            collate_fn=torch.stack,
        )
        self.unet, self.optimizer, self.loader = accelerator.prepare(unet, self.optimizer, loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        epochs = args.num_epochs
        self.max_steps = args.max_train_steps or (epochs * self.steps_per_epoch if epochs is not None else 1000)
        # A prepared LR scheduler steps once for each process.
        self.lr_scheduler = accelerator.prepare(
            get_scheduler(
                args.lr_scheduler,
                self.optimizer,
                num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
                num_training_steps=self.max_steps * accelerator.num_processes,
            )
        )
        self.ema = EMAModel(
            self.unet.parameters(),
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
        )
        self.ema.to(accelerator.device)
        self.progress = Progress()
        stateful = [self.progress] + ([self.ema] if args.use_ema else [])
        if isinstance(self.sampler, LossSecondMomentTimesteps):
            stateful.append(self.sampler)
        accelerator.register_for_checkpointing(*stateful)

    def model(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The network in evaluation, under the run's mixed precision."""
        with self.accelerator.autocast():
            return self.accelerator.unwrap_model(self.unet)(x_t, timesteps).sample.float()

    def averaged(self) -> "_Averaged":
        """A context in which the network has its averaged weights."""
        return _Averaged(self)

    def pipeline(self) -> DDPMVLBPipeline:
        """The pipeline of the network as it is now."""
        pipeline = DDPMVLBPipeline(unet=self.accelerator.unwrap_model(self.unet), scheduler=self.scheduler)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False)
        return pipeline


class _Averaged:
    def __init__(self, run: Run):
        self.run = run

    def __enter__(self) -> None:
        self.run.unet.eval()
        if self.run.args.use_ema:
            self.run.ema.store(self.run.unet.parameters())
            self.run.ema.copy_to(self.run.unet.parameters())

    def __exit__(self, *_: object) -> None:
        if self.run.args.use_ema:
            self.run.ema.restore(self.run.unet.parameters())
        self.run.unet.train()


def batches(run: Run) -> Iterator[Tensor]:
    """Endless training batches, from where a resumed run stopped; the order depends on the seed and the epoch."""
    per_step = run.args.gradient_accumulation_steps
    epoch, skip = divmod(run.progress.step, run.steps_per_epoch)
    while True:
        run.loader.set_epoch(epoch)
        loader = run.accelerator.skip_first_batches(run.loader, skip * per_step) if skip else run.loader
        yield from loader
        epoch, skip = epoch + 1, 0


def train_batch(run: Run, x_0: Tensor, micro_step: int) -> Tensor:
    """Forward and backward of one batch; returns the weighted losses (B,)."""
    args, device = run.args, x_0.device
    rank = run.accelerator.process_index
    t, weights = run.sampler.sample(
        len(x_0), device, seeded_generator("cpu", args.seed, run.progress.step, micro_step)
    )
    generator = seeded_generator(device, args.seed, run.progress.step, micro_step, rank)
    noise = torch.randn(x_0.shape, generator=generator, device=device)
    diffused = run.reverse.forward.diffuse(x_0, t, noise)
    output = run.unet(diffused.x_t, run.reverse.forward.timesteps[t]).sample
    losses = run.loss(run.reverse, output, diffused)
    weighted = weights * losses
    run.accelerator.backward(weighted.mean())
    if isinstance(run.sampler, LossSecondMomentTimesteps):
        run.sampler.update(run.accelerator.gather(t), run.accelerator.gather(losses.detach()))
    if not bool(weighted.isfinite().all()):
        bad = t[~weighted.isfinite()].tolist()
        raise FloatingPointError(f"The loss is NaN or infinite at step {run.progress.step}, chain indices t={bad[:8]}.")
    return weighted.detach()


def train(run: Run) -> float:
    """Train to the last step; returns the seconds spent on it, validation not counted."""
    args, accelerator = run.args, run.accelerator
    bar = tqdm(
        total=run.max_steps, initial=run.progress.step, desc="Training", disable=not accelerator.is_local_main_process
    )
    source, seconds = batches(run), 0.0
    while run.progress.step < run.max_steps:
        started = time.perf_counter()
        losses = []
        for micro_step in range(args.gradient_accumulation_steps):
            x_0 = next(source)
            with accelerator.accumulate(run.unet):
                losses.append(train_batch(run, x_0, micro_step).mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(run.unet.parameters(), args.max_grad_norm)
                run.optimizer.step()
                run.lr_scheduler.step()
                run.optimizer.zero_grad()
            if accelerator.sync_gradients:
                break  # also at the end of an epoch, where accelerate closes a short step
        run.progress.step += 1
        if args.use_ema:
            run.ema.step(run.unet.parameters())
        seconds += time.perf_counter() - started
        step = run.progress.step
        bar.update()
        if step % 10 == 0 or step == run.max_steps:
            log = {
                "loss": float(torch.stack(losses).mean()),
                "grad_norm": float(norm),
                "lr": run.lr_scheduler.get_last_lr()[0],
            }
            bar.set_postfix(loss=f"{log['loss']:.3f}", lr=f"{log['lr']:.1e}")
            accelerator.log(log, step=step)
        if step % args.validation_steps == 0 and step < run.max_steps:
            validate(run, step)
        if args.checkpointing_steps and step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, run.folder, step, args.checkpoints_total_limit)
    bar.close()
    return seconds


def evaluate(run: Run, images: Images, limit: int | None, calls_per_image: int, description: str) -> VLBEstimate:
    """Bits/dim of the first `limit` images with the network's weights as they are; x_0 is not clipped."""
    reverse = run.scheduler.reverse_process(run.accelerator.device)
    reverse = ReverseProcess(
        reverse.forward, reverse.prediction_type, reverse.variance_type, clip_sample=False, levels=reverse.levels
    )
    total = len(images) if limit is None else min(limit, len(images))
    pilot_images = torch.cat(list(run.data.train.batches(64, limit=64))).to(run.accelerator.device)
    with tqdm(total=total, desc=description, unit="image", leave=False) as bar:
        probabilities = pilot_probabilities(run.model, reverse, pilot_images, seed=run.args.seed)
        return estimate_vlb(
            run.model,
            reverse,
            images.batches(run.args.eval_batch_size, limit),
            probabilities=probabilities,
            calls_per_image=calls_per_image,
            num_replicates=4 if calls_per_image % 4 == 0 else 2,
            seed=run.args.seed,
            on_images=bar.update,
        )


def sample(run: Run, num_images: int, steps: int) -> Tensor:
    """Images (N, C, H, W) in [0, 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(run.args.seed)
    return run.pipeline()(num_images, generator=generator, num_inference_steps=steps, output_type="pt").images.cpu()


def validate(run: Run, step: int) -> None:
    """Validation bits/dim and a grid of samples, to the tracker; on the main process."""
    accelerator = run.accelerator
    if accelerator.is_main_process:
        with run.averaged():
            estimate = evaluate(run, run.data.validation, 64, 16, "Validating")
            images = sample(run, 16, min(100, run.args.ddpm_num_inference_steps))
        tqdm.write(f"step {step}: validation {describe(estimate)}")
        accelerator.log({"validation_bits_per_dim": estimate.bits_per_dim, "validation_se": total_se(estimate)}, step)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("samples", images.numpy(), step)
    accelerator.wait_for_everyone()


def total_se(estimate: VLBEstimate) -> float:
    """Noise and image standard errors together."""
    return math.hypot(estimate.noise_se, estimate.image_se)


def describe(estimate: VLBEstimate) -> str:
    """An estimate in one line."""
    return (
        f"{estimate.bits_per_dim:.3f} +- {estimate.noise_se:.3f} (noise) +- {estimate.image_se:.3f} (images) bits/dim"
    )


def finish(run: Run, seconds: float) -> dict[str, Any]:
    """Save the pipeline, score the test images, draw the pictures; metrics.json comes last."""
    args, data, folder = run.args, run.data, run.folder
    with run.averaged():
        pipeline = run.pipeline()
        pipeline.save_pretrained(folder)
        write_json(data.record, folder / "data.json")
        estimate = evaluate(run, data.test, args.num_test_images, args.calls_per_image, "Scoring test images")
        generated = sample(run, args.eval_batch_size, args.ddpm_num_inference_steps)
    real = next(data.test.batches(args.eval_batch_size)) / 2 + 0.5
    plot_samples(generated[: len(real)], real[: len(generated)], folder / "samples.png")
    plot_vlb_terms(estimate, folder / "vlb_terms.png")
    packages = ("ddpm-vlb", "torch", "diffusers", "accelerate", "datasets")
    metrics = {
        "test": {**score(estimate), "clip_sample": False, "seed": args.seed},
        "baselines": baselines(data.train, data.test),
        "train": {"seconds": seconds, "steps": run.progress.step, "device": str(run.accelerator.device)},
        "data": data.record,
        "options": vars(args),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    write_json(metrics, folder / "metrics.json")
    return metrics


def report(metrics: dict[str, Any], estimate_line: str, folder: Path) -> None:
    """Print the result beside the baselines."""
    test = metrics["test"]
    print(f"\nTest bits/dim ({test['num_images']} images, {test['network_calls_per_image']} network calls each):")
    print(f"  this model             {estimate_line}")
    print(f"    = prior {test['prior']:.4f} + KL {test['kl']:.4f} + decoder {test['decoder']:.4f}")
    for name, value in metrics["baselines"].items():
        print(f"  {name:22} {value:.3f}")
    print(f"Trained {metrics['train']['steps']} steps in {metrics['train']['seconds']:.0f} s.")
    print(f"Wrote the pipeline, samples.png, vlb_terms.png and metrics.json to {folder}.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Train, score and save. Returns the metrics (on the main process)."""
    args = parse_args(argv)
    folder = prepare_output_dir(args)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(args.seed)
    with accelerator.main_process_first():
        data = load_image_data(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.image_column,
            args.train_split,
            args.test_split,
            args.resolution,
            args.cache_dir,
        )
    run = Run(args, accelerator, data, folder)
    accelerator.init_trackers("train", config={k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()})
    resume(accelerator, folder, args.resume_from_checkpoint)
    seconds = train(run)
    metrics = None
    if accelerator.is_main_process:
        metrics = finish(run, seconds)
        test = metrics["test"]
        line = f"{test['bits_per_dim']:.3f} +- {test['noise_se']:.3f} (noise) +- {test['image_se']:.3f} (images)"
        report(metrics, line, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
