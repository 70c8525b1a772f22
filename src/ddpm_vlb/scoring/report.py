"""What the commands print of a bound."""

from pathlib import Path
from typing import Any

from ddpm_vlb.runtime.reporting import describe


def report(metrics: dict[str, Any], folder: Path) -> None:
    """Print the result."""
    names = ("clipped", "unclipped") if metrics["clip_sample"] else ("unclipped", "clipped")
    first, other = metrics["by_clipping"][names[0]], metrics["by_clipping"].get(names[1])
    unit, steps = metrics["unit"], len(metrics["timesteps"])
    print(f"\n{describe(first, unit)}")
    print(f"  = L_T {first['prior']:.4f} + sum L_t {first['kl']:.4f} + L_0 {first['decoder']:.4f}, x_0_hat {names[0]}")
    if other is not None:
        print(f"  {names[1]}: {describe(other, unit)}")
    calls = f"{metrics['network_calls_per_image']} network calls each"
    extra = metrics["pilot_calls"] or metrics["second_draw_calls"]
    levels = f"{metrics['data']['levels']} levels" if metrics["data"]["levels"] else "continuous"
    what = "the pilot's" if metrics["pilot_calls"] else "for the error bar"
    images = f"{metrics['num_images']} images of {metrics['data']['split']!r} ({levels})"
    print(f"{images}, {steps} steps, {calls} (+ {extra} {what}).")
    if not metrics["data"]["levels"]:
        print("Continuous data: a density, which depends on the scale of the data and is no code length of images.")
    print(f"metrics.json, vlb_terms.png and per_image.png are in {folder}.")
