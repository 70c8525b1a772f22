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


class Recorder:
    """The states and log-probabilities of a walk, step by step.

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
        self._timesteps, self._scale = scheduler.timesteps, guidance_scale
        self._states, self._log_probs = [x_t], list[Tensor]()

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
        t = len(self._timesteps) - len(self._states)
        drawn = t > 0  # the last step's log-probability is that of nothing
        self._log_probs.append(step_log_prob(self._reverse, output, x_t, t, x_s) if drawn else x_t.new_zeros(len(x_t)))
        self._states.append(x_s)

    def trajectory(self, x_0: Tensor) -> Trajectory:
        """What was kept.

        Args:
            x_0: what is given out.

        Raises:
            ValueError: as `note`.
        """
        self._check_drawn(x_0)
        states, log_probs = (torch.stack(kept, dim=1) for kept in (self._states, self._log_probs))
        return Trajectory(states, self._timesteps, log_probs, self._reverse, self._scale)

    def _check_drawn(self, x: Tensor) -> None:
        if x is not self._states[-1]:
            raise ValueError(
                "`return_trajectory` keeps what was drawn, but `callback_on_step_end` put other `latents` in its "
                "place, which have no log-probability: return none from it."
            )


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
