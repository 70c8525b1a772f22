r"""Log-probabilities of sampling steps, which policy gradients are made of.

A sampler's step from x_t draws x_s, s = t - 1 on its chain; its last step, t = 0, draws nothing and gives the mean.

1. log p(x_s | x_t) = sum over dimensions of log N(x_s; mu_t, sigma_t^2)
2. KL(p(x_s | x_t) || p'(x_s | x_t)) = sum over dimensions of the KL of two Gaussians
3. log p(x_s | x_t) / p'(x_s | x_t) = -1/2 sum over dimensions of d (d + 2 z') + u, with z' = (x_s - mu') / sigma',
   u = log sigma^2 / sigma'^2 and d = z - z' = z' expm1(-u/2) - (mu - mu') / sigma' exp(-u/2)

All in nats, summed (not averaged) over dimensions in float32 or better. Equation 1 is of the size of the number of
dimensions, and known to 1e-7 of that; equation 3 sums their changes, and nothing of that size is rounded: mu - mu' and
u are those of the outputs, times their coefficients.

Sources: Black et al. 2024 (DDPO), section 4 (the steps as a policy); Fan et al. 2023 (DPOK), section 4.2 (the
divergence of two policies, step by step).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributions import DiagonalGaussian, gaussian_kl, promote_half
from .reverse_process import ReverseProcess

# What says how x_0_hat is limited; all else that a step depends on is in the coefficients.
_LIMITS = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def step_log_prob(reverse: ReverseProcess, model_output: Tensor, x_t: Tensor, t: Tensor | int, x_s: Tensor) -> Tensor:
    """log p(x_s | x_t) of a sampler's step, (B,), in nats summed over dimensions; differentiable in the output.

    With the same output, states and batch it is bit for bit what `DDPMVLBPipeline` stored of the step.

    Args:
        reverse: p of the chain that was sampled, as short as it was.
        model_output: the network's output at (x_t, forward.timesteps[t]), (B, C, *) or (B, 2 C, *); a variance half
            that the variance type does not use is left aside, as the scheduler does.
        x_t: the state before the step, (B, C, *).
        t: chain indices (B,), or one for the whole batch, 1 .. T - 1. Looking at those on a GPU waits for it;
            while compiling nothing is looked at.
        x_s: the state after it, (B, C, *).

    Raises:
        ValueError: a step that draws nothing (t = 0, or eta = 0), or shapes that do not match.
        TypeError: `t` is not of an integer dtype.
        IndexError: `t` leaves the chain.

    Source: equation 1 above; Black et al. 2024, section 4.3.
    """
    _check_states(x_t, x_s)
    p, _ = reverse(_used(reverse, model_output, x_t), x_t, _drawing(reverse, x_t, t))
    return p.log_prob(promote_half(x_s)).flatten(1).sum(1)


def step_log_ratio(
    reverse: ReverseProcess,
    model_output: Tensor,
    old_output: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    x_s: Tensor,
) -> Tensor:
    """log p(x_s | x_t) / p_old(x_s | x_t) of a step under two outputs, (B,), in nats; differentiable in both.

    What two of `step_log_prob` differ by, as the sum of each dimension's difference: to subtract their sums loses 0.02
    nats at 3x256x256. 0 bit for bit where the outputs are the same. Where the old variance, or the new one in parts of
    it, is below 2e-35 (1e-277 in float64), the distances in sigmas are those at 2e-35: log-probabilities may be -inf
    there, and their ratio is very low but not NaN.

    Args:
        reverse: p of the chain that was sampled, as short as it was.
        model_output: the network's output at (x_t, forward.timesteps[t]), as in `step_log_prob`.
        old_output: what the step was drawn with, likewise.
        x_t: the state before the step, (B, C, *).
        t: as in `step_log_prob`.
        x_s: the state after it, (B, C, *).

    Raises:
        ValueError, TypeError, IndexError: as `step_log_prob`.

    Source: equation 3 above; Schulman et al. 2017 (PPO), section 3, has the ratio.
    """
    _check_states(x_t, x_s)
    old, gap, u = _pair(reverse, model_output, old_output, x_t, t)
    old_precision = torch.exp(-0.5 * _floored(old.log_variance))
    z, shrunk = (promote_half(x_s) - old.mean) * old_precision, -0.5 * _floored(u)
    d = z * torch.expm1(shrunk) - gap * old_precision * torch.exp(shrunk)
    return -0.5 * (d * (d + 2 * z) + u).flatten(1).sum(1)


def step_kl(
    reverse: ReverseProcess, model_output: Tensor, reference_output: Tensor, x_t: Tensor, t: Tensor | int
) -> Tensor:
    """The exact KL(p || p_reference) of a step under two networks, (B,), in nats; differentiable in both outputs.

    Args:
        reverse: p of the chain that was sampled, as short as it was.
        model_output: the network's output at (x_t, forward.timesteps[t]), as in `step_log_prob`.
        reference_output: the other's, likewise.
        x_t: the state before the step, (B, C, *).
        t: as in `step_log_prob`.

    Raises:
        ValueError, TypeError, IndexError: as `step_log_prob`.

    Source: equation 2 above; Fan et al. 2023, section 4.2.
    """
    reference, gap, u = _pair(reverse, model_output, reference_output, x_t, t)
    scaled = gap * torch.exp(-0.5 * _floored(reference.log_variance))
    # In the reference's sigmas, as p's may vanish.
    of_variances = gaussian_kl(gap.new_zeros(()), _floored(-u))
    return (0.5 * scaled.square() + of_variances).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a sampler went through, from noise to data, and how probable each of its steps was.

    Args:
        states: x_t before each of the K steps, and the sample after the last, (B, K + 1, C, *).
        timesteps: what the network was told at each step, (K,), descending.
        outputs: the network's at each step, guided where it was, (B, K, C, *) or (B, K, 2 C, *) in float32.
        log_probs: `step_log_prob` of each step, (B, K), in nats summed over dimensions, float32; 0 at the last step,
            which draws nothing.
        reverse: p of the chain that was walked.
        guidance_scale: of the outputs that the steps were drawn with; 1 is none.
    """

    states: Tensor
    timesteps: Tensor
    outputs: Tensor
    log_probs: Tensor
    reverse: ReverseProcess
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    def t(self, k: int) -> int:
        """The chain index of step k: K - 1 - k.

        Args:
            k: 0 .. K - 1, from the noise to the data.

        Raises:
            IndexError: another step.
        """
        if not 0 <= k < len(self):
            raise IndexError(f"`k` must be a step of the trajectory, 0 .. {len(self) - 1}, but got {k}.")
        return len(self) - 1 - k

    def log_prob(self, reverse: ReverseProcess, model_output: Tensor, k: int, guidance_scale: float = 1.0) -> Tensor:
        """`step_log_prob` of the stored step k under another output of a network, (B,).

        Args:
            reverse: p of the same chain.
            model_output: the network's output at (states[:, k], timesteps[k]), guided as the trajectory's were.
            k: 0 .. K - 2, from the noise to the data.
            guidance_scale: what `model_output` was guided with.

        Raises:
            ValueError: another chain, another guidance, or as `step_log_prob`: so the last step, k = K - 1.
            IndexError: no step of the trajectory.
        """
        t = self._checked(reverse, k, guidance_scale)
        return step_log_prob(reverse, model_output, self.states[:, k], t, self.states[:, k + 1])

    def log_ratio(self, reverse: ReverseProcess, model_output: Tensor, k: int, guidance_scale: float = 1.0) -> Tensor:
        """`step_log_ratio` of the stored step k under another output of a network against the stored one, (B,).

        Args:
            reverse: p of the same chain.
            model_output: as in `log_prob`.
            k: likewise.
            guidance_scale: likewise.

        Raises:
            ValueError, IndexError: as `log_prob`.
        """
        t = self._checked(reverse, k, guidance_scale)
        x_t, x_s = self.states[:, k], self.states[:, k + 1]
        return step_log_ratio(reverse, model_output, self.outputs[:, k], x_t, t, x_s)

    def _checked(self, reverse: ReverseProcess, k: int, guidance_scale: float) -> int:
        """The chain index of step k, if the output of this process and guidance scores it."""
        t = self.t(k)
        if guidance_scale != self.guidance_scale:
            raise ValueError(
                f"This trajectory's log-probabilities are of steps with `guidance_scale={self.guidance_scale}`, but "
                f"`model_output` is said to have {guidance_scale}: guide it in the same way, on the mean half."
            )
        if reverse is not self.reverse and not _same_steps(reverse, self.reverse, self.states[:, k]):
            raise ValueError(
                f"This trajectory walked another chain, of {len(self)} steps, than `reverse`, of "
                f"{len(reverse.forward)}: pass `trajectory.reverse`, or the process of the same steps and variances."
            )
        return t


def _check_states(x_t: Tensor, x_s: Tensor) -> None:
    if x_s.shape != x_t.shape:
        raise ValueError(
            f"`x_s` must have the shape of `x_t`, {tuple(x_t.shape)}, but has {tuple(x_s.shape)}: pass the states "
            "before and after the same steps."
        )


def _used(reverse: ReverseProcess, model_output: Tensor, x_t: Tensor) -> Tensor:
    """The output without the variance half where nothing is learned of it."""
    whole = reverse.learns_variance or model_output.shape[1] != 2 * x_t.shape[1]
    return model_output if whole else model_output[:, : x_t.shape[1]]


def _pair(
    reverse: ReverseProcess, model_output: Tensor, other_output: Tensor, x_t: Tensor, t: Tensor | int
) -> tuple[DiagonalGaussian, Tensor, Tensor]:
    """What a step draws from under the other output, mu - mu' and u."""
    c = reverse.coefficients(_drawing(reverse, x_t, t), x_t)
    (output, variance), (other, other_variance) = (
        reverse.split(_used(reverse, whole, x_t), x_t) for whole in (model_output, other_output)
    )
    x_t = promote_half(x_t)
    other_mean, other_x_0 = reverse.predict_mean(other, x_t, c)
    # The outputs are subtracted, not what is made of them: the terms that they share would cancel with digits lost.
    gap = c.output_to_x_0 * (output - other)
    if reverse.clip_sample or reverse.thresholding:
        x_0 = reverse.predict_x_0(output, x_t, c)
        gap = torch.where(_inside(reverse, x_0) & _inside(reverse, other_x_0), gap, x_0 - other_x_0)
    p = DiagonalGaussian(other_mean, c.log_variance(other_variance))
    u = gap.new_zeros(())
    if variance is not None and other_variance is not None:
        u = c.variance_slope * (variance - other_variance)
    return p, c.x_0_to_mean * gap, u


def _inside(reverse: ReverseProcess, x_0: Tensor) -> Tensor:
    """Where x_0_hat is what the output gave; thresholding rescales it everywhere."""
    return x_0.abs() < (0 if reverse.thresholding else reverse.clip_sample_range)


def _floored(log_ratio: Tensor) -> Tensor:
    """The logarithm of a variance, or of two's ratio, of which the inverse can be multiplied without an inf."""
    return log_ratio.clamp(min=-0.9 * math.log(torch.finfo(log_ratio.dtype).max))


def _drawing(reverse: ReverseProcess, x_t: Tensor, t: Tensor | int) -> Tensor:
    """One chain index for each row, none of which draws nothing."""
    if reverse.eta == 0:
        raise ValueError("`eta=0` draws no noise: its steps have no log-probability. Sample with `eta` above 0.")
    t = torch.as_tensor(t, device=None if isinstance(t, Tensor) else "cpu")
    if t.numel() != 1 and t.shape != x_t.shape[:1]:
        raise ValueError(
            f"`t` must hold one chain index, or one for each of the {len(x_t)} rows of `x_t`, but has the shape "
            f"{tuple(t.shape)}."
        )
    if not torch.compiler.is_compiling() and bool((t == 0).any()):
        raise ValueError(
            "`t` holds 0, the chain's last step: it draws nothing, so that it has no log-probability. Leave it out."
        )
    return t.reshape(-1).expand(len(x_t))


def _same_steps(one: ReverseProcess, other: ReverseProcess, like: Tensor) -> bool:
    """Whether two processes draw the same from the same outputs, but for rounding."""
    if any(getattr(one, name) != getattr(other, name) for name in _LIMITS):
        return False
    if not torch.equal(one.forward.timesteps.cpu(), other.forward.timesteps.cpu()):
        return False
    t = torch.arange(1, len(one.forward))
    pairs = zip(*(process.coefficients(t, like) for process in (one, other)))
    return all(torch.allclose(a.float(), b.to(a.device).float(), rtol=1e-5, atol=1e-5) for a, b in pairs)
