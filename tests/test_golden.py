"""Agreement with numbers that another implementation computed (tests/golden/README.md), in float64 to 1e-9.

The reference's own values at t = 0 use an approximate Gaussian CDF and are left out: there the exact ones stand in.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from golden_cases import GOLDEN, LOOPS, PREDICTION, STEPS, VARIANCE, closed_form, forward, golden, inputs, reverse

from ddpm_vlb import (
    DiagonalGaussian,
    Diffused,
    ForwardProcess,
    ReverseProcess,
    evaluate_vlb,
    hybrid_loss,
    nats_to_bits_per_dim,
    prior_kl,
    simple_loss,
    vlb_loss,
    vlb_term,
)

DIMS = 3 * 4 * 4
TABLES = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "sqrt_alphas_cumprod": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod": "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alphas_cumprod",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_coef_x_0",
    "posterior_mean_coef2": "posterior_mean_coef_x_t",
}
SPACED = [
    key.removesuffix(".total_bpd.f64").split("|")[1:]
    for key in np.load(GOLDEN / "spaced.npz")
    if key.endswith("total_bpd.f64")
]
SPECS = sorted({spec for spec, _ in SPACED})


def close(actual, expected, rtol=1e-9, atol=0.0):
    """Relative error of at most 1e-9; `atol` only for values that cross zero."""
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol)


def steps_of(file, schedule):
    """(step, row) pairs of a file that holds one row for each of several steps."""
    return [(int(t), row) for row, t in enumerate(golden(file)[f"{schedule}.t"])]


def batch_of(t):
    """The chain index `t` for the batch of three images."""
    return torch.full((3,), t)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("schedule", STEPS)
def test_tables(schedule, table):
    """Every table of the schedules equals the reference's, from its betas and from `make_betas` alike."""
    expected = golden("tables")[f"{schedule}.{table}"]
    given = ForwardProcess.from_betas(golden("tables")[f"{schedule}.betas"])
    # log(1 - abar) approaches zero at the noisy end, where the reference has rounded 1 - abar to 1e-16.
    atol = 1e-15 if table == "log_one_minus_alphas_cumprod" else 0.0
    close(getattr(given, TABLES[table]), expected, atol=atol)
    close(getattr(forward(schedule), TABLES[table]), expected, atol=atol)


@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_forward_process(schedule):
    """x_t, q(x_t | x_0) and the posterior q(x_{t-1} | x_t, x_0), DDPM eq. 4, 6 and 7."""
    q, data = forward(schedule), golden("q_f64")
    for step, row in steps_of("q_f64", schedule):
        diffused = q.diffuse(inputs("x0"), batch_of(step), inputs("noise"))
        marginal = q.q_marginal(inputs("x0"), batch_of(step))
        posterior = q.q_posterior(inputs("x0"), diffused.x_t, batch_of(step))
        for name, actual in {
            "x_t": diffused.x_t,
            "q_mean": marginal.mean,
            "q_log_variance": marginal.log_variance,
            "posterior_mean": posterior.mean,
            "posterior_log_variance_clipped": posterior.log_variance,
        }.items():
            close(actual, data[f"{schedule}.{name}"][row], atol=1e-12)
        close(q.posterior_variance[step].expand(3, 3, 4, 4), data[f"{schedule}.posterior_variance"][row])


@pytest.mark.parametrize("clip", ["clip0", "clip1"])
@pytest.mark.parametrize("variance", VARIANCE)
@pytest.mark.parametrize("mean", PREDICTION)
@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_reverse_process(schedule, mean, variance, clip):
    """Mean, log variance, x_0 estimate and a sample of p(x_{t-1} | x_t), DDPM eq. 7 and 11, iDDPM eq. 15."""
    p, network, data = reverse(schedule, mean, variance, clip), closed_form(schedule, "toy", variance), golden("q_f64")
    expected = golden("p_mean_variance_f64")
    for step, row in steps_of("p_mean_variance_f64", schedule):
        x_t, t = torch.from_numpy(data[f"{schedule}.x_t"][row]), batch_of(step)
        distribution, x_0 = p(network(x_t, t), x_t, t)
        case = f"{schedule}.{mean}.{variance}.{clip}"
        close(distribution.mean, expected[f"{case}.mean"][row], atol=1e-12)
        close(x_0, expected[f"{case}.pred_xstart"][row], atol=1e-12)
        # One array serves them all: neither the prediction type nor the clip enters the log variance.
        close(distribution.log_variance, expected[f"{schedule}.EPSILON.{variance}.clip1.log_variance"][row])
        if clip == "clip1":
            noise = inputs("noise_seq")[0]
            sample = distribution.sample(noise if step > 0 else torch.zeros_like(noise))
            close(sample, expected[f"{case}.p_sample"][row], atol=1e-12)


@pytest.mark.parametrize("clip", ["clip0", "clip1"])
@pytest.mark.parametrize("variance", VARIANCE)
@pytest.mark.parametrize("mean", PREDICTION)
@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_terms_of_the_bound(schedule, mean, variance, clip):
    """L_{t-1} for t > 0, and L_0 with the exact Gaussian CDF, in bits/dim, DDPM eq. 5 and 13."""
    p, network = reverse(schedule, mean, variance, clip), closed_form(schedule, "toy", variance)
    case = f"{schedule}.{mean}.{variance}.{clip}"
    for step, row in steps_of("vb_terms_f64", schedule):
        diffused = p.forward.diffuse(inputs("x0"), batch_of(step), inputs("noise"))
        actual = nats_to_bits_per_dim(vlb_term(p, network(diffused.x_t, batch_of(step)), diffused), DIMS)
        exact = golden("exact_decoder_f64")[f"vb.{case}.decoder_bits_exact"]
        close(actual, exact if step == 0 else golden("vb_terms_f64")[f"{case}.output"][row])


@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_prior(schedule):
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim."""
    actual = nats_to_bits_per_dim(prior_kl(reverse(schedule, "EPSILON", "FIXED_SMALL", "clip0"), inputs("x0")), DIMS)
    close(actual, golden("bpd_loop_f64")[f"prior_bpd.{schedule}"])


def training_runs(schedule, mean, variance, loss):
    """For each batch of the golden runs: its row, its steps, the loss and its gradient by the network's output."""
    p, network = reverse(schedule, mean, variance, "clip0"), closed_form(schedule, "toy", variance)
    for row, t in enumerate(torch.from_numpy(golden("training_losses_f64")[f"{schedule}.t"])):
        diffused = p.forward.diffuse(inputs("x0"), t, inputs("noise"))
        output = network(diffused.x_t, t).requires_grad_()
        values = loss(p, output, diffused)
        values.mean().backward()
        yield row, t.numpy(), values.detach(), output.grad


@pytest.mark.parametrize("variance", VARIANCE)
@pytest.mark.parametrize("mean", PREDICTION)
@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_simple_loss(schedule, mean, variance):
    """`simple_loss` is the reference's mean squared error, and with a fixed variance its MSE loss and gradient."""
    expected = golden("training_losses_f64")
    case = f"{schedule}.{mean}.{variance}.MSE"

    def loss(p: ReverseProcess, output: torch.Tensor, diffused: Diffused) -> torch.Tensor:
        """Of the mean half alone, where the other one is not to stay untrained."""
        return simple_loss(replace(p, variance_type="fixed_small"), output[:, : diffused.x_t.shape[1]], diffused)

    for row, _, values, grad in training_runs(schedule, mean, variance, loss):
        close(values, expected[f"{case}.mse"][row])
        if "FIXED" in variance:
            close(values, expected[f"{case}.loss"][row])
            close(grad, expected[f"{case}.grad_model_output"][row], atol=1e-12)


@pytest.mark.parametrize("kind", ["MSE", "RESCALED_MSE"])
@pytest.mark.parametrize("variance", ["LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", PREDICTION)
@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_hybrid_loss(schedule, mean, variance, kind):
    """`hybrid_loss` is MSE + 0.001 T vb with the mean frozen in vb (RESCALED_MSE); lambda = 1/T gives MSE + vb."""
    weight = 0.001 if kind == "RESCALED_MSE" else 1 / STEPS[schedule]
    expected, case = golden("training_losses_f64"), f"{schedule}.{mean}.{variance}.{kind}"
    for row, t, values, grad in training_runs(
        schedule, mean, variance, functools.partial(hybrid_loss, vlb_weight=weight)
    ):
        late = t > 0
        close(values[late], expected[f"{case}.loss"][row][late])
        close(grad[late], expected[f"{case}.grad_model_output"][row][late], atol=1e-12)
        # The mean half learns from the squared error alone, also at t = 0.
        close(grad[:, :3], expected[f"{case}.grad_model_output"][row][:, :3], atol=1e-12)


@pytest.mark.parametrize("variance", VARIANCE)
@pytest.mark.parametrize("mean", PREDICTION)
@pytest.mark.parametrize("schedule", ["linear50", "linear1000"])
def test_vlb_loss(schedule, mean, variance):
    """`vlb_loss` is the reference's RESCALED_KL, with its gradient, and T times its KL."""
    expected, case = golden("training_losses_f64"), f"{schedule}.{mean}.{variance}"
    for row, t, values, grad in training_runs(schedule, mean, variance, vlb_loss):
        late = t > 0
        close(values[late], expected[f"{case}.RESCALED_KL.loss"][row][late])
        close(values[late] / STEPS[schedule], expected[f"{case}.KL.loss"][row][late])
        close(grad[late], expected[f"{case}.RESCALED_KL.grad_model_output"][row][late], atol=1e-12)


def noise_of(steps):
    """The noise of the loops; the long one goes on where the stored one ends."""
    stored = golden("inputs")["noise_seq"]
    if steps <= len(stored):
        return stored[:steps]
    noise = np.random.default_rng(777).standard_normal((1000, 3, 3, 4, 4))
    assert np.array_equal(noise[: len(stored)], stored), "numpy's generator has changed its stream"
    return noise[:steps]


@pytest.mark.parametrize("case", LOOPS)
def test_whole_bound(case):
    """The bound of the whole chain, every term of it, with the exact decoder."""
    schedule, model, mean, variance, clip = case.split(".")
    noise = torch.from_numpy(noise_of(STEPS[schedule]))
    network = closed_form(schedule, model, variance)
    actual = evaluate_vlb(network, reverse(schedule, mean, variance, clip), inputs("x0"), noise=noise)
    exact, loops = golden("exact_decoder_f64"), golden("bpd_loop_f64")
    close(actual.bits_per_dim, exact[f"loop.{case}.total_bpd_exact"])
    close(nats_to_bits_per_dim(actual.terms[:, 0], DIMS), exact[f"loop.{case}.decoder_bits_exact"])
    close(nats_to_bits_per_dim(actual.prior, DIMS), loops[f"prior_bpd.{schedule}"])
    if f"{case}.vb" in loops:
        late = loops[f"{case}.vb"][:, -2::-1]  # from t = 1 up
        close(nats_to_bits_per_dim(actual.terms[:, 1:], DIMS), late)


@pytest.mark.parametrize("variance", VARIANCE)
def test_ancestral_sampling(variance):
    """Fifty steps of x_{t-1} = p.sample(noise), without noise in the last, arrive where the reference does."""
    p, network = reverse("linear50", "EPSILON", variance, "clip1"), closed_form("linear50", "gauss", variance)
    x = inputs("noise")
    for step in reversed(range(50)):
        noise = inputs("noise_seq")[step] if step > 0 else torch.zeros_like(x)
        x = p(network(x, batch_of(step)), x, step).p.sample(noise)
    close(x, golden("p_sample_loop_f64")[f"linear50.gauss.EPSILON.{variance}.clip1.sample"], atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_respaced_tables(spec):
    """A respaced chain has the reference's betas, marginals and posterior variances, and tells original timesteps."""
    data = {key.split("|")[2]: value for key, value in golden("spaced").items() if key.split("|")[1] == spec}
    q = forward("linear50").respace(data["timesteps"])
    assert q.timesteps.tolist() == data["timesteps"].tolist() == data["model_t"][::-1].tolist()
    close(q.betas, data["betas"])
    close(q.alphas_cumprod, data["alphas_cumprod"])
    close(q.posterior_variance, data["posterior_variance"])
    close(q.posterior_log_variance, data["posterior_log_variance_clipped"])


@pytest.mark.parametrize(("spec", "case"), SPACED)
def test_respaced_bound(spec, case):
    """The bound of a respaced chain: prior and t > 0 are the reference's, t = 0 has the exact decoder."""
    model, mean, variance, clip = case.split(".")
    data, prefix = golden("spaced"), f"linear50|{spec}"
    timesteps, network = data[f"{prefix}|timesteps"], closed_form("linear50", model, variance)
    p, noise = reverse("linear50", mean, variance, clip, timesteps), noise_of(len(timesteps))
    told = []

    def listening(x_t, t):
        told.extend(t.tolist())
        return network(x_t, t)

    actual = evaluate_vlb(listening, p, inputs("x0"), noise=torch.from_numpy(noise))
    assert set(told) == set(timesteps.tolist())
    expected = {name: data[f"{prefix}|{case}.{name}.f64"] for name in ("vb", "prior_bpd", "total_bpd")}
    bits = nats_to_bits_per_dim(actual.terms, DIMS)
    close(nats_to_bits_per_dim(actual.prior, DIMS), expected["prior_bpd"])
    close(bits[:, 1:], expected["vb"][:, -2::-1])
    close(actual.bits_per_dim - bits[:, 0], expected["total_bpd"] - expected["vb"][:, -1])

    tab = reference.tables(reference.respaced_betas(golden("tables")["linear50.betas"], timesteps))
    x_0, t = golden("inputs")["x0"], np.zeros(3, dtype=int)
    x_t = reference.diffuse(tab, x_0, t, noise[0])
    output = network(torch.from_numpy(x_t), torch.full((3,), int(timesteps[0]))).numpy()
    options = {"clip": 1.0 if clip == "clip1" else None}
    decoder = reference.vlb_term(tab, PREDICTION[mean], VARIANCE[variance], output, x_0, x_t, t, **options)
    close(actual.terms[:, 0], decoder)


def test_discretised_likelihood():
    """Exact log mass and gradients over a grid of levels, means and scales (256 levels)."""
    data = golden("disc_loglik")
    mean = torch.from_numpy(data["mean"]).requires_grad_()
    log_scale = torch.from_numpy(data["log_scale"]).requires_grad_()
    actual = DiagonalGaussian(mean, 2 * log_scale).discretized_log_prob(torch.from_numpy(data["x"]))
    actual.sum().backward()
    close(actual.detach(), data["exact"], atol=1e-10)
    close(mean.grad, data["exact_grad_mean"], atol=1e-10)
    close(log_scale.grad, data["exact_grad_log_scale"], atol=1e-10)
