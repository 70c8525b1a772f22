"""What the estimator costs beside the network: CPU time of one (image, t) pair with a network of next to no cost.

python benchmarks/scoring_cost.py

Images are 3x32x32 with the spectrum of natural ones, 256 levels; the chain is the usual linear one of 1000 steps with
a learned variance. The second row is what no estimator can do without: the noise of a pair and its term.
"""

import statistics
import time
from collections.abc import Callable

import torch
from environment import describe

from ddpm_vlb import DDPMVLBScheduler, VLBEstimator, fit_pilot, vlb_term

IMAGES, CALLS, ROUNDS, SHAPE = 100, 20, 9, (3, 32, 32)


def coloured_images(count: int) -> torch.Tensor:
    """Images whose power falls with the square of the frequency, on the levels."""
    white = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    power = 0.02 + torch.fft.rfftfreq(SHAPE[2])[None] ** 2 + torch.fft.fftfreq(SHAPE[1])[:, None] ** 2
    x = torch.fft.irfft2(torch.fft.rfft2(white) / power, s=SHAPE[1:])
    return (((x / x.std() * 0.4).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def cost(work: Callable[[], object], pairs: int) -> list[float]:
    """CPU milliseconds of a pair, round by round."""
    times = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        work()
        times.append((time.thread_time() - started) / pairs * 1e3)
    return times


def main() -> None:
    torch.set_num_threads(1)
    reverse = DDPMVLBScheduler(variance_type="learned_range").reverse_process()
    outputs: dict[int, torch.Tensor] = {}

    def model(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return outputs.setdefault(len(x_t), torch.zeros(len(x_t), 2 * SHAPE[0], *SHAPE[1:]))

    x_0 = coloured_images(500 + IMAGES)
    pilot = fit_pilot(model, reverse, x_0[:500])
    estimator, images = VLBEstimator(model, reverse, pilot, CALLS), x_0[500:]
    few, t = images[:20], torch.arange(1, 1000, 50)

    @torch.no_grad()
    def noise_and_term() -> None:
        diffused = reverse.forward.diffuse(few, t, torch.randn_like(few))
        vlb_term(reverse, model(diffused.x_t, t), diffused)

    rows = {
        f"a whole pair, t = 0 drawn with p = {float(pilot.probabilities[0]):.2f}": cost(
            lambda: estimator.score(images, range(IMAGES)), IMAGES * CALLS
        ),
        "noise and term of a pair with t > 0": cost(lambda: [noise_and_term() for _ in range(50)], 50 * len(few)),
    }
    print(describe() + "\n\n| | ms a pair, median | interquartile range |\n| --- | --- | --- |")
    for name, times in rows.items():
        low, _, high = statistics.quantiles(times, n=4)
        print(f"| {name} | {statistics.median(times):.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
