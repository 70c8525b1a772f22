"""The probability of Student's t against scipy's."""

import math

import pytest
import scipy.stats

from ddpm_vlb.students_t import two_sided


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 11, 63, 64, 10_001])
def test_students_probability(degrees):
    """For odd and even degrees, either sign, from nothing to certainty."""
    for t in (0.0, 0.1, 1.0, -2.0, 2.4, 5.0, 40.0, math.inf):
        assert two_sided(t, degrees) == pytest.approx(2 * scipy.stats.t.sf(abs(t), degrees), rel=1e-9, abs=1e-12)


def test_one_value_has_none():
    """Nor has what is no number."""
    assert math.isnan(two_sided(1.0, 0)) and math.isnan(two_sided(math.nan, 5))
