"""Scoring on a device: the host waits once for each network call, and for that only when the next one is launched."""

import pytest
import torch
from pretend_device import DEVICE, PretendDevice, put
from torch import Tensor, nn

from ddpm_vlb import (
    DDPMVLBScheduler,
    ReverseProcess,
    VLBEstimator,
    collect_statistics,
    evaluate_vlb,
    fit_pilot,
    spread_knots,
)

T, CALL = 12, 96  # steps, and values in a network call: six images of 1 x 4 x 4
SCHEDULER = DDPMVLBScheduler(num_train_timesteps=T, beta_end=0.3, variance_type="learned_range", levels=17)


def images(n: int, seed: int = 0) -> Tensor:
    k = torch.randint(17, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    return k / 8 - 1


class Network(nn.Module):
    """Two channels from one; it keeps the number of waits at each of its calls."""

    def __init__(self, device: PretendDevice | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.device, self.waits = device, list[int]()

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        if self.device is not None:
            self.waits.append(len(self.device.waits))
        return torch.cat([self.weight * x_t, (0.01 * timesteps).reshape(-1, 1, 1, 1) - 0.5 * x_t], 1)


def reverse(device: torch.device | str) -> ReverseProcess:
    return SCHEDULER.reverse_process(device)


def pilot(network: nn.Module, p: ReverseProcess):
    return fit_pilot(network, p, images(40, 1), num_calls=140, values_per_call=CALL)


def score(network: nn.Module, p: ReverseProcess):
    known = fit_pilot(Network(), reverse("cpu"), images(40, 1), num_calls=140)
    scores = VLBEstimator(network, p, known, 6, values_per_call=CALL).score(images(8), range(8))[0]
    return scores.kl + scores.decoder + scores.prior


def statistics(network: nn.Module, p: ReverseProcess):
    found = collect_statistics(network, p, images(8), spread_knots(reverse("cpu").forward, 6), values_per_call=CALL)
    return torch.cat([found.squared.flatten(), found.learned.flatten(), found.samples.flatten().double()])


WAYS = {
    "score": (score, 1),  # and one for the prior
    "pilot": (lambda network, p: pilot(network, p).probabilities, 0),
    "statistics": (statistics, 0),
    "evaluate_vlb": (
        lambda network, p: (
            evaluate_vlb(
                network, p, images(8), generator=torch.Generator().manual_seed(0), values_per_call=CALL
            ).bits_per_dim
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_one_wait_for_each_network_call(name):
    """It comes after the next call was launched, and the numbers are the CPU's, of data that lies there."""
    way, beside = WAYS[name]
    expected = way(Network(), reverse("cpu"))
    with PretendDevice() as device:
        network, p = put(Network(device)), reverse(DEVICE)
        way(network, p)  # the first batch of a process is looked at
        device.waits.clear()
        network.waits.clear()
        values = way(network, p)
    calls = len(network.waits)
    assert calls > 4 and len(device.waits) == calls + beside, device.waits
    assert network.waits == [0, 0, *range(1, calls - 1)]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_is_scored(dtype):
    """It gets its input in its own; what it answers is scored in float32."""
    expected = score(Network(), reverse("cpu"))
    values = score(Network().to(dtype), reverse("cpu"))
    torch.testing.assert_close(values.mean(), expected.mean(), rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=0)
