"""The network of a Gaussian path, seen as a v-prediction of the VP chain: equation 3 of gaussian_paths at work."""

from typing import Any

import torch
from torch import Tensor, nn

from .checks import Model, output_tensor
from .devices import send
from .distributions import ordinary_tensors, promote_half
from .forward_process import gather


class PathNetwork(nn.Module):
    """A path's network as the chain calls one, (x', chain index, **conditioning) to v'; made by `GaussianPath`.

    Args:
        tables: what translates at each level, float64 (T, 4): what x' is multiplied by for the network, the time that
            it is told, and the shares of x' and of its output in v'.
        model: the network.
    """

    def __init__(self, tables: Tensor, model: Model):
        super().__init__()
        self.model = model
        self._float64 = tables
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def training(self) -> bool:
        """The network's mode; a function has none, whatever it is around."""
        return isinstance(self.model, nn.Module) and self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """`train` sets the network's itself."""

    def prepare(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "PathNetwork":
        """Make the tables of a device; else the first call there does or, compiled, each call anew.

        Args:
            device: of x'.
            dtype: of x'; half precision is computed in float32.
        """
        with ordinary_tensors():
            table = send(self._float64.to(dtype), device)
        self._tables[table.device, dtype] = table
        return self

    def _table(self, x: Tensor) -> Tensor:
        """The tables beside `x`, cast once."""
        key = x.device, x.dtype
        if key not in self._tables:
            if torch.compiler.is_compiling():
                return self._float64.to(x.dtype).to(x.device)
            self.prepare(*key)
        return self._tables[key]

    def forward(self, x_t: Tensor, timesteps: Tensor | int, **conditioning: Any) -> Tensor:
        """v', and the variance half where the network has one.

        Args:
            x_t: the VP variable x' (B, C, *).
            timesteps: chain indices (B,), or one for the whole batch.
            conditioning: further arguments of the network.

        Raises:
            ValueError: times of each token, or an output that is neither of the shape of x' nor twice its channels.
        """
        t = torch.as_tensor(timesteps, device=None if isinstance(timesteps, Tensor) else x_t.device)
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x_t))):
            raise ValueError(
                f"`timesteps` must be one chain index for each of {len(x_t)} images, but got the shape "
                f"{tuple(t.shape)}: times of each token are no Gaussian path of the whole."
            )
        x = promote_half(x_t)
        scale, told, from_x, from_output = gather(self._table(x), t.expand(len(x)), x).unbind(1)
        output = self.model((scale * x).to(x_t.dtype), told.flatten().to(x_t.dtype), **conditioning)
        output = promote_half(output_tensor(output))
        channels = x.shape[1]
        if output.shape not in [(len(x), width, *x.shape[2:]) for width in (channels, 2 * channels)]:
            raise ValueError(
                f"`model` must put out the shape of its input, {tuple(x.shape)}, or twice its {channels} channels "
                f"with a variance half, but got {tuple(output.shape)}."
            )
        mean, *variance = output.split(channels, dim=1)
        v = torch.addcmul(from_x * x, mean, from_output)
        return torch.cat([v, *variance], dim=1) if variance else v
