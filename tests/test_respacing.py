"""Spacings: which training timesteps a shorter chain visits, as stock has them."""

import pytest
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_vlb import spaced_timesteps

SPACINGS = ("leading", "linspace", "trailing")


def stock_timesteps(spacing: str, num: int, total: int, offset: int = 0) -> list[int]:
    scheduler = DDPMScheduler(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(num)
    return scheduler.timesteps.tolist()


def well_defined(steps: list[int], num: int) -> bool:
    """Stock's `trailing` has num + 1 steps, down to -1, where the rounding of its stride leaves room for one more."""
    return len(steps) == num and steps[-1] >= 0


def is_chain(steps: list[int], num: int, total: int) -> bool:
    descending = all(a > b for a, b in zip(steps, steps[1:], strict=False))
    return len(steps) == num and descending and steps[-1] >= 0 and steps[0] < total


@pytest.mark.parametrize("total", [1, 2, 3, 7, 19, 50, 250, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_equals_stock_at_every_number_of_steps(spacing, total):
    """Every number of steps gives stock's own timesteps wherever stock gives that many in the chain."""
    scheduler = DDPMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    differ = []
    for num in range(1, total + 1):
        scheduler.set_timesteps(num)
        stock = scheduler.timesteps.tolist()
        if well_defined(stock, num) and spaced_timesteps(spacing, num, total) != stock:
            differ.append(num)
    assert not differ, f"{len(differ)} of {total} differ from stock, the first at {differ[:5]}"


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from(SPACINGS), st.integers(1, 5000), st.data())
def test_equals_stock(spacing, total, data):
    """On chains of any length the timesteps are stock's, wherever stock is well-defined."""
    num = data.draw(st.integers(1, total))
    stock = stock_timesteps(spacing, num, total)
    if well_defined(stock, num):
        assert spaced_timesteps(spacing, num, total) == stock


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from(SPACINGS), st.integers(1, 5000), st.data())
def test_every_spacing_is_a_chain(spacing, total, data):
    """There are always exactly K timesteps, strictly descending, within 0 .. T - 1."""
    num = data.draw(st.integers(1, total))
    assert is_chain(spaced_timesteps(spacing, num, total), num, total)


@pytest.mark.parametrize(("num", "total"), [(13, 15), (7, 17), (14, 17), (15, 21)])
def test_trailing_where_stock_leaves_the_chain(num, total):
    """Where float rounding makes stock's `trailing` visit -1 or one step too many, ours is still a chain of K."""
    assert not well_defined(stock_timesteps("trailing", num, total), num)
    assert is_chain(spaced_timesteps("trailing", num, total), num, total)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(2, 2000), st.data())
def test_ends_of_each_spacing(total, data):
    """Leading visits 0, trailing visits T - 1, linspace both; K = T visits every step in all of them."""
    num = data.draw(st.integers(2, total))
    assert spaced_timesteps("leading", num, total)[-1] == 0
    assert spaced_timesteps("trailing", num, total)[0] == total - 1
    both = spaced_timesteps("linspace", num, total)
    assert (both[0], both[-1]) == (total - 1, 0)
    for spacing in SPACINGS:
        assert spaced_timesteps(spacing, total, total) == list(range(total))[::-1]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(2, 2000), st.data())
def test_steps_offset_equals_stock(total, data):
    """The offset shifts the leading spacing as stock does, and leaves the others alone."""
    num = data.draw(st.integers(1, total))
    room = total - 1 - (num - 1) * (total // num)
    offset = data.draw(st.integers(0, room))
    assert spaced_timesteps("leading", num, total, offset) == stock_timesteps("leading", num, total, offset)
    for spacing in ("linspace", "trailing"):
        assert spaced_timesteps(spacing, num, total, offset) == spaced_timesteps(spacing, num, total)


@pytest.mark.parametrize("offset", [1, -1, 7])
def test_the_whole_chain_has_no_offset(offset):
    """All T steps are all steps, whatever the offset: stock would begin one behind its last."""
    assert spaced_timesteps("leading", 10, 10, offset) == list(range(10))[::-1]


@pytest.mark.parametrize(("num", "total", "offset"), [(3, 10, 4), (5, 10, -1), (9, 10, 2)])
def test_offset_out_of_the_chain(num, total, offset):
    """An offset that pushes a step out of 0 .. T - 1 is refused (stock would index past its tables)."""
    with pytest.raises(ValueError, match="steps_offset"):
        spaced_timesteps("leading", num, total, offset)


@pytest.mark.parametrize("num", [0, -1, 11, 2.0, True, None, "5"])
def test_number_of_steps_is_checked(num):
    """K outside 1 .. T, or no integer, is refused."""
    with pytest.raises(ValueError, match="num_inference_steps"):
        spaced_timesteps("leading", num, 10)


def test_unknown_spacing_lists_the_choices():
    """An unknown name is answered with every name there is."""
    with pytest.raises(ValueError) as error:
        spaced_timesteps("uniform", 5, 10)
    assert "'uniform'" in str(error.value) and all(name in str(error.value) for name in SPACINGS)
