"""L_simple of a path is that of its raw output with sigma drawn as the field does, whatever t is drawn from."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from ddpm_vlb import (
    SIGMA_SAMPLINGS,
    GaussianPath,
    ImportanceTimesteps,
    sigma_probabilities,
    simple_loss,
    simple_weights,
    spaced_ratios,
)

T = 40
RATIOS = spaced_ratios(0.05, 100.0, T)
FLOW, EDM = GaussianPath.flow(RATIOS / (1 + RATIOS)), GaussianPath.edm(RATIOS, sigma_data=0.8)
PATHS = {"flow": (FLOW, "uniform"), "flow-logit": (FLOW, "logit_normal"), "edm": (EDM, "log_normal")}


def model(x, t):
    """Some network's raw output."""
    return (1.3 * x + 0.1 * t.reshape(-1, 1, 1, 1).sin()).sin()


def direct(name, path, x_0, noise):
    """The field's own formula at each level, (T,): E over images of |o - o*|^2 on the path's own variable."""
    sigma = path.sigma.reshape(-1, 1, 1, 1, 1)
    if name == "edm":
        x, sd = x_0 + sigma * noise, 0.8
        c_in = (sigma**2 + sd**2).rsqrt()
        c_skip, c_out = (sd * c_in) ** 2, sigma * sd * c_in
        seen, told, target = c_in * x, path.sigma.log() / 4, (x_0 - c_skip * x) / c_out
    else:
        seen, told, target = (1 - sigma) * x_0 + sigma * noise, 1000 * path.sigma, noise - x_0
    output = torch.stack([model(*pair) for pair in zip(seen, told)])
    return (output - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("name", PATHS)
def test_it_is_the_raw_output_s(name):
    path, sampling = PATHS[name]
    reverse = path.reverse_process(levels=None)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(T, 3, 1, 4, 4, generator=generator, dtype=torch.float64)
    p, network = sigma_probabilities(path, sampling), path.network(model)
    weights, found = simple_weights(path, p), []
    for t in range(T):
        diffused = reverse.forward.diffuse(x_0, torch.full((3,), t), noise[t])
        found.append(weights[t] * simple_loss(reverse, network(diffused.x_t, diffused.t), diffused).mean() / T)
    torch.testing.assert_close(torch.stack(found), p * direct(name, path, x_0, noise), rtol=1e-9, atol=0)


CDFS = {  # of sigma, as the papers have it
    "uniform": lambda r: r / (1 + r),
    "logit_normal": lambda r: stats.norm.cdf(special.logit(r / (1 + r))),
    "log_normal": lambda r: stats.norm.cdf(np.log(r), -1.2, 1.2),
}


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("sampling", SIGMA_SAMPLINGS)
def test_a_level_has_the_probability_of_its_cell(sampling, even):
    """That of the sigmas between it and its neighbours' midpoints, also on levels that are not even in log SNR."""
    ratios = spaced_ratios(0.05, 100.0, 400) if even else torch.linspace(0.2, 5, 800, dtype=torch.float64)
    p = sigma_probabilities(GaussianPath.edm(ratios), sampling)
    middles = (ratios.log()[1:] + ratios.log()[:-1]).div(2).exp()
    cells = torch.from_numpy(np.diff(CDFS[sampling](middles.numpy())))
    torch.testing.assert_close(p[1:-1] / p[1:-1].sum(), cells / cells.sum(), rtol=3e-3, atol=1e-12)
    assert float(p.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", PATHS)
def test_drawn_as_the_field_does_the_output_s_error_has_weight_one(name):
    """The importance weights and T p_t cancel, and what is left is (s / (n out))^2."""
    path, sampling = PATHS[name]
    p = sigma_probabilities(path, sampling)
    t, weights = ImportanceTimesteps(p).sample(500, generator=torch.Generator().manual_seed(1))
    unit = (path.sigma**2 / (path.signal**2 + path.sigma**2) / path.out**2)[t]
    torch.testing.assert_close(weights.double() * simple_weights(path, p)[t], unit, rtol=1e-6, atol=0)
    drawn = torch.bincount(t, minlength=T).double()
    assert (drawn - 500 * p).abs().max() < 2  # systematic


REFUSED = {
    "a density": (lambda: sigma_probabilities(FLOW, "normal"), "`sampling` must be one of"),
    "no signal": (lambda: sigma_probabilities(GaussianPath.flow([0.5, 1.0]), "uniform"), "signal at every level"),
    "another chain": (lambda: simple_weights(FLOW, torch.ones(3) / 3), "`probabilities` must be 40 numbers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_say_what_to_do(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_one_level_takes_all():
    assert sigma_probabilities(GaussianPath.edm([2.0]), "log_normal").tolist() == [1.0]
