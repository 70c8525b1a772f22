"""The forward process against the formulas in numpy, and the identities that tie its distributions together."""

import functools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_vlb import ForwardProcess, make_betas, rescale_betas_zero_snr
from ddpm_vlb.forward_process import gather

TABLES = {
    "betas": lambda tab: tab.betas,
    "alphas_cumprod": lambda tab: tab.abar,
    "sqrt_alphas_cumprod": lambda tab: np.sqrt(tab.abar),
    "sqrt_one_minus_alphas_cumprod": lambda tab: np.sqrt(1 - tab.abar),
    "log_one_minus_alphas_cumprod": lambda tab: np.log(1 - tab.abar),
    "sqrt_recip_alphas_cumprod": lambda tab: 1 / np.sqrt(tab.abar),
    "sqrt_recipm1_alphas_cumprod": lambda tab: np.sqrt(1 / tab.abar - 1),
    "posterior_mean_coef_x_0": lambda tab: tab.c0,
    "posterior_mean_coef_x_t": lambda tab: tab.ct,
    "posterior_variance": lambda tab: tab.posterior_variance,
    "posterior_log_variance": lambda tab: tab.log_small,
    "log_betas": lambda tab: np.log(tab.betas),
    "log_variance_range": lambda tab: np.log(tab.betas) - tab.log_small,
}
SCHEDULES = {
    "linear-1000": reference.linear_betas(1000),
    "cosine-1000": reference.cosine_betas(1000),
    "cosine-4000": reference.cosine_betas(4000),
    "steep": np.array([0.999, 0.5, 0.999, 0.001, 0.999]),
    "one-step": np.array([0.3]),
}
SHAPES = [(3, 5), (3, 2, 7), (3, 2, 4, 4), (3, 2, 2, 3, 4), (3, 1, 2, 2, 2, 2)]
seeded = settings(deadline=None, derandomize=True, max_examples=60)


def process(steps=40):
    """A linear chain whose last step is nearly noise."""
    return ForwardProcess.from_betas(reference.linear_betas(steps, 0.002, 0.2))


def randn(*shape, seed=0, dtype=torch.float64):
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def each(step, batch=3):
    """The same chain index for a whole batch."""
    return torch.full((batch,), step)


def assert_same(a, b, rtol=1e-10, atol=1e-12):
    """Two Gaussians are one and the same."""
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=atol)
    torch.testing.assert_close(a.log_variance, b.log_variance, rtol=rtol, atol=atol)


@st.composite
def pairs(draw, steps=40):
    """Steps s < t of a chain."""
    t = draw(st.integers(1, steps - 1))
    return draw(st.integers(0, t - 1)), t


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tables(schedule, name, dtype):
    """Each table follows its formula: to 1e-9 in float64, and to 1e-6 of the float64 values in float32."""
    q = ForwardProcess.from_betas(SCHEDULES[schedule]).to(dtype=dtype)
    expected = TABLES[name](reference.tables(SCHEDULES[schedule]))
    assert len(q) == len(expected) and getattr(q, name).dtype == dtype
    # Near the noisy end two logarithms are differences from one, which plain numpy rounds to 1e-16 or so.
    atol = 1e-14 if name in ("log_one_minus_alphas_cumprod", "log_variance_range") else 0.0
    np.testing.assert_allclose(getattr(q, name), expected, rtol=1e-9 if dtype == torch.float64 else 1e-6, atol=atol)
    assert q.timesteps.tolist() == list(range(len(q)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_tables_are_rounded_float64(schedule):
    """Casting comes last: every float32 table is the float64 one rounded once, and the root stays in float64."""
    double = ForwardProcess.from_betas(SCHEDULES[schedule])
    single = double.to(dtype=torch.float32)
    for name in TABLES:
        assert torch.equal(getattr(single, name), getattr(double, name).float())
    assert single.log_alphas_cumprod.dtype == torch.float64
    assert torch.equal(single.log_alphas_cumprod, double.log_alphas_cumprod)
    assert single.timesteps.dtype == torch.int64


def test_marginal_transition_and_posterior_follow_the_formulas():
    """Means and variances of q(x_t | x_0), q(x_t | x_{t-1}), q(x_{t-1} | x_t, x_0) at every step, DDPM eq. 2, 4, 7."""
    q, tab = process(), reference.tables(reference.linear_betas(40, 0.002, 0.2))
    t, x_0, x_t = torch.arange(40), randn(40, 2, 3), randn(40, 2, 3, seed=1)
    marginal, transition, posterior = q.q_marginal(x_0, t), q.q_transition(x_0, t), q.q_posterior(x_0, x_t, t)
    mean, log_variance = reference.posterior(tab, x_0.numpy(), x_t.numpy(), t.numpy())
    signal = reference.at(np.sqrt(tab.abar), t, x_0)
    step = reference.at(np.sqrt(1 - tab.betas), t, x_0)
    for actual, expected in [
        (marginal.mean, signal * x_0.numpy()),
        (marginal.log_variance, np.log(1 - signal**2) + 0 * x_0.numpy()),
        (transition.mean, step * x_0.numpy()),
        (transition.log_variance, np.log(1 - step**2) + 0 * x_0.numpy()),
        (posterior.mean, mean),
        (posterior.log_variance, log_variance),
    ]:
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_diffuse_is_a_sample_of_the_marginal():
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise, equation 4, is q_marginal(x_0, t).sample(noise)."""
    q, t, x_0, noise = process(), torch.tensor([0, 20, 39]), randn(3, 2, 4), randn(3, 2, 4, seed=1)
    diffused = q.diffuse(x_0, t, noise)
    tab = reference.tables(reference.linear_betas(40, 0.002, 0.2))
    expected = reference.diffuse(tab, x_0.numpy(), t.numpy(), noise.numpy())
    np.testing.assert_allclose(diffused.x_t, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(diffused.x_t, q.q_marginal(x_0, t).sample(noise))
    assert diffused.x_0 is x_0 and diffused.t is t and diffused.noise is noise


@seeded
@given(pairs())
def test_bayes(steps):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0), as log densities, for any s < t."""
    s, t = (each(step) for step in steps)
    q, x_0 = process(), randn(3, 2, 4)
    x_s = q.diffuse(x_0, s, randn(3, 2, 4, seed=1)).x_t
    x_t = q.q_transition(x_s, t, s).sample(randn(3, 2, 4, seed=2))
    left = q.q_posterior(x_0, x_t, t, s).log_prob(x_s) + q.q_marginal(x_0, t).log_prob(x_t)
    right = q.q_transition(x_s, t, s).log_prob(x_t) + q.q_marginal(x_0, s).log_prob(x_s)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@seeded
@given(pairs())
def test_posterior_between_any_two_steps(steps):
    """q(x_s | x_t, x_0) is the normalised product of q(x_s | x_0) and q(x_t | x_s), by precisions."""
    s, t = (each(step) for step in steps)
    x_0, x_t = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    tab = reference.tables(reference.linear_betas(40, 0.002, 0.2))
    mean, variance = reference.posterior_between(tab, x_0.numpy(), x_t.numpy(), t.numpy(), s.numpy())
    actual = process().q_posterior(x_0, x_t, t, s)
    np.testing.assert_allclose(actual.mean, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual.log_variance, np.log(variance), rtol=1e-9, atol=1e-12)


@seeded
@given(st.lists(st.integers(-1, 39), min_size=3, max_size=3, unique=True))
def test_chapman_kolmogorov(steps):
    """Going from r to s and from s to t is going from r to t, for any r < s < t, r = -1 being the data."""
    q, x_r = process(), randn(3, 2, 4)
    r, s, t = (each(step) for step in sorted(steps))
    first, second = q.q_transition(x_r, s, r), q.q_transition(q.q_transition(x_r, s, r).mean, t, s)
    gain = q.q_transition(torch.ones_like(x_r), t, s).mean
    whole = q.q_transition(x_r, t, r)
    variance = gain.square() * first.log_variance.exp() + second.log_variance.exp()
    torch.testing.assert_close(second.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, whole.log_variance.exp(), rtol=1e-12, atol=0)


def test_transition_from_the_data_is_the_marginal():
    """q(x_t | x_s) with s = -1 is q(x_t | x_0), and without s it is the chain's own step."""
    q, t, x = process(), torch.tensor([0, 7, 39]), randn(3, 2, 4)
    assert_same(q.q_transition(x, t, each(-1)), q.q_marginal(x, t))
    assert_same(q.q_transition(x, t), q.q_transition(x, t, t - 1))


@pytest.mark.parametrize("schedule", ["linear-1000", "cosine-1000", "steep"])
def test_posterior_of_neighbours_is_the_table(schedule):
    """q_posterior(..., s = t - 1) equals q_posterior without s, where q(x_{t-1} | x_t, x_0) has a variance."""
    q = ForwardProcess.from_betas(SCHEDULES[schedule])
    t = torch.arange(1, len(q))
    x_0, x_t = randn(len(t), 3), randn(len(t), 3, seed=1)
    assert_same(q.q_posterior(x_0, x_t, t, t - 1), q.q_posterior(x_0, x_t, t), rtol=1e-9)


def test_posterior_of_the_data():
    """With s = -1 the posterior is the point x_0: its mean is x_0, and its log variance log beta_{t|s} stands in."""
    q, t, x_0 = process(), torch.tensor([0, 5, 39]), randn(3, 2, 4)
    posterior = q.q_posterior(x_0, randn(3, 2, 4, seed=1), t, each(-1))
    torch.testing.assert_close(posterior.mean, x_0, rtol=1e-12, atol=0)
    expected = torch.log1p(-q.alphas_cumprod[t])[:, None, None].expand(3, 2, 4)
    torch.testing.assert_close(posterior.log_variance, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(q.q_posterior(x_0, randn(3, 2, 4, seed=1), each(0)).mean, x_0, rtol=1e-12, atol=0)


@pytest.mark.parametrize("indices", [list(range(40)), [0, 1, 2, 39], [3, 17, 18, 39], [39], [0, 39]], ids=str)
def test_first_step_borrows_the_next_posterior_variance(indices):
    """At the first step log betatilde is that of the chain's own second step; a chain of one step takes log beta."""
    q = process().respace(indices)
    abar = process().alphas_cumprod[torch.tensor(indices)]
    if len(indices) == 1:
        expected = torch.log(1 - abar[0])
    else:
        expected = torch.log((1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1]))
    torch.testing.assert_close(q.posterior_log_variance[0], expected, rtol=1e-10, atol=0)
    assert float(q.posterior_variance[0]) == 0
    actual = q.q_posterior(randn(1, 2), randn(1, 2), torch.tensor([0])).log_variance
    torch.testing.assert_close(actual, expected.expand(1, 2), rtol=1e-10, atol=0)


@seeded
@given(st.sets(st.integers(0, 39), min_size=1))
def test_respacing_keeps_the_marginals(chosen):
    """A respaced chain has the same q(x_t | x_0) at the steps it visits, and tells the network their timesteps."""
    indices = sorted(chosen)
    q, short, x_0 = process(), process().respace(indices), randn(len(indices), 2, 3)
    assert short.timesteps.tolist() == indices and len(short) == len(indices)
    assert_same(short.q_marginal(x_0, torch.arange(len(short))), q.q_marginal(x_0, torch.tensor(indices)), rtol=1e-12)
    np.testing.assert_allclose(
        short.betas, reference.respaced_betas(reference.linear_betas(40, 0.002, 0.2), indices), rtol=1e-9
    )


@seeded
@given(st.sets(st.integers(0, 39), min_size=2))
def test_respaced_posterior_is_that_of_two_far_steps(chosen):
    """The respaced chain's q(x_{t-1} | x_t, x_0) is the long chain's q(x_s | x_t, x_0)."""
    indices = torch.tensor(sorted(chosen))
    t = torch.arange(1, len(indices))
    x_0, x_t = randn(len(t), 2, 3), randn(len(t), 2, 3, seed=1)
    short = process().respace(indices).q_posterior(x_0, x_t, t)
    assert_same(short, process().q_posterior(x_0, x_t, indices[1:], indices[:-1]), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_respacing_to_all_steps_changes_nothing(dtype):
    """Keeping every step gives the chain back, and the dtype is kept: float32 chains respace from the float64 root."""
    q = ForwardProcess.from_betas(SCHEDULES["cosine-4000"])
    whole, part = q.to(dtype=dtype).respace(range(4000)), q.to(dtype=dtype).respace(range(0, 4000, 7))
    for name in TABLES:
        assert getattr(whole, name).dtype == dtype
        # beta_t = 1 - abar_t / abar_{t-1} comes back through a difference of logarithms.
        rtol, atol = (2e-7, 1e-12) if dtype == torch.float32 else (1e-10, 1e-12)
        torch.testing.assert_close(getattr(whole, name), getattr(q.to(dtype=dtype), name), rtol=rtol, atol=atol)
        assert torch.equal(getattr(part, name), getattr(q.respace(range(0, 4000, 7)), name).to(dtype))


def test_respacing_twice():
    """Respacing a respaced chain picks from its steps, and the timesteps are still those of the first chain."""
    twice = process().respace([1, 3, 5, 7, 39]).respace([0, 2, 4])
    once = process().respace([1, 5, 39])
    assert twice.timesteps.tolist() == [1, 5, 39]
    torch.testing.assert_close(twice.betas, once.betas, rtol=1e-14, atol=0)


def test_timesteps_of_their_own():
    """A chain can be given the timesteps that its network is to be told; respacing picks from them."""
    q = ForwardProcess.from_betas([0.1, 0.2, 0.3], timesteps=[10, 20, 999])
    assert q.timesteps.tolist() == [10, 20, 999]
    assert q.respace([0, 2]).timesteps.tolist() == [10, 999]


def test_betas_of_almost_one():
    """A chain of betas 0.999 keeps finite tables and distributions in float32 and float64."""
    q = ForwardProcess.from_betas([0.999] * 8)
    for dtype in (torch.float32, torch.float64):
        tables = q.to(dtype=dtype)
        assert all(bool(getattr(tables, name).isfinite().all()) for name in TABLES)
    t = torch.arange(8)
    posterior = q.q_posterior(randn(8, 3), randn(8, 3, seed=1), t)
    assert bool(posterior.mean.isfinite().all()) and bool(posterior.log_variance.isfinite().all())
    np.testing.assert_allclose(q.alphas_cumprod, 0.001 ** np.arange(1, 9), rtol=1e-12)


def test_zero_terminal_snr():
    """A last beta of 1 leaves no signal: x_T is the noise, its posterior comes from x_0 alone, nothing is NaN."""
    q = ForwardProcess.from_betas(rescale_betas_zero_snr(make_betas("linear", 20)))
    x_0, noise, last = randn(3, 2, 4), randn(3, 2, 4, seed=1), each(19)
    assert float(q.alphas_cumprod[-1]) == 0
    assert torch.equal(q.diffuse(x_0, last, noise).x_t, noise)
    finite = [name for name in TABLES if not name.startswith("sqrt_recip")]
    assert all(bool(getattr(q, name).isfinite().all()) for name in finite)
    for posterior in (q.q_posterior(x_0, noise, last), q.q_posterior(x_0, noise, last, last - 1)):
        torch.testing.assert_close(posterior.mean, q.sqrt_alphas_cumprod[18] * x_0, rtol=1e-12, atol=1e-14)
        expected = torch.log1p(-q.alphas_cumprod[18]).expand(3, 2, 4)
        torch.testing.assert_close(posterior.log_variance, expected, rtol=1e-10, atol=0)
    assert_same(q.q_transition(x_0, last), q.q_marginal(x_0, last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_data_keep_their_noise(dtype):
    """Half precision data are noised in float32: at the first steps, where half would add nothing, x_t differs."""
    q = ForwardProcess.from_betas(SCHEDULES["cosine-4000"]).to(dtype=torch.float32)
    x_0, noise, t = torch.full((84, 1, 64), 0.75, dtype=dtype), randn(84, 1, 64).to(dtype), torch.arange(84)
    diffused = q.diffuse(x_0, t, noise)
    assert {x.dtype for x in (diffused.x_0, diffused.x_t, diffused.noise)} == {torch.float32}
    expected = q.diffuse(x_0.float(), t, noise.float())
    assert torch.equal(diffused.x_t, expected.x_t)
    added = diffused.x_t - q.q_marginal(x_0, t).mean
    assert bool(((added != 0) | (noise == 0)).all())
    correlation = (added * noise.float()).sum((1, 2)) / noise.float().square().sum((1, 2))
    torch.testing.assert_close(correlation, q.sqrt_one_minus_alphas_cumprod[:84], rtol=1e-3, atol=0)
    for distribution in (q.q_marginal(x_0, t), q.q_transition(x_0, t), q.q_posterior(x_0, noise, t)):
        assert distribution.mean.dtype == distribution.log_variance.dtype == torch.float32


def test_float64_data_are_kept():
    """float64 data are noised in float64, also by float32 tables."""
    q = process().to(dtype=torch.float32)
    assert q.diffuse(randn(3, 2), each(1), randn(3, 2)).x_t.dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    """Vectors, signals, images, volumes and more: coefficients go with the batch axis and no other."""
    q, t, x_0, noise = process(), torch.tensor([0, 11, 39]), randn(*shape), randn(*shape, seed=1)
    flat = functools.partial(torch.flatten, start_dim=1)
    diffused = q.diffuse(x_0, t, noise)
    assert torch.equal(flat(diffused.x_t), q.diffuse(flat(x_0), t, flat(noise)).x_t)
    for full, vector in [
        (q.q_marginal(x_0, t), q.q_marginal(flat(x_0), t)),
        (q.q_transition(x_0, t), q.q_transition(flat(x_0), t)),
        (q.q_posterior(x_0, noise, t), q.q_posterior(flat(x_0), flat(noise), t)),
        (q.q_posterior(x_0, noise, t, t - 1), q.q_posterior(flat(x_0), flat(noise), t, t - 1)),
    ]:
        assert full.mean.shape == full.log_variance.shape == torch.Size(shape)
        assert torch.equal(flat(full.mean), vector.mean) and torch.equal(flat(full.log_variance), vector.log_variance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_integer_dtypes_of_t(dtype):
    """Chain indices may be of either integer dtype that torch indexes with."""
    t = torch.tensor([0, 5, 39])
    expected = process().diffuse(randn(3, 2), t, randn(3, 2)).x_t
    assert torch.equal(process().diffuse(randn(3, 2), t.to(dtype), randn(3, 2)).x_t, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int16], ids=str)
def test_t_of_a_dtype_that_does_not_index(dtype):
    """Floating point, boolean, uint8 and int16 chain indices are refused: they would not index, or select instead."""
    with pytest.raises(TypeError, match=f"integer tensor of chain indices.*{dtype}"):
        process().diffuse(randn(3, 2), torch.ones(3, dtype=dtype), randn(3, 2))
    with pytest.raises(TypeError, match="integer tensor of chain indices"):
        gather(process().betas, torch.ones(3, dtype=dtype), randn(3, 2))


@pytest.mark.parametrize("t", [[0, 1, 40], [0, 1, -1]], ids=str)
def test_t_outside_the_chain(t):
    """Chain indices beyond the chain, or negative (which would count from its end), are refused with their range."""
    with pytest.raises(IndexError, match=rf"0 \.\. 39, but it reaches from {min(t)} to {max(t)}"):
        process().diffuse(randn(3, 2), torch.tensor(t), randn(3, 2))


@pytest.mark.parametrize(
    ("x_0", "noise", "t"),
    [((3, 2), (3, 1), (3,)), ((3, 2), (3, 2), (2,)), ((3, 2), (3, 2), ()), ((3, 2), (3, 2), (3, 1))],
    ids=str,
)
def test_mismatched_shapes(x_0, noise, t):
    """Shapes that would broadcast silently are refused, and all three are named."""
    with pytest.raises(ValueError, match=r"`x_0`, `noise` and `t` must have the shapes") as error:
        process().diffuse(randn(*x_0), torch.zeros(t, dtype=torch.int64), randn(*noise))
    assert f"{x_0}, {noise} and {t}" in str(error.value)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "non-empty"),
        ([[0.1, 0.2]], "non-empty list"),
        ([0.1, 0.0], r"\(0, 1\], but betas\[1\] is 0.0"),
        ([-0.1, 0.1], r"\(0, 1\], but betas\[0\] is -0.1"),
        ([0.1, 0.2, 1.5], r"\(0, 1\], but betas\[2\] is 1.5"),
        ([0.1, float("nan")], r"\(0, 1\], but betas\[1\] is nan"),
        ([0.1, 1.0, 0.2], r"Only the last of `betas` may be 1.*betas\[1\]"),
    ],
    ids=str,
)
def test_betas_that_are_no_schedule(betas, message):
    """Betas outside (0, 1], or a 1 before the last step, are refused with their place and value."""
    with pytest.raises(ValueError, match=message):
        ForwardProcess.from_betas(betas)


@pytest.mark.parametrize("timesteps", [[0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]], ids=str)
def test_timesteps_that_do_not_match(timesteps):
    """Timesteps must be integers, one for each beta."""
    with pytest.raises(ValueError, match="one integer for each of the 3 betas"):
        ForwardProcess.from_betas([0.1, 0.2, 0.3], timesteps=timesteps)


@pytest.mark.parametrize("indices", [[], [0.0, 1.0], [[0, 1]], [True, False]], ids=str)
def test_indices_that_are_no_list_of_integers(indices):
    """Indices to keep must be a non-empty list of integers."""
    with pytest.raises(ValueError, match="`indices` must be a non-empty list of integers"):
        process().respace(indices)


@pytest.mark.parametrize("indices", [[3, 1], [1, 1], [-1, 3], [0, 40]], ids=str)
def test_indices_out_of_order_or_range(indices):
    """Indices to keep must ascend strictly within the chain; the message gives its range and what came."""
    with pytest.raises(ValueError, match=r"strictly ascending within 0 \.\. 39") as error:
        process().respace(indices)
    assert str(indices) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_tables_in_half_precision_are_refused(dtype):
    """Tables are float32 or float64: half precision would lose the first steps' noise."""
    with pytest.raises(ValueError, match="`dtype` must be torch.float32 or torch.float64"):
        process().to(dtype=dtype)


def test_to_without_a_dtype_keeps_it():
    """Moving alone casts nothing."""
    assert process().to("cpu").betas.dtype == torch.float64
    assert process().to("cpu", torch.float32).to("cpu").betas.dtype == torch.float32


def test_steps_outside_the_chain_are_refused_by_every_distribution():
    """A negative index would silently count from the end, and a later s would give the logarithm of nothing."""
    q, x = process(), randn(2, 3)
    for t in (torch.tensor([-1, 2]), torch.tensor([0, len(q)])):
        for distribution in (
            lambda t: q.q_marginal(x, t),
            lambda t: q.q_posterior(x, x, t),
            lambda t: q.q_transition(x, t),
        ):
            with pytest.raises(IndexError):
                distribution(t)
    for s in (torch.tensor([5, 5]), torch.tensor([7, 0]), torch.tensor([-2, 0])):
        with pytest.raises(IndexError, match="`s`"):
            q.q_posterior(x, x, torch.tensor([5, 5]), s)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_integers_are_not_diffused(dtype):
    """Levels 0 .. 255 give a plausible x_t: data and noise must be floating point."""
    forward, t = ForwardProcess.from_betas([0.1, 0.2]), torch.tensor([1])
    levels, noise = torch.ones(1, 1, 2, 2, dtype=dtype), torch.zeros(1, 1, 2, 2)
    for x_0, epsilon in ((levels, noise), (noise, levels)):
        with pytest.raises(TypeError, match=r"floating point.*2 / \(n - 1\) - 1"):
            forward.diffuse(x_0, t, epsilon)
