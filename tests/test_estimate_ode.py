"""A data set's likelihood under the probability-flow ODE: exact where the model is, with errors that hold."""

import math
from dataclasses import replace

import pytest
import torch
from correlated import (
    COVARIANCE,
    SHAPE,
    ExactNetwork,
    even_chain,
    log_normal,
    noised,
    normal,
    runge_kutta_weights,
    slopes,
)
from scipy.stats import t as student
from torch import Tensor, nn

from ddpm_vlb import (
    Diffused,
    ODEEstimate,
    estimate_ode,
    image_generator,
    nats_to_bits_per_dim,
    ode_log_prob,
    vlb_term,
)

UNIT = 1 / (4 * math.log(2))


def on_levels(number: int, levels: int = 17) -> Tensor:
    x = normal(number, COVARIANCE).clamp(-1, 1)
    return ((x + 1) / 2 * (levels - 1)).round() * 2 / (levels - 1) - 1


# --- the estimate


def test_each_image_of_isotropic_data_has_its_own_likelihood():
    """Decoder, density and signs are exact there and the draw of x_1 cancels: the value is the image's -log q(x_0)."""
    variance = 0.3 * torch.eye(4).double()
    reverse = even_chain(0.05, 400, 65)
    posterior = 0.3 * 0.05**2 / (0.3 + 0.05**2)
    reverse = replace(reverse, decoder_log_variance=math.log(posterior))
    x_0 = normal(20, variance)
    estimate = estimate_ode(ExactNetwork(reverse, variance), reverse, x_0.split(20))
    exact = -log_normal(x_0, variance) * UNIT
    torch.testing.assert_close(estimate.per_image, exact, rtol=0, atol=1e-4)
    assert estimate.bits_per_dim == pytest.approx(float(exact.mean()), abs=1e-4)
    assert estimate.probe_se < 1e-9 and estimate.image_se == pytest.approx(float(exact.std()) / 20**0.5, rel=1e-3)


def test_the_levels_probabilities_sum_to_less_than_one():
    """On one dimension of five levels: each value bounds -log P of its level from above, and closely."""
    variance = 0.3 * torch.eye(1).double()
    reverse = even_chain(0.15, 100, 33, levels=5)
    reverse = replace(reverse, decoder_log_variance=2 * math.log(0.15))
    x_0 = torch.linspace(-1, 1, 5).double().repeat(400).reshape(-1, 1, 1)
    network = ExactNetwork(reverse, variance)
    bits = estimate_ode(network, reverse, [x_0], probes=None).per_image.reshape(400, 5).mean(0)
    assert 0.8 < float((2**-bits).sum()) < 1.0


@pytest.mark.parametrize("options", [{}, {"clip_sample": True, "clip_sample_range": 0.3}])
def test_the_estimate_is_equation_4(options):
    """Each image's x_1 is its own generator's first draw; the decoder is that of the bound and clips as it does."""
    reverse = even_chain(0.1, 20, 9, levels=17, **options)
    network, x_0 = ExactNetwork(reverse), on_levels(6)
    noise = torch.stack([torch.randn(SHAPE, generator=image_generator(3, i)) for i in range(6)]).double()
    diffused: Diffused = reverse.forward.diffuse(x_0, torch.zeros(6, dtype=torch.int64), noise)
    log_q = reverse.forward.q_marginal(x_0, diffused.t).log_prob(diffused.x_t).flatten(1).sum(1)
    decoder = vlb_term(reverse, network(diffused.x_t, diffused.t), diffused)
    nats = log_q - ode_log_prob(network, reverse, diffused.x_t, probes=None)[0] + decoder
    network.rows = 0
    estimate = estimate_ode(network, reverse, [x_0], probes=None, seed=3)
    torch.testing.assert_close(estimate.per_image, nats_to_bits_per_dim(nats, 4), rtol=1e-10, atol=1e-10)
    assert network.rows == 6 * estimate.network_calls_per_image == 6 * 16


def test_values_do_not_depend_on_the_batches():
    """Nor on the size of the network's calls, with each image's own conditioning."""
    reverse = even_chain(0.1, 20, 5, levels=17)
    exact, sizes = ExactNetwork(reverse), set()

    def network(x_t, timesteps, scale):
        sizes.add(len(x_t))
        return exact(x_t, timesteps) * scale.reshape(-1, 1, 1, 1)

    x_0, scale = on_levels(7), 1 + torch.arange(7).double() / 10
    pairs = [(x_0[i], {"scale": scale[i]}) for i in (slice(0, 4), slice(4, 7))]
    apart = estimate_ode(network, reverse, pairs, values_per_call=9)
    assert sizes == {2, 1}
    together = estimate_ode(network, reverse, [(x_0, {"scale": scale})])
    torch.testing.assert_close(apart.per_image, together.per_image, rtol=1e-10, atol=1e-10)
    other = estimate_ode(network, reverse, [(x_0, {"scale": scale})], seed=1)
    assert float((other.per_image - together.per_image).abs().min()) > 0


def test_float32_is_enough():
    """The same draws give the same values to five digits."""
    reverse = even_chain(0.1, 20, 9, levels=17)
    network, x_0 = ExactNetwork(reverse), on_levels(6)
    exact = estimate_ode(network, reverse, [x_0])
    single = estimate_ode(network, reverse.to(dtype=torch.float32), [x_0.float()])
    torch.testing.assert_close(single.per_image, exact.per_image, rtol=1e-5, atol=1e-5)


# --- its errors


def test_the_interval_covers_the_population():
    """95 % intervals of both errors hold the expectation over data, draws and signs in 90 to 99 % of 200 replicates.

    Each has 16 images, and so 15 degrees of freedom. The expectation is made of Gaussian entropies, E log q(x_1 | x_0)
    and E -log p(x_1), and of the decoder's with the mean squared error. The chain is short, which costs hundredths of
    the standard error.
    """
    reverse = replace(even_chain(0.4, 20, 7), decoder_log_variance=2 * math.log(0.3))
    network, forward = ExactNetwork(reverse), reverse.forward
    posterior = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + torch.eye(4) / 0.4**2)
    noise = float(forward.log_one_minus_alphas_cumprod[0])
    nats = 0.5 * float(torch.logdet(noised(reverse)[0])) - 2 * noise
    nats += 2 * math.log(2 * math.pi * 0.3**2) + 0.5 * float(posterior.trace()) / 0.3**2
    data, covered = normal(200 * 16, COVARIANCE).split(16), 0
    for seed, x_0 in enumerate(data):
        estimate = estimate_ode(network, reverse, [x_0], seed=seed)
        error = math.hypot(estimate.probe_se, estimate.image_se)
        covered += abs(estimate.bits_per_dim - nats * UNIT) < student.ppf(0.975, 15) * error
    assert 0.90 <= covered / 200 <= 0.99


def test_the_probes_error_is_that_of_their_signs():
    """The variance of one estimate is a sum over stages (closed form), over probes and images of their mean."""
    reverse = even_chain(0.1, 20, 9)
    stages, weights = runge_kutta_weights(reverse)
    off = weights[:, None, None] * slopes(reverse)[stages] * (1 - torch.eye(4))
    variance = float(2 * off.square().sum()) * UNIT**2
    estimate = estimate_ode(ExactNetwork(reverse), reverse, [normal(400, COVARIANCE)], probes=3)
    # 800 degrees of freedom: 4 errors of an SD are 10 %.
    assert estimate.probe_se == pytest.approx((variance / 3 / 400) ** 0.5, rel=0.1)


def test_errors_where_one_is_not_known():
    """The exact divergence has none; one probe's is in the images' error; one image has no spread."""
    reverse = even_chain(0.1, 20, 9)
    network, x_0 = ExactNetwork(reverse), normal(30, COVARIANCE)
    exact = estimate_ode(network, reverse, [x_0], probes=None)
    assert exact.probe_se == 0
    one = estimate_ode(network, reverse, [x_0], probes=1)
    assert math.isnan(one.probe_se)
    assert one.image_se == pytest.approx(float(one.per_image.std()) / 30**0.5)
    alone = estimate_ode(network, reverse, [x_0[:1]])
    assert alone.probe_se > 0 and math.isnan(alone.image_se)


def test_it_says_what_it_is():
    """As the bound's estimate does."""
    estimate = ODEEstimate(1.8269, 0.0017, 0.0132, torch.zeros(297), 64)
    assert str(estimate) == "1.827 +- 0.002 (probes) +- 0.013 (images) bits/dim, 297 images"


# --- what is refused


@pytest.mark.parametrize(
    "batches, message",
    [
        (torch.zeros(2, *SHAPE), r"pass `\[x_0\]`"),
        ([], "`batches` holds no images"),
        ([torch.full((2, *SHAPE), 0.01)], "must lie on the 17 levels"),
        ([(torch.zeros(2, *SHAPE), {"scale": torch.ones(3)})], "one row for each of 2 images"),
    ],
)
def test_other_data_is_refused(batches, message):
    """As by the bound's estimate, and before a network call."""
    reverse = even_chain(0.1, 20, 5, levels=17)
    with pytest.raises(ValueError, match=message):
        estimate_ode(lambda x_t, timesteps: pytest.fail("called"), reverse, batches)


def test_other_probes_networks_and_chains_are_refused():
    """As by the density."""
    reverse = even_chain(0.1, 20, 5)
    x_0, network = [normal(2, COVARIANCE)], ExactNetwork(reverse)
    with pytest.raises(ValueError, match="`probes`"):
        estimate_ode(network, reverse, x_0, probes=0)
    with pytest.raises(ValueError, match="training mode"):
        estimate_ode(nn.Sequential(nn.Dropout(0.1)).train(), reverse, x_0)
    with pytest.raises(ValueError, match="odd number of steps"):
        estimate_ode(network, even_chain(0.1, 20, 6), x_0)


def test_what_is_not_finite_names_the_image_s_position():
    """In the data, not in its batch."""
    reverse = even_chain(0.1, 20, 5)

    def network(x_t, timesteps):
        return torch.where(x_t.abs() > 100, math.nan, x_t)

    x_0 = normal(4, COVARIANCE)
    x_0[2] = 1000
    with pytest.raises(FloatingPointError, match=r"the model's output at chain index t=0 \(timestep 0\), image 2"):
        estimate_ode(network, reverse, x_0.split(2))
