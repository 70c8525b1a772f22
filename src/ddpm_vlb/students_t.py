r"""How surely a mean of few values is not 0: the two-sided probability of Student's t.

1. with theta = atan(|t| / sqrt(n)), n the degrees of freedom, P(|T| < |t|) = sin(theta) S for even n and
   2 / pi (theta + sin(theta) S) for odd n, S = 1 + 1/2 cos^2(theta) + (1 3)/(2 4) cos^4(theta) + ... up to
   cos^{n-2}(theta), and cos(theta) + 2/3 cos^3(theta) + (2 4)/(3 5) cos^5(theta) + ...

Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4.
"""

import math


def two_sided(t: float, degrees: int) -> float:
    """P(|T| >= |t|) of Student's distribution, to some 1e-12; NaN where t is none, or nothing is left to vary.

    Args:
        t: a mean over its standard error.
        degrees: n, of freedom: of N values N - 1.

    Source: equation 1.
    """
    if math.isnan(t) or degrees < 1:
        return math.nan
    theta = math.atan(abs(t) / math.sqrt(degrees))
    odd, cos = degrees % 2, math.cos(theta)
    term = cos if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees, 2):
        term *= cos**2 * (k - 1) / k
        total += term
    inside = math.sin(theta) * total
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))
