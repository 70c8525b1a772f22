r"""Gaussian masses of bins as integers that add up to 2^28, the same on every machine.

What a coder and its decoder must agree on to the last bit cannot be left to floating point. So a Gaussian is first
rounded to two integers, and everything after that is integer arithmetic:

1. sigma = unit 2^(s/256), with s an integer: the standard deviation to 1/256 octave, in units of the bin
2. mean = sigma m/64, with m an integer: the mean to 1/64 sigma
3. bin j reaches from (j - 1/2) to (j + 1/2) units, j = low .. high; the outer bins are open
4. C_j = floor(Phi(a_j) (2^28 - n)) + j - low, with a_j = ((j - 1/2) unit - mean) / sigma and n bins: every bin has at
   least one of the 2^28 counts, so that nothing that can be written down cannot be coded

Phi is a table at 1/256 sigma, made by integers too, with straight lines between.

Sources: Townsend, Bird & Barber 2019 (bits back with ANS), section 2; Duda 2014 for coding with such counts.
"""

import bisect
import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

PRECISION = 28
"""Binary digits of the counts' sum."""
TOTAL = 1 << PRECISION
OCTAVE, PLACES = 256, 64
"""Steps of sigma in an octave, and of the mean in a sigma."""
SMALLEST, LARGEST = -8 * OCTAVE, 18 * OCTAVE
"""The range of s: from a 256th of a bin to more than the levels of any data."""

_WIDE = 8  # sigmas on either side that the table of Phi has; beyond them a bin has its one count
_NODES, _FINE = 256, 22  # nodes of the table in a sigma, and binary digits of an argument's fraction
_ROOT = 36  # binary digits of 2^(-s/256)
_FARTHEST = (2 * _WIDE) << _FINE
_HALF_ROOT, _MEAN, _BETWEEN = _ROOT + 1 - _FINE, _FINE - 6, _FINE - 8
_FAR = 2.0**40  # in places of the mean
_DIGITS = 1e-13
_FRACTION = (1 << _BETWEEN) - 1


@cache
def _phi() -> Integers:
    """2^32 Phi at -8, -8 + 1/256 .. 8, from the series Phi(x) - 1/2 = phi(0) sum (-1)^k x^(2k+1) / (2^k k! (2k+1))."""
    one = 1 << 160  # at 8 sigma the terms reach 10^12 and leave 10^-15
    pi = _pi(one)
    root = math.isqrt(2 * pi * one)  # sqrt(2 pi)
    values = []
    for node in range(_WIDE * _NODES + 1):
        x = node * one // _NODES
        half_square = x * x // (2 * one)
        power, total, k = x, 0, 0
        while power:
            total += (power if k % 2 == 0 else -power) // (2 * k + 1)
            k += 1
            power = power * half_square // (one * k)
        values.append((((total * one // root) << 32) + one // 2) // one)
    half = 1 << 31
    return np.array([half - own for own in reversed(values)] + [half + own for own in values[1:]], dtype=np.int64)


def _pi(one: int) -> int:
    """Machin's formula: pi/4 = 4 arctan(1/5) - arctan(1/239)."""

    def arctan(inverse: int) -> int:
        power, total, k = one // inverse, 0, 1
        while power:
            total += power // k if k % 4 == 1 else -(power // k)
            power //= inverse * inverse
            k += 2
        return total

    return 4 * (4 * arctan(5) - arctan(239))


@cache
def _inverse_sigmas() -> Integers:
    """2^36 unit / sigma for s = SMALLEST .. LARGEST."""
    one = 1 << 200
    step = one // 2
    for _ in range(OCTAVE.bit_length() - 1):
        step = math.isqrt(step * one)  # 2^(-1/OCTAVE) in the end
    fractions, power = [], one
    for _ in range(OCTAVE):
        fractions.append(power >> 200 - _ROOT - 1)
        power = power * step >> 200
    exponents = range(SMALLEST, LARGEST + 1)
    values = [(fractions[s % OCTAVE] << 20) >> (s // OCTAVE + 21) for s in exponents]
    return np.array(values, dtype=np.int64)


def exact_power(s: int) -> float:
    """2^(s/256) to 36 binary digits, the same number on every machine.

    Args:
        s: any integer.
    """
    return math.ldexp(float(_inverse_sigmas()[-(s % OCTAVE) - SMALLEST]), s // OCTAVE - _ROOT)


@cache
def _as_lists() -> tuple[list[int], list[int]]:
    """`_inverse_sigmas` and `_phi`, for one at a time."""
    return _inverse_sigmas().tolist(), _phi().tolist()


@cache
def _sigmas() -> NDArray[np.float64]:
    return 2.0**_ROOT / _inverse_sigmas()


class Rounded(NamedTuple):
    """Gaussians as integers, m and s of equations 2 and 1, and how far from another pair the nearest value was."""

    m: Integers
    s: Integers
    margin: float


def rounded(mean: NDArray[np.float64], log2_sigma: NDArray[np.float64]) -> Rounded:
    """Round Gaussians to integers.

    Args:
        mean: in units of the bin, from the middle of bin 0; what is not finite is taken for 0.
        log2_sigma: of the standard deviation in the same units, likewise, of the same shape.

    Source: equations 1 and 2; the margin is in steps of both.
    """
    octaves = np.clip(np.nan_to_num(log2_sigma) * OCTAVE, SMALLEST, LARGEST)
    s = np.rint(octaves).astype(np.int64)
    # Products of floats, one of them exact: the same on every machine.
    inverse = _inverse_sigmas()[s - SMALLEST] * (PLACES / 2.0**_ROOT)
    places = np.clip(np.clip(np.nan_to_num(mean), -_FAR, _FAR) * inverse, -_FAR, _FAR)
    m = np.rint(places).astype(np.int64)
    # The last digits of a large number are worth more.
    off = np.abs(places - m) + _DIGITS * np.abs(places)
    margin = 0.5 - max(off.max(initial=0.0), np.abs(octaves - s).max(initial=0.0))
    return Rounded(m, s, float(margin))


class Bins(NamedTuple):
    """Bins low .. high; all that follows is of them."""

    low: int
    high: int

    def counts_below(self, j: Integers, m: Integers, s: Integers) -> Integers:
        """C_j of equation 4: the counts of all bins below j, 0 at `low` and 2^28 beyond `high`.

        Args:
            j: bins, low .. high + 1.
            m: of the means.
            s: of the standard deviations.
        """
        argument = ((2 * j - 1) * _inverse_sigmas()[s - SMALLEST] >> _HALF_ROOT) - (m << _MEAN)
        place = np.clip(argument + (_WIDE << _FINE), 0, _FARTHEST - 1)
        node, fraction = place >> _BETWEEN, place & _FRACTION
        table = _phi()
        left = table[node]
        phi = left + ((table[node + 1] - left) * fraction >> _BETWEEN)
        below = (phi * self._shared >> 32) + (j - self.low)
        below = np.where(j <= self.low, 0, below)
        return np.where(j > self.high, TOTAL, below)

    def find(self, slots: Integers, m: Integers, s: Integers) -> Integers:
        """The bins j with C_j <= slot < C_j+1.

        Args:
            slots: 0 .. 2^28 - 1.
            m: of the means.
            s: of the standard deviations.
        """
        j = self._guess(slots, m, s)
        wrong = (self.counts_below(j, m, s) > slots) | (self.counts_below(j + 1, m, s) <= slots)
        if wrong.any():
            j[wrong] = self._bisected(slots[wrong], m[wrong], s[wrong])
        return j

    def count_below(self, j: int, m: int, s: int) -> int:
        """`counts_below` of one bin.

        Args:
            j: as there.
            m: as there.
            s: as there.
        """
        if j <= self.low:
            return 0
        if j > self.high:
            return TOTAL
        roots, table = _as_lists()
        argument = ((2 * j - 1) * roots[s - SMALLEST] >> _HALF_ROOT) - (m << _MEAN)
        place = min(max(argument + (_WIDE << _FINE), 0), _FARTHEST - 1)
        left, right = table[place >> _BETWEEN], table[(place >> _BETWEEN) + 1]
        return ((left + ((right - left) * (place & _FRACTION) >> _BETWEEN)) * self._shared >> 32) + j - self.low

    def find_one(self, slot: int, m: int, s: int) -> tuple[int, int, int]:
        """`find` of one slot, with C_j and C_j+1.

        Args:
            slot: as there.
            m: as there.
            s: as there.
        """
        phi = (slot << 32) // self._shared
        argument = (bisect.bisect_right(_as_lists()[1], phi) - 0.5) / _NODES - _WIDE + m / PLACES
        j = min(max(math.floor(argument * 2 ** (s / OCTAVE) + 0.5), self.low), self.high)
        for step in (0, 1, -1):
            if self.low <= j + step <= self.high:
                below, up_to = self.count_below(j + step, m, s), self.count_below(j + step + 1, m, s)
                if below <= slot < up_to:
                    return j + step, below, up_to
        j = bisect.bisect_right(range(self.low, self.high + 1), slot, key=lambda own: self.count_below(own, m, s))
        j += self.low - 1
        return j, self.count_below(j, m, s), self.count_below(j + 1, m, s)

    @property
    def _shared(self) -> int:
        """The counts that the masses share, one for each bin set aside."""
        return TOTAL - (self.high - self.low + 1)

    def _guess(self, slots: Integers, m: Integers, s: Integers) -> Integers:
        """The bins by floating point, nearly always right."""
        node = np.searchsorted(_phi(), (slots << 32) // self._shared, side="right") - 1
        table = _phi()
        left, node = table[node], np.clip(node, 0, len(table) - 2)
        within = ((slots << 32) / self._shared - left) / np.maximum(table[node + 1] - left, 1)
        argument = (node + np.clip(within, 0, 1)) / _NODES - _WIDE + m / PLACES
        j = np.floor(argument * _sigmas()[s - SMALLEST] + 0.5)
        return np.clip(j, self.low, self.high).astype(np.int64)

    def _bisected(self, slots: Integers, m: Integers, s: Integers) -> Integers:
        low, high = np.full_like(slots, self.low), np.full_like(slots, self.high + 1)
        while (high - low > 1).any():
            middle = (low + high) >> 1
            right = self.counts_below(middle, m, s) <= slots
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return low
