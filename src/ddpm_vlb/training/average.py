"""The average of the weights, which may be sharded over processes."""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; a collective then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether processes share the weights or the optimizer's state."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


class ShardedEMAModel(EMAModel):
    """Diffusers' average, of parameters that may be sharded; its saved state is whole either way."""

    shadow_params: list[Tensor]
    _whole: list[Tensor] | None = None

    @torch.no_grad()
    def follow(self, parameters: Iterable[Tensor], taken: Tensor) -> None:
        """`step`, of which the device makes nothing where it skips the optimizer's; `not_taken` tells of that later.

        Args:
            parameters: of the network.
            taken: 1, or 0 of a step that was skipped; on the device.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        gaps = torch._foreach_sub(self.shadow_params, list(parameters))
        torch._foreach_mul_(gaps, taken * (1 - self.cur_decay_value))
        torch._foreach_sub_(self.shadow_params, gaps)

    def not_taken(self) -> None:
        """The decay does not count the last step."""
        self.optimization_step -= 1

    def gather(self) -> None:
        """Make the whole average for the next `state_dict`; all processes must call it."""
        self._whole = [full(tensor).cpu() for tensor in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; without `gather` before it, a collective."""
        if self._whole is None:
            self.gather()
        whole, self._whole = self._whole, None
        return {**super().state_dict(), "shadow_params": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint, whatever the number of processes that wrote it; the decay stays this run's."""
        own: list[Tensor] = self.shadow_params
        kept = {name: getattr(self, name) for name in ("decay", "inv_gamma", "power")}
        super().load_state_dict({**state_dict, **kept})
        self.shadow_params = [
            distribute_tensor(saved.to(old.device), old.device_mesh, old.placements)
            if isinstance(old, DTensor)
            else saved.to(old.device)
            for saved, old in zip(self.shadow_params, own, strict=True)
        ]


def build_average(args: argparse.Namespace, unet: torch.nn.Module, accelerator: Accelerator) -> ShardedEMAModel:
    """The average of --use_ema, in float32."""
    average = ShardedEMAModel(
        unet.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=accelerator.distributed_type != DistributedType.FSDP,  # DTensors know no _foreach_copy_
    )
    # The parameters are half under DeepSpeed, where small updates would vanish.
    average.shadow_params = [value.float() for value in average.shadow_params]
    return average
