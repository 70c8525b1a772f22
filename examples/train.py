"""Train a likelihood-based DDPM on images, score its test bits/dim, sample it, and save it as a diffusers pipeline.

Without options: scikit-learn's 8x8 digits with their own 17 levels, in a few minutes on a CPU.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --dataset_name ylecun/mnist --block_out_channels 32 64 --max_train_steps 20000
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from image_data import ImageData, Images, load_image_data
from publish import Publisher, describe_folder, open_publisher, repair_command, stage_result
from reporting import baselines, describe, plot_samples, plot_vlb_terms, score, write_json
from scoring import pilot_positions, run_sweep, shared
from torch import Tensor
from tqdm.auto import tqdm
from train_options import parse_args

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    Pilot,
    ReverseProcess,
    UniformTimesteps,
    VLBEstimate,
    VLBEstimator,
    beta_start_for_levels,
    covariance_eigenvalues,
    estimate_from_scores,
    fit_pilot,
    hybrid_loss,
    simple_loss,
    vlb_loss,
)

SNAPSHOT_STEPS = 100
TimestepSampler = UniformTimesteps | ImportanceTimesteps | LossSecondMomentTimesteps


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
                f"The model config has {unet.config.in_channels} input and {unet.config.out_channels} output "
                f"channels, but this data and variance type need {data.channels} and {out_channels}."
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


def build_sampler(
    args: argparse.Namespace, reverse: ReverseProcess, train: Images, rank: int, world_size: int
) -> TimestepSampler:
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
        return functools.partial(simple_loss, snr_gamma=args.snr_gamma)
    if args.objective == "hybrid":
        return functools.partial(hybrid_loss, vlb_weight=args.vlb_weight, snr_gamma=args.snr_gamma)
    return vlb_loss


def seed_of(*key: int) -> int:
    """A seed that depends on the key (seed, step, ...) alone, so that a resumed run repeats its draws."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest(), "little")


def random_flip(x_0: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability one half."""
    mirrored = torch.rand(len(x_0), generator=generator, device=x_0.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)


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
    """The optimizer steps done and the seconds spent on them, kept in checkpoints."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """From a checkpoint."""
        self.step, self.seconds = int(state_dict["step"]), state_dict["seconds"]


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
        self.publisher: Publisher | None = None
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

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the network is in evaluation mode, with its averaged weights."""
        parameters = list(self.unet.parameters())
        self.unet.eval()
        if self.args.use_ema:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        try:
            yield
        finally:
            if self.args.use_ema:
                self.ema.restore(parameters)
            self.unet.train()

    def pipeline(self) -> DDPMVLBPipeline:
        """The pipeline of the network as it is now."""
        pipeline = DDPMVLBPipeline(unet=self.accelerator.unwrap_model(self.unet), scheduler=self.scheduler)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False)
        return pipeline


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
    key = (args.seed, run.progress.step, micro_step)
    t, weights = run.sampler.sample(len(x_0), device, torch.Generator().manual_seed(seed_of(*key)))
    own = seed_of(*key, run.accelerator.process_index)
    generator = torch.Generator(device=device).manual_seed(own)
    torch.manual_seed(own)  # for dropout, which draws from the global generator
    if args.random_flip:
        x_0 = random_flip(x_0, generator)
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
        raise FloatingPointError(
            f"The loss is NaN or infinite at step {run.progress.step}, chain indices t={bad[:8]}."
        )
    return weighted.detach()


def train(run: Run) -> None:
    """Train to the last step; counts the seconds spent on it, validation left out."""
    args, accelerator = run.args, run.accelerator
    bar = tqdm(
        total=run.max_steps, initial=run.progress.step, desc="Training", disable=not accelerator.is_local_main_process
    )
    source = batches(run)
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
        run.progress.seconds += time.perf_counter() - started
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


def evaluate(run: Run, images: Images, limit: int | None, calls_per_image: int, description: str) -> VLBEstimate:
    """Bits/dim of the first `limit` images, on all processes; the network's weights as they are, x_0 not clipped."""
    reverse = dataclasses.replace(run.reverse, clip_sample=False)
    total = len(images) if limit is None else min(limit, len(images))

    def stacked(source: Images, positions: Sequence[int]) -> Tensor:
        return torch.stack(source.__getitems__(list(positions)))

    def pilot() -> Pilot:
        train_images = stacked(run.data.train, pilot_positions(len(run.data.train), stacked(images, [0]).numel()))
        return fit_pilot(run.model, reverse, train_images, seed=run.args.seed)

    scorer = VLBEstimator(run.model, reverse, shared(run.accelerator, pilot), calls_per_image, seed=run.args.seed)
    scores = run_sweep(
        run.accelerator,
        scorer,
        lambda positions: (stacked(images, positions), {}),
        range(total),
        description=description,
        report_unit=1 / math.log(2),
    )
    return estimate_from_scores(scores)


def sample(run: Run, num_images: int, steps: int) -> Tensor:
    """Images (N, C, H, W) in [0, 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(run.args.seed)
    images: Any = run.pipeline()(
        num_images, generator=generator, num_inference_steps=steps, output_type="pt", return_dict=False
    )
    return images[0].cpu()


def validate(run: Run, step: int) -> None:
    """Validation bits/dim, scored on all processes, and a grid of samples, to the tracker."""
    accelerator = run.accelerator
    with run.averaged():
        estimate = evaluate(run, run.data.validation, 64, 16, "Validating")
        if accelerator.is_main_process:
            images = sample(run, 16, min(SNAPSHOT_STEPS, run.args.ddpm_num_inference_steps))
            tqdm.write(f"step {step}: validation {describe(score(estimate))}")
            logged = {"validation_bits_per_dim": estimate.bits_per_dim, "validation_se": total_se(estimate)}
            accelerator.log(logged, step)
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_images("samples", images.numpy(), step)
            if run.publisher is not None:
                said = f"Step {step}: validation {describe(score(estimate))}"
                run.publisher.offer(lambda folder: snapshot(run, folder, estimate, images), said)
    accelerator.wait_for_everyone()


def pictures(estimate: VLBEstimate, generated: Tensor, images: Images, folder: Path) -> None:
    """Draw samples.png, with as many real images, and vlb_terms.png."""
    real = next(images.batches(len(generated))) / 2 + 0.5
    plot_samples(generated[: len(real)], real, folder / "samples.png")
    plot_vlb_terms(estimate, folder / "vlb_terms.png")


def record(run: Run) -> dict[str, Any]:
    """What metrics.json says of the training."""
    packages = ("ddpm-vlb", "torch", "diffusers", "accelerate", "datasets")
    return {
        "train": {
            "seconds": run.progress.seconds,
            "steps": run.progress.step,
            "device": str(run.accelerator.device),
        },
        "data": run.data.record,
        "options": vars(run.args),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def snapshot(run: Run, folder: Path, estimate: VLBEstimate, images: Tensor) -> None:
    """Write the pipeline as it is now, as it is to be uploaded."""
    assert run.publisher is not None
    pipeline = run.pipeline()
    pipeline.save_pretrained(folder, include_code=run.args.hub_include_code)
    pictures(estimate, images, run.data.validation, folder)
    drawn = min(SNAPSHOT_STEPS, run.args.ddpm_num_inference_steps)
    metrics = {
        "validation": {**score(estimate), "clip_sample": False},
        "samples": {"num_inference_steps": drawn, "seed": run.args.seed},
        **record(run),
    }
    status = f"Training is not finished: this is step {run.progress.step} of {run.max_steps}."
    describe_folder(pipeline, folder, run.publisher.repo_id, metrics, run.args, status=status)


def total_se(estimate: VLBEstimate) -> float:
    """Noise and image standard errors together."""
    return math.hypot(estimate.noise_se, estimate.image_se)


def finish(run: Run) -> dict[str, Any] | None:
    """Save the pipeline, score the test images, draw the pictures; metrics.json comes last.

    All processes score; the main one does the rest and returns the metrics.
    """
    args, data, folder = run.args, run.data, run.folder
    with run.averaged():
        if run.accelerator.is_main_process:
            run.pipeline().save_pretrained(folder)
            write_json(data.record, folder / "data.json")
        estimate = evaluate(run, data.test, args.num_test_images, args.calls_per_image, "Scoring test images")
        if not run.accelerator.is_main_process:
            return None
        generated = sample(run, args.eval_batch_size, args.ddpm_num_inference_steps)
    pictures(estimate, generated, data.test, folder)
    metrics = {
        "test": {**score(estimate), "clip_sample": False, "seed": args.seed},
        "baselines": baselines(data.train, data.test, num_test_images=args.num_test_images),
        "samples": {"num_inference_steps": args.ddpm_num_inference_steps, "seed": args.seed},
        **record(run),
    }
    write_json(metrics, folder / "metrics.json")
    return metrics


def report(metrics: dict[str, Any], folder: Path) -> None:
    """Print the result beside the baselines."""
    test = metrics["test"]
    print(f"\nTest bits/dim ({test['num_images']} images, {test['network_calls_per_image']} network calls each):")
    print(f"  this model             {describe(test)}, x_0_hat unclipped")
    print(f"    = prior {test['prior']:.4f} + KL {test['kl']:.4f} + decoder {test['decoder']:.4f}")
    for name, value in metrics["baselines"].items():
        print(f"  {name:22} {value:.3f}")
    print(f"Trained {metrics['train']['steps']} steps in {metrics['train']['seconds']:.0f} s.")
    print(f"Wrote the pipeline, samples.png, vlb_terms.png and metrics.json to {folder}.")


def publish(run: Run) -> None:
    """Upload the result; it is safe in the output folder whatever happens."""
    args, publisher = run.args, run.publisher
    if publisher is None:
        return
    metrics = json.loads((run.folder / "metrics.json").read_text())
    make = stage_result(run.folder, publisher.repo_id, metrics, args)
    message = f"Step {run.progress.step}, the last: the result"
    if publisher.finish(make, message, f"step-{run.progress.step}") is None:
        print(f"NOT UPLOADED. The result is whole in {run.folder}. To upload it:")
        print(f"  {repair_command(args, publisher.repo_id)}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Train, score and save. Returns the metrics (on the main process)."""
    args = parse_args(argv, str(__doc__))
    folder = prepare_output_dir(args)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed_precision fp16 needs a GPU: on the CPU choose bf16 or no.")
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
    run.publisher = open_publisher(accelerator, args)
    accelerator.init_trackers(
        "train", config={k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()}
    )
    try:
        resume(accelerator, folder, args.resume_from_checkpoint)
        train(run)
        metrics = finish(run)
    except BaseException:
        if run.publisher is not None:
            run.publisher.close()
        raise
    if metrics is not None:
        report(metrics, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    publish(run)  # alone: a long upload would run into the other processes' time limit
    return metrics


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
