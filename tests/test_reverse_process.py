"""The reverse process against the formulas in numpy, for every prediction and variance type, and its errors."""

import functools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_vlb import ForwardProcess, ReverseProcess, make_betas, rescale_betas_zero_snr, vlb_loss, vlb_term
from ddpm_vlb.reverse_process import PREDICTION_TYPES, VARIANCE_TYPES

BETAS = reference.linear_betas(40, 0.002, 0.2)
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
SHAPES = [(3, 5), (3, 2, 7), (3, 2, 4, 4), (3, 2, 2, 3, 4)]


def randn(*shape, seed=0, dtype=torch.float64):
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def process(prediction="epsilon", variance="fixed_small", indices=None, **options):
    """p of the test's chain, or of a respaced one."""
    q = ForwardProcess.from_betas(BETAS)
    return ReverseProcess(q if indices is None else q.respace(indices), prediction, variance, **options)


def output_for(x_t, variance, seed=5):
    """A network's output of the right number of channels."""
    channels = x_t.shape[1] * (2 if "learned" in variance else 1)
    return randn(x_t.shape[0], channels, *x_t.shape[2:], seed=seed, dtype=x_t.dtype)


@pytest.mark.parametrize("indices", [None, [0, 3, 4, 20, 39], [39]], ids=["chain", "respaced", "one-step"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.4])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_p_follows_the_formulas(prediction, variance, clip, indices):
    """Mean, log variance and x_0 estimate of p at every step: DDPM eq. 7 and 11, iDDPM eq. 15, clipped or not."""
    tab = reference.tables(BETAS if indices is None else reference.respaced_betas(BETAS, indices))
    options = {"clip_sample": False} if clip is None else {"clip_sample_range": clip}
    p = process(prediction, variance, indices, **options)
    t, x_t = torch.arange(len(tab.betas)), randn(len(tab.betas), 3, 2, 2)
    output = output_for(x_t, variance)
    mean, log_variance, x_0 = reference.p(tab, prediction, variance, output.numpy(), x_t.numpy(), t.numpy(), clip)
    actual = p(output, x_t, t)
    np.testing.assert_allclose(actual.x_0, x_0, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual.p.mean, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual.p.log_variance, log_variance, rtol=1e-9, atol=1e-12)
    assert actual.p.log_variance.shape == x_t.shape


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_target_is_what_predicts_the_data(prediction):
    """An output equal to the target gives back x_0, and p's mean is then the posterior's, at every step."""
    p, t, x_0 = process(prediction, clip_sample=False), torch.arange(40), randn(40, 3, 2)
    diffused = p.forward.diffuse(x_0, t, randn(40, 3, 2, seed=1))
    target = p.target(diffused)
    tab = reference.tables(BETAS)
    expected = reference.target(tab, prediction, x_0.numpy(), t.numpy(), diffused.noise.numpy())
    np.testing.assert_allclose(target, expected, rtol=1e-9, atol=1e-12)
    result = p(target, diffused.x_t, t)
    torch.testing.assert_close(result.x_0, x_0, rtol=1e-10, atol=1e-12)
    posterior = p.forward.q_posterior(x_0, diffused.x_t, t)
    torch.testing.assert_close(result.p.mean, posterior.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.p.log_variance, posterior.log_variance, rtol=1e-12, atol=0)


def test_range_of_learned_variance():
    """v = -1 gives log betatilde, v = 1 gives log beta, and v is not clamped beyond (iDDPM eq. 15)."""
    p, q = process(variance="learned_range"), ForwardProcess.from_betas(BETAS)
    t, x_t = torch.arange(40), randn(40, 1)
    for v, expected in [
        (-1.0, q.posterior_log_variance),
        (1.0, q.log_betas),
        (3.0, 2 * q.log_betas - q.posterior_log_variance),
    ]:
        output = torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, v)], dim=1)
        torch.testing.assert_close(p(output, x_t, t).p.log_variance[:, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("indices", [[0, 1, 39], [5, 30, 39], [39]], ids=str)
def test_first_step_of_fixed_variances(indices):
    """fixed_small and fixed_large both borrow the chain's second betatilde at its first step (one step: beta)."""
    q, x_t = ForwardProcess.from_betas(BETAS).respace(indices), randn(1, 2)
    expected = q.posterior_log_variance[0].expand(1, 2)
    for variance in ("fixed_small", "fixed_large"):
        actual = process(variance=variance, indices=indices)(x_t, x_t, torch.tensor([0])).p.log_variance
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_log_aliases(variance):
    """The names with `_log` mean the same as those without."""
    t, x_t = torch.arange(40), randn(40, 2)
    plain, alias = process(variance=variance)(x_t, x_t, t), process(variance=f"{variance}_log")(x_t, x_t, t)
    assert torch.equal(plain.p.mean, alias.p.mean) and torch.equal(plain.p.log_variance, alias.p.log_variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_int_t_equals_tensor_t(prediction, variance, dtype):
    """One Python int for the whole batch means a tensor of it."""
    p, x_t = process(prediction, variance).to(dtype=dtype), randn(3, 2, 4, dtype=dtype)
    output = output_for(x_t, variance)
    for step in (0, 1, 17, 39):
        by_int, by_tensor = p(output, x_t, step), p(output, x_t, torch.full((3,), step))
        for a, b in [
            (by_int.p.mean, by_tensor.p.mean),
            (by_int.p.log_variance, by_tensor.p.log_variance),
            (by_int.x_0, by_tensor.x_0),
        ]:
            assert a.dtype == b.dtype == dtype and a.shape == b.shape
            tolerance = 1e-6 if dtype == torch.float32 else 1e-14
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, variance):
    """Vectors, signals, images and volumes: the same numbers as the flattened data give, channel axis first."""
    p, t, x_t = process(variance=variance), torch.tensor([0, 11, 39]), randn(*shape)
    output = output_for(x_t, variance)
    flat = functools.partial(torch.flatten, start_dim=1)
    actual, vector = p(output, x_t, t), p(flat(output), flat(x_t), t)
    for full, expected in [
        (actual.p.mean, vector.p.mean),
        (actual.p.log_variance, vector.p.log_variance),
        (actual.x_0, vector.x_0),
    ]:
        assert full.shape == x_t.shape and torch.equal(flat(full), expected)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("ratio", "maximum"), [(0.995, 1.0), (0.5, 1.5), (0.9, 100.0), (1.0, 2.0), (0.0, 3.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_thresholding(shape, ratio, maximum, clip):
    """x_0 is clamped at each image's quantile s of |x_0|, s in [1, maximum], and divided by s (numpy's quantile)."""
    options = {"dynamic_thresholding_ratio": ratio, "sample_max_value": maximum, "clip_sample": clip}
    p = process("sample", thresholding=True, **options)
    scale = torch.tensor([0.1, 1.5, 20.0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    x_0 = scale * randn(*shape)
    s = np.quantile(np.abs(x_0.flatten(1).numpy()), ratio, axis=1).clip(1, maximum).reshape(scale.shape)
    actual = p(x_0, randn(*shape, seed=1), torch.tensor([0, 11, 39])).x_0
    np.testing.assert_allclose(actual, np.clip(x_0.numpy(), -s, s) / s, rtol=1e-12, atol=0)


def test_thresholding_comes_before_the_mean():
    """The thresholded x_0, not the raw one, makes p's mean."""
    p, t = process("sample", thresholding=True), torch.tensor([7])
    x_0, x_t = 10 * randn(1, 3, 4), randn(1, 3, 4, seed=1)
    prediction = p(x_0, x_t, t)
    assert float(prediction.x_0.abs().max()) == 1
    torch.testing.assert_close(prediction.p.mean, p.forward.q_posterior(prediction.x_0, x_t, t).mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variance", VARIANCES)
def test_half_precision_outputs_are_promoted(variance, dtype):
    """p is in float32 when output and x_t are in half precision, and equal to that of the promoted tensors."""
    p, x_t = process(variance=variance).to(dtype=torch.float32), randn(3, 2, 4).to(dtype)
    output, t = output_for(x_t.double(), variance).to(dtype), torch.tensor([0, 11, 39])
    half, single = p(output, x_t, t), p(output.float(), x_t.float(), t)
    for a, b in [(half.p.mean, single.p.mean), (half.p.log_variance, single.p.log_variance), (half.x_0, single.x_0)]:
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("variance", VARIANCES)
def test_dtypes_in_turn(variance):
    """What one process remembers of a step serves float32, float64 and half precision calls in any order."""
    p, x_t = process(variance=variance), randn(3, 2, 4)
    output = output_for(x_t, variance)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        actual = p(output.to(dtype), x_t.to(dtype), 11).p
        fresh = process(variance=variance)(output.to(dtype), x_t.to(dtype), torch.full((3,), 11)).p
        assert actual.mean.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.mean, fresh.mean)
        torch.testing.assert_close(actual.log_variance, fresh.log_variance)


@pytest.mark.parametrize("variance", VARIANCES)
def test_half_output_with_float32_input(variance):
    """An output in bfloat16, as under autocast, beside x_t in float32 gives a float32 p, for int and tensor t."""
    p, x_t = process(variance=variance).to(dtype=torch.float32), randn(3, 2, 4, dtype=torch.float32)
    output = output_for(x_t, variance).bfloat16()
    for t in (11, torch.full((3,), 11)):
        prediction = p(output, x_t, t)
        expected = p(output.float(), x_t, t)
        assert prediction.p.mean.dtype == prediction.p.log_variance.dtype == prediction.x_0.dtype == torch.float32
        assert torch.equal(prediction.p.mean, expected.p.mean)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_terminal_snr(prediction, variance):
    """With zero-terminal SNR, x_0- and v-prediction work at every step: p, the bound and its gradient are finite."""
    q = ForwardProcess.from_betas(rescale_betas_zero_snr(make_betas("linear", 20)))
    p, x_0, t = ReverseProcess(q, prediction, variance), randn(20, 2, 4).clamp(-1, 1), torch.arange(20)
    x_0 = ((x_0 + 1) * 127.5).round() / 127.5 - 1
    diffused = q.diffuse(x_0, t, randn(20, 2, 4, seed=1))
    output = output_for(x_0, variance).requires_grad_()
    result = p(output, diffused.x_t, t)
    assert all(bool(x.isfinite().all()) for x in (result.p.mean, result.p.log_variance, result.x_0))
    assert bool(vlb_term(p, output, diffused).isfinite().all())
    loss = vlb_loss(p, output, diffused)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(output.grad.isfinite().all())


def test_zero_terminal_snr_with_epsilon():
    """Epsilon-prediction cannot recover x_0 from pure noise: the error says so and names what can."""
    q = ForwardProcess.from_betas(rescale_betas_zero_snr(make_betas("linear", 20)))
    with pytest.raises(ValueError, match="zero-terminal SNR.*v_prediction.*'sample'"):
        ReverseProcess(q, "epsilon")
    assert len(ReverseProcess(q.respace(range(19)), "epsilon").forward) == 19


def test_betas_of_almost_one():
    """Every prediction and variance type works on a chain of betas 0.999, whose SNR at the end is 1e-15."""
    q = ForwardProcess.from_betas([0.999] * 5)
    x_t, t = randn(5, 2), torch.arange(5)
    for prediction in PREDICTION_TYPES:
        for variance in VARIANCES:
            result = ReverseProcess(q, prediction, variance)(output_for(x_t, variance), x_t, t)
            assert bool(result.p.mean.isfinite().all()) and bool(result.p.log_variance.isfinite().all())


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.sets(st.integers(0, 39), min_size=1), st.sampled_from(PREDICTION_TYPES), st.sampled_from(VARIANCES))
def test_respacing(chosen, prediction, variance):
    """`reverse.respace` is the reverse process of `forward.respace`, with everything else unchanged."""
    indices = sorted(chosen)
    short = process(prediction, variance, clip_sample_range=0.7, levels=17).respace(indices)
    direct = process(prediction, variance, indices, clip_sample_range=0.7, levels=17)
    x_t, t = randn(len(indices), 2), torch.arange(len(indices))
    output = output_for(x_t, variance)
    a, b = short(output, x_t, t), direct(output, x_t, t)
    assert torch.equal(a.p.mean, b.p.mean) and torch.equal(a.p.log_variance, b.p.log_variance)
    assert short.forward.timesteps.tolist() == indices and short.levels == 17 and short.clip_sample_range == 0.7


def test_to_casts_and_keeps_the_rest():
    """`to` casts the tables and keeps the configuration; half precision is refused as by the forward process."""
    p = process("v_prediction", "learned", levels=None, clip_sample=False).to("cpu", torch.float32)
    assert p.forward.betas.dtype == torch.float32
    kept = (p.prediction_type, p.variance_type, p.levels, p.clip_sample)
    assert kept == ("v_prediction", "learned", None, False)
    with pytest.raises(ValueError, match="`dtype` must be torch.float32 or torch.float64"):
        p.to(dtype=torch.float16)


@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_learns_variance(variance):
    """Only "learned" and "learned_range" want 2 C channels."""
    assert process(variance=variance).learns_variance == (variance in ("learned", "learned_range"))


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_too_few_channels(variance):
    """A network without a variance half is refused with the number of `out_channels` to build it with."""
    message = rf"variance_type='{variance}'.*6 output channels, twice the 3.*out_channels=6.*fixed variance"
    with pytest.raises(ValueError, match=message):
        process(variance=variance)(randn(2, 3, 4, 4), randn(2, 3, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_too_many_channels(variance):
    """A network with a variance half that a fixed variance would not use is refused likewise."""
    message = rf"variance_type='{variance}'.*3 output channels, the 3.*out_channels=3.*learned variance"
    with pytest.raises(ValueError, match=message):
        process(variance=variance)(randn(2, 6, 4, 4), randn(2, 3, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 3, 4, 1), (2, 3, 4), (2, 1, 4, 4)], ids=str)
def test_output_of_another_shape(shape):
    """An output that would broadcast against x_t is refused, with both shapes."""
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*output of shape") as error:
        process()(randn(*shape), randn(2, 3, 4, 4), torch.tensor([0, 1]))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("name", "choices"), [("prediction_type", PREDICTION_TYPES), ("variance_type", VARIANCE_TYPES)], ids=str
)
def test_unknown_names(name, choices):
    """An unknown prediction or variance type is refused with the value and all the choices."""
    with pytest.raises(ValueError, match=f"`{name}` must be one of") as error:
        ReverseProcess(ForwardProcess.from_betas(BETAS), **{name: "fixed_medium"})
    assert "'fixed_medium'" in str(error.value) and all(f"'{choice}'" in str(error.value) for choice in choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "`levels` must be an integer of at least 2, or None.*1"),
        ({"levels": True}, "`levels` must be an integer.*True"),
        ({"levels": 256.0}, "`levels` must be an integer.*256.0"),
        ({"clip_sample_range": 0.0}, "`clip_sample_range` must be positive.*0.0"),
        ({"clip_sample_range": float("nan")}, "`clip_sample_range` must be positive.*nan"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "`dynamic_thresholding_ratio`.*1.5"),
        ({"thresholding": True, "sample_max_value": 0.0}, "`sample_max_value`.*0.0"),
    ],
    ids=str,
)
def test_impossible_numbers(options, message):
    """Numbers outside their range are refused with their value."""
    with pytest.raises(ValueError, match=message):
        process(**options)


def test_t_of_a_floating_point_dtype():
    """Floating point chain indices are refused by the reverse process too."""
    with pytest.raises(TypeError, match="integer tensor of chain indices"):
        process()(randn(2, 3), randn(2, 3), torch.tensor([0.0, 1.0]))


def test_an_output_of_more_digits_keeps_them():
    """A float64 output at a float32 state is not cut to the state's type."""
    chain = ForwardProcess.from_betas(make_betas("linear", 10))
    reverse = ReverseProcess(chain, clip_sample=False).to(dtype=torch.float32)
    output = torch.full((1, 1, 2, 2), 1 + 1e-12, dtype=torch.float64)
    prediction = reverse(output, torch.zeros(1, 1, 2, 2), 3)
    assert prediction.p.mean.dtype == prediction.x_0.dtype == torch.float64
    assert bool((prediction.x_0 != reverse(torch.ones_like(output), torch.zeros(1, 1, 2, 2), 3).x_0).all())
