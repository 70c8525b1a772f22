"""Noise as a function of a key: the published sequence, normal numbers, and nothing else that they depend on."""

import math

import pytest
import torch
from pretend_device import DEVICE, PretendDevice, values

from ddpm_vlb import counter_keys, counter_normal

SHAPE = (3, 5, 5)  # of an odd number of values


def some(n: int, seed: int = 5) -> torch.Tensor:
    return counter_keys(seed, torch.arange(n))


def test_the_numbers_are_splitmix64_s():
    """Its published outputs of the seed 0, by Box and Muller in Python's own numbers."""
    outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    polar = [(math.sqrt(-2 * math.log(((x >> 32) + 0.5) / 2**32)), 2 * math.pi * (x % 2**32) / 2**32) for x in outputs]
    expected = [r * math.cos(v) for r, v in polar] + [r * math.sin(v) for r, v in polar]
    got = counter_normal(torch.zeros(1, dtype=torch.int64), (6,))[0]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_keys_are_hashes():
    """Of key and index by the same mixer: no two of a million are alike, whatever the sign bit of the key."""
    assert len(some(10**6).unique()) == 10**6
    assert counter_keys(2**64 - 1, torch.arange(3)).tolist() != counter_keys(2**63 - 1, torch.arange(3)).tolist()
    assert not set(some(1000, 5).tolist()) & set(some(1000, 6).tolist())


def test_an_image_s_noise_depends_on_its_key_alone():
    """Whatever else is drawn beside it, bit for bit."""
    whole = counter_normal(some(40), SHAPE)
    parts = torch.cat([counter_normal(some(40)[i : i + 7], SHAPE) for i in range(0, 40, 7)])
    assert torch.equal(whole, parts) and whole.shape == (40, *SHAPE) and whole.dtype == torch.float32


def test_it_is_standard_normal():
    """Means of z, z^2, z^3, z^4 within 4 standard errors of 0, 1, 0, 3 over 3 million, and the share beyond 4."""
    z = counter_normal(some(1000), (3000,)).double()
    n = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - mean) < 4 * math.sqrt(variance / n)
    beyond = math.erfc(4 / math.sqrt(2))
    assert abs(int((z.abs() > 4).sum()) - n * beyond) < 4 * math.sqrt(n * beyond)
    assert z.isfinite().all()


@pytest.mark.parametrize("pair", ["places", "neighbours", "images", "squares"])
def test_numbers_are_uncorrelated(pair):
    """The correlation over a million pairs is below 4 standard errors: within an image, and between two of a step."""
    z = counter_normal(some(1001), (1000,)).double()
    x, y = {
        "places": (z[:-1, :500], z[:-1, 500:]),  # cosine and sine of one angle
        "neighbours": (z[:-1, :-1], z[:-1, 1:]),
        "images": (z[:-1], z[1:]),
        "squares": (z[:-1].square() - 1, z[1:].square() - 1),
    }[pair]
    product = (x * y).flatten()
    assert abs(float(product.mean())) < 4 * float(product.std()) / math.sqrt(len(product))


def test_launches_do_not_grow_with_the_batch():
    """On a device: as many for 300 images as for 2, none that is waited for, and the CPU's numbers."""
    launches = []
    for n in (2, 300):
        with PretendDevice() as device:
            keys = counter_keys(7, torch.arange(n, device=DEVICE))
            noise = counter_normal(keys, SHAPE)
        launches.append(device.launches)
        assert device.waits == []
        assert torch.equal(values(noise), counter_normal(some(n, 7), SHAPE))
    assert launches[0] == launches[1] < 50
