"""The chains of a network, the training chain and every shorter one: which steps they visit, and their p."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .distributions import ordinary_tensors
from .few_step_store import FewStepStore
from .forward_process import ForwardProcess
from .respacing import ALL_SPACINGS, SquaredErrors, StoredPath, spaced_timesteps
from .reverse_process import ReverseProcess
from .schedules import check_betas, make_betas, rescale_betas_zero_snr

_Place = tuple[torch.device, torch.dtype]
# The configuration's names for the arguments of a ReverseProcess.
_OF_REVERSE = (
    "prediction_type",
    "variance_type",
    "clip_sample",
    "levels",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "decoder_log_variance",
)


@dataclass(frozen=True, eq=False)
class Chains:
    """The training chain of a network and every shorter one.

    Args:
        forward: q of the T steps of the training chain.
        training: p of those that can be visited. Without signal the noise says nothing of x_0: a last step that no
            chain of an epsilon-network can visit.
        store: paths of few steps, and what optimal variances come from.
        variance: of the chains without a stored path, "network", "analytic" or "per_pixel".
    """

    forward: ForwardProcess
    training: ReverseProcess
    store: FewStepStore
    variance: str
    _forwards: dict[_Place, ForwardProcess] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    @ordinary_tensors()
    def from_config(cls, config: Mapping[str, Any], optimal_paths: Any = None, x_0_mse: Any = None) -> "Chains":
        """Those of a scheduler's configuration.

        Args:
            config: whole, as the scheduler's arguments.
            optimal_paths: what it stores; None where that lies in a file, or nowhere.
            x_0_mse: likewise.

        Raises:
            ValueError: betas that are no schedule, an unknown name, an impossible number, or paths or errors of
                another chain.
        """
        forward = ForwardProcess.from_betas(_betas(config))
        last_is_blind = config["prediction_type"] == "epsilon" and bool(forward.betas[-1] == 1) and len(forward) > 1
        seen = forward.respace(list(range(len(forward) - 1))) if last_is_blind else forward
        training = ReverseProcess(seen, **{name: config[name] for name in _OF_REVERSE})
        store = FewStepStore.from_config(optimal_paths, x_0_mse, len(seen) - 1, config["few_steps_file"])
        return cls(forward, training, store, config["reverse_variance"])

    def changed(self, config: Mapping[str, Any]) -> "Chains":
        """Those of a configuration that has changed; what is stored stays, and must be of the same chain.

        Args:
            config: as in `from_config`.

        Raises:
            ValueError: as `from_config`; a change of what the stored paths were found for.
        """
        new = Chains.from_config(config)
        steps = new.training.forward.timesteps
        alike = torch.equal(new.forward.betas, self.forward.betas) and len(steps) == len(self.training.forward)
        of_network = ("prediction_type", "variance_type", "decoder_log_variance")
        alike &= all(getattr(new.training, name) == getattr(self.training, name) for name in of_network)
        if self.store.name is not None and not alike:
            raise ValueError(
                "This scheduler stores paths and variances that were found for another chain or network: remove them "
                "first, `scheduler.store_few_steps()`, and make them anew with `ddpm-vlb optimize-timesteps`."
            )
        return replace(new, store=self.store)

    @functools.cached_property
    def stock_tables(self) -> dict[str, Tensor]:
        """Stock's public tables, in float32."""
        tables = {"betas": self.forward.betas, "alphas": 1 - self.forward.betas}
        tables["alphas_cumprod"] = self.forward.alphas_cumprod
        return {name: table.float() for name, table in tables.items()}

    def __len__(self) -> int:
        return len(self.forward)

    @functools.cached_property
    def whole(self) -> StoredPath:
        """All steps that can be visited."""
        return StoredPath(tuple(self.training.forward.timesteps.flip(0).tolist()), self.variance)

    def forward_for(self, x_0: Tensor) -> ForwardProcess:
        """q of the training chain on the data's device, in its precision, float32 at least.

        Args:
            x_0: data.
        """
        key = x_0.device, torch.promote_types(x_0.dtype, torch.float32)
        if key not in self._forwards:
            self._forwards[key] = self.forward.to(*key)
        return self._forwards[key]

    def with_file(self, root: str, subfolder: str | None, where: dict[str, Any]) -> "Chains":
        """With the errors of each pixel that lie beside the configuration; arguments and errors as of the store."""
        return replace(self, store=self.store.with_file(root, subfolder, where))

    def with_errors(self, errors: SquaredErrors | None) -> "Chains":
        """With these errors in place of those that the configuration holds.

        Args:
            errors: the same, and those of each pixel.
        """
        return self if errors is None else replace(self, store=replace(self.store, errors=errors))

    def is_stored(self, path: StoredPath | None) -> bool:
        """Whether it is a stored path itself; the same steps by hand have the short chain's own decoder.

        Args:
            path: of this chain.
        """
        return path is not None and path is self.store.paths.get(len(path.timesteps))

    def is_blind(self, timestep: int) -> bool:
        """Whether the network is blind at a step of the training chain.

        Args:
            timestep: any integer.
        """
        return len(self.training.forward) <= timestep < len(self)

    def path(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        timestep_spacing: str | None,
        default: tuple[str, int],
    ) -> StoredPath:
        """The steps that are asked for; a stored path is returned as it is.

        Args:
            num_inference_steps: K.
            timesteps: the steps themselves, in place of a number.
            timestep_spacing: of K steps; None takes the stored path where there is one, else the default.
            default: a spacing, and the offset of "leading".

        Raises:
            ValueError: as `DDPMVLBScheduler.set_timesteps`.
        """
        if (num_inference_steps is None) == (timesteps is None):
            given = " (`timestep_spacing` needs `num_inference_steps`)" if timestep_spacing is not None else ""
            raise ValueError(f"Pass exactly one of `num_inference_steps` and `timesteps`{given}.")
        if timestep_spacing not in (None, *ALL_SPACINGS):
            raise ValueError(
                f"`timestep_spacing` must be one of {list(ALL_SPACINGS)}, but got {timestep_spacing!r:.80}."
            )
        if timesteps is not None:
            if timestep_spacing is not None:
                raise ValueError(
                    "`timestep_spacing` is for `num_inference_steps`: `timesteps` are the steps themselves."
                )
            return StoredPath(self._checked(timesteps), self.variance)
        assert num_inference_steps is not None
        integer = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
        if timestep_spacing in (None, "optimal") and num_inference_steps != len(self):
            self.store.check_known()
        stored = self.store.paths.get(int(num_inference_steps)) if integer else None
        if stored is not None and timestep_spacing in (None, "optimal"):
            return stored
        if timestep_spacing == "optimal":
            raise ValueError(
                f"No path of {num_inference_steps} steps is stored; there are {sorted(self.store.paths) or 'none'}. "
                "Make one with `ddpm-vlb optimize-timesteps`, or take another `timestep_spacing`."
            )
        spacing, offset = default
        chosen = spaced_timesteps(timestep_spacing or spacing, num_inference_steps, len(self), offset)
        return StoredPath(tuple(chosen), self.variance)

    def _checked(self, timesteps: Sequence[int]) -> tuple[int, ...]:
        chosen = tuple(int(t) for t in timesteps)
        if any(given != t for given, t in zip(timesteps, chosen)):
            raise ValueError(f"`timesteps` must be integers, but got {list(timesteps)[:8]}.")
        if not chosen:
            raise ValueError("`timesteps` must hold at least one step, but it is empty.")
        if any(b >= a for a, b in zip(chosen, chosen[1:])):
            raise ValueError("`timesteps` must be in descending order, each below the one before it.")
        if chosen[0] >= len(self) or chosen[-1] < 0:
            raise ValueError(
                f"`timesteps` must start before {len(self)}, the length of the chain, and not go below 0."
            )
        return chosen

    @ordinary_tensors()
    def process(self, path: StoredPath | None, eta: float = 1.0) -> ReverseProcess:
        """The reverse process of a path.

        Args:
            path: as `path` gives it; None for the training chain.
            eta: of DDIM, from 0 (no noise) to 1 (DDPM).

        Raises:
            ValueError: a step at which the network is blind, `eta` outside [0, 1], or variances that are not there.
        """
        ascending = range(len(self)) if path is None else sorted(path.timesteps)
        if self.is_blind(ascending[-1]):
            return replace(self.training, forward=self.forward)  # raises, and says why
        variance = self.variance if path is None else path.variance
        shift = path.decoder_shift if path is not None and self.is_stored(path) else None
        process = self.training
        if path is not None and (shift is not None or len(ascending) < len(process.forward)):
            process = process.respace(ascending, shift if variance == "network" else None)
        if variance != "network":
            rows = self.store.rows(variance, process.forward.timesteps)
            process = replace(process, x_0_mse=rows, decoder_log_variance=None)
            if shift is not None:
                process = process.respace(range(len(process.forward)), shift)
        return process if eta == 1 else replace(process, eta=eta)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The schedule that a configuration names."""
    if config["trained_betas"] is not None:
        betas = check_betas(config["trained_betas"])
    else:
        names = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
        betas = make_betas(*(config[name] for name in names))
    return rescale_betas_zero_snr(betas) if config["rescale_betas_zero_snr"] else betas
