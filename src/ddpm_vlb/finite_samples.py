"""NaN and infinity on the way to a sample, noted without a wait for the device and told at the end."""

from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteSamples:
    """Whether the state and the network's output were finite, step by step.

    Clipping would make an infinite output look harmless, and a NaN is black once it is an image.
    """

    def __init__(self) -> None:
        self._finite: list[Tensor] = []

    def note(self, x_t: Tensor, output: Tensor) -> None:
        """Keep what a step began with and what the network made of it.

        Args:
            x_t: the network's input, (B, C, *).
            output: the network's output.
        """
        self._finite.append(torch.stack([x_t.isfinite().all(), output.isfinite().all()]))

    def check(self, x_0: Tensor, timesteps: Sequence[float], network: str, otherwise: str) -> None:
        """Refuse samples that are not finite, with who made the first value that is not.

        Args:
            x_0: the samples, (B, C, *).
            timesteps: those of the steps.
            network: its name.
            otherwise: what to say where the network's outputs were finite until then.

        Raises:
            ValueError: NaN or infinity; the network's with the first timestep.
        """
        finite = torch.stack([*self._finite, x_0.isfinite().all().expand(2)]).cpu()
        bad = (~finite.all(1)).nonzero().flatten().tolist()
        if not bad:
            return
        first = bad[0]
        if not bool(finite[first, 0]):
            raise ValueError(otherwise)
        raise ValueError(
            f"NaN or infinity in the output of the network, a {network}, at timestep {timesteps[first]}, step "
            f"{first + 1} of {len(timesteps)}: its weights or its precision are at fault."
        )
