"""The bound of both clippings of the x_0 estimate: which comes first, its entry of metrics.json, what is printed."""

import dataclasses
from pathlib import Path
from typing import Any

from ddpm_vlb import DDPMVLBScheduler, ReverseProcess, VLBEstimate
from ddpm_vlb.runtime.files import read_json
from ddpm_vlb.runtime.image_data import data_name
from ddpm_vlb.runtime.reporting import describe, score
from ddpm_vlb.scoring.ode import ode_lines

PICTURES = ("vlb_terms.png", "per_image.png")


def both_clippings(reverse: ReverseProcess, clip: bool | None = None) -> tuple[ReverseProcess, ReverseProcess]:
    """A reverse process with and without clipping, the one of the headline first.

    Args:
        reverse: the checkpoint's.
        clip: whether the first one clips; None: as the checkpoint does.
    """
    first = clips(reverse) if clip is None else clip
    return _with_clipping(reverse, first), _with_clipping(reverse, not first)


def clips(reverse: ReverseProcess) -> bool:
    """Whether a process clips its x_0 estimate.

    Args:
        reverse: of a checkpoint.
    """
    return reverse.clip_sample or reverse.thresholding


def _with_clipping(reverse: ReverseProcess, clip: bool) -> ReverseProcess:
    if not clip:
        return dataclasses.replace(reverse, clip_sample=False, thresholding=False)
    return reverse if reverse.thresholding else dataclasses.replace(reverse, clip_sample=True)


def _names(first: bool) -> tuple[str, str]:
    return ("clipped", "unclipped") if first else ("unclipped", "clipped")


def entry(estimate: VLBEstimate, first: bool, discrete: bool = True) -> dict[str, Any]:
    """The numbers of an estimate for metrics.json, those of the other clipping under `by_clipping`.

    Args:
        estimate: of the headline's process, and `also` of the other.
        first: whether the headline's process clips.
        discrete: as of `score`.
    """
    by_clipping = zip(_names(first), (estimate, *estimate.also))
    return {
        **score(estimate, discrete),
        "clip_sample": first,
        "by_clipping": {name: score(own, discrete) for name, own in by_clipping},
    }


def bound_lines(scores: dict[str, Any], unit: str = "bits/dim", own: bool = True) -> list[str]:
    """What is printed of a bound: the headline, its parts, and the other clipping where it was scored.

    Args:
        scores: as of `entry`.
        unit: of the numbers.
        own: the headline is of the checkpoint's own process; else of the one that was asked for.
    """
    name, other = _names(scores["clip_sample"])
    parts = f"L_T {scores['prior']:.4f} + sum L_t {scores['kl']:.4f} + L_0 {scores['decoder']:.4f}"
    why = "as the checkpoint samples" if own else "as asked for"
    lines = [describe(scores, unit), f"  = {parts}, x_0_hat {name}, {why}"]
    if other in scores["by_clipping"]:
        lines.append(f"  {other}: {describe(scores['by_clipping'][other], unit)}")
    return lines


def in_one_line(scores: dict[str, Any]) -> str:
    """The same in short.

    Args:
        scores: as of `entry`, in bits/dim.
    """
    name, other = _names(scores["clip_sample"])
    return f"{describe(scores)}, x_0_hat {name} ({other} {scores['by_clipping'][other]['bits_per_dim']:.3f})"


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The metrics of an earlier run of exactly this bound, or None.

    Args:
        folder: of the results.
        key: of the bound.
    """
    metrics = read_json(folder / "metrics.json")
    whole = all((folder / name).is_file() for name in PICTURES)
    return metrics if whole and metrics.get("key") == key else None


def path_taken(scheduler: DDPMVLBScheduler, steps: int, spacing: str | None) -> str:
    """By name, the path that a number of steps takes.

    Args:
        scheduler: of the checkpoint.
        steps: how many.
        spacing: that was asked for; None: none was.
    """
    if spacing in (None, "optimal") and steps in scheduler.optimal_paths:
        return "the stored path"
    return f"spacing {spacing or scheduler.config.timestep_spacing!s}"


def path_lines(model: dict[str, Any]) -> list[str]:
    """What is said of a network that is no DDPM's: its path and chain, and what a distilled one is.

    Args:
        model: of a metrics.json.
    """
    lines, path, distilled = [], model.get("gaussian_path"), model.get("distilled")
    if path is not None:
        low, high = ("noise alone" if r is None else f"{r:.4g}" for r in path["ratios"])
        whose = "the checkpoint's own" if path["stored"] else "chosen here"
        lines.append(
            f"A network of {path['kind']} ({path['scheduler']}): the bound is that of a chain of {path['steps']} "
            f"steps, noise-to-signal ratios {low} to {high}, {whose}."
        )
    if distilled is not None:
        lines.append(
            f"{distilled} is of a distilled network, trained to jump to the data: this is its score as a denoiser."
        )
    return lines


def report(metrics: dict[str, Any], folder: Path) -> None:
    """Print an evaluation.

    Args:
        metrics: of `ddpm-vlb evaluate`.
        folder: where they lie.
    """
    unit, steps, path = metrics["unit"], len(metrics["timesteps"]), metrics.get("path")
    print()
    print("\n".join(bound_lines(metrics, unit, metrics["options"]["clip_sample"] is None)))
    calls = f"{metrics['network_calls_per_image']} network calls each"
    extra = metrics["pilot_calls"] or metrics["second_draw_calls"]
    levels = f"{metrics['data']['levels']} levels" if metrics["data"]["levels"] else "continuous"
    what = "the pilot's" if metrics["pilot_calls"] else "for the error bar"
    images = f"{metrics['num_images']} images of {data_name(metrics['data'])} ({levels})"
    if metrics["estimator"] == "full" != metrics["options"]["estimator"]:
        print(f"Every step was taken once, not drawn: --calls_per_image is enough for all {steps}.")
    print(f"{images}, {steps} steps{f' ({path})' if path else ''}, {calls} (+ {extra} {what}).")
    for line in path_lines(metrics["model"]) + ([] if metrics.get("ode") is None else ode_lines(metrics)):
        print(line)
    if not metrics["data"]["levels"]:
        print("Continuous data: a density, which depends on the scale of the data and is no code length of images.")
    print(f"metrics.json, vlb_terms.png and per_image.png are in {folder}.")
