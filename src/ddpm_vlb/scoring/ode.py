"""The likelihood of a checkpoint's probability-flow ODE beside its bound, for `ddpm-vlb evaluate --ode`."""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_vlb import GaussianPath, ReverseProcess, estimate_ode, spaced_ratios
from ddpm_vlb.scoring.checkpoint import Checkpoint
from ddpm_vlb.scoring.sweep import units

PROBES = 2
_OF_DECODER = """
    variance_type clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value
""".split()


def ode_path(run: Checkpoint, calls: int) -> GaussianPath:
    """The checkpoint's path on as many levels as the calls take, over the range of the chain that is scored.

    Args:
        run: the checkpoint.
        calls: network calls, four for each Runge-Kutta step over two levels.
    """
    pipeline, steps = run.pipeline, calls // 2 + 1
    forward = pipeline.chain.reverse_process(dtype=torch.float64).forward
    abar = forward.log_alphas_cumprod.exp()
    known = (1 / abar - 1).sqrt()
    known = known[known.isfinite()]
    if len(known) < 2:
        raise ValueError(
            "--ode integrates between the chain's levels, of which it needs two with some signal, but the "
            f"checkpoint's has {len(known)}: leave it out."
        )
    ratios = spaced_ratios(float(known[0]), float(known[-1]), steps)
    if pipeline.path is None:
        return GaussianPath.ddpm(abar, ratios, pipeline.chain.config.prediction_type)
    return GaussianPath.from_config(pipeline.scheduler, ratios)


def ode_process(path: GaussianPath, reverse: ReverseProcess, shape: tuple[int, ...]) -> ReverseProcess:
    """The chain of the ODE's levels, with the decoder of the process that is scored.

    Args:
        path: its levels.
        reverse: the process.
        shape: of an image, (C, *).
    """
    first = reverse.to("cpu", torch.float64).coefficients(0, torch.zeros(1, *shape, dtype=torch.float64))
    log_variance = first.log_variance_offset.squeeze()
    return path.reverse_process(
        reverse.levels,
        decoder_log_variance=float(log_variance) if log_variance.ndim == 0 else log_variance.reshape(shape),
        decoder_slope=float(first.variance_slope),
        **{name: getattr(reverse, name) for name in _OF_DECODER},
    )


class CheckpointODE(NamedTuple):
    """A checkpoint's path and process as the ODE takes them, made before anything is scored."""

    path: GaussianPath
    process: ReverseProcess

    @classmethod
    def of(cls, run: Checkpoint, reverse: ReverseProcess, calls: int) -> "CheckpointODE":
        """That of a checkpoint.

        Args:
            run: the checkpoint.
            reverse: the process that is scored.
            calls: network calls for each image.

        Raises:
            ValueError: a chain of one level.
        """
        path = ode_path(run, calls)
        return cls(path, ode_process(path, reverse, tuple(run.batch([0])[0].shape[1:])))


def has_ode(metrics: dict[str, Any], calls: int | None) -> bool:
    """Whether metrics.json holds the ODE that is asked for; any does where none is.

    Args:
        metrics: its content.
        calls: network calls for each image.
    """
    ode = metrics["ode"]
    return calls is None or (ode is not None and ode["network_calls_per_image"] == calls)


def with_ode(run: Checkpoint, own: CheckpointODE, metrics: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json with the ODE beside the bound; the main process computes it, on others it is null.

    Args:
        run: the checkpoint.
        own: its ODE.
        metrics: with the bound of the same process, with or without an ODE.
    """
    unclipped = metrics["per_image_other_clipping"] if metrics["clip_sample"] else []  # as the ODE is
    bound = torch.tensor(unclipped[0] if unclipped else metrics["per_image"], dtype=torch.float64)
    scored = _score_ode(run, own, bound) if run.accelerator.is_main_process else None
    return {**metrics, "options": {**metrics["options"], "ode": run.args.ode}, "ode": scored}


def _score_ode(run: Checkpoint, own: CheckpointODE, bound: Tensor) -> dict[str, Any]:
    started, path, unit = time.perf_counter(), own.path, 1.0 if run.discrete else math.log(2)
    network = path.network(run.unet)
    size = max(1, run.values_per_call // (4 * run.dims))

    def model(x_t: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        with run.accelerator.autocast():
            return network(x_t.to(run.unet.dtype), timesteps, **conditioning).float()

    def batches() -> Iterator[Any]:
        for group in units(range(len(bound)), size):
            yield run.batch(group)

    process = own.process.to(run.accelerator.device, torch.float32)
    estimate = estimate_ode(model, process, batches(), PROBES, run.args.seed, size * run.dims)
    per_image, gaps = estimate.per_image * unit, bound - estimate.per_image * unit
    value = float(per_image.mean())
    return {
        "bits_per_dim": value if run.discrete else None,
        "nats_per_dim": None if run.discrete else value,
        "probe_se": estimate.probe_se * unit,
        "image_se": None if math.isnan(estimate.image_se) else estimate.image_se * unit,
        "difference": float(gaps.mean()),
        "difference_se": float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else None,
        "network_calls_per_image": estimate.network_calls_per_image,
        "probes": PROBES,
        "ratios": [float(path.ratios[0]), float(path.ratios[-1])],
        "per_image": per_image.tolist(),
        "seconds": time.perf_counter() - started,
    }


def ode_lines(metrics: dict[str, Any]) -> list[str]:
    """What is printed of it.

    Args:
        metrics: of `ddpm-vlb evaluate --ode`.
    """
    ode, unit = metrics["ode"], metrics["unit"]
    value = ode["bits_per_dim"] if ode["bits_per_dim"] is not None else ode["nats_per_dim"]
    images, paired = ("n/a" if error is None else f"{error:.4f}" for error in (ode["image_se"], ode["difference_se"]))
    calls = ode["network_calls_per_image"]
    return [
        f"ODE: {value:.4f} +- {ode['probe_se']:.4f} (probes) +- {images} (images) {unit}, {calls} network calls each, "
        f"with {ode['probes']} backward passes a call",
        f"  bound, unclipped as the ODE is, - ODE: {ode['difference']:+.4f} +- {paired} on the same images; "
        f"{ode['seconds']:.0f} s, the bound {metrics['seconds']:.0f} s in the start that finished it",
        f"  an estimate, no bound: with few calls the integral is off, to either side: compare --ode {2 * calls}.",
    ]
