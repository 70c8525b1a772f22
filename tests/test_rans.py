"""The stack: last in, first out; as long as its symbols' information; bits that were drawn can be given back."""

import constriction
import numpy as np
import pytest

from ddpm_vlb.integer_gaussians import OCTAVE, PLACES, TOTAL, Bins, rounded
from ddpm_vlb.rans import Stack, WideStack, stack_for

BINS = Bins(-40, 40)


def supply(n):
    """Words that look random."""
    return n * 2654435761 % 2**32


@pytest.fixture(params=["one state", "many states"])
def make(request):
    """Makes stacks of a kind."""
    return lambda *parts: Stack(supply, *parts) if request.param == "one state" else WideStack(supply, 24, *parts)


def symbols(n, seed=0):
    """Symbols of random Gaussians, and these."""
    rng = np.random.default_rng(seed)
    mean, log2_sigma = rng.uniform(-10, 10, n), rng.uniform(-1, 3, n)
    return np.clip(np.rint(rng.normal(mean, 2**log2_sigma)), -40, 40).astype(np.int64), rounded(mean, log2_sigma)


def test_last_in_first_out(make):
    """What was pushed comes back, and the stack is as it was."""
    first, second = symbols(100), symbols(61, seed=1)
    stack = make()
    for j, own in (first, second):
        stack.push(BINS, j, own.m, own.s)
    for j, own in (second, first):
        assert (stack.pop(BINS, own.m, own.s) == j).all()
    assert stack.is_as_supplied()


def test_length_is_the_information(make):
    """Bits on the stack are -log2 of the symbols' masses, to a thousandth."""
    j, own = symbols(3000)
    counts = BINS.counts_below(j + 1, own.m, own.s) - BINS.counts_below(j, own.m, own.s)
    stack = make()
    stack.push(BINS, j, own.m, own.s)
    assert stack.bits() == pytest.approx(-np.log2(counts / TOTAL).sum(), rel=1e-3)


def test_as_short_as_the_library_s():
    """constriction's, with masses of 2^24, needs as many bits for the same symbols, to a thousandth."""
    j, own = symbols(60000)
    stack, coder, sigma = Stack(supply), constriction.stream.stack.AnsCoder(), 2.0 ** (own.s / OCTAVE)
    stack.push(BINS, j, own.m, own.s)
    family = constriction.stream.model.QuantizedGaussian(-40, 40)
    coder.encode_reverse(j.astype(np.int32), family, own.m / PLACES * sigma, sigma)
    assert stack.bits() == pytest.approx(coder.num_valid_bits(), rel=1e-3)


def test_drawn_symbols_are_given_back(make):
    """Popping from an empty stack draws from the Gaussians; pushing the draws leaves it as supplied."""
    _, own = symbols(200)
    whites = np.random.default_rng(5).integers(0, TOTAL, 200)
    stack = make()
    j = stack.pop(BINS, own.m, own.s, whites)
    assert not stack.is_as_supplied() and stack.bits() < 0
    stack.push(BINS, j, own.m, own.s, whites)
    assert stack.is_as_supplied()


def test_draws_have_the_distribution(make):
    """The mean and variance of 4000 standardised draws are within four standard errors of 0 and 1."""
    n = 4000
    own = rounded(np.zeros(n), np.full(n, 3.0))
    whites = np.random.default_rng(0).integers(0, TOTAL, n)
    z = make().pop(BINS, own.m, own.s, whites) / 8
    assert abs(z.mean()) < 4 / n**0.5 and abs((z**2).mean() - 1 - 1 / 768) < 4 * (2 / n) ** 0.5


def test_a_stack_is_its_parts(make):
    """One that is made from the bytes of another gives the same symbols."""
    j, own = symbols(150)
    stack = make()
    stack.push(BINS, j, own.m, own.s)
    other = make(*stack.parts())
    assert (other.pop(BINS, own.m, own.s) == j).all() and other.is_as_supplied()


def test_counts_of_any_kind(make):
    """Symbols by a table come back too, among the others."""
    k = np.random.default_rng(0).integers(0, 16, 100)
    j, own = symbols(30)
    stack = make()
    stack.push_counts(k * (TOTAL // 16), np.full(100, TOTAL // 16))
    stack.push(BINS, j, own.m, own.s)
    assert (stack.pop(BINS, own.m, own.s) == j).all()
    assert (stack.pop_counts(np.tile(np.arange(1, 17) * (TOTAL // 16), (100, 1))) == k).all()


def test_many_dimensions_have_many_states():
    """One for each 24 dimensions, from a thousand on."""
    assert type(stack_for(64, supply)) is Stack
    assert len(stack_for(3072, supply).parts()[0]) == 8 * 128
