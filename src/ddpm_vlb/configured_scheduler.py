"""A scheduler whose state follows its configuration, however that is changed: derived, never kept beside it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .chains import Chains
from .configurations import FEW_STEPS, OWN_DEFAULTS, check_values, drops_decoder, normalized, portable_values
from .distributions import ordinary_tensors
from .respacing import StoredPath
from .walk import Walk


def _mark(table: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written into."""
    return id(table), 0 if table.is_inference() else table._version


def _is_written(table: Tensor, mark: tuple[int, int]) -> bool:
    """Whether it was written into since; a copy of a scheduler has other tensors, which count their own writes."""
    return id(table) == mark[0] and not table.is_inference() and table._version != mark[1]


class StockTable:
    """One of stock's public tables, which follow from the configuration: it may be moved, not changed."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        scheduler._now()
        return scheduler._tables[self.name][0]

    def __set__(self, scheduler: Any, value: Any) -> None:
        own = self.__get__(scheduler)
        alike = isinstance(value, Tensor) and value.shape == own.shape
        if not (alike and torch.equal(value.cpu(), own.cpu().to(value.dtype))):
            raise AttributeError(
                f"`{self.name}` follows from the configuration and cannot be changed alone: what samples and scores "
                "would not change with it. Make the chain that you mean, "
                "`DDPMVLBScheduler.from_config(scheduler.config, trained_betas=betas)`, or with "
                "`rescale_betas_zero_snr=True`."
            )
        scheduler._tables[self.name] = value, _mark(value)


class ConfiguredScheduler(SchedulerMixin, ConfigMixin):
    """What `DDPMVLBScheduler` derives from its configuration: the chains, the walk of `step`, stock's tables."""

    _internal_dict: Any
    _timesteps: Tensor
    _steps_mark: tuple[int, int]
    num_inference_steps: int | None
    custom_timesteps: bool
    _settled: Any = None  # the configuration that what follows is derived from
    _chains_: Chains
    _walk_: Walk
    _tables: dict[str, tuple[Tensor, tuple[int, int]]]

    def register_to_config(self, **kwargs: Any) -> None:
        """Take a configuration, or a change of one, as diffusers' training scripts make it; a bad one changes nothing.

        What is kept is what stock takes without a word, and from which it takes the same chain.

        Args:
            kwargs: values by name.

        Raises:
            ValueError: as the constructor; paths or variances, which `store_few_steps` takes; a change of the network
                or the chain that the stored ones were found for.
        """
        if self._settled is None:  # the whole configuration, from the constructor
            return super().register_to_config(**portable_values(kwargs))
        stored = [name for name in FEW_STEPS if name in kwargs] + self._others(kwargs, "few_steps_file")
        if stored:
            raise ValueError(f"`{stored[0]}` is set by `store_few_steps`, not by `register_to_config`.")
        idle = self._others(kwargs, "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        if idle and self.config["trained_betas"] is not None and "trained_betas" not in kwargs:
            raise ValueError(f"`{idle[0]}` has no effect beside `trained_betas`: change those, or to None.")
        if drops_decoder(self.config, kwargs):
            kwargs["decoder_log_variance"] = None
        before = self._internal_dict
        super().register_to_config(**kwargs)
        try:
            self._settle(self._chains_.changed)
        except Exception:
            self._internal_dict = before
            raise

    def _others(self, given: Mapping[str, Any], *names: str) -> list[str]:
        """Which of these are given with another value than the configuration's."""
        return [name for name in names if name in given and given[name] != self.config.get(name)]

    @ordinary_tensors()
    def _settle(self, make: Callable[[Mapping[str, Any]], Chains]) -> None:
        """Derive from the configuration what step and p need; nothing is changed where that cannot be done."""
        updates = normalized(self.config)
        whole = {**OWN_DEFAULTS, **self.config, **updates}
        check_values(whole)
        chains = make(whole)
        path, eta = self._steps_on(chains)
        walk = Walk(chains, path, eta)
        if self._settled is not None:  # other classes drop what is listed as left at its default
            changed = {k for k, v in {**self.config, **updates}.items() if self._settled.get(k) != v}
            listed = self.config.get("_use_default_values", ())
            if changed & set(listed):
                updates["_use_default_values"] = [k for k in listed if k not in changed]
        if chains.store.name != whole["few_steps_file"]:
            updates["few_steps_file"] = chains.store.name
        if updates:  # diffusers would write the whole configuration twice into a log that nobody reads
            super().register_to_config(**updates)
        self._settled, self._chains_, self._walk_ = self._internal_dict, chains, walk
        self._tables = {name: (table, _mark(table)) for name, table in chains.stock_tables.items()}
        self.one = torch.tensor(1.0)
        if self.num_inference_steps is None and len(self._timesteps) != len(chains):
            self._show(torch.arange(len(chains), device=self._timesteps.device).flip(0))

    def _steps_on(self, chains: Chains) -> tuple[StoredPath, float]:
        """The steps that were chosen, as far as the chain has them, or else all."""
        if self.num_inference_steps is not None and self._walk_.path.timesteps[0] < len(chains):
            path = self._walk_.path
            return path if chains.is_stored(path) else replace(path, variance=chains.variance), self._walk_.eta
        self.num_inference_steps, self.custom_timesteps = None, False
        # The errors of each pixel come later, if at all: this chain's variances are looked up when they are needed.
        return replace(chains.whole, variance="network"), 1.0

    def _now(self) -> None:
        """Diffusers' pipelines replace a scheduler's configuration by assigning it."""
        if self._internal_dict is not self._settled:
            self._settle(self._chains_.changed)
        if torch.compiler.is_compiling():  # of tensors that are traced nothing is known
            return
        if _is_written(self._timesteps, self._steps_mark):
            raise ValueError(
                "`timesteps` was written into, which changes no chain: choose the steps, "
                "`scheduler.set_timesteps(timesteps=steps)`."
            )
        for name, marked in self._tables.items():
            if not _is_written(*marked):
                continue
            raise ValueError(
                f"`{name}` was written into, but what samples and scores follows from the configuration: make "
                "the chain that you mean, `DDPMVLBScheduler.from_config(scheduler.config, trained_betas=betas)`."
            )

    def _show(self, timesteps: Tensor) -> None:
        """The steps of the chain that `step` walks, as stock shows them."""
        self._timesteps, self._steps_mark = timesteps, _mark(timesteps)

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the chain that `step` walks; others that are assigned become that chain."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        steps = torch.as_tensor(value)
        if steps.tolist() != self._timesteps.tolist():
            self.set_timesteps(timesteps=steps.tolist(), device=steps.device, eta=self._walk.eta)
        self._show(steps)

    @property
    def _chains(self) -> Chains:
        self._now()
        return self._chains_

    @property
    def _walk(self) -> Walk:
        self._now()
        return self._walk_

    betas = StockTable()
    alphas = StockTable()
    alphas_cumprod = StockTable()

    @property
    def variance_type(self) -> str:
        """The configuration's."""
        return self.config.variance_type

    @variance_type.setter
    def variance_type(self, value: str) -> None:
        self.register_to_config(variance_type=value)
