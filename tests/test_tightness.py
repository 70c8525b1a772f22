r"""The bound is tight: with the true reverse process it equals -log p(x_0).

For data x_0 ~ N(m, diag(lam)) everything is Gaussian, and independent between dimensions: the network's optimal output
is linear in x_t, and so is the mean of the true reverse transition q(x_{t-1} | x_t), whose variance
betatilde_t + c0^2 Var(x_0 | x_t) does not depend on x_t. A network that puts out both makes p's transitions the true
ones. Then the chain telescopes, and for each x_0 (not only on average)

    bound(x_0) = -log q(x_0) + E_{q(x_T | x_0)} log q(x_T) / N(x_T; 0, I)                                         (*)

The last term is the price of starting from N(0, I), not from q(x_T); it is computed in closed form. Every term of the
bound is quadratic in the noise of each dimension, so that the mean over noise +1 and -1 is the exact expectation: (*)
is asserted to 1e-9. Tests with random noise assert it within 4 standard errors (a false alarm once in 16,000 seeds).
"""

import math

import numpy as np
import pytest
import reference
import torch
from scipy.stats import norm

from ddpm_vlb import ForwardProcess, ReverseProcess, evaluate_vlb, make_betas

MEAN = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64)
VARIANCE = torch.tensor([0.002, 0.01, 0.03, 0.025], dtype=torch.float64)
DIMS = len(MEAN)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULES = {"linear": make_betas("linear", 1000), "cosine": make_betas("squaredcos_cap_v2", 1000)}
CHAINS = {
    "every-step": list(range(1000)),
    "hundred-steps": [*range(0, 990, 10), 999],
    "ten-steps": [round(i * 999 / 9) for i in range(10)],
    "uneven": [0, 1, 2, 10, 300, 301, 999],
    "ends-in-signal": [20, 500],  # x_T is far from N(0, I): the price in (*) is most of the prior term
}


def process(schedule, indices, prediction, variance, levels=None, dtype=torch.float64):
    """p of a chain, unclipped: clipping is the one thing that is not linear."""
    q = ForwardProcess.from_betas(SCHEDULES[schedule]).respace(indices).to(dtype=dtype)
    return ReverseProcess(q, prediction, variance, clip_sample=False, levels=levels)


class TrueReverse:
    """The network that knows the data's distribution, for the chain of some steps of a schedule."""

    def __init__(self, schedule, indices, prediction, variance):
        self.indices = torch.tensor(indices)
        self.prediction, self.variance = prediction, variance
        self.tab = reference.tables(reference.respaced_betas(SCHEDULES[schedule].numpy(), indices))
        abar = torch.from_numpy(self.tab.abar)[:, None]
        self.signal, self.sigma, total = abar.sqrt(), (1 - abar).sqrt(), abar * VARIANCE + 1 - abar
        self.gain = self.signal * VARIANCE / total
        data_variance = VARIANCE * (1 - abar) / total  # of x_0 given x_t
        c0, small = torch.from_numpy(self.tab.c0)[:, None], torch.from_numpy(self.tab.posterior_variance)[:, None]
        self.reverse_variance = small + c0.square() * data_variance
        self.log_small = torch.from_numpy(self.tab.log_small)[:, None]
        self.log_beta = torch.from_numpy(np.log(self.tab.betas))[:, None]

    def __call__(self, x_t, timesteps):
        i, x = torch.searchsorted(self.indices, timesteps), x_t.double()
        assert torch.equal(self.indices[i], timesteps)
        x_0 = MEAN + self.gain[i] * (x - self.signal[i] * MEAN)
        epsilon = (x - self.signal[i] * x_0) / self.sigma[i]
        v = self.signal[i] * epsilon - self.sigma[i] * x_0
        output = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[self.prediction]
        log_variance = self.reverse_variance[i].log()
        if self.variance == "learned":
            output = torch.cat([output, log_variance], dim=1)
        elif self.variance == "learned_range":
            share = (log_variance - self.log_small[i]) / (self.log_beta[i] - self.log_small[i])
            output = torch.cat([output, 2 * share - 1], dim=1)
        return output.to(x_t.dtype)

    def prior_price(self, x_0):
        """E over q(x_T | x_0) of log q(x_T) - log N(x_T; 0, I), in nats per image."""
        abar = float(self.tab.abar[-1])
        mean, total = math.sqrt(abar) * x_0, abar * VARIANCE + 1 - abar
        off = (mean - math.sqrt(abar) * MEAN).square() + 1 - abar
        return (0.5 * (mean.square() + 1 - abar - off / total - total.log())).sum(1)


def exact_nll(x_0, levels=None):
    """-log q(x_0) in nats per image: of the density, or of the mass of the bin around each level."""
    mean, sigma = MEAN.numpy(), VARIANCE.sqrt().numpy()
    if levels is None:
        return -torch.from_numpy(norm.logpdf(x_0.numpy(), mean, sigma)).sum(1)
    half = 1 / (levels - 1)
    # Survival functions of the lighter tail: a difference of two cdfs near one would lose digits.
    side = np.where(x_0.numpy() > mean, 1.0, -1.0)
    near, far = (side * (x_0.numpy() - mean) + s * half for s in (-1, 1))
    return -torch.from_numpy(np.log(norm.sf(near / sigma) - norm.sf(far / sigma))).sum(1)


def expected_bound(network, p, x_0):
    """The bound of each image in nats, its expectation over the noise taken exactly (noise of +1 and -1)."""
    noise = torch.ones(len(p.forward), *x_0.shape, dtype=x_0.dtype)
    runs = [evaluate_vlb(network, p, x_0, noise=sign * noise) for sign in (1, -1)]
    return sum(run.prior + run.terms.sum(1) for run in runs) / 2


def data(num, seed=0):
    """Samples of the data's distribution."""
    return MEAN + VARIANCE.sqrt() * torch.from_numpy(np.random.default_rng(seed).standard_normal((num, DIMS)))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bound_is_the_exact_likelihood(schedule, prediction, variance, chain):
    """(*) holds for each x_0 to 1e-9, on any spacing: for Gaussian data the true reverse is Gaussian from any step."""
    network = TrueReverse(schedule, CHAINS[chain], prediction, variance)
    x_0 = data(5)
    bound = expected_bound(network, process(schedule, CHAINS[chain], prediction, variance), x_0)
    torch.testing.assert_close(bound, exact_nll(x_0) + network.prior_price(x_0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("only_step", [0, 300, 999])
def test_chain_of_one_step(prediction, only_step):
    """A chain of one step is tight as well: its decoder is the true q(x_0 | x_1), its prior pays the rest."""
    network = TrueReverse("linear", [only_step], prediction, "learned")
    x_0 = data(5)
    bound = expected_bound(network, process("linear", [only_step], prediction, "learned"), x_0)
    torch.testing.assert_close(bound, exact_nll(x_0) + network.prior_price(x_0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prior_price_is_negligible_on_whole_schedules(schedule):
    """The standard schedules end so close to N(0, I) that (*) is the likelihood itself, to 1e-4 bits/dim."""
    network = TrueReverse(schedule, CHAINS["every-step"], "epsilon", "learned")
    assert float(network.prior_price(data(100)).abs().max()) / (DIMS * math.log(2)) < 1e-4


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gap_of_fixed_variances(schedule, variance, chain):
    """With a fixed variance the bound exceeds the entropy by the KL to the true reverse: (r - 1 - log r) / 2 > 0.

    r is the true reverse variance over the fixed one, summed over steps and dimensions. For Gaussian data the true
    reverse transition is Gaussian for any spacing, so this KL is all of the gap. On average over x_0 only: the mean
    over x_0 = m +- sqrt(lam) is exact, because the bound is quadratic in x_0 too.
    """
    network = TrueReverse(schedule, CHAINS[chain], "epsilon", variance)
    x_0 = torch.stack([MEAN + VARIANCE.sqrt(), MEAN - VARIANCE.sqrt()])
    bound = expected_bound(network, process(schedule, CHAINS[chain], "epsilon", variance), x_0).mean()
    entropy = 0.5 * torch.log(2 * math.pi * math.e * VARIANCE).sum() + network.prior_price(x_0).mean()
    fixed = network.tab.log_small if variance == "fixed_small" else network.tab.log_large
    ratio = network.reverse_variance / torch.from_numpy(np.exp(fixed))[:, None]
    gap = 0.5 * (ratio - 1 - ratio.log()).sum()
    torch.testing.assert_close(bound - entropy, gap, rtol=1e-9, atol=1e-9)
    assert float(gap) / (DIMS * math.log(2)) > 0.01


def random_noise_gap(schedule, chain, levels, dtype, num=28_000):
    """Mean and standard error of bound - (*) in bits/dim, from one random noise for each of many x_0 and steps."""
    x_0 = data(num, seed=1)
    if levels is not None:
        x_0 = ((x_0 + 1) * (levels - 1) / 2).round() * 2 / (levels - 1) - 1
        assert float(x_0.abs().max()) < 0.98, "the data must keep clear of the open outer bins"
    network = TrueReverse(schedule, CHAINS[chain], "epsilon", "learned")
    p = process(schedule, CHAINS[chain], "epsilon", "learned", levels, dtype)
    actual = evaluate_vlb(network, p, x_0.to(dtype), generator=torch.Generator().manual_seed(2))
    assert actual.bits_per_dim.dtype == dtype
    exact = (exact_nll(x_0, levels) + network.prior_price(x_0)) / (DIMS * math.log(2))
    gap = actual.bits_per_dim.double() - exact
    return float(gap.mean()), float(gap.std()) / math.sqrt(num)


@pytest.mark.parametrize(
    ("chain", "levels", "dtype"),
    [
        ("hundred-steps", None, torch.float64),
        ("hundred-steps", 65536, torch.float32),
        ("ten-steps", None, torch.float32),
        ("ten-steps", 65536, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bound_with_random_noise(schedule, chain, levels, dtype):
    """(*) within 4 standard errors, the standard error below 0.005 bits/dim, with the density and the exact decoder.

    On the fine grid of 65536 levels the data are the rounded Gaussian, whose likelihood is the mass of a bin. There
    the true q(x_0 | x_1) is the discretised Gaussian but for terms of (bin / sigma_1)^2 < 1e-4, far below the error.
    """
    gap, standard_error = random_noise_gap(schedule, chain, levels, dtype)
    assert standard_error < 0.005
    assert abs(gap) < 4 * standard_error


@pytest.mark.parametrize(("shift", "stretch"), [(0.1, 0.0), (0.0, 0.3), (0.0, -0.3), (-0.05, 0.1)])
def test_wrong_models_pay(shift, stretch):
    """Any other model's bound is above the entropy on average: a shifted epsilon or a wrong variance costs bits."""
    network = TrueReverse("linear", CHAINS["ten-steps"], "epsilon", "learned")
    wrong = torch.tensor([[shift] * DIMS + [stretch] * DIMS], dtype=torch.float64)
    x_0 = torch.stack([MEAN + VARIANCE.sqrt(), MEAN - VARIANCE.sqrt()])
    p = process("linear", CHAINS["ten-steps"], "epsilon", "learned")
    bound = expected_bound(lambda x_t, t: network(x_t, t) + wrong, p, x_0).mean()
    true = 0.5 * torch.log(2 * math.pi * math.e * VARIANCE).sum() + network.prior_price(x_0).mean()
    abar, tab = torch.from_numpy(network.tab.abar)[:, None], network.tab
    gap_of_means = torch.from_numpy(tab.c0)[:, None] * shift * torch.sqrt(1 / abar - 1)
    ratio = torch.full_like(network.reverse_variance, math.exp(-stretch))
    price = 0.5 * (ratio - 1 - ratio.log() + ratio * gap_of_means.square() / network.reverse_variance)
    assert float(price.sum()) > 0
    torch.testing.assert_close(bound - true, price.sum(), rtol=1e-9, atol=1e-9)
