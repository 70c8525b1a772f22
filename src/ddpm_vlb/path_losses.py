r"""L_simple of a Gaussian path in the field's own terms, as that of the v-prediction network that the chain sees.

1. flow matching and EDM train E_sigma |o - o*|^2 on the network's raw output o, sigma drawn from a density
2. with u = log r = log s/a these densities are, on the levels of a chain, p_t proportional to f(u_t) du/dt:
   uniform sigma of a flow: f = sigmoid(u) sigmoid(-u);  its logit-normal(0, 1): f = N(u; 0, 1);
   EDM's log-normal: f = N(u; -1.2, 1.2^2)
3. v' is affine in o with the slope -n out / s, so |o - o*|^2 = (s / (n out))^2 |v' - v'*|^2
4. L_simple = mean over t of T p_t (s / (n out))^2 |v' - v'*|^2, a weight for each step, whatever t is drawn from;
   drawn from p_t itself, the importance weights 1 / (T p_t) leave the squared error of o with weight 1

Sources: Lipman et al. 2023, eq. 23; Esser et al. 2024, section 3.1 (logit-normal); Karras et al. 2022, table 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .distributions import ordinary_tensors
from .gaussian_paths import GaussianPath

SIGMA_SAMPLINGS = ("uniform", "logit_normal", "log_normal")
"""How sigma is drawn in training: the first two of a flow, the last of EDM."""
_EDM_MEAN, _EDM_STD = -1.2, 1.2


@ordinary_tensors()
def sigma_probabilities(path: GaussianPath, sampling: str) -> Tensor:
    """p_t of the levels where sigma is drawn as the field does, within their range: float64 (T,), of sum 1.

    Args:
        path: levels with signal at each, their spacing as it is.
        sampling: density of sigma: "uniform" in (0, 1) or "logit_normal" (0, 1) of a flow, "log_normal" (-1.2, 1.2) of
            EDM.

    Raises:
        ValueError: an unknown density, or a level without signal.

    Source: equation 2 above.
    """
    if sampling not in SIGMA_SAMPLINGS:
        raise ValueError(f"`sampling` must be one of {list(SIGMA_SAMPLINGS)}, but got {sampling!r:.80}.")
    u = path.ratios.log()
    if not bool(u.isfinite().all()):
        raise ValueError("`path` must have signal at every level to be drawn from, but its last has none: end before.")
    log_density = {
        "uniform": logsigmoid(u) + logsigmoid(-u),
        "logit_normal": -0.5 * u.square(),
        "log_normal": -0.5 * ((u - _EDM_MEAN) / _EDM_STD).square(),
    }[sampling]
    if len(u) > 1:
        log_density = log_density + torch.gradient(u)[0].log()
    return log_density.softmax(0)


@ordinary_tensors()
def simple_weights(path: GaussianPath, probabilities: Tensor) -> Tensor:
    """What turns `simple_loss` of v' at each step into the path's own L_simple under uniform t: float64 (T,).

    Multiply by it, and by the weights of whatever sampler t is drawn with.

    Args:
        path: of the network.
        probabilities: p_t of its levels, (T,), as of `sigma_probabilities`.

    Raises:
        ValueError: probabilities of another number of levels.

    Source: equation 4 above.
    """
    if probabilities.shape != path.sigma.shape:
        raise ValueError(f"`probabilities` must be {len(path)} numbers, but got {tuple(probabilities.shape)}.")
    n = (path.signal.square() + path.sigma.square()).sqrt()
    return len(path) * probabilities.double() * (path.sigma / (n * path.out)).square()
