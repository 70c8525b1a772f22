"""Networks, pilots and estimates whose expectations have a closed form (analytic.py)."""

import math

from analytic import PosteriorMean, images, process

from ddpm_vlb import Pilot, ReverseProcess, fit_pilot

FACTOR = 0.8  # the network is wrong by so much, so that no control variate explains all of it
UNIT = 1 / (16 * math.log(2))


def setting(levels: int | None = None, **options) -> tuple[ReverseProcess, PosteriorMean]:
    reverse = process(levels, **options)
    return reverse, PosteriorMean(reverse.forward, FACTOR)


def fitted_pilot(levels: int | None = None) -> Pilot:
    """A pilot as it should be."""
    reverse, model = setting(levels)
    return fit_pilot(model, reverse, images(100, levels=levels, seed=1))
