"""The chains that are compared, and the one that is stored."""

from scoring_support import T

from ddpm_vlb import StoredPath
from ddpm_vlb.few_steps.candidates import Candidate, chosen


def test_the_choice():
    """The cheapest that is eligible; a simpler one where the gain is too small to matter; the one asked for."""

    def candidate(variance, expected):
        stored = StoredPath((T - 1, 2), variance) if variance != "fixed_large" else None
        return Candidate("optimal", variance, None, stored, expected)

    every = [
        candidate(*own) for own in [("network", 0.9), ("fixed_large", 0.1), ("per_pixel", 0.5), ("analytic", 0.7)]
    ]
    assert chosen(every, "auto").variance == "per_pixel"
    assert chosen(every, "network").variance == "network"
    close = [candidate("per_pixel", 0.5), candidate("analytic", 0.5004), candidate("network", 0.6)]
    assert chosen(close, "auto").variance == "analytic"
