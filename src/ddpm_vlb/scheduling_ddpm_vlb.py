"""DDPMVLBScheduler: DDPMScheduler's place and configuration in diffusers, with the distributions underneath.

`step` is one call of the reverse process p(x_{t-1} | x_t) on the respaced chain; `reverse_process()` hands out the
same p for training and evaluation. Names here are diffusers' (`original_samples`, `sample`, `timestep`).
"""

import os
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging
from torch import Tensor

from .chains import Chains
from .configurations import MODEL_DEFINING, read_config, taken_over
from .configured_scheduler import ConfiguredScheduler
from .devices import send
from .few_step_store import storable, to_config
from .respacing import SquaredErrors, StoredPath
from .reverse_process import ReverseProcess
from .walk import DDPMVLBSchedulerOutput, Walk

logger = logging.get_logger(SchedulerMixin.__module__)  # what `diffusers.utils.logging` sets is ours too
# Set while a pipeline saves us that writes stock's names into its index.
_INDEX_IS_OURS: ContextVar[bool] = ContextVar("_INDEX_IS_OURS", default=False)
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class DDPMVLBScheduler(ConfiguredScheduler):
    """DDPM's ancestral sampler with learned variance, respacing and the training process behind it.

    A drop-in for `DDPMScheduler`: the same configuration, defaults and methods. The configuration may be changed as
    diffusers' scripts do, `register_to_config(prediction_type="v_prediction")`; step and p change with it.

    Args:
        num_train_timesteps: T, the number of steps of the training chain.
        beta_start: beta_1, in (0, 1].
        beta_end: beta_T, in (0, 1].
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" or "laplace".
        trained_betas: the betas themselves, in place of a named schedule.
        variance_type: "fixed_small", "fixed_large", "learned", "learned_range"; "fixed_small_log" and
            "fixed_large_log" mean the same as without `_log`.
        clip_sample: clamp x_0_hat to +- `clip_sample_range`.
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding: dynamic thresholding in place of clipping.
        dynamic_thresholding_ratio: its quantile, in [0, 1].
        clip_sample_range: the clamp, positive.
        sample_max_value: the largest value at which thresholding clamps, positive.
        timestep_spacing: "leading", "linspace" or "trailing".
        steps_offset: added to the steps of the "leading" spacing.
        rescale_betas_zero_snr: rescale to zero-terminal SNR.
        levels: number of levels of the data on [-1, 1]; None for continuous data. This and the rest are not known to
            stock schedulers, and saved only where they are not at these defaults.
        reverse_variance: "network" (what `variance_type` says), or the optimal variance in its place, with one value
            for each step, "analytic", or for each step and dimension, "per_pixel".
        optimal_paths: paths of few steps, each a dict as of `StoredPath.to_config`; see `set_timesteps`. This and the
            next are no part of the configuration but of older ones: `store_few_steps` sets them.
        x_0_mse: the errors that the optimal variances come from: `timesteps`, `mean`, and the name of the file beside
            the configuration with those of each pixel, `per_pixel_file`, or None.
        few_steps_file: the name of the file beside the configuration that holds these two.
        decoder_log_variance: log sigma^2 of the first step, in place of what `variance_type` says; see `path_chain`.

    Raises:
        ValueError: an unknown name, a value of the wrong type, betas that are no schedule, an impossible number, or
            paths or errors of another chain.

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, section 4; Watson et al. 2021; Bao et al. 2022.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        levels: int | None = 256,
        reverse_variance: str = "network",
        optimal_paths: Sequence[dict[str, Any]] | None = None,
        x_0_mse: dict[str, Any] | None = None,
        few_steps_file: str | None = None,
        decoder_log_variance: float | None = None,
    ):
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self._show(torch.zeros(0, dtype=torch.int64))
        self._settle(lambda config: Chains.from_config(config, optimal_paths, x_0_mse))

    # diffusers' private name; its own would read a file of any size, and a test holds it to calling this one.
    _dict_from_json_file = staticmethod(read_config)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the configuration; warns where a stock pipeline does so, whose index nobody could load from the Hub.

        Args:
            save_directory: the folder to write into.
            push_to_hub: upload it as well.
            kwargs: those of `SchedulerMixin.save_pretrained`.
        """
        if Path(save_directory).name == "scheduler" and not _INDEX_IS_OURS.get():
            logger.warning(
                f"DDPMVLBScheduler was saved to {save_directory}. If this is part of saving a stock pipeline, its "
                "model_index.json names `ddpm_vlb`, and no `from_pretrained` loads that from the Hub. Save "
                "`DDPMVLBPipeline.from_pipe(pipeline)` instead, or put a stock scheduler into the pipeline first: "
                "`pipeline.register_modules(scheduler=DDPMScheduler.from_config(pipeline.scheduler.config))`."
            )
        self._chains.store.save(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As diffusers', and the files with what is stored for few steps, where the configuration names them.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a Hub repository.
            subfolder: where the configuration lies in it.
            return_unused_kwargs: return what was not used beside the scheduler.
            kwargs: those of `SchedulerMixin.from_pretrained`.

        Raises:
            OSError, ValueError: as `SchedulerMixin.from_pretrained`; a file that does not fit the configuration.
        """
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=return_unused_kwargs, **kwargs
        )
        scheduler = loaded[0] if return_unused_kwargs else loaded
        where = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs}
        chains = scheduler._chains.with_file(str(pretrained_model_name_or_path), subfolder, where)
        given = MODEL_DEFINING & kwargs.keys()
        if given and chains.store.name is not None:
            raise ValueError(
                f"`{min(given)}` is given, but the paths and variances stored here were found for the saved chain and "
                "network: load it without, then `scheduler.store_few_steps()` and `register_to_config`."
            )
        scheduler._settle(lambda config: chains)
        return loaded

    def store_few_steps(
        self,
        paths: Sequence[StoredPath] = (),
        errors: SquaredErrors | None = None,
        reverse_variance: str = "network",
    ) -> None:
        """Store paths and variances, in place of those that are stored; resets `set_timesteps`.

        Args:
            paths: of different numbers of steps; `set_timesteps` takes them where their number is asked for.
            errors: what optimal variances come from.
            reverse_variance: of the chains without a stored path, "network", "analytic" or "per_pixel".

        Raises:
            ValueError: paths of another chain, or variances without the errors that they need.
        """
        errors = None if errors is None else storable(errors)
        new = {**self.config, **to_config(paths, errors), "reverse_variance": reverse_variance, "few_steps_file": None}
        other = type(self).from_config(new)  # checks it all before anything is changed
        other._settle(lambda config: other._chains_.with_errors(errors))
        for kind in {reverse_variance, *(path.variance for path in paths)}:
            other._chains.store.rows(kind, [0])
        self.__dict__.update(other.__dict__)

    @property
    def errors(self) -> SquaredErrors | None:
        """The errors that optimal variances come from, if they are known."""
        return self._chains.store.errors

    @property
    def errors_file(self) -> str | None:
        """The name of the file with the errors of each pixel, beside the saved configuration; None without one."""
        return self._chains.store.file

    @property
    def optimal_paths(self) -> dict[int, StoredPath]:
        """The stored paths by their number of steps."""
        return dict(self._chains.store.paths)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', but what defines the chain is taken from the other class even where it is at its defaults.

        Args:
            config: the configuration of a scheduler, ours or a stock one.
            return_unused_kwargs: return what was not used beside the scheduler.
            kwargs: values in place of the configuration's.

        Raises:
            ValueError: a configuration that describes no chain of betas, whatever is given in its place, or an
                impossible value.
        """
        if isinstance(config, dict):
            config, kwargs = taken_over(config, kwargs)
            if "timestep_spacing" in kwargs:  # the steps that are meant, not those that may be stored
                kwargs.setdefault("few_steps_file", None)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return len(self._chains)

    @property
    def levels(self) -> int | None:
        """Number of levels of the data on [-1, 1]; None for continuous data."""
        return self._chains.training.levels

    def reverse_process(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        timesteps: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = None,
    ) -> ReverseProcess:
        """The reverse process p of the training chain, or of the shorter one that `set_timesteps` would choose.

        Args:
            device: where its tables shall live; the CPU when None.
            dtype: torch.float32 or torch.float64.
            timesteps: score the shorter chain that visits only these training timesteps (any order).
            num_inference_steps: score the chain of so many steps.
            timestep_spacing: their spacing, as in `set_timesteps`.

        Raises:
            ValueError: another dtype, timesteps that are repeated or leave the chain, an epsilon-network on a chain
                whose last step has no signal (zero-terminal SNR), or as `set_timesteps`.
        """
        if timesteps is not None:
            timesteps = sorted((int(t) for t in timesteps), reverse=True)
        asked = num_inference_steps, timesteps, timestep_spacing
        path = None if all(own is None for own in asked) else self._path(*asked)
        return self._chains.process(path).to(device, dtype)

    def _path(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None, timestep_spacing: str | None
    ) -> StoredPath:
        default = self.config.timestep_spacing, self.config.steps_offset
        return self._chains.path(num_inference_steps, timesteps, timestep_spacing, default)

    def _visit(self, path: StoredPath, device: torch.device | str | None, eta: float = 1.0) -> None:
        """Make a path the chain that `step` walks."""
        if not self._walk.is_of(self._chains, path, eta):
            self._walk_ = Walk(self._chains, path, eta)
        timesteps = torch.tensor(path.timesteps, dtype=torch.int64, device="cpu" if device is not None else None)
        self._show(timesteps if device is None else send(timesteps, device))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
        timestep_spacing: str | None = None,
        eta: float = 1.0,
    ) -> None:
        """Choose the steps to visit; `step` then uses the coefficients of that chain.

        Args:
            num_inference_steps: K, 1 .. T.
            device: where `self.timesteps` shall live.
            timesteps: the steps themselves, strictly descending in 0 .. T - 1, in place of a number.
            timestep_spacing: "leading", "linspace", "trailing", "quadratic", or "optimal", the stored path of K steps.
                None takes the stored path where there is one, else what the configuration says.
            eta: of DDIM, from 0 (no noise) to 1 (DDPM).

        Raises:
            ValueError: both or none given, K outside 1 .. T, timesteps not strictly descending in the chain, an
                unknown spacing, no stored path, `eta` outside [0, 1], or variances that are not there.
        """
        path = self._path(num_inference_steps, timesteps, timestep_spacing)
        self._visit(path, device, eta)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(path.timesteps)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` as it is: a DDPM does not scale the network's input.

        Args:
            sample: the network's input.
            timestep: not used.
        """
        return sample

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The timestep that follows `timestep` on the way to the data, -1 after the last; waits for one on a GPU.

        Args:
            timestep: a timestep of the current chain.

        Raises:
            ValueError: `timestep` is not part of the chain.
        """
        index = self._walk.index(timestep)
        return torch.tensor(-1) if index == 0 else self._walk.process.forward.timesteps[index - 1]

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        """A diagnostic with stock's values, which `step` does not use and which waits; see `Walk.stock_variance`."""
        name = self.config.variance_type if variance_type is None else variance_type
        return self._walk.stock_variance(t, predicted_variance, name)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMVLBSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_{t-1} from p(x_{t-1} | x_t); without noise at the chain's last step.

        NaN and infinity are not looked for, which would wait for the device: `DDPMVLBPipeline` tells of them. To
        compile it, call it once before, and pass `timestep` as a tensor: one graph then serves all steps.

        Args:
            model_output: the network's output (B, C, *) or (B, 2 C, *); a variance half that the variance type does
                not use is left aside.
            timestep: a timestep of the current chain, or one for each sample (B,). In a tensor on a GPU, or while
                compiling, one outside the chain cannot be refused without a wait: its sample is NaN.
            sample: x_t, (B, C, *).
            generator: source of the noise, or a list with one for each sample.
            return_dict: return a `DDPMVLBSchedulerOutput`, with the distribution too, or stock's tuple.

        Raises:
            ValueError: a timestep outside the chain, or a wrong number of channels.
            TypeError: a timestep that is no integer.

        Source: Ho et al. 2020, algorithm 2.
        """
        if self.num_inference_steps is None and self._walk.path.variance != self._chains.variance:
            self._visit(self._chains.whole, self.timesteps.device)
        walk = self._walk  # each look at it is a check
        previous, x_0 = walk.step(model_output, timestep, sample, generator)
        if not return_dict:
            return previous, x_0
        return DDPMVLBSchedulerOutput.drawn(previous, x_0, walk, (model_output, timestep, sample))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise data to the given steps of the training chain; computed in float32, returned in the data's dtype.

        Args:
            original_samples: x_0, (B, C, *), or one for all timesteps, (1, C, *).
            noise: epsilon, likewise.
            timesteps: training timesteps (B,) or one for all, 0 .. T - 1.

        Raises:
            TypeError, IndexError, ValueError: as `ForwardProcess.diffuse`.
        """
        timesteps = send(timesteps.reshape(-1), original_samples.device)
        batch = max(len(original_samples), len(noise), len(timesteps))
        x_0, noise = (x.expand(batch, *x.shape[1:]) for x in (original_samples, noise))
        forward = self._chains.forward_for(original_samples)
        return forward.diffuse(x_0, timesteps.expand(batch), noise).x_t.to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v that a v-prediction network should answer: sqrt(abar) noise - sqrt(1 - abar) x_0.

        Args:
            sample: x_0, (B, C, *).
            noise: epsilon, same shape.
            timesteps: training timesteps (B,), 0 .. T - 1.

        Raises:
            TypeError: timesteps that are no integers, or data that is none but integers.
        """
        return self._chains.velocity(sample, noise, timesteps)
