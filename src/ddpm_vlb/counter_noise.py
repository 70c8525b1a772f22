r"""Standard normal noise as a function of a key: no state, no order of draws, the same on every device.

The numbers of a key k are those of SplitMix64, whose i-th output is a function of k and i alone:

1. x_i = mix(k + i g), with the odd g = 2^64 / golden ratio and David Stafford's 13th mixer,
   mix(z): z = (z ^ z >> 30) c1, z = (z ^ z >> 27) c2, z ^ z >> 31 (modulo 2^64)
2. both halves of x_i are uniform numbers u, v of 32 bits; r = sqrt(-2 log u), and r cos(2 pi v) and r sin(2 pi v) are
   two normal numbers (Box & Muller)

It is sound because the sequence passes the suites that torch's own generators pass (BigCrush), and because keys are
hashes: two of n images with L numbers each share a stretch n^2 L / 2^65 times, once in a hundred million images of
3 x 32 x 32, and then at other places of other steps. Integers wrap alike on all devices; the normal numbers differ by
rounding.

Sources: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 4; Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3", for noise as a function of a counter.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return x - 2**64 if x >= 2**63 else x


_GOLDEN, _C1, _C2 = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LOW = 2**32 - 1


def _mix(z: Tensor) -> Tensor:
    """Equation 1's mixer of int64, in place. A shift of signed numbers brings in copies of the sign, masked away."""
    for shift, factor in ((30, _C1), (27, _C2), (31, 1)):
        z ^= (z >> shift) & (2 ** (64 - shift) - 1)
        z *= factor
    return z


def counter_keys(key: int, index: Tensor) -> Tensor:
    """Keys of single images from one of all, int64 (B,).

    Args:
        key: of a run's step, say: a hash of 64 bits, 0 .. 2^64 - 1.
        index: numbers that differ between the images, int64 (B,), on the device where the noise shall be.
    """
    return _mix(index * _GOLDEN + _signed(key))


def counter_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    r"""Standard normal noise, float32 (B, \*shape), in a number of operations that does not grow with B.

    Args:
        keys: int64 (B,), one for each image, on the device where the noise shall be.
        shape: of one image, (C, \*).

    Source: the module's list.
    """
    number = math.prod(shape)
    index = torch.arange(1, (number + 1) // 2 + 1, device=keys.device)
    x = _mix(keys[:, None] + index * _GOLDEN)
    u, v = ((x >> 32) & _LOW).float(), (x & _LOW).float()
    radius = u.add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()  # u = 1 after rounding is a radius of 0
    angle = v.mul_(2 * math.pi / 2**32)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return normal[:, :number].reshape(len(keys), *shape)
