"""What the losses cost a GPU in launches and waits, and that their numbers are the CPU's."""

from dataclasses import fields, replace

import pytest
import torch
from pretend_device import DEVICE, PretendDevice, put, values
from torch import nn

from ddpm_vlb import Diffused, ForwardProcess, ReverseProcess, hybrid_loss, simple_loss, vlb_loss, vlb_term

STEPS = torch.tensor([0, 1, 7, 0])
CASES = [
    *((loss, variance, 256) for loss in (vlb_term, vlb_loss) for variance in ("fixed_small", "learned_range")),
    *((loss, "learned", levels) for loss in (vlb_loss, hybrid_loss) for levels in (17, None)),
    (hybrid_loss, "learned_range", 256),
    (simple_loss, "fixed_large", 256),
]
named = pytest.mark.parametrize(("loss", "variance", "levels"), CASES)


def process(variance, levels=256, prediction="epsilon"):
    """p of a short chain, in float32 on the CPU."""
    forward = ForwardProcess.from_betas(torch.linspace(1e-4, 0.2, 8)).to(dtype=torch.float32)
    return ReverseProcess(forward, prediction, variance, levels=levels)


def batch(p):
    """A batch with decoder steps, both outer levels and the mean of two bins, and an output for it, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    levels = p.levels or 256
    x_0 = torch.randint(0, levels, (len(STEPS), 2, 4, 4), generator=generator) * (2 / (levels - 1)) - 1
    x_0[:, 0, 0, 0], x_0[:, 0, 0, 1] = -1, 1
    diffused = p.forward.diffuse(x_0, STEPS, torch.randn(x_0.shape, generator=generator))
    output = p.target(diffused) + 0.3 * torch.randn(x_0.shape, generator=generator)
    variance = [torch.randn(x_0.shape, generator=generator) - 4] if p.learns_variance else []
    return torch.cat([output, *variance], dim=1), diffused


def moved(p):
    """p on the device, which has no float64 for the root of its tables."""
    tables = {field.name: put(getattr(p.forward, field.name)) for field in fields(ForwardProcess)}
    tables["log_alphas_cumprod"] = p.forward.log_alphas_cumprod
    return replace(p, forward=ForwardProcess(**tables))


def on_device(diffused, keep=()):
    """The batch there, but for the fields to keep on the CPU."""
    return Diffused(*(x if name in keep else put(x) for name, x in zip(Diffused._fields, diffused, strict=True)))


def value_and_gradient(loss, p, output, diffused):
    """The losses, and the gradient of their sum by the network's output."""
    leaf = output.detach().requires_grad_()
    losses = loss(p, leaf, diffused)
    losses.mean().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("loss", "variance", "budget"),
    [(vlb_loss, "learned_range", 160), (hybrid_loss, "learned_range", 170), (vlb_loss, "fixed_small", 145)],
)
def test_launches_and_waits(loss, variance, budget, prediction):
    """Forward and backward of a batch with t = 0 rows: few launches, and nothing that the host waits for."""
    p = process(variance, prediction=prediction)
    output, diffused = batch(p)
    with PretendDevice():
        p, output, diffused = moved(p), put(output), on_device(diffused)
        loss(p, output, diffused)  # a process' first batch is looked at
    with PretendDevice() as device:
        value_and_gradient(loss, p, output, diffused)
    assert device.waits == []
    assert 0 < device.launches <= budget


@named
def test_numbers_are_the_cpu_s(loss, variance, levels):
    """The masked decoder of the whole batch gives the values and gradients of the rows at t = 0 alone."""
    p = process(variance, levels)
    output, diffused = batch(p)
    expected = value_and_gradient(loss, p, output, diffused)
    with PretendDevice():
        actual = value_and_gradient(loss, moved(p), put(output), on_device(diffused))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(values(ours), theirs, rtol=2e-6, atol=1e-7)


def test_what_is_masked_leaves_no_trace():
    """Where t > 0 the gradient is bit for bit that of a batch without decoder steps, for absurd variances too."""
    p = process("learned")
    output, diffused = batch(p)
    output[:, 2:] = torch.tensor([-80.0, -60.0, 80.0, 200.0]).reshape(-1, 1, 1, 1)
    rows = slice(1, 3)
    expected = value_and_gradient(lambda *a: vlb_loss(*a) / 2, p, output[rows], Diffused(*(x[rows] for x in diffused)))
    with PretendDevice():
        actual = value_and_gradient(vlb_loss, moved(p), put(output), on_device(diffused))
    assert bool(values(actual[1]).isfinite().all())
    assert torch.equal(values(actual[1])[rows], expected[1])
    assert torch.equal(values(actual[0])[rows], 2 * expected[0])


@named
def test_timesteps_may_stay_on_the_cpu(loss, variance, levels):
    """As in diffusers' `add_noise`, t is moved to the data."""
    p = process(variance, levels, "v_prediction")
    output, diffused = batch(p)
    with PretendDevice():
        p, output = moved(p), put(output)
        expected = loss(p, output, on_device(diffused))
        actual = loss(p, output, on_device(diffused, keep=("t",)))
    assert torch.equal(values(actual), values(expected))


def test_processes_take_timesteps_of_the_cpu():
    """q and p likewise, with the variances of each dimension too; t beyond the chain is still noticed."""
    p = replace(process("fixed_small"), x_0_mse=torch.rand(8, 2, 4, 4) + 0.1)
    output, diffused = batch(p)
    with PretendDevice():
        there, (x_0, x_t, t, noise), o = moved(p), on_device(diffused), put(output)
        q = there.forward
        assert q.diffuse(x_0, STEPS, noise).t.device == DEVICE
        for f in (
            lambda t: q.diffuse(x_0, t, noise).x_t,
            lambda t: q.q_marginal(x_0, t).mean,
            lambda t: q.q_posterior(x_0, x_t, t).mean,
            lambda t: there(o, x_t, t).p.mean,
            lambda t: there(o, x_t, t).p.log_variance,
        ):
            assert torch.equal(values(f(STEPS)), values(f(t)))
        with pytest.raises(IndexError, match="`t` must lie in 0 .. 7"):
            q.diffuse(x_0, STEPS + 1, noise)


def test_a_process_on_another_device_is_refused():
    """In one line that tells the way out, from whichever side and at each entry."""
    p = process("fixed_small")
    output, diffused = batch(p)
    with PretendDevice():
        there = on_device(diffused)
        for call in (
            lambda: p.forward.diffuse(there.x_0, there.t, there.noise),
            lambda: p(put(output), there.x_t, there.t),
            lambda: vlb_term(p, put(output), there),
        ):
            with pytest.raises(
                ValueError, match=r"is on cpu and the data on lazy:0. Move it: `process.to\('lazy:0'\)"
            ):
                call()
        with pytest.raises(ValueError, match="is on lazy:0 and the data on cpu"):
            vlb_loss(moved(p), output, diffused)


@pytest.mark.parametrize("loss", [vlb_loss, hybrid_loss])
def test_network_and_loss_are_one_graph(loss):
    """`torch.compile` takes the network and its loss as one graph, with the eager gradients of the weights."""
    p = process("learned_range")
    _, diffused = batch(p)
    torch.manual_seed(0)
    network, graphs = nn.Conv2d(2, 4, 3, padding=1), []

    def step(diffused):
        return loss(p, network(diffused.x_t), diffused).mean()

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    actual = torch.autograd.grad(compiled(diffused), network.parameters())
    assert len(graphs) == 1
    for ours, theirs in zip(actual, torch.autograd.grad(step(diffused), network.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
