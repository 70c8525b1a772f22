"""DDPMVLBScheduler: DDPMScheduler's place and configuration in diffusers, with the distributions underneath.

`step` is one call of the reverse process p(x_{t-1} | x_t) on the respaced chain; `reverse_process()` hands out the
same p for training and evaluation. Names here are diffusers' (`original_samples`, `sample`, `timestep`).
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .distributions import promote_half
from .forward_process import ForwardProcess, check_timesteps, gather
from .respacing import (
    ALL_SPACINGS,
    TIMESTEP_SPACINGS,
    VARIANCES,
    SquaredErrors,
    StoredPath,
    spaced_timesteps,
    stored_errors,
    stored_paths,
)
from .reverse_process import VARIANCE_TYPES, ReverseProcess
from .schedules import check_betas, make_betas
from .schedules import rescale_betas_zero_snr as rescaled_to_zero_snr

logger = logging.get_logger(SchedulerMixin.__module__)  # what `diffusers.utils.logging` sets is ours too
# Set while a pipeline saves us that writes stock's names into its index.
_INDEX_IS_OURS: ContextVar[bool] = ContextVar("_INDEX_IS_OURS", default=False)
# Keys that stock schedulers do not know are written only where they differ from these defaults.
_OWN_DEFAULTS: dict[str, Any] = {
    "levels": 256,
    "reverse_variance": "network",
    "optimal_paths": None,
    "x_0_mse": None,
}
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# 100 000 betas take 3 MB.
_MAX_CONFIG_BYTES = 8_000_000
# The largest that a float32 tensor can be clamped to.
_MAX_NUMBER = torch.finfo(torch.float32).max


def _is_number(value: Any) -> bool:
    real: Any = value  # numpy's scalars among them
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(real) <= _MAX_NUMBER)


_TYPES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "True or False": (
        lambda value: isinstance(value, bool),
        ("clip_sample", "thresholding", "rescale_betas_zero_snr"),
    ),
    "a finite number": (
        _is_number,
        ("dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"),
    ),
    "an integer": (
        lambda value: isinstance(value, Integral) and not isinstance(value, bool),
        ("steps_offset",),
    ),
}
# The classes whose defaults are ours: a configuration of theirs may leave anything out.
_OUR_DEFAULTS = (None, "DDPMVLBScheduler", "DDPMScheduler", "DDPMParallelScheduler")
# What the network was trained with must survive a change of class even where it equals a default.
_MODEL_DEFINING = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "prediction_type",
    "rescale_betas_zero_snr",
}


def read_config(json_file: str | os.PathLike[str], dduf_entries: Any = None) -> dict[str, Any]:
    """A configuration file of a scheduler or a pipeline, which may come from anybody.

    Args:
        json_file: its path.
        dduf_entries: what diffusers before 0.42 passes for a file in a DDUF archive, which is left to it.

    Raises:
        ValueError: larger than any configuration of ours can be, not JSON, or not an object.
    """
    if dduf_entries is not None:
        return ConfigMixin._dict_from_json_file(json_file, dduf_entries=dduf_entries)
    path = Path(json_file)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} must be at most {_MAX_CONFIG_BYTES} bytes, but has {path.stat().st_size}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be JSON, but cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold a JSON object, but holds {type(config).__name__}.")
    return config


def _check_types(config: Any) -> None:
    """Refuse values of a foreign configuration that Python would let pass, or fail on somewhere deep."""
    for kind, (accepts, names) in _TYPES.items():
        for name in names:
            if not accepts(config[name]):
                raise ValueError(f"`{name}` must be {kind}, but got {config[name]!r:.80}.")


class DDPMVLBScheduler(SchedulerMixin, ConfigMixin):
    """DDPM's ancestral sampler with learned variance, respacing and the training process behind it.

    A drop-in for `DDPMScheduler`: the same configuration, defaults and methods.

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
        optimal_paths: paths of few steps, each a dict as of `StoredPath.to_config`; see `set_timesteps`.
        x_0_mse: the errors that the optimal variances come from: `timesteps`, `mean`, and the name of the file beside
            the configuration with those of each pixel, `per_pixel_file`, or None. `store_few_steps` writes these keys.

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
    ):
        _check_types(self.config)
        for name, value, choices in (
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
            ("reverse_variance", reverse_variance, VARIANCES),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, but got {value!r:.80}.")
        if trained_betas is not None:
            betas = check_betas(trained_betas)
            # Stock takes T from the betas' number too; a config that contradicts itself would break its spacings.
            if len(betas) != num_train_timesteps:
                self.register_to_config(num_train_timesteps=len(betas))
            self.register_to_config(trained_betas=betas.tolist())
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if rescale_betas_zero_snr:
            betas = rescaled_to_zero_snr(betas)
        if variance_type == "fixed_large_log":  # a name under which stock computes NaN
            variance_type = "fixed_large"
            self.register_to_config(variance_type=variance_type)

        self._forward = ForwardProcess.from_betas(betas)
        self._reverse_of = functools.partial(
            ReverseProcess,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_sample=clip_sample,
            levels=levels,
            clip_sample_range=clip_sample_range,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
        )
        # Without signal the noise says nothing of x_0: a last step that no chain of an epsilon-network can visit.
        last_is_blind = prediction_type == "epsilon" and bool(betas[-1] == 1)
        self._blind = len(betas) - 1 if last_is_blind and len(betas) > 1 else None
        seen = self._forward if self._blind is None else self._forward.respace(list(range(self._blind)))
        self._training = self._reverse_of(seen)
        self._paths = stored_paths(optimal_paths, len(seen) - 1)
        self._errors, self._errors_file = stored_errors(x_0_mse)
        self._check_errors()
        self.variance_type = variance_type
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = self._forward.alphas_cumprod.float()
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self._forwards: dict[torch.device, ForwardProcess] = {}
        self._chain = self._training
        self._index: dict[int, int] = {}
        self._visited: tuple[Any, ...] = ()
        # The errors of each pixel come later, if at all: this chain's variances are looked up when they are needed.
        self._whole = StoredPath(tuple(seen.timesteps.flip(0).tolist()), reverse_variance)
        self._visit(replace(self._whole, variance="network"), None)
        self.timesteps = torch.arange(len(betas)).flip(0)

    def register_to_config(self, **kwargs: Any) -> None:
        """Keep diffusers' list of values left at their defaults, which other classes made from this config drop.

        Model-defining keys must not be on it: another class may have other defaults. Keys of our own are left out of
        the configuration where they are at theirs, so that stock takes it without a word (see docs/notation.md).
        """
        if "num_train_timesteps" in kwargs and "levels" in kwargs:  # the whole configuration, not an update
            kwargs = {k: v for k, v in kwargs.items() if k not in _OWN_DEFAULTS or v != _OWN_DEFAULTS[k]}
            unset = set(kwargs.pop("_use_default_values", ())) - _MODEL_DEFINING - set(_OWN_DEFAULTS)
            if unset:
                kwargs["_use_default_values"] = sorted(unset)
        super().register_to_config(**kwargs)

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
        if self._errors is not None and self._errors.per_pixel is not None:
            assert self._errors_file is not None
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for stale in Path(save_directory).glob("x_0_mse-*.safetensors"):
                stale.unlink()
            save_file({"x_0_mse": self._errors.per_pixel.contiguous()}, Path(save_directory, self._errors_file))
        elif self._errors_file is not None:
            logger.warning(
                f"{self._errors_file} is not saved: this scheduler was made from a configuration alone, or the file "
                "was missing. The variances of each pixel cannot be used until it lies beside the configuration."
            )
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As diffusers', and the file with the errors of each pixel, where the configuration names one.

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
        if scheduler._errors_file is not None:
            where = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs}
            scheduler._load_errors(str(pretrained_model_name_or_path), subfolder, where)
        return loaded

    def _load_errors(self, root: str, subfolder: str | None, where: dict[str, Any]) -> None:
        """Read the errors of each pixel; without the file the scheduler works until they are asked for."""
        assert self._errors is not None and self._errors_file is not None
        path = Path(root, subfolder or "", self._errors_file)
        try:
            if not Path(root).is_dir():
                path = Path(hf_hub_download(root, self._errors_file, subfolder=subfolder, **where))
            with safe_open(path, "pt") as file:
                # Before anything is read: who made the file is not known.
                entry = file.get_slice("x_0_mse") if list(file.keys()) == ["x_0_mse"] else None
                shape = [] if entry is None else entry.get_shape()
                if entry is None or entry.get_dtype() != "F32" or len(shape) < 2 or shape[0] != len(self._errors.mean):
                    raise ValueError(
                        f"{path} does not belong to this configuration: it must hold a float32 tensor `x_0_mse` with "
                        f"a row for each of its {len(self._errors.mean)} timesteps."
                    )
                pixels = file.get_tensor("x_0_mse")
        except (FileNotFoundError, EntryNotFoundError):
            logger.warning(f"{path} is missing: the variances of each pixel cannot be used until it is there.")
            return
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        if _file_of(pixels) != self._errors_file:
            raise ValueError(f"{path} is damaged or another: its name is not that of its content.")
        self._errors = replace(self._errors, per_pixel=pixels)

    def store_few_steps(
        self,
        paths: Sequence[StoredPath] = (),
        errors: SquaredErrors | None = None,
        reverse_variance: str = "network",
    ) -> None:
        """Put paths and variances into the configuration, in place of those that are in it; resets `set_timesteps`.

        Args:
            paths: of different numbers of steps; `set_timesteps` takes them where their number is asked for.
            errors: what optimal variances come from.
            reverse_variance: of the chains without a stored path, "network", "analytic" or "per_pixel".

        Raises:
            ValueError: paths of another chain, or variances without the errors that they need.
        """
        entry = file = None
        if errors is not None:
            if errors.per_pixel is not None:
                errors = replace(errors, per_pixel=errors.per_pixel.cpu().float())
                file = _file_of(errors.per_pixel)
            steps, mean = errors.timesteps.tolist(), errors.mean.double().tolist()
            entry = {"timesteps": steps, "mean": mean, "per_pixel_file": file}
        new = {
            "optimal_paths": [path.to_config() for path in sorted(paths, key=lambda own: len(own.timesteps))] or None,
            "x_0_mse": entry,
            "reverse_variance": reverse_variance,
        }
        other = type(self).from_config({**self.config, **new})  # checks it all before anything is changed
        if errors is not None:
            other._errors = replace(errors, mean=errors.mean.double())
            other._check_errors()
        for kind in {reverse_variance, *(path.variance for path in paths)}:
            other._rows(kind, [0])
        self.__dict__.update(other.__dict__)

    @property
    def errors(self) -> SquaredErrors | None:
        """The errors that optimal variances come from, if they are known."""
        return self._errors

    @property
    def errors_file(self) -> str | None:
        """The name of the file with the errors of each pixel, beside the saved configuration; None without one."""
        return self._errors_file

    @property
    def optimal_paths(self) -> dict[int, StoredPath]:
        """The stored paths by their number of steps."""
        return dict(self._paths)

    def _check_errors(self) -> None:
        if self._errors is None:
            return
        steps, last = self._errors.timesteps, len(self._training.forward) - 1
        if (int(steps[0]), int(steps[-1])) != (0, last):
            raise ValueError(
                f"`x_0_mse` reaches from timestep {int(steps[0])} to {int(steps[-1])}, but this chain from 0 to "
                f"{last}: it was made for another chain. Make it anew with examples/optimize_timesteps.py."
            )

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', but what defines the chain is taken from the other class even where it is at its defaults.

        Args:
            config: the configuration of a scheduler, ours or a stock one.
            return_unused_kwargs: return what was not used beside the scheduler.
            kwargs: values in place of the configuration's.

        Raises:
            ValueError: the configuration of a scheduler that has no betas or shifts its noise levels away from them,
                or an impossible value.
        """
        if isinstance(config, dict):
            unset = config.get("_use_default_values", ())
            if not isinstance(unset, (list, tuple)) or {"self", "cls"} & config.keys():
                raise ValueError("`_use_default_values` must be a list, and no key `self` or `cls`.")
            unshifted = {"snr_shift_scale": (None, 1), "use_flow_sigmas": (None, False)}
            shifted = [key for key, values in unshifted.items() if config.get(key) not in values]
            if shifted:
                raise ValueError(
                    f"This configuration's `{shifted[0]}={config[shifted[0]]!r:.80}` gives noise levels that are not "
                    "those of its betas. Pass the betas of a chain as `trained_betas`, without that key."
                )
            named = {key: config[key] for key in _MODEL_DEFINING if config.get(key) is not None}
            foreign = isinstance(config, FrozenDict) or config.get("_class_name") not in _OUR_DEFAULTS
            if foreign and not {"beta_schedule", "trained_betas"} & (named.keys() | kwargs.keys()):
                raise ValueError(
                    f"This configuration names no betas: {sorted(k for k in config if not k.startswith('_'))}. Its "
                    "scheduler has noise levels of another kind. Pass `beta_schedule` or `trained_betas`."
                )
            # The DPM-Solvers and SA-Solver save `variance_type: null`.
            config = {k: v for k, v in config.items() if k not in _MODEL_DEFINING or v is not None}
            kwargs = named | kwargs
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return len(self._forward)

    @property
    def levels(self) -> int | None:
        """Number of levels of the data on [-1, 1]; None for continuous data."""
        return self._training.levels

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
        if timesteps is None and num_inference_steps is None and timestep_spacing is None:
            return self._process(None).to(device, dtype)
        return self._process(self._path(num_inference_steps, timesteps, timestep_spacing)).to(device, dtype)

    def _is_stored(self, path: StoredPath | None) -> bool:
        """Whether it is a stored path itself; the same steps by hand have the short chain's own decoder."""
        return path is not None and path is self._paths.get(len(path.timesteps))

    def _path(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None, timestep_spacing: str | None
    ) -> StoredPath:
        """The steps that are asked for; a stored path is returned as it is."""
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
            return StoredPath(self._checked_steps(timesteps), self._whole.variance)
        assert num_inference_steps is not None
        whole = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
        stored = self._paths.get(int(num_inference_steps)) if whole else None
        if stored is not None and timestep_spacing in (None, "optimal"):
            return stored
        if timestep_spacing == "optimal":
            raise ValueError(
                f"No path of {num_inference_steps} steps is stored; there are {sorted(self._paths) or 'none'}. Make "
                "one with examples/optimize_timesteps.py, or take another `timestep_spacing`."
            )
        spacing, offset = timestep_spacing or self.config.timestep_spacing, self.config.steps_offset
        chosen = spaced_timesteps(spacing, num_inference_steps, len(self), offset)
        return StoredPath(tuple(chosen), self._whole.variance)

    def _checked_steps(self, timesteps: Sequence[int]) -> tuple[int, ...]:
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

    def _process(self, path: StoredPath | None, eta: float = 1.0) -> ReverseProcess:
        """The reverse process of a path, or of the training chain."""
        ascending = None if path is None else sorted(path.timesteps)
        if self._blind is not None and (ascending is None or self._blind in ascending):
            return self._reverse_of(self._forward)  # raises, and says why
        variance = self._whole.variance if path is None else path.variance
        shift = path.decoder_shift if path is not None and self._is_stored(path) else None
        process = self._training
        if ascending is not None and (shift is not None or len(ascending) < len(process.forward)):
            process = process.respace(ascending, shift if variance == "network" else None)
        if variance != "network":
            process = replace(process, x_0_mse=self._rows(variance, process.forward.timesteps))
            if shift is not None:
                process = process.respace(range(len(process.forward)), shift)
        return process if eta == 1 else replace(process, eta=eta)

    def _rows(self, variance: str, timesteps: Sequence[int] | Tensor) -> Tensor | None:
        """The errors at some timesteps that an optimal variance comes from."""
        if variance == "network":
            return None
        if self._errors is None:
            raise ValueError(
                f"The variance {variance!r} needs `x_0_mse`, which this configuration does not have. "
                "examples/optimize_timesteps.py makes it."
            )
        if variance == "per_pixel" and self._errors.per_pixel is None:
            raise ValueError(
                "The variance 'per_pixel' needs the errors of each pixel, from the file "
                f"{self._errors_file or 'x_0_mse-*.safetensors'} beside the scheduler's configuration: it is missing, "
                "or the scheduler was made from a configuration alone. Load it with `DDPMVLBScheduler.from_pretrained`"
                " or `DDPMVLBPipeline.from_pretrained`, or take another `timestep_spacing`."
            )
        return self._errors.at(timesteps, variance)

    def _visit(self, path: StoredPath, device: torch.device | str | None, eta: float = 1.0) -> None:
        """Make a path the chain that `step` walks."""
        visited = path, self._is_stored(path), eta
        if self._visited != visited:
            self._chain = self._process(path, eta)
            last = len(path.timesteps) - 1
            self._index = {timestep: last - i for i, timestep in enumerate(path.timesteps)}
            self._chains: dict[tuple[torch.device, torch.dtype], tuple[ReverseProcess, Tensor]] = {}
            self._visited = visited
        self.timesteps = torch.tensor(path.timesteps, dtype=torch.int64, device=device)

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
        """The timestep that follows `timestep` on the way to the data, -1 after the last.

        Args:
            timestep: a timestep of the current chain.

        Raises:
            ValueError: `timestep` is not part of the chain.
        """
        index = self._chain_index(timestep)
        return torch.tensor(-1) if index == 0 else self._chain.forward.timesteps[index - 1]

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        """A diagnostic with stock's values, which `step` does not use.

        It differs from `step` at the chain's last timestep: the variance is not borrowed there but the posterior's 0,
        clamped at 1e-20. And its unit goes by the type, as in stock: sigma for "fixed_small_log", log sigma^2 for
        "fixed_large_log", "learned" and "learned_range", sigma^2 otherwise.

        Args:
            t: a timestep of the current chain.
            predicted_variance: the variance half of the network's output, for the learned types.
            variance_type: one of the six; the configuration's when None.

        Raises:
            ValueError: a timestep outside the chain, an unknown type, or "learned_range" without its output.
        """
        name = self.config.variance_type if variance_type is None else variance_type
        if name not in VARIANCE_TYPES:
            raise ValueError(f"`variance_type` must be one of {list(VARIANCE_TYPES)}, but got {name!r:.80}.")
        if name == "learned":
            return predicted_variance
        index, forward = self._chain_index(t), self._chain.forward
        small, large = forward.posterior_variance[index].clamp(min=1e-20), forward.betas[index]
        if name == "learned_range":
            if predicted_variance is None:
                raise ValueError("`variance_type='learned_range'` needs `predicted_variance`.")
            low, high = small.log().float(), large.log().float()
            fraction = (predicted_variance + 1) / 2
            return fraction * high + (1 - fraction) * low
        values = {"fixed_small": small, "fixed_small_log": small.sqrt(), "fixed_large": large}
        return values.get(name, large.log()).float()

    def _chain_index(self, timestep: int | Tensor) -> int:
        integer = timestep.dtype in _INTEGERS if isinstance(timestep, Tensor) else isinstance(timestep, Integral)
        if not integer:
            raise TypeError(f"`timestep` must be an integer, but got {timestep!r}.")
        index = self._index.get(int(timestep))
        if index is None and int(timestep) == self._blind:
            self._process(None)
        if index is None:
            raise ValueError(
                f"`timestep` {int(timestep)} is not part of the current chain of {len(self._index)} steps. Take it "
                "from `scheduler.timesteps`, or include it in `set_timesteps(timesteps=...)`."
            )
        return index

    def _forward_on(self, device: torch.device) -> ForwardProcess:
        if device not in self._forwards:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._forwards[device] = self._forward.to(device, dtype)
        return self._forwards[device]

    def _chain_for(self, sample: Tensor) -> tuple[ReverseProcess, Tensor]:
        """The current chain with its tables where and in the precision that `sample` needs, and timestep -> index."""
        if self._visited[0].variance != self._whole.variance and self.num_inference_steps is None:
            self._visit(self._whole, self.timesteps.device)
        key = sample.device, sample.dtype
        if key not in self._chains:
            lookup = torch.full((len(self),), -1)
            lookup[self._chain.forward.timesteps] = torch.arange(len(self._chain.forward))
            dtype = torch.promote_types(sample.dtype, torch.float32)
            self._chains[key] = self._chain.to(sample.device, dtype), lookup.to(sample.device)
        return self._chains[key]

    def _chain_indices(self, timestep: Tensor, sample: Tensor, lookup: Tensor) -> Tensor:
        """The chain index of each sample's timestep."""
        if timestep.dtype not in _INTEGERS:
            raise TypeError(f"`timestep` must be an integer tensor, but got {timestep.dtype}.")
        timestep = timestep.to(sample.device).long()
        index = lookup[timestep.clamp(0, len(self) - 1)]
        inside = (timestep >= 0) & (timestep < len(self)) & (index >= 0)
        if timestep.shape != sample.shape[:1] or not bool(inside.all()):
            raise ValueError(
                f"A tensor `timestep` must hold one timestep of the current chain of {len(self._index)} steps for "
                f"each of the {len(sample)} samples, but got {timestep.tolist()[:8]}. Take them from "
                "`scheduler.timesteps`."
            )
        return index

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_{t-1} from p(x_{t-1} | x_t); without noise at the chain's last step.

        Args:
            model_output: the network's output (B, C, *) or (B, 2 C, *); a variance half that the variance type does
                not use is left aside.
            timestep: a timestep of the current chain, or one for each sample (B,).
            sample: x_t, (B, C, *).
            generator: source of the noise, or a list with one for each sample.
            return_dict: return a `DDPMSchedulerOutput`, or a tuple.

        Raises:
            ValueError: a timestep outside the chain, or a wrong number of channels.
            TypeError: a timestep that is no integer.

        Source: Ho et al. 2020, algorithm 2.
        """
        chain, lookup = self._chain_for(sample)
        if not chain.learns_variance and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            index = self._chain_indices(timestep, sample, lookup)
            p, x_0 = chain(model_output, sample, index)
            noise = _draw(model_output, sample, generator)
            # Selected, not multiplied by zero: no noise on the last step, whatever its variance.
            last = (index == 0).reshape(-1, *[1] * (sample.ndim - 1))
            previous = torch.where(last, p.mean, p.sample(noise))
        else:
            step = self._chain_index(timestep)
            p, x_0 = chain(model_output, sample, step)
            previous = p.mean if step == 0 or chain.eta == 0 else p.sample(_draw(model_output, sample, generator))
        if sample.dtype != previous.dtype:
            previous, x_0 = previous.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return previous, x_0
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise data to the given steps of the training chain; computed in float32, returned in the data's dtype.

        Args:
            original_samples: x_0, (B, C, *).
            noise: epsilon, same shape.
            timesteps: training timesteps (B,), 0 .. T - 1.

        Raises:
            TypeError, IndexError, ValueError: as `ForwardProcess.diffuse`.
        """
        timesteps = timesteps.to(original_samples.device).reshape(-1).expand(len(original_samples))
        forward = self._forward_on(original_samples.device)
        return forward.diffuse(original_samples, timesteps, noise).x_t.to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v that a v-prediction network should answer: sqrt(abar) noise - sqrt(1 - abar) x_0.

        Args:
            sample: x_0, (B, C, *).
            noise: epsilon, same shape.
            timesteps: training timesteps (B,), 0 .. T - 1.

        Raises:
            TypeError: timesteps that are no integers.
        """
        forward = self._forward_on(sample.device)
        timesteps = timesteps.to(sample.device).reshape(-1)
        check_timesteps(timesteps, len(self))
        x_0, epsilon = promote_half(sample), promote_half(noise)
        signal = gather(forward.sqrt_alphas_cumprod, timesteps, x_0)
        sigma = gather(forward.sqrt_one_minus_alphas_cumprod, timesteps, x_0)
        return (signal * epsilon - sigma * x_0).to(sample.dtype)


def _draw(model_output: Tensor, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Noise in the network's dtype, as stock draws it, so that the same generator gives the same image."""
    if generator is None:  # the same draws as randn_tensor's, without its checks
        noise = torch.randn_like(sample, dtype=model_output.dtype, memory_format=torch.contiguous_format)
    else:
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
    return promote_half(noise)


def _file_of(pixels: Tensor | None) -> str:
    """The name of the file that holds the errors of each pixel."""
    assert pixels is not None
    digest = hashlib.sha256(f"{tuple(pixels.shape)}".encode())
    digest.update(pixels.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"x_0_mse-{digest.hexdigest()[:12]}.safetensors"
