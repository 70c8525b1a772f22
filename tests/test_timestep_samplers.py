"""Timestep samplers: every one keeps the expectation of the loss; the good ones have less variance."""

import io

import numpy as np
import pytest
import torch

from ddpm_vlb import (
    ForwardProcess,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    ReverseProcess,
    UniformTimesteps,
    covariance_eigenvalues,
    gaussian_model_terms,
    make_betas,
    spaced_ratios,
    vlb_term,
)

T = 23
UNEVEN = torch.linspace(1, 9, T).square()
EIGENVALUES = torch.logspace(-3, 0.5, 12, dtype=torch.float64)
ABAR = ForwardProcess.from_betas(make_betas("linear", T, 0.01, 0.3)).alphas_cumprod


def warmed_up(rank: int = 0, world_size: int = 1) -> LossSecondMomentTimesteps:
    sampler = LossSecondMomentTimesteps(T, history_per_term=2, uniform_fraction=0.1, rank=rank, world_size=world_size)
    for scale in (1.0, 3.0):
        sampler.update(torch.arange(T), scale * (1 + torch.arange(T).float()) ** -1.5)
    return sampler


SAMPLERS = {
    "uniform": lambda **ranks: UniformTimesteps(T, **ranks),
    "low_discrepancy": lambda **ranks: LowDiscrepancyTimesteps(T, **ranks),
    "importance": lambda **ranks: ImportanceTimesteps(UNEVEN, **ranks),
    "gaussian_model": lambda **ranks: ImportanceTimesteps.from_gaussian_model(ABAR, EIGENVALUES, **ranks),
    "loss_second_moment": lambda **ranks: warmed_up(**ranks),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("name", SAMPLERS)
def test_unbiased(name, n):
    """E[w f(t)] = mean_t f(t): the average of 2000 independent batches is within 4 standard errors of it.

    The batch means are independent with a variance: 4 standard errors fail one time in 16,000. The seed is fixed.
    """
    f = torch.randn(T, generator=seeded(0), dtype=torch.float64).exp()
    sampler, generator = SAMPLERS[name](), seeded(1)
    means = torch.empty(2000, dtype=torch.float64)
    for i in range(len(means)):
        t, weights = sampler.sample(n, generator=generator)
        means[i] = (weights.double() * f[t]).mean()
    error = float((means.mean() - f.mean()).abs())
    # n draws of an even spread may hit every t equally often: then the error is the float32 weights' alone.
    assert error <= 4 * float(means.std()) / len(means) ** 0.5 + 1e-6 * float(f.mean())


@pytest.mark.parametrize("name", SAMPLERS)
def test_shapes_dtypes_and_range(name):
    """A sampler returns int64 chain indices in 0 .. T - 1 and float32 weights, one for each image."""
    t, weights = SAMPLERS[name]().sample(50, device="cpu", generator=seeded(2))
    assert t.shape == weights.shape == (50,) and t.dtype == torch.int64 and weights.dtype == torch.float32
    assert 0 <= int(t.min()) and int(t.max()) < T and bool((weights > 0).all())


@pytest.mark.parametrize("name", SAMPLERS)
def test_generator_decides_everything(name):
    """Equal generators give equal draws; without one, the draws follow torch's global seed."""
    sampler = SAMPLERS[name]()
    first, again, other = (sampler.sample(30, generator=seeded(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    first = sampler.sample(30)[0]
    torch.manual_seed(5)
    assert torch.equal(first, sampler.sample(30)[0])


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [1, 2, 3, 4], [10, 1, 1, 88], [7]])
def test_systematic_sampling_is_exactly_unbiased(monkeypatch, counts, n):
    """Averaged over all offsets, step t is drawn exactly n p_t times.

    With p_t = k_t / N the drawn steps change only where the offset is a multiple of 1/N, so that N offsets half way
    between those, (j + 1/2) / N, give the average over U(0, 1) exactly.
    """
    total = sum(counts)
    sampler = ImportanceTimesteps(torch.tensor(counts, dtype=torch.float64))
    drawn = torch.zeros(len(counts))
    for j in range(total):
        offset = (j + 0.5) / total
        monkeypatch.setattr(torch, "rand", lambda *size, u=offset, **options: torch.full((1,), u).double())
        drawn += torch.bincount(sampler.sample(n)[0], minlength=len(counts))
    assert (drawn / total).tolist() == pytest.approx([n * k / total for k in counts], rel=1e-6)


@pytest.mark.parametrize("n", [1, 5, 23, 64, 1000])
@pytest.mark.parametrize("name", ["low_discrepancy", "importance", "gaussian_model", "loss_second_moment"])
def test_counts_are_the_expected_ones_rounded(name, n):
    """Systematic sampling draws each t either floor(n p_t) or ceil(n p_t) times."""
    sampler = SAMPLERS[name]()
    for seed in range(20):
        t, _ = sampler.sample(n, generator=seeded(seed))
        excess = torch.bincount(t, minlength=T) - n * sampler.probabilities
        assert float(excess.abs().max()) < 1 + 1e-9


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_one_global_draw(name, world_size):
    """Seeded alike, the ranks' parts in order are the single process's draw: every position of it exactly once."""
    whole = SAMPLERS[name]().sample(6 * world_size, generator=seeded(6))
    parts = [
        SAMPLERS[name](rank=rank, world_size=world_size).sample(6, generator=seeded(6)) for rank in range(world_size)
    ]
    for k in range(2):
        assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


def test_low_discrepancy_spreads_over_the_global_batch():
    """With as many images as steps over all ranks every t comes exactly once, though not within a rank."""
    ranks = [LowDiscrepancyTimesteps(64, rank=r, world_size=4).sample(16, generator=seeded(7))[0] for r in range(4)]
    assert sorted(torch.cat(ranks).tolist()) == list(range(64))
    assert all(int(t.max() - t.min()) > 32 for t in ranks)


def test_low_discrepancy_is_uniform_with_unit_weights():
    """The low-discrepancy sampler is the importance sampler of p_t = 1/T: all weights are 1."""
    sampler = LowDiscrepancyTimesteps(T)
    assert torch.equal(sampler.sample(9)[1], torch.ones(9))
    torch.testing.assert_close(sampler.probabilities, torch.full((T,), 1 / T, dtype=torch.float64))


@pytest.mark.parametrize("name", ["low_discrepancy", "importance"])
def test_position_in_the_batch_says_nothing_of_t(name):
    """The order is a random permutation: at each position t has the mean of p_t, within 4 standard errors.

    Over 1500 independent batches of 8 positions, one position fails 4 standard errors one time in 16,000.
    """
    sampler, generator = SAMPLERS[name](), seeded(8)
    t = torch.stack([sampler.sample(8, generator=generator)[0] for _ in range(1500)]).double()
    mean = float((sampler.probabilities * torch.arange(T)).sum())
    assert ((t.mean(0) - mean).abs() < 4 * t.std(0) / 1500**0.5).all()
    rising = (t.diff(dim=1) >= 0).all(dim=1).double().mean()
    assert float(rising) < 0.01  # 8 sorted steps have a chance of about 1/8!


def test_weights_undo_the_probabilities():
    """w = 1 / (T p_t), whatever the scale in which the probabilities are given."""
    sampler = ImportanceTimesteps((1000 * UNEVEN).tolist())
    t, weights = sampler.sample(100, generator=seeded(9))
    expected = 1 / (T * (UNEVEN / UNEVEN.sum())[t])
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    assert float(sampler.probabilities.sum()) == pytest.approx(1, abs=1e-14)


def test_one_step_chain():
    """T = 1 leaves nothing to choose: t = 0 with weight 1 from every sampler."""
    one = LossSecondMomentTimesteps(1, history_per_term=1)
    one.update(torch.tensor([0]), torch.tensor([2.0]))
    gaussian = ImportanceTimesteps.from_gaussian_model(torch.tensor([0.5]), EIGENVALUES)
    for sampler in (UniformTimesteps(1), LowDiscrepancyTimesteps(1), ImportanceTimesteps([3.0]), gaussian, one):
        t, weights = sampler.sample(4)
        assert t.tolist() == [0, 0, 0, 0]
        torch.testing.assert_close(weights, torch.ones(4))


# --- loss second moment


def test_second_moment_is_eq_18():
    """p_t = (1 - u) sqrt(mean of the last 10 L_t^2) / sum + u / T (iDDPM eq. 18), by numpy from the same losses."""
    rng = np.random.default_rng(0)
    sampler = LossSecondMomentTimesteps(5, history_per_term=10, uniform_fraction=0.01)
    history = [[] for _ in range(5)]
    for _ in range(60):
        t = rng.permutation(5)
        losses = rng.gamma(2.0, 1 + t)
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        for step, loss in zip(t, losses, strict=True):
            history[step].append(loss)
    root = np.array([np.sqrt(np.mean(np.square(h[-10:]))) for h in history])
    expected = 0.99 * root / root.sum() + 0.01 / 5
    np.testing.assert_allclose(sampler.probabilities.numpy(), expected, rtol=1e-12)


def test_second_moment_is_uniform_until_warmed_up():
    """Until the last step has its history full the draws are uniform with weight 1; then they are not."""
    sampler = LossSecondMomentTimesteps(3, history_per_term=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0]))
    assert torch.allclose(sampler.probabilities, torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(sampler.sample(5)[1], torch.ones(5))
    sampler.update(torch.tensor([2]), torch.tensor([9.0]))
    expected = 0.999 * np.array([1, 5, 9]) / 15 + 0.001 / 3
    np.testing.assert_allclose(sampler.probabilities.numpy(), expected, rtol=1e-12)


def test_second_moment_of_zero_losses_is_uniform():
    """A history of zeros has no shape to follow: uniform, not NaN."""
    sampler = LossSecondMomentTimesteps(4, history_per_term=1)
    sampler.update(torch.arange(4), torch.zeros(4))
    assert sampler.probabilities.tolist() == [0.25] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_second_moment_forgets_losses_that_are_not_finite(bad):
    """A NaN or infinite loss leaves the history as it was, the good losses of the same batch are kept."""
    clean, poisoned = warmed_up(), warmed_up()
    clean.update(torch.tensor([2, 4]), torch.tensor([7.0, 8.0]))
    poisoned.update(torch.tensor([2, 3, 4, 3]), torch.tensor([7.0, bad, 8.0, bad]))
    assert torch.equal(clean.probabilities, poisoned.probabilities)


def test_second_moment_takes_losses_with_gradient_and_in_half():
    """The history holds numbers, not graphs, and accepts the dtypes that losses come in."""
    sampler = LossSecondMomentTimesteps(2, history_per_term=1)
    sampler.update(torch.tensor([0]), torch.tensor([1.5], requires_grad=True))
    sampler.update(torch.tensor([1]), torch.tensor([0.5], dtype=torch.bfloat16))
    np.testing.assert_allclose(sampler.probabilities, 0.999 * np.array([0.75, 0.25]) + 0.0005, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_second_moment_takes_a_batch_as_its_losses_one_by_one(size):
    """Steps that come more often in a batch than the history is long keep their last losses, in the ring's places."""
    at_once, one_by_one = (LossSecondMomentTimesteps(5, history_per_term=size) for _ in range(2))
    for seed in range(4):
        t = torch.randint(5, (37,), generator=seeded(seed))
        losses = torch.rand(37, generator=seeded(seed + 10)).masked_fill(t.roll(1) == 2, torch.nan)
        at_once.update(t, losses)
        for pair in zip(t[:, None], losses[:, None], strict=True):
            one_by_one.update(*pair)
    for name, value in one_by_one.state_dict().items():
        assert torch.equal(at_once.state_dict()[name], value), name


def test_second_moment_state_survives_a_checkpoint():
    """A state through torch.save (weights only) gives the same probabilities, draws and later history."""
    sampler = warmed_up()
    sampler.update(torch.tensor([5]), torch.tensor([0.3]))
    buffer = io.BytesIO()
    torch.save(sampler.state_dict(), buffer)
    buffer.seek(0)
    restored = LossSecondMomentTimesteps(T, history_per_term=2, uniform_fraction=0.1)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for s in (sampler, restored):
        s.update(torch.tensor([5, 6]), torch.tensor([2.5, 0.1]))
    assert torch.equal(sampler.probabilities, restored.probabilities)
    assert torch.equal(sampler.sample(20, generator=seeded(1))[0], restored.sample(20, generator=seeded(1))[0])


def test_second_moment_state_is_a_copy():
    """A state taken before more losses does not follow them, nor does a sampler follow the state it loaded."""
    sampler = warmed_up()
    before, state = sampler.probabilities, sampler.state_dict()
    sampler.update(torch.arange(T), torch.full((T,), 100.0))
    other = LossSecondMomentTimesteps(T, history_per_term=2, uniform_fraction=0.1)
    other.load_state_dict(state)
    assert torch.equal(other.probabilities, before)
    for value in state.values():
        value.zero_()
    assert torch.equal(other.probabilities, before)


@pytest.mark.parametrize(("steps", "history"), [(T + 1, 2), (T, 3)])
def test_second_moment_refuses_another_chain_s_state(steps, history):
    """A state of another number of steps or another history length is refused."""
    with pytest.raises(ValueError, match="saved"):
        LossSecondMomentTimesteps(steps, history_per_term=history).load_state_dict(warmed_up().state_dict())


# --- Gaussian data model


def test_gaussian_terms_are_those_of_the_posterior_mean_network():
    """The closed form is the bound of Gaussian data under the network E[x_0 | x_t], drawn by brute force.

    Each L_t is averaged over 20,000 draws of (x_0, noise) with the loss of the library; 4 standard errors at each of
    the T - 1 steps, fixed seed.
    """
    lam = torch.tensor([2.0, 0.3, 0.01, 0.0], dtype=torch.float64)
    forward = ForwardProcess.from_betas(make_betas("linear", 8, 0.02, 0.4))
    reverse = ReverseProcess(forward, "sample", "fixed_small", clip_sample=False, levels=None)
    generator = seeded(10)
    x_0 = torch.randn(20000, 4, 1, 1, generator=generator, dtype=torch.float64) * lam.sqrt().reshape(4, 1, 1)
    expected = gaussian_model_terms(forward.alphas_cumprod, lam)
    assert expected.shape == (8,) and expected[0] == expected[1]
    for step in range(1, 8):
        t = torch.full((20000,), step)
        diffused = forward.diffuse(x_0, t, torch.randn(x_0.shape, generator=generator, dtype=torch.float64))
        abar = forward.alphas_cumprod[step]
        gain = abar.sqrt() * lam / (abar * lam + 1 - abar)
        terms = vlb_term(reverse, gain.reshape(4, 1, 1) * diffused.x_t, diffused) / 4
        assert float((terms.mean() - expected[step]).abs()) < 4 * float(terms.std()) / 20000**0.5


def test_gaussian_terms_sum_to_the_mutual_information():
    """On a fine chain the terms sum to the information between x at its two ends: 1/2 sum log(1 + lam SNR).

    I-MMSE (Guo et al. 2005): the integral of mmse dSNR / 2; a chain of T = 20000 steps is a Riemann sum of it.
    """
    lam = torch.tensor([1.5, 0.2], dtype=torch.float64)
    log_snr = torch.linspace(4, -12, 20000, dtype=torch.float64)
    terms = gaussian_model_terms(torch.sigmoid(log_snr), lam)[1:].sum()
    information = 0.5 * (torch.log1p(lam * log_snr[0].exp()) - torch.log1p(lam * log_snr[-1].exp())).mean()
    assert float(terms) == pytest.approx(float(information), rel=1e-3)


def test_gaussian_model_probabilities_follow_the_terms():
    """p_t = (1 - u) L_t / sum L + u / T, and all draws are possible."""
    sampler = ImportanceTimesteps.from_gaussian_model(ABAR, EIGENVALUES, uniform_fraction=0.2)
    terms = gaussian_model_terms(ABAR, EIGENVALUES)
    torch.testing.assert_close(sampler.probabilities, 0.8 * terms / terms.sum() + 0.2 / T, rtol=1e-12, atol=0)
    constant = ImportanceTimesteps.from_gaussian_model(ABAR, torch.zeros(3))
    torch.testing.assert_close(constant.probabilities, torch.full((T,), 1 / T, dtype=torch.float64))


@pytest.mark.parametrize("steps", [100, 1000])
def test_the_decoder_s_draws_do_not_depend_on_how_close_the_levels_are(steps):
    """By SNR_0 mmse_0 / 2 it has its share of the integral 1/2 of mmse over SNR, whose rest the levels divide."""
    abar = 1 / (1 + spaced_ratios(0.05, 100.0, steps).square())
    terms = gaussian_model_terms(abar, EIGENVALUES, decoder_by_snr=True)
    snr = 1 / 0.05**2
    own = 0.5 * (snr * EIGENVALUES / (snr * EIGENVALUES + 1)).mean()
    torch.testing.assert_close(terms[0], own, rtol=1e-9, atol=0)
    assert torch.equal(terms[1:], gaussian_model_terms(abar, EIGENVALUES)[1:])
    rest = 0.5 * ((snr * EIGENVALUES + 1) / (EIGENVALUES / 100**2 + 1)).log().mean()
    p = ImportanceTimesteps.from_gaussian_model(abar, EIGENVALUES, decoder_by_snr=True).probabilities
    assert float(p[0]) == pytest.approx(float(0.9 * own / (own + rest) + 0.1 / steps), rel=0.08)


def test_gaussian_model_reduces_the_variance_of_the_bound():
    """On Gaussian data the weighted L_vlb varies less than uniform draws' by the factor that its second moments say.

    Var + mean^2 of w L_t under p is sum_t E[L_t^2] / (T^2 p_t); the observed ratio of variances over 40,000 draws must
    be below one half and within 20 % of that closed form (E[L_t^2] from Gaussian errors: m^2 + 2 sum a_i^2).
    """
    forward = ForwardProcess.from_betas(make_betas("linear", 1000))
    abar = forward.alphas_cumprod[:, None]
    lam = EIGENVALUES
    per_mode = lam * (1 - abar) / (abar * lam + 1 - abar)
    snr = forward.alphas_cumprod / (1 - forward.alphas_cumprod)
    scale = 0.5 * (snr[:-1] - snr[1:])[:, None]
    modes = scale * per_mode[1:]
    modes = torch.cat([modes[:1], modes]) / len(lam)
    second = modes.sum(1).square() + 2 * modes.square().sum(1)
    mean = modes.sum(1).mean()
    generator, variances, exact = seeded(11), [], []
    gaussian = ImportanceTimesteps.from_gaussian_model(forward.alphas_cumprod, lam)
    for sampler in (UniformTimesteps(1000), gaussian):
        p = getattr(sampler, "probabilities", torch.full((1000,), 1e-3, dtype=torch.float64))
        t, weights = sampler.sample(40000, generator=generator)
        errors = torch.randn(40000, len(lam), generator=generator, dtype=torch.float64).square()
        values = weights * (modes[t] * errors).sum(1)
        variances.append(float(values.var()))
        exact.append(float((second / (1e6 * p)).sum() - mean.square()))
    assert variances[1] < 0.5 * variances[0]
    assert variances[1] / variances[0] == pytest.approx(exact[1] / exact[0], rel=0.2)


def test_covariance_eigenvalues_are_numpy_s():
    """For small images they are the eigenvalues of the sample covariance, by numpy from the flattened data."""
    x = torch.randn(40, 2, 3, 4, generator=seeded(12)) * torch.linspace(0.1, 2, 24).reshape(2, 3, 4) + 5
    expected = np.linalg.eigvalsh(np.cov(x.flatten(1).double().numpy(), rowvar=False))
    np.testing.assert_allclose(covariance_eigenvalues(x).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_covariance_of_fewer_examples_than_dimensions():
    """A rank-deficient covariance has no negative eigenvalues: the rounding below 0 is cut off."""
    eigenvalues = covariance_eigenvalues(torch.randn(5, 1, 4, 4, generator=seeded(13)))
    assert eigenvalues.shape == (16,) and float(eigenvalues.min()) >= 0
    assert int((eigenvalues > 1e-9).sum()) == 4


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 4, 8), (2, 10), (2, 3, 4, 2)])
def test_power_spectrum_preserves_the_total_variance(shape):
    """Parseval: the stationary model has as many eigenvalues and the same trace as the full covariance."""
    x = torch.randn(30, *shape, generator=seeded(14)).cumsum(-1)
    full, stationary = covariance_eigenvalues(x), covariance_eigenvalues(x, max_dims=1)
    assert full.shape == stationary.shape == (x[0].numel(),)
    assert float(stationary.sum()) == pytest.approx(float(full.sum()), rel=1e-10)


def test_power_spectrum_recovers_a_stationary_process():
    """For a stationary field with known spectrum the eigenvalues are the spectrum.

    Each is a mean of 2000 squared Gaussians (or 2 x 2000 halves): relative standard error sqrt(2/2000) = 3.2 %, and
    none of the 64 may be off by more than 4.5 of them; sorting cannot make the largest gap larger.
    """
    frequency = torch.fft.fftfreq(8, dtype=torch.float64)
    spectrum = 1 / (0.02 + frequency[:, None].square() + frequency[None].square())
    white = torch.randn(2000, 1, 8, 8, generator=seeded(15), dtype=torch.float64)
    x = torch.fft.ifft2(torch.fft.fft2(white) * spectrum.sqrt()).real
    estimate = covariance_eigenvalues(x, max_dims=1).sort().values
    expected = spectrum.flatten().sort().values
    assert float((estimate / expected - 1).abs().max()) < 4.5 * (2 / 2000) ** 0.5


def test_power_spectrum_sees_the_channels_correlation():
    """Two equal channels have the spectrum of one at twice the variance, and zeros."""
    x = torch.randn(50, 1, 6, 6, generator=seeded(16), dtype=torch.float64)
    one = covariance_eigenvalues(x, max_dims=1).sort().values
    two = covariance_eigenvalues(x.repeat(1, 2, 1, 1), max_dims=1).sort().values
    torch.testing.assert_close(two[:36], torch.zeros(36, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(two[36:], 2 * one)


# --- errors


@pytest.mark.parametrize("p", [[], [0.5, 0.0], [0.5, -0.1], [float("nan"), 1.0], [float("inf"), 1.0], [[0.5, 0.5]]])
def test_probabilities_are_checked(p):
    """A step that is never drawn, or a probability that is none, is refused."""
    with pytest.raises(ValueError, match="positive finite"):
        ImportanceTimesteps(p)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_and_rank_are_checked(name):
    """A batch below 1 and a rank outside the world are refused."""
    with pytest.raises(ValueError, match="batch_size"):
        SAMPLERS[name]().sample(0)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            SAMPLERS[name](rank=rank, world_size=world_size)


@pytest.mark.parametrize("make", [UniformTimesteps, LowDiscrepancyTimesteps, LossSecondMomentTimesteps])
def test_chain_length_is_checked(make):
    """A chain without steps is refused."""
    with pytest.raises(ValueError, match="num_timesteps"):
        make(0)


def test_other_arguments_are_checked():
    """Shares of uniform draws outside (0, 1], empty histories and mismatched losses are refused."""
    for fraction in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="uniform_fraction"):
            ImportanceTimesteps.from_gaussian_model(ABAR, EIGENVALUES, fraction)
        with pytest.raises(ValueError, match="uniform_fraction"):
            LossSecondMomentTimesteps(4, uniform_fraction=fraction)
    with pytest.raises(ValueError, match="history_per_term"):
        LossSecondMomentTimesteps(4, history_per_term=0)
    with pytest.raises(ValueError, match="one shape"):
        LossSecondMomentTimesteps(4).update(torch.tensor([0, 1]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="at least 2 finite"):
        covariance_eigenvalues(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="at least 2 finite"):
        covariance_eigenvalues(torch.full((3, 1, 2, 2), float("nan")))


def test_several_processes_need_a_generator():
    """Without a shared generator each process would cut its part out of a draw of its own."""
    for sampler in (UniformTimesteps(10, 1, 2), LowDiscrepancyTimesteps(10, 0, 2)):
        with pytest.raises(ValueError, match="generator"):
            sampler.sample(4)
