"""The pretend device notices what a GPU's host would wait for, and refuses what a GPU would refuse."""

import pytest
import torch
from pretend_device import DEVICE, PretendDevice, PretendGenerator, put, values

WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "boolean index": lambda x: x[x > 0],
    "to the CPU": lambda x: x.cpu(),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "a new tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "an index on the CPU": lambda x: x[torch.tensor([0, 1])],
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2 + 1).exp().sum(),
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "an index on the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "one element": lambda x: x[1],
    "full": lambda x: torch.full((2,), 3, device=x.device),
    "not blocking": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_noticed(name):
    """Each of these is one wait, named with this file."""
    x = put(torch.tensor([1.0, -1.0, 2.0]))
    with PretendDevice() as device:
        WAITS[name](x)
    assert len(device.waits) == 1 and "test_pretend_device.py" in device.waits[0]


@pytest.mark.parametrize("name", NO_WAITS)
def test_what_does_not_wait(name):
    """These only launch, and their results stay on the device."""
    x = put(torch.tensor([1.0, -1.0, 2.0]))
    with PretendDevice() as device:
        assert NO_WAITS[name](x).device == DEVICE
    assert device.waits == []


def test_two_devices_are_refused():
    """A tensor of the CPU meets one of the device, one indexes the other, a CPU generator draws there."""
    x = put(torch.ones(3))
    with PretendDevice():
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="indexed by one of the device"):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device=DEVICE)]
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.randn(3, generator=torch.Generator(), device=DEVICE)


@pytest.mark.parametrize("make", [lambda x: x.double(), lambda x: x.to("cpu", torch.float64)], ids=["there", "back"])
def test_float64_is_refused(make):
    """As by MPS, also on the way to the CPU: a copy casts where it comes from."""
    x = put(torch.ones(3))
    with PretendDevice(), pytest.raises(TypeError, match="float64 on the device"):
        make(x)


def test_values_launches_and_generators():
    """The values are the CPU's, views are no launches, and a generator of the device draws there."""
    with PretendDevice() as device:
        x = torch.randn(4, 3, generator=PretendGenerator().manual_seed(1), device=DEVICE)
        y = x.reshape(2, 6)[0] * 2
    expected = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).reshape(2, 6)[0] * 2
    assert torch.equal(values(y), expected) and device.launches == 2


def test_modules_and_gradients():
    """A network trains there without a wait, to the CPU's gradients."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
    x = torch.randn(2, 1, 5, 5)
    expected = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    net, x = put(net), put(x)
    with PretendDevice() as device:
        net(x).square().mean().backward()
    assert device.waits == []
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(values(parameter.grad), gradient)
