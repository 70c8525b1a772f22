"""What `DDPMVLBPipeline` keeps of a walk where its trajectory is asked for, and what it gives out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .scheduling_ddpm_vlb import DDPMVLBScheduler
from .step_log_probs import Trajectory, step_log_prob


@dataclass
class DDPMVLBPipelineOutput(ImagePipelineOutput):
    """The `images`, as stock's pipelines give them and `output_type` says, and the way to them.

    Args:
        trajectory: of all images; None where it was not asked for.
    """

    trajectory: Trajectory | None = None


_NOT_DRAWN = (
    "`return_trajectory` keeps what was drawn, but `callback_on_step_end` put other `latents` in its place, which "
    "have no log-probability: return none from it, and write into none."
)


class Recorder:
    """The states, outputs and log-probabilities of a walk, step by step.

    Args:
        scheduler: ours, its timesteps set.
        x_t: the noise that the walk begins with, (B, C, *).
        guidance_scale: of the network's outputs.

    Raises:
        ValueError: a scheduler of stock's, or `eta=0`.
    """

    def __init__(self, scheduler: SchedulerMixin, x_t: Tensor, guidance_scale: float):
        if not isinstance(scheduler, DDPMVLBScheduler):
            raise ValueError(
                f"`return_trajectory` needs the distribution of each step, which {type(scheduler).__name__} does not "
                "tell: put a `DDPMVLBScheduler` into the pipeline."
            )
        self._reverse = scheduler._walk.process.to(x_t.device, x_t.dtype)
        if self._reverse.eta == 0:
            raise ValueError("`return_trajectory` needs `eta` above 0: with 0 no step draws, and none is probable.")
        with torch.inference_mode(False):  # a trajectory is there to be trained on
            self._timesteps = scheduler.timesteps.clone()
        self._scale, self._last = guidance_scale, x_t
        self._kept: dict[str, Tensor] = {}
        self._written: list[Tensor] = []
        self._keep("states", 0, x_t, len(self._timesteps) + 1)

    def note(self, x_t: Tensor, output: Tensor, x_s: Tensor) -> None:
        """Keep a step.

        Args:
            x_t: what it began with.
            output: the network's, guided.
            x_s: what was drawn.

        Raises:
            ValueError: a callback has put another state in the place of what the last step drew.
        """
        self._check_drawn(x_t)
        k, steps = len(self._written) - 1, len(self._timesteps)
        t = steps - 1 - k
        drawn = t > 0  # the last step's log-probability is that of nothing
        log_prob = step_log_prob(self._reverse, output, x_t, t, x_s) if drawn else x_t.new_zeros(len(x_t))
        self._keep("states", k + 1, x_s, steps + 1)
        self._keep("outputs", k, output, steps)
        self._keep("log_probs", k, log_prob, steps)
        self._last = x_s

    def trajectory(self, x_0: Tensor) -> Trajectory:
        """What was kept.

        Args:
            x_0: what is given out.

        Raises:
            ValueError: as `note`, or a callback has written into what a step drew.
        """
        self._check_drawn(x_0)
        if bool(torch.stack(self._written).any()):
            raise ValueError(_NOT_DRAWN)
        return Trajectory(timesteps=self._timesteps, reverse=self._reverse, guidance_scale=self._scale, **self._kept)

    def _keep(self, name: str, k: int, value: Tensor, length: int) -> None:
        """Copy a step's value, so that it stays what it was."""
        if name not in self._kept:
            with torch.inference_mode(False):
                self._kept[name] = value.new_empty((len(value), length, *value.shape[1:]))
        self._kept[name][:, k] = value

    def _check_drawn(self, x: Tensor) -> None:
        if x is not self._last:
            raise ValueError(_NOT_DRAWN)
        self._written.append((x != self._kept["states"][:, len(self._written)]).any())  # looked at in the end


def check_tensor_inputs(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse tensors that a callback cannot be given.

    Args:
        names: what it asks for.
        known: what there is.

    Raises:
        ValueError: another name.
    """
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may hold {known}, not {sorted(unknown)}.")
