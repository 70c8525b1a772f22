"""The chains that are compared, and the one that is stored."""

import torch
from scoring_support import T

from ddpm_vlb import VARIANCES, GaussianPath, SquaredErrors, StoredPath
from ddpm_vlb.few_steps.candidates import Candidate, chosen, respaced, variances_for


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


def test_an_optimal_variance_is_the_decoder_s_too():
    """Not the decoder that a path gives to fixed variances."""
    training = GaussianPath.edm([0.1, 1.0, 10.0]).reverse_process()
    mean = torch.tensor([0.003, 0.2, 0.9], dtype=torch.float64)
    p = respaced(training, [0, 2], "analytic", SquaredErrors(torch.arange(3), mean))
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(p(x, x, 0).p.log_variance, torch.full_like(x, 0.003).log())


def test_a_learned_path_is_not_compared_with_fixed_variances():
    """Their decoder would be the second step's, far below the first noise of a fine chain."""
    path = GaussianPath.edm([0.1, 1.0, 10.0])
    learned = path.reverse_process(variance_type="learned_range")
    assert variances_for(learned, of_path=True) == list(VARIANCES)
    assert "fixed_large" in variances_for(learned) and "fixed_large" in variances_for(path.reverse_process(), True)
