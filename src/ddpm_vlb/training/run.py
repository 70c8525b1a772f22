"""What the parts of a training run share: the chain, the network and its average, the optimizer, the data's order."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, LossSecondMomentTimesteps, describe_path
from ddpm_vlb.runtime.image_data import ImageData
from ddpm_vlb.runtime.image_sets import Images
from ddpm_vlb.runtime.launching import main_first
from ddpm_vlb.runtime.publisher import Publisher
from ddpm_vlb.runtime.reporting import versions
from ddpm_vlb.runtime.staging import PATHS
from ddpm_vlb.runtime.stopping import Stop, own_process_group
from ddpm_vlb.training.average import build_average, full, is_sharded
from ddpm_vlb.training.checkpoints import Checkpoints, Progress
from ddpm_vlb.training.global_batches import GlobalBatches, Noise
from ddpm_vlb.training.networks import build_unet
from ddpm_vlb.training.paths import (
    build_path,
    build_sampler,
    chain_network,
    measured_sigma_data,
    weights_of_simple,
)
from ddpm_vlb.training.pretrained import pretrained_parts
from ddpm_vlb.training.validations import Validations

# Options that say what the network's output means.
CHAIN = (
    *("ddpm_num_steps", "ddpm_beta_schedule", "ddpm_beta_start", "ddpm_beta_end", "rescale_betas_zero_snr"),
    *("prediction_type", "variance_type", "path"),
)


def build_parts(
    args: argparse.Namespace, data: ImageData, sigma_data: float | None
) -> tuple[DDPMVLBScheduler, SchedulerMixin | None, UNet2DModel]:
    """The chain, the scheduler of stock beside it, and the network."""
    if args.pretrained is None:
        chain, unet = build_path(args, data.levels, sigma_data), build_unet(args, data)
    else:
        scheduler, unet = pretrained_parts(args, data)
        chain = scheduler, None
    return *chain, unet.to(memory_format=torch.channels_last) if args.channels_last else unet


def build_loader(
    args: argparse.Namespace, train: Images, batches: GlobalBatches, device: torch.device
) -> torch.utils.data.DataLoader:
    """This process's micro batches; not prepared by Accelerate, which would shard them anew."""
    workers = args.dataloader_num_workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)
    return torch.utils.data.DataLoader(
        train,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=torch.stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=own_process_group,
        generator=torch.Generator(),  # else it would draw from, and so move, the global one
    )


def build_optimizer(args: argparse.Namespace, unet: UNet2DModel, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW, fused where that can be."""
    by_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
    return torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda") and not by_engine,
    )


def term_weights(args: argparse.Namespace) -> dict[str, float]:
    """The terms of --objective by name, and the weight of each in the loss."""
    if args.objective == "hybrid":
        return {"simple": 1.0, "vlb": args.vlb_weight}
    return {args.objective: 1.0}


class Run:
    """What the parts of a training run share, and what a recipe finds on `run`.

    `args`, the options; `accelerator`; `data`, the training, validation and test images; `labels`, the training
    images' classes (N,), or None, and `null_label`, that of no class under --label_dropout; `scheduler`, the chain,
    and its `reverse` (p; `reverse.forward` is q); `path`, that of another --path than ddpm, or None, and `stock`, the
    scheduler that is saved with it; `sampler` of t; `unet`, `optimizer` and `lr_scheduler`, as Accelerate prepares
    them; `network`, `unet` as the chain calls it; `simple_weights`, of L_simple at each step; `ema`, the average or
    None; `batches` and `loader`, which images a step takes; `noise`, of single images; `term_weights`, of the loss's
    terms by name; `progress.step`, the optimizer steps done; `max_steps`; `validations`, those so far; `checkpoints`;
    `folder`; `publisher`, of uploads, or None; `stop`, which notes that the run was asked to stop.

    Args:
        args: the options of `ddpm-vlb train`.
        accelerator: of the run.
        data: the images.
        folder: of --output_dir.

    Raises:
        ValueError, SystemExit: options that do not go with the data, of one process and of several.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, data: ImageData, folder: Path):
        self.args, self.accelerator, self.data, self.folder = args, accelerator, data, folder
        self.publisher: Publisher | None = None
        self.stop = Stop()
        sigma_data = measured_sigma_data(args, data.train, accelerator)
        self.scheduler, self.stock, unet = main_first(
            accelerator, lambda: build_parts(args, data, sigma_data), "train", ValueError, OSError
        )
        pipeline = self.pipeline(unet)
        self.path, self._described_path = pipeline.path, describe_path(pipeline)
        self.reverse = self.scheduler.reverse_process(accelerator.device)
        # L_simple's, which takes the mean half alone: L_vlb trains the other one.
        self.of_the_mean = dataclasses.replace(self.reverse, variance_type="fixed_small")
        self.simple_weights = weights_of_simple(args, self.path, self.reverse)
        self.sampler = build_sampler(args, self.reverse, self.path, data.train, accelerator)
        self.network_config = unet.config
        self.labels = None if data.classes is None else data.train.labels()
        self.null_label = (unet.config.num_class_embeds or 0) - 1  # the last, as the pipeline's guidance has it
        self.has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in unet.modules())
        self.batches = GlobalBatches(
            len(data.train),
            args.train_batch_size,
            args.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            args.seed,
        )
        self.noise = Noise(args.seed)
        epochs = args.num_epochs
        self.max_steps = args.max_train_steps or (1000 if epochs is None else self.batches.steps(epochs))
        self.loader = build_loader(args, data.train, self.batches, accelerator.device)
        optimizer = build_optimizer(args, unet, accelerator)
        lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=self.max_steps
        )
        self.unet, self.optimizer, self.lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
        self.network = chain_network(self.path, self.unet, accelerator.device)
        self.input_dtype = next(self.unet.parameters()).dtype  # half under DeepSpeed, which keeps masters of its own
        self.skips_on_device = bool(optimizer.defaults["fused"]) and not is_sharded(accelerator)
        # The next step's t depend on the losses of this one.
        self.reads_at_once = not self.skips_on_device or isinstance(self.sampler, LossSecondMomentTimesteps)
        self.ema = build_average(args, self.unet, accelerator) if args.use_ema else None
        self.progress = Progress()
        self.term_weights = term_weights(args)
        stateful: list[Any] = [self.progress] + ([] if self.ema is None else [self.ema])
        if isinstance(self.sampler, LossSecondMomentTimesteps):
            stateful.append(self.sampler)
        self.validations = Validations(
            data.validation, self.reverse, args.validation_calls, args.seed, args.keep_best, args.patience
        )
        stateful.append(self.validations)
        accelerator.register_for_checkpointing(*stateful)
        prepare = None if self.ema is None else self.ema.gather
        self.checkpoints = Checkpoints(accelerator, folder, args.checkpoints_total_limit, *self._identity(), prepare)

    def _identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a resumed run must have in common with its checkpoint, and the options that may differ."""
        args, accelerator = self.args, self.accelerator
        size = "a global batch (processes x --gradient_accumulation_steps x --train_batch_size) of"
        fixed = {
            size: self.batches.global_batch_size,
            "--seed": args.seed,
            **{f"--{name}": getattr(args, name) for name in CHAIN},
            "--timestep_sampler": args.timestep_sampler,
            **{f"--{name}": getattr(args, name) for name in ("use_ema", "validation_calls", "keep_best")},
            "--freeze_mean": args.freeze_mean,
            "the network": {k: v for k, v in self.network_config.items() if not k.startswith("_")},
            "training images": {
                **{k: self.data.record[k] for k in ("num_images", "size", "levels", "test_fingerprint")},
                "train_fingerprint": self.data.train_fingerprint,
            },
        }
        if args.pretrained is not None:  # of which a checkpoint has the weights, wherever it lies by now
            fixed["the chain"] = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        kind = accelerator.distributed_type
        fixed["sharding by"] = kind.value if is_sharded(accelerator) else "nothing"
        if kind == DistributedType.DEEPSPEED:  # its optimizer's shards fit no other number
            fixed["--num_processes"] = accelerator.num_processes
        said_elsewhere = {"train_batch_size", "gradient_accumulation_steps"}
        said_elsewhere |= {"resume_from_checkpoint", "overwrite_output_dir"}
        kept = {k: v for k, v in vars(args).items() if f"--{k}" not in fixed and k not in said_elsewhere}
        return fixed, {k: v for k, v in kept.items() if k not in PATHS and not k.startswith("hub_")}

    def take_options(self) -> None:
        """Give the optimizer and its schedule this run's options, where a checkpoint has brought others.

        The run is at its end where the checkpoint's validations are.
        """
        self.heed_patience()
        args, schedule = self.args, self.lr_scheduler.scheduler
        schedule.base_lrs = [args.learning_rate for _ in schedule.base_lrs]
        for group, factor in zip(self.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group.update(
                initial_lr=args.learning_rate,
                lr=args.learning_rate * factor(schedule.last_epoch),
                betas=(args.adam_beta1, args.adam_beta2),
                weight_decay=args.adam_weight_decay,
                eps=args.adam_epsilon,
            )

    def heed_patience(self) -> None:
        """End the run with this step after --patience validations that were surely worse than the best."""
        step, best = self.progress.step, self.validations.so_far.best
        if step < self.max_steps and self.validations.exhausted():
            self.max_steps = step
            self.accelerator.print(
                f"--patience {self.args.patience}: so many validations in a row, up to step {step}, are worse than "
                f"that of step {best}, and not by luck. The training ends; a larger --patience goes on."
            )

    def averaged_network(self) -> UNet2DModel:
        """A plain network of its own with the averaged weights, to score and to save; all processes must call it."""
        names = [_plain_name(name) for name, _ in self.unet.named_parameters()]
        values = list(self.unet.parameters()) if self.ema is None else self.ema.shadow_params
        whole = [full(value.detach()).to(torch.float32, copy=True) for value in values]
        state = dict(zip(names, whole, strict=True))
        state.update({_plain_name(name): full(buffer).clone() for name, buffer in self.unet.named_buffers()})
        with init_empty_weights():
            network = UNet2DModel.from_config(self.network_config)
        network.load_state_dict(state, assign=True)
        return network.eval().requires_grad_(False)

    def pipeline(self, network: UNet2DModel) -> DDPMVLBPipeline:
        """The pipeline of a network."""
        pipeline = DDPMVLBPipeline(unet=network, scheduler=self.stock or self.scheduler)
        if self.stock is not None:
            pipeline.chain = self.scheduler
        pipeline.set_progress_bar_config(desc="Sampling", leave=False)
        return pipeline

    def record(self, ended: bool = False) -> dict[str, Any]:
        """What metrics.json says of the training.

        Args:
            ended: the network is the one that is kept, no snapshot of a step.
        """
        return {
            "train": {
                "seconds": self.progress.seconds,
                "steps": self.progress.step,
                **({"kept_step": self.validations.so_far.best} if ended and self.args.keep_best else {}),
                "skipped_steps": self.progress.skipped,
                "num_processes": self.accelerator.num_processes,
                "device": str(self.accelerator.device),
            },
            **({} if self.path is None else {"path": self._described_path}),
            "data": self.data.record,
            "options": vars(self.args),
            "versions": versions(),
        }


def _plain_name(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
