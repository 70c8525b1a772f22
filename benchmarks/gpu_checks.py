"""Sections of gpu.py: the device's values beside the CPU's, and where the host waits for the device."""

import contextlib
import functools
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from gpu_speed import Done, Settings, random_images, train_options
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    ReverseProcess,
    UniformTimesteps,
    VLBEstimator,
    estimate_vlb,
    fit_pilot,
    hybrid_loss,
    prior_kl,
    simple_loss,
    vlb_loss,
    vlb_term,
)
from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training.run import Run

STEPS = torch.tensor([0, 0, 1, 2, 5, 10, 30, 60, 100, 200, 300, 450, 600, 800, 950, 999])
SHAPE = (len(STEPS), 3, 32, 32)
# In parts of an image's largest value: some five times what float32 differs by from float64 on a CPU, for a loss, and,
# where numbers close to each other are subtracted, for a gradient and a step; one unit in the last place of what is
# rounded to half precision, as a rounding may fall to the other side.
LOSS, SUBTRACTED = 2e-6, 1e-4
ROUNDED = {torch.float32: SUBTRACTED, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SYNCHRONIZES = "called a synchronizing CUDA operation"  # what CUDA says of a wait
SURE = 4.0  # standard errors


def toy(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A network whose arithmetic is exact in any precision, so that all devices agree on it."""

    def network(x_t: Tensor, timesteps: Tensor) -> Tensor:
        half = x_t.to(dtype)
        return torch.cat([0.25 * half, half.clamp(-1, 1)], dim=1)

    return network


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row, in parts of the row's largest value; infinite where one is not finite."""
    own, cpu = (value.detach().cpu().double().reshape(len(value), -1) for value in (found, expected))
    gap = (own - cpu).abs().amax(1) / cpu.abs().amax(1).clamp(min=1e-30)
    return float(gap.nan_to_num(math.inf, math.inf).max())


def losses(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, float]]:
    """Losses and their gradients of the same numbers on any device, with the limit of each."""
    generator, found = torch.Generator().manual_seed(0), dict[str, tuple[Tensor, float]]()
    x_0, noise = random_images(SHAPE, generator), torch.randn(SHAPE, generator=generator)
    mean = noise + 0.1 * torch.randn(SHAPE, generator=generator)
    output = torch.cat([mean, 2 * torch.rand(SHAPE, generator=generator) - 1], dim=1).to(dtype)
    for loss in (vlb_loss, hybrid_loss, simple_loss, vlb_term):
        reverse = process(device, "fixed_small" if loss is simple_loss else "learned_range")
        diffused = reverse.forward.diffuse(x_0.to(device), STEPS.to(device), noise.to(device))
        leaf = output[:, : 6 if reverse.learns_variance else 3].to(device, copy=True).requires_grad_()
        value = loss(reverse, leaf, diffused)
        value.sum().backward()
        assert leaf.grad is not None
        found |= {loss.__name__: (value, LOSS), f"{loss.__name__}, gradient": (leaf.grad, ROUNDED[dtype])}
    return found | {"prior_kl": (prior_kl(process(device), x_0.to(device)), LOSS)}


def process(device: torch.device, variance_type: str = "learned_range") -> ReverseProcess:
    return DDPMVLBScheduler(variance_type=variance_type).reverse_process(device)


def steps(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, float]]:
    """The same of `scheduler.step` for each kind of timestep, and of a whole chain of them."""
    generator = torch.Generator().manual_seed(1)
    sample, output = torch.randn(SHAPE, generator=generator), torch.randn(len(STEPS), 6, 32, 32, generator=generator)
    x, output, network = sample.to(device), output.to(device, dtype), toy(dtype)
    scheduler, found = DDPMVLBScheduler(variance_type="learned_range"), dict[str, tuple[Tensor, float]]()
    scheduler.set_timesteps(25, device=device)
    kinds: dict[str, Callable[[int], Any]] = {
        "an int": lambda i: int(scheduler.timesteps[i]),
        "t on the device": lambda i: scheduler.timesteps[i],
        "t of each sample": lambda i: scheduler.timesteps.roll(-i)[: len(STEPS)],
    }
    for kind, t in kinds.items():
        pairs = []
        for i in (0, 12, 24):
            draws = torch.Generator().manual_seed(i)
            pairs += scheduler.step(output, t(i), x, generator=draws, return_dict=False)
        found[f"scheduler.step, {kind}"] = torch.cat(pairs), SUBTRACTED
    draws = torch.Generator().manual_seed(2)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, x), t, x, generator=draws, return_dict=False)[0]
    return found | {"a chain of 25 steps": (x, ROUNDED[dtype])}


def samplers(device: torch.device) -> dict[str, tuple[Tensor, float]]:
    """t and weights of the timestep samplers, which must be the very same; the last has seen losses of the device."""
    seen = LossSecondMomentTimesteps(100, history_per_term=1)
    seen.update(torch.arange(100).to(device), torch.linspace(1, 2, 100).to(device))
    made = UniformTimesteps(100), LowDiscrepancyTimesteps(100), ImportanceTimesteps(torch.linspace(1, 3, 100)), seen
    found = {}
    for sampler in made:
        t, weights = sampler.sample(64, device=device, generator=torch.Generator().manual_seed(3))
        found[type(sampler).__name__] = torch.stack([t.float(), weights], dim=1), 0.0
    return found


def estimates(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """The bound of the same images; its draws may be the device's own, so that the limit is the noise's."""
    x_0, model = random_images((32, 3, 16, 16), torch.Generator().manual_seed(4)), toy(dtype)
    cpu, calls = torch.device("cpu"), 20 if settings.smoke else 200
    pilot = fit_pilot(model, process(cpu), x_0, num_calls=256)
    ours, theirs = (
        estimate_vlb(model, process(device), x_0.split(16), pilot, calls) for device in (settings.device, cpu)
    )
    limit = SURE * math.hypot(ours.noise_se, theirs.noise_se)
    error = abs(ours.bits_per_dim - theirs.bits_per_dim)
    what = f"estimate_vlb, bits/dim; limit: {SURE:.0f} SE of its noise"
    return {"what": what, "network": _name(dtype), "error": error, "limit": limit, "ok": error <= limit}


def correctness(settings: Settings) -> dict[str, Any]:
    """Errors of the device's values, each beside its limit."""
    checks: list[tuple[str, Callable[[torch.device], dict[str, tuple[Tensor, float]]]]] = [("-", samplers)]
    for dtype in ROUNDED:
        checks += [(_name(dtype), functools.partial(check, dtype)) for check in (losses, steps)]
    rows: list[dict[str, Any]] = []
    for network, check in checks:
        expected = check(torch.device("cpu"))
        for what, (found, limit) in check(settings.device).items():
            error = worst(found, expected[what][0])
            rows.append({"what": what, "network": network, "error": error, "limit": limit, "ok": error <= limit})
    return {"rows": rows + [estimates(settings, dtype) for dtype in ROUNDED]}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def told(settings: Settings, mode: str) -> None:
    """Set what CUDA does where the host waits: "error", "warn" or "default"."""
    if settings.device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def no_waits(settings: Settings) -> Iterator[None]:
    told(settings, "error")
    try:
        yield
    finally:
        told(settings, "default")


def small_unet(settings: Settings) -> UNet2DModel:
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "add_attention": False}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=6, **blocks, **kinds)
    return unet.to(settings.device)


def readme_loop(settings: Settings) -> None:
    """README's loop with each loss, after its first step."""
    unet, reverse = small_unet(settings), process(settings.device)
    sampler, optimizer = LowDiscrepancyTimesteps(len(reverse.forward)), torch.optim.AdamW(unet.parameters())
    batches = random_images((6, 16, 3, 8, 8), torch.Generator().manual_seed(5)).to(settings.device)
    for i, x_0 in enumerate(batches):
        loss = (vlb_loss, hybrid_loss)[i % 2]
        with no_waits(settings) if i > 1 else contextlib.nullcontext():  # each loss looks at its first batch
            t, weights = sampler.sample(len(x_0), device=x_0.device)
            diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
            output = unet(diffused.x_t, reverse.forward.timesteps[t]).sample
            (weights * loss(reverse, output, diffused)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def step_loop(settings: Settings, kind: str) -> None:
    """`scheduler.step`, after its first one."""
    scheduler, x = DDPMVLBScheduler(variance_type="learned_range"), torch.randn(8, 3, 8, 8, device=settings.device)
    scheduler.set_timesteps(5, device=settings.device)
    steps: Any = scheduler.timesteps.tolist() if kind == "int" else list(scheduler.timesteps)
    if kind == "batch":
        steps = [t.expand(len(x)) for t in steps]
    network = toy(torch.float32)
    for i, t in enumerate(steps):
        output = network(x, x)
        with no_waits(settings) if i > 0 else contextlib.nullcontext():
            x = scheduler.step(output, t, x).prev_sample


def pipeline_loop(settings: Settings) -> None:
    """The pipeline's loop, from the end of its first step to that of the last but one."""
    pipeline = DDPMVLBPipeline(small_unet(settings).eval(), DDPMVLBScheduler(variance_type="learned_range"))
    pipeline.set_progress_bar_config(disable=True)

    def look(own: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i in (0, 4):
            told(settings, "error" if i == 0 else "default")
        return tensors

    pipeline(4, num_inference_steps=6, output_type="pt", callback_on_step_end=look)


def train_steps(settings: Settings) -> None:
    """Steps of `ddpm-vlb train`, from one validation to an optimizer's launch before the next."""
    done = 0

    def launched(*args: Any) -> None:
        nonlocal done
        done += 1
        if done % 10 == 5:
            told(settings, "default")

    def loop(run: Run, validate: object) -> bool:
        def at_validation(run: Run) -> None:
            if run.progress.step >= 20:
                raise Done({})
            told(settings, "error")

        run.optimizer.optimizer.register_step_post_hook(launched)
        return recipe.train(run, at_validation)

    with contextlib.suppress(Done):
        train.main(train_options(settings, "waits", "--validation_steps", "10"), loop=loop)


def located(error: BaseException) -> str:
    """Where an error arose in this package, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "ddpm_vlb" in Path(frame.filename).parts] or frames
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}: {said}"


def scoring_waits(settings: Settings) -> dict[str, Any]:
    """Waits of one network call more: those of many calls less those of few, for the same images."""
    x_0, reverse, calls = random_images((16, 3, 8, 8), torch.Generator().manual_seed(6)), process(settings.device), 0
    network = toy(torch.float32)

    def model(x_t: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x_t, timesteps)

    pilot = fit_pilot(model, reverse, x_0, num_calls=256)
    found = []
    for pairs in (8, 8, 16):  # the first warms up
        calls = 0
        scorer = VLBEstimator(model, reverse, pilot, pairs, 2, values_per_call=16 * x_0[0].numel())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            told(settings, "warn")
            scorer.score(x_0, range(len(x_0)))
            told(settings, "default")
        found.append((sum(SYNCHRONIZES in str(warning.message) for warning in caught), calls))
    more = (found[2][0] - found[1][0]) / (found[2][1] - found[1][1])
    return {"where": "scoring, each network call", "budget": 1, "waits": more, "at": "", "ok": more <= 1}


def waits(settings: Settings) -> dict[str, Any]:
    """Host waits where there must be none, and those of scoring; the regions run on a CPU too, uncounted."""
    regions: dict[str, Callable[[], None]] = {
        "README's loop after its first steps": lambda: readme_loop(settings),
        "scheduler.step, t an int": lambda: step_loop(settings, "int"),
        "scheduler.step, t on the device": lambda: step_loop(settings, "one"),
        "scheduler.step, t of each sample": lambda: step_loop(settings, "batch"),
        "the pipeline's loop": lambda: pipeline_loop(settings),
        "steps of `ddpm-vlb train`": lambda: train_steps(settings),
    }
    rows = []
    for name, region in regions.items():
        row: dict[str, Any] = {"where": name, "budget": 0, "waits": 0, "at": "", "ok": True}
        try:
            region()
        except (Exception, SystemExit) as error:
            waited = SYNCHRONIZES in str(error)
            row |= {"waits": "1 or more" if waited else "failed", "at": located(error), "ok": False}
        finally:
            told(settings, "default")
        rows.append(row)
    rows.append(scoring_waits(settings))
    if settings.device.type != "cuda":
        broken = [row["at"] for row in rows if row["at"]]
        if broken:
            raise RuntimeError(broken[0])
        return {"skipped": "the regions ran, but only CUDA counts the waits in them."}
    return {"rows": rows}
