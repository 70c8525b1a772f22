"""The chain that `DDPMVLBScheduler.step` walks: a step of it, and where a timestep lies in it."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .chains import Chains
from .devices import send
from .distributions import DiagonalGaussian, ordinary_tensors, promote_half
from .respacing import StoredPath
from .reverse_process import VARIANCE_TYPES, ReverseProcess
from .reverse_tables import Coefficients

_HALF_IN_BITS = 0.5 / math.log(2)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class _Tables(NamedTuple):
    """On a sample's device: p, and at each timestep + 1, from -1 to T, its index in p and NaN outside the chain.

    And for the steps taken, log2 sigma without a variance output and its slope in it.
    """

    process: ReverseProcess
    indices: Tensor
    outside: Tensor
    log2_sigmas: dict[int, tuple[Tensor, Tensor]]

    def sigma(self, step: int, c: Coefficients, variance_output: Tensor | None) -> Tensor:
        """Standard deviations at a step, in few passes; by `exp2`, which takes a third of `exp` on some CPUs."""
        if c.log_variance_offset.ndim:
            return (0.5 * c.log_variance(variance_output)).exp_()
        if step not in self.log2_sigmas:
            with torch.inference_mode(False):
                self.log2_sigmas[step] = _HALF_IN_BITS * c.log_variance_offset, _HALF_IN_BITS * c.variance_slope
        offset, slope = self.log2_sigmas[step]
        return offset.exp2() if variance_output is None else (variance_output * slope).add_(offset).exp2_()


@dataclass
class DDPMVLBSchedulerOutput(DDPMSchedulerOutput):
    """What a step gives: stock's output, which also tells what `prev_sample` was drawn from.

    Its fields are stock's, `prev_sample` x_{t-1} and `pred_original_sample` x_0_hat, (B, C, *).
    """

    _step = None

    @classmethod
    def drawn(cls, prev_sample: Tensor, x_0: Tensor, walk: "Walk", given: Any) -> "DDPMVLBSchedulerOutput":
        """That of a step.

        Args:
            prev_sample: x_{t-1}.
            x_0: x_0_hat.
            walk: whose step it was.
            given: its model output, timestep and sample.
        """
        # Inference tensors do not count how often they are written into, and to ask one is slow.
        unknown = torch.compiler.is_dynamo_compiling() or torch.is_inference_mode_enabled()
        # The parent's own way, by `fields` and a look among the keys for each, takes a fifth of a small step.
        output = cls.__new__(cls)
        fields = {"prev_sample": prev_sample, "pred_original_sample": x_0}
        for name, value in fields.items():
            OrderedDict.__setitem__(output, name, value)
        output.__dict__.update(fields, _step=(walk, given, None if unknown else _versions(given)))
        return output

    @property
    def distribution(self) -> DiagonalGaussian | None:
        """p(x_{t-1} | x_t) that `prev_sample` was drawn from, in float32 or better; None where nothing was drawn.

        Worked out when it is asked for, from the tensors that `step` was given; on a GPU that waits.

        Raises:
            ValueError: some of the samples are at the chain's last step, and some are not; a tensor that `step` was
                given has been written into since (of inference tensors, and through `.data`, that is not seen); or
                no output of a step's.
        """
        if self._step is None:
            raise ValueError(
                "This output was made by hand or copied, and does not tell what it was drawn from: ask for the "
                "`distribution` of the one that `step` returned."
            )
        walk, given, versions = self._step
        if _written(given, versions):
            raise ValueError(
                "`distribution` is worked out from the tensors that `step` was given, but one of them was written "
                "into since: ask before that, or give `step` a copy."
            )
        return walk.distribution(*given)

    def __copy__(self) -> "DDPMVLBSchedulerOutput":
        # By `__reduce__` it would take the tensors to be its own.
        output = self.__class__.__new__(self.__class__)
        for name, value in self.items():
            OrderedDict.__setitem__(output, name, value)
        output.__dict__.update(self.__dict__)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        made, fields, state, *others = super().__reduce__()
        if self._step is not None:
            walk, given, versions = self._step
            # The tensors of a deep copy count anew.
            state = state | {"_step": None if _written(given, versions) else (walk, given, None)}
        return made, fields, state, *others


def _versions(given: tuple[Tensor, int | Tensor, Tensor]) -> tuple[int, int, int] | None:
    """How often each has been written into; None where one is an inference tensor."""
    output, timestep, sample = given
    try:
        return output._version, getattr(timestep, "_version", 0), sample._version
    except RuntimeError:
        return None


def _written(given: tuple[Tensor, int | Tensor, Tensor], versions: tuple[int, int, int] | None) -> bool:
    return versions is not None and versions != _versions(given)


class Walk:
    """The chain that `step` walks.

    Args:
        chains: of the network.
        path: the steps.
        eta: of DDIM.

    Raises:
        ValueError: as `Chains.process`.
    """

    @ordinary_tensors()
    def __init__(self, chains: Chains, path: StoredPath, eta: float = 1.0):
        self.path = path
        self.eta = eta
        self.process = chains.process(path, eta)
        self._chains = chains
        self._asked = path, chains.is_stored(path), eta
        self._index = {timestep: i for i, timestep in enumerate(self.process.forward.timesteps.tolist())}
        self._tables: dict[tuple[torch.device, torch.dtype], _Tables] = {}

    def is_of(self, chains: Chains, path: StoredPath, eta: float) -> bool:
        """Whether it is the walk that these arguments would make.

        Args:
            chains: of the same network.
            path: the steps.
            eta: of DDIM.
        """
        return self._asked == (path, chains.is_stored(path), eta)

    def index(self, timestep: int | Tensor) -> int:
        """The chain index of a timestep.

        Args:
            timestep: one of the chain's.

        Raises:
            TypeError: no integer.
            ValueError: a timestep outside the chain.
        """
        integer = timestep.dtype in _INTEGERS if isinstance(timestep, Tensor) else isinstance(timestep, Integral)
        if not integer:
            raise TypeError(f"`timestep` must be an integer, but got {timestep!r}.")
        index = self._index.get(int(timestep))
        if index is None and self._chains.is_blind(int(timestep)):
            self._chains.process(None)
        if index is None:
            raise ValueError(
                f"`timestep` {int(timestep)} is not part of the current chain of {len(self._index)} steps. Take it "
                "from `scheduler.timesteps`, or include it in `set_timesteps(timesteps=...)`."
            )
        return index

    def places(self, timestep: Tensor, sample: Tensor) -> Tensor:
        """Where each sample's timestep stands in the tables, (B,), or (1,) for one of the whole batch.

        Args:
            timestep: one of the chain's for each sample, (B,), or a single one.
            sample: x_t, (B, C, *).

        Raises:
            TypeError: no integers.
            ValueError: another shape, or, where that can be seen without a wait, a timestep outside the chain.
        """
        if timestep.dtype not in _INTEGERS:
            raise TypeError(f"`timestep` must be an integer tensor, but got {timestep.dtype}.")
        right = timestep.numel() == 1 or timestep.shape == sample.shape[:1]
        # A 0-dim index would be compiled for each value anew.
        places = timestep.reshape(-1).long().clamp(-1, len(self._chains)) + 1
        if right and (torch.compiler.is_compiling() or timestep.device.type != "cpu"):
            return places.to(sample.device)
        if not right or bool(self._on(timestep, torch.float32).outside[places].isnan().any()):
            raise ValueError(
                f"A tensor `timestep` must hold one timestep of the current chain of {len(self._index)} steps for "
                f"each of the {len(sample)} samples, but got {timestep.tolist()[:8]}. Take them from "
                "`scheduler.timesteps`."
            )
        return send(places, sample.device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} and x_0_hat; arguments and errors as of `DDPMVLBScheduler.step`."""
        tables = self._on(sample, sample.dtype)
        process = tables.process
        if not process.learns_variance and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if _by_table(timestep):
            places = self.places(timestep if isinstance(timestep, Tensor) else torch.full((1,), timestep), sample)
            index, outside = tables.indices[places], tables.outside[places]
            along = -1, *[1] * (sample.ndim - 1)
            c = process.coefficients(index, sample)
            # What cannot be refused without a wait must not look like a sample.
            c = c._replace(x_t_to_x_0=c.x_t_to_x_0 + outside.reshape(along))
            p, x_0 = process.predict(model_output, sample, c)
            previous = p.mean
            if process.eta > 0:
                # Selected, not multiplied by zero: no noise on the last step, whatever its variance.
                noisy = p.sample(_draw(model_output, sample, generator))
                previous = torch.where((index == 0).reshape(along), previous, noisy)
        else:
            step = self.index(timestep)
            c = process.coefficients(step, sample)
            mean_output, variance_output = process.split(model_output, sample)
            previous, x_0 = process.predict_mean(mean_output, promote_half(sample), c)
            if step > 0 and process.eta > 0:
                # As `p.sample` does it, in the memory that there is.
                sigma = tables.sigma(step, c, variance_output)
                previous = previous.addcmul_(sigma, _draw(model_output, sample, generator))
        if sample.dtype != previous.dtype:
            previous, x_0 = previous.to(sample.dtype), x_0.to(sample.dtype)
        return previous, x_0

    def distribution(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> DiagonalGaussian | None:
        """What `step` draws from, given the same; None at the chain's last step or where eta is 0.

        Args:
            model_output: the network's output.
            timestep: one of the chain's, or one for each sample.
            sample: x_t, (B, C, *).

        Raises:
            ValueError: some of the samples are at the last step, and some are not.
        """
        tables = self._on(sample, sample.dtype)
        process = tables.process
        places = self.places(timestep if isinstance(timestep, Tensor) else torch.full((1,), int(timestep)), sample)
        index = tables.indices[places].expand(len(sample))
        last = (index == 0).cpu()
        if process.eta == 0 or bool(last.all()):
            return None
        if bool(last.any()):
            raise ValueError(
                f"`distribution` is asked for, but the samples {last.nonzero().flatten().tolist()[:8]} are at the "
                "chain's last step, where nothing is drawn: give those to a `step` of their own."
            )
        if not process.learns_variance:
            model_output = model_output[:, : sample.shape[1]]
        return process(model_output, sample, index).p

    def stock_variance(self, timestep: int | Tensor, predicted_variance: Tensor | None, name: str) -> Tensor | None:
        """A diagnostic with stock's values, which `step` does not use.

        It differs from `step` at the chain's last timestep: the variance is not borrowed there but the posterior's 0,
        clamped at 1e-20. And its unit goes by the type, as in stock: sigma for "fixed_small_log", log sigma^2 for
        "fixed_large_log", "learned" and "learned_range", sigma^2 otherwise.

        Args:
            timestep: one of the chain's.
            predicted_variance: the variance half of the network's output, for the learned types.
            name: one of the six variance types.

        Raises:
            ValueError: a timestep outside the chain, an unknown type, or "learned_range" without its output.
        """
        if name not in VARIANCE_TYPES:
            raise ValueError(f"`variance_type` must be one of {list(VARIANCE_TYPES)}, but got {name!r:.80}.")
        if name == "learned":
            return predicted_variance
        index, forward = self.index(timestep), self.process.forward
        small, large = forward.posterior_variance[index].clamp(min=1e-20), forward.betas[index]
        if name == "learned_range":
            if predicted_variance is None:
                raise ValueError("`variance_type='learned_range'` needs `predicted_variance`.")
            low, high = small.log().float(), large.log().float()
            fraction = (predicted_variance + 1) / 2
            return fraction * high + (1 - fraction) * low
        values = {"fixed_small": small, "fixed_small_log": small.sqrt(), "fixed_large": large}
        return values.get(name, large.log()).float()

    def _on(self, like: Tensor, dtype: torch.dtype) -> _Tables:
        """The tables on a tensor's device, for samples of a dtype."""
        key = like.device, dtype
        if key not in self._tables:
            if torch.compiler.is_compiling():
                raise RuntimeError("Call `step` once before it is compiled: it makes its tables then.")
            self._tables[key] = self._made(*key)
        return self._tables[key]

    @ordinary_tensors()
    def _made(self, device: torch.device, dtype: torch.dtype) -> _Tables:
        dtype = torch.promote_types(dtype, torch.float32)
        where = self.process.forward.timesteps.cpu() + 1
        index = torch.zeros(len(self._chains) + 2, dtype=torch.int64)
        index[where] = torch.arange(len(where))
        outside = torch.full(index.shape, torch.nan, dtype=dtype)
        outside[where] = 0
        return _Tables(self.process.to(device, dtype), send(index, device), send(outside, device), {})


def _by_table(timestep: int | Tensor) -> bool:
    """Whether the index of a timestep comes from a table: its value must not be asked for, or there are several."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(timestep, Tensor) and (timestep.numel() != 1 or timestep.device.type != "cpu")


def draw(
    shape: torch.Size | tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """What `randn_tensor` draws, without a wait for what generators of the CPU draw for a GPU.

    Args:
        shape: (B, C, *).
        generator: source of the noise, or a list with one for each sample.
        device: where the noise shall live.
        dtype: its dtype.
    """
    first = generator[0] if isinstance(generator, list) and generator else generator
    where = first.device if isinstance(first, torch.Generator) and first.device.type == "cpu" else device
    return send(randn_tensor(shape, generator=generator, device=where, dtype=dtype), device)


def _draw(model_output: Tensor, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Noise in the network's dtype, as stock draws it, so that the same generator gives the same image."""
    if generator is None:  # the same draws as randn_tensor's, without its checks
        noise = torch.randn_like(sample, dtype=model_output.dtype, memory_format=torch.contiguous_format)
    else:
        noise = draw(sample.shape, generator, sample.device, model_output.dtype)
    return promote_half(noise)
