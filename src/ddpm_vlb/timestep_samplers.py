r"""Which steps t to train on, and the importance weights that keep the expectation of the loss the same.

Every sampler draws t with probability p_t and returns w = 1 / (T p_t), so that E[w f(t)] = mean over t of f(t):

1. uniform: p_t = 1/T, independent draws
2. low-discrepancy: t = floor(T (i + U) / n) for i = 0 .. n - 1 with one U ~ U(0, 1): each t is uniform, and the n
   draws of a batch spread evenly (Kingma et al. 2021, VDM, appendix I.1)
3. importance: the same over the inverse CDF of any p_t (systematic sampling)
4. loss second moment: p_t proportional to sqrt(E[L_t^2]) over the last losses (Nichol & Dhariwal 2021, eq. 18)
5. Gaussian data model: p_t proportional to the L_t of Gaussian data with the training data's covariance:
   L_t = (SNR_{t-1} - SNR_t) / 2 x mean_i lam_i (1 - abar_t) / (abar_t lam_i + 1 - abar_t), no warm-up needed

On several processes a sampler draws the t of the *global* batch from a generator that must be seeded alike everywhere,
and returns the part of its `rank`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .devices import send
from .gaussian_model import gaussian_model_terms


def systematic_points(n: int, generator: torch.Generator | None) -> Tensor:
    """n points evenly spread over [0, 1) from a random offset, in random order; float64 (n,) on the CPU.

    Args:
        n: how many.
        generator: source of randomness.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    dtype = torch.float64 if device.type == "cpu" else torch.float32  # MPS has no other
    offset = torch.rand(1, generator=generator, device=device, dtype=dtype).cpu().double()
    order = torch.randperm(n, generator=generator, device=device).cpu()
    return ((torch.arange(n, dtype=torch.float64) + offset) / n)[order]


def _check_sizes(num_timesteps: int, rank: int, world_size: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"`num_timesteps` must be at least 1, but got {num_timesteps!r}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie in 0 .. world_size - 1, but got rank {rank!r} of {world_size!r}.")


def _check_draw(batch_size: int, world_size: int, generator: torch.Generator | None) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but got {batch_size!r}.")
    if world_size > 1 and generator is None:
        raise ValueError(
            f"On {world_size} processes `sample` needs a `generator`, seeded alike on all of them: each returns its "
            "part of one global draw."
        )


class UniformTimesteps:
    """Independent uniform draws.

    Args:
        num_timesteps: T, the length of the chain.
        rank: this process's index among `world_size`.
        world_size: number of processes.

    Raises:
        ValueError: sizes out of range.

    Source: Ho et al. 2020, algorithm 1.
    """

    def __init__(self, num_timesteps: int, rank: int = 0, world_size: int = 1):
        _check_sizes(num_timesteps, rank, world_size)
        self.num_timesteps, self.rank, self.world_size = num_timesteps, rank, world_size

    def sample(
        self, batch_size: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw (t, weights), each (batch_size,): int64 chain indices and float32 weights (here all 1).

        Args:
            batch_size: number of images of this process, at least 1.
            device: where the results go.
            generator: source of randomness, in the same state on every process.

        Raises:
            ValueError: `batch_size` below 1, or several processes without a generator.
        """
        _check_draw(batch_size, self.world_size, generator)
        source = generator.device if generator is not None else "cpu"
        t = torch.randint(self.num_timesteps, (batch_size * self.world_size,), generator=generator, device=source)
        t = send(t[self.rank * batch_size : (self.rank + 1) * batch_size], device or "cpu")
        return t, torch.ones(batch_size, device=t.device)


class ImportanceTimesteps:
    """Systematic draws from given probabilities.

    Args:
        probabilities: p_t, (T,), positive and finite; normalised here. A zero would bias the loss.
        rank: this process's index among `world_size`.
        world_size: number of processes.

    Raises:
        ValueError: probabilities that are not positive and finite, or sizes out of range.

    Source: Kingma et al. 2021, appendix I.1, over the inverse CDF.
    """

    def __init__(self, probabilities: Sequence[float] | Tensor, rank: int = 0, world_size: int = 1):
        p = torch.as_tensor(probabilities, device="cpu").detach().to(torch.float64, copy=True)
        if p.ndim != 1 or len(p) == 0 or not bool((p.isfinite() & (p > 0)).all()):
            raise ValueError(
                "`probabilities` must be a list of positive finite numbers, one for each step of the chain: a step "
                "that is never drawn would be missing from the loss."
            )
        _check_sizes(len(p), rank, world_size)
        self.num_timesteps, self.rank, self.world_size = len(p), rank, world_size
        self.probabilities = p / p.sum()

    @classmethod
    def from_gaussian_model(
        cls,
        alphas_cumprod: Tensor,
        eigenvalues: Tensor,
        uniform_fraction: float = 0.1,
        rank: int = 0,
        world_size: int = 1,
        decoder_by_snr: bool = False,
    ) -> "ImportanceTimesteps":
        """The sampler for L_vlb that needs no warm-up: p_t from a Gaussian model of the data (item 5 above).

        Args:
            alphas_cumprod: alphabar_t of the chain, (T,).
            eigenvalues: eigenvalues of the training data's covariance, from `covariance_eigenvalues`.
            uniform_fraction: share of p_t that is uniform, in (0, 1]: real data is not Gaussian.
            rank: this process's index among `world_size`.
            world_size: number of processes.
            decoder_by_snr: as of `gaussian_model_terms`; for the chain of a path.

        Raises:
            ValueError: `uniform_fraction` outside (0, 1], or sizes out of range.
        """
        if not 0 < uniform_fraction <= 1:
            raise ValueError(f"`uniform_fraction` must lie in (0, 1], but got {uniform_fraction!r}.")
        terms = gaussian_model_terms(alphas_cumprod, eigenvalues, decoder_by_snr)
        total = terms.sum()
        share = terms / total if total > 0 else torch.zeros_like(terms)
        uniform = uniform_fraction if total > 0 else 1.0
        return cls((1 - uniform) * share + uniform / len(terms), rank, world_size)

    def at(self, points: Tensor) -> Tensor:
        """The chain indices where the distribution function of p_t reaches some points.

        Args:
            points: in [0, 1), float64 of any shape; evenly spread ones make a systematic sample.
        """
        cdf = torch.cumsum(self.probabilities, 0)
        return torch.searchsorted(cdf, points * cdf[-1], right=True).clamp(max=len(cdf) - 1)

    def sample(
        self, batch_size: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw (t, weights), each (batch_size,): int64 chain indices and float32 weights 1 / (T p_t).

        Args:
            batch_size: number of images of this process, at least 1.
            device: where the results go.
            generator: source of randomness, in the same state on every process.

        Raises:
            ValueError: `batch_size` below 1, or several processes without a generator.
        """
        _check_draw(batch_size, self.world_size, generator)
        t = self.at(systematic_points(batch_size * self.world_size, generator))
        t = t[self.rank * batch_size : (self.rank + 1) * batch_size]
        weights = (1 / (self.num_timesteps * self.probabilities[t])).float()
        return send(t, device or "cpu"), send(weights, device or "cpu")


class LowDiscrepancyTimesteps(ImportanceTimesteps):
    """Uniform t, spread evenly over the global batch; all weights are 1.

    Args:
        num_timesteps: T, the length of the chain.
        rank: this process's index among `world_size`.
        world_size: number of processes.

    Raises:
        ValueError: sizes out of range.

    Source: Kingma et al. 2021, appendix I.1.
    """

    def __init__(self, num_timesteps: int, rank: int = 0, world_size: int = 1):
        _check_sizes(num_timesteps, rank, world_size)
        super().__init__(torch.ones(num_timesteps), rank, world_size)


class LossSecondMomentTimesteps:
    """Importance sampling by the root mean square of each step's last losses; uniform until every step has enough.

    Losses that are NaN or infinite are left out, so one bad batch cannot poison the history.

    Args:
        num_timesteps: T, the length of the chain.
        history_per_term: number of losses remembered for each step.
        uniform_fraction: share of p_t that is uniform, in (0, 1].
        rank: this process's index among `world_size`.
        world_size: number of processes.

    Raises:
        ValueError: sizes out of range.

    Source: Nichol & Dhariwal 2021, section 3.3, eq. 18.
    """

    @torch.inference_mode(False)  # `update` writes into what is made here
    def __init__(
        self,
        num_timesteps: int,
        history_per_term: int = 10,
        uniform_fraction: float = 0.001,
        rank: int = 0,
        world_size: int = 1,
    ):
        _check_sizes(num_timesteps, rank, world_size)
        if history_per_term < 1 or not 0 < uniform_fraction <= 1:
            raise ValueError(
                "`history_per_term` must be at least 1 and `uniform_fraction` lie in (0, 1], but got "
                f"{history_per_term!r} and {uniform_fraction!r}."
            )
        self.num_timesteps, self.rank, self.world_size = num_timesteps, rank, world_size
        self.uniform_fraction = uniform_fraction
        self._history = torch.zeros(num_timesteps, history_per_term, dtype=torch.float64)
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64)

    @property
    def probabilities(self) -> Tensor:
        """p_t as of now, (T,) float64."""
        uniform = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if bool((self._counts < self._history.shape[1]).any()):
            return uniform
        root = self._history.square().mean(1).sqrt()
        if root.sum() == 0:
            return uniform
        return (1 - self.uniform_fraction) * root / root.sum() + self.uniform_fraction * uniform

    def sample(
        self, batch_size: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw (t, weights), each (batch_size,): int64 chain indices and float32 weights 1 / (T p_t).

        Args:
            batch_size: number of images of this process, at least 1.
            device: where the results go.
            generator: source of randomness, in the same state on every process.

        Raises:
            ValueError: `batch_size` below 1, or several processes without a generator.
        """
        return ImportanceTimesteps(self.probabilities, self.rank, self.world_size).sample(
            batch_size, device, generator
        )

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses of a batch. On several processes pass the gathered batch, the same everywhere.

        Args:
            t: chain indices (B,).
            losses: unweighted losses (B,); those that are not finite are left out.

        Raises:
            ValueError: the shapes differ.
        """
        if t.shape != losses.shape:
            raise ValueError(f"`t` and `losses` must have one shape, but got {tuple(t.shape)}, {tuple(losses.shape)}.")
        t, losses = t.cpu().long(), losses.detach().cpu().double()
        finite = losses.isfinite()
        t, order = t[finite].sort(stable=True)
        losses = losses[finite][order]
        new, size = torch.bincount(t, minlength=self.num_timesteps), self._history.shape[1]
        place = torch.arange(len(t)) - (new.cumsum(0) - new)[t]  # among the new losses of its step
        slot = (self._counts[t] + place) % size
        kept = place >= new[t] - size  # those before are overwritten by a later one of the same batch
        self._history[t[kept], slot[kept]] = losses[kept]
        self._counts += new

    def state_dict(self) -> dict[str, Tensor]:
        """The history, for a checkpoint."""
        return {"history": self._history.clone(), "counts": self._counts.clone()}

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore a history.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: it is of a chain or history of another length.
        """
        history, counts = state_dict["history"], state_dict["counts"]
        if history.shape != self._history.shape:
            raise ValueError(
                f"The saved history has the shape {tuple(history.shape)}, but this sampler holds "
                f"{tuple(self._history.shape)}: it was saved with another number of timesteps or `history_per_term`."
            )
        self._history, self._counts = history.double().cpu().clone(), counts.long().cpu().clone()
