"""Classes of a batch of images, and classifier-free guidance to them.

Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", with the scale as diffusers counts it: 1 is none.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .devices import send


def batch_count(batch_size: Any) -> int:
    """A number of images, as Python has it.

    Args:
        batch_size: B, an integer of Python's, numpy's or a tensor's.

    Raises:
        ValueError: no integer, or none above 0.
    """
    try:
        count = operator.index(batch_size)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, but got {batch_size!r}.")
    return count


def classes_of(config: Mapping[str, Any]) -> int | None:
    """The number of labels that a network takes, the one for no class included; None for an unconditional one.

    Args:
        config: the network's.
    """
    if config.get("class_embed_type") is not None:  # it goes before a number
        return None
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"])
    # A DiT keeps one more label than it has classes, for no class.
    return config["num_embeds_ada_norm"] + 1 if config.get("num_embeds_ada_norm") is not None else None


def check_no_embeddings(config: Mapping[str, Any]) -> None:
    """Refuse a network that takes something else than labels for classes.

    Args:
        config: the network's.

    Raises:
        ValueError: such a network.
    """
    kind = config.get("class_embed_type")
    if kind is not None:
        raise ValueError(
            f"This network takes embeddings of classes (`class_embed_type={kind!r:.80}`), but labels are numbers "
            "here. Sample it in a loop of your own, with `scheduler.step`."
        )


def called(network: Any, sample: Tensor, timestep: Any, labels: Tensor | None) -> Tensor:
    """The output of a network at one timestep.

    Args:
        network: called as network(sample, timesteps[, class_labels=...]).
        sample: its input (B, C, *).
        timestep: of all images, a number or a tensor.
        labels: (B,); None for an unconditional network.
    """
    if isinstance(timestep, int):  # filled in there: to send a number would wait for the device
        timesteps = torch.full((len(sample),), timestep, device=sample.device)
    else:
        timesteps = timestep.to(sample.device).expand(len(sample))
    output = network(sample, timesteps) if labels is None else network(sample, timesteps, class_labels=labels)
    return output if isinstance(output, Tensor) else output.sample


@dataclass(frozen=True, eq=False)
class Guidance:
    """What a network is told of the classes of its images.

    Args:
        labels: (B,) int64; None for an unconditional network.
        null_labels: those that stand for no class, (B,) int64; None without guidance.
        scale: g of uncond + g (cond - uncond), on the mean half; the variance half is the conditional one.
    """

    labels: Tensor | None = None
    null_labels: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        batch_size: int,
        class_labels: Any,
        scale: float,
        null_class_label: int | None,
        classes: int | None,
        device: torch.device | str,
    ) -> "Guidance":
        """That of a call of the pipeline.

        Args:
            batch_size: B.
            class_labels: a class for all images or one for each; None for an unconditional network.
            scale: g.
            null_class_label: the label that stands for no class; the network's last when None.
            classes: number of labels that the network takes; None for an unconditional one.
            device: where the labels shall live.

        Raises:
            ValueError: labels that the network does not take or that do not match the batch, or guidance
                without labels.
        """
        if class_labels is None:
            if scale != 1.0:
                raise ValueError(
                    "`guidance_scale` needs `class_labels`: without a class there is nothing to guide to."
                )
            if classes is not None:
                raise ValueError(f"This network is class-conditional: pass `class_labels` (0 .. {classes - 1}).")
            return cls()
        if classes is None:
            raise ValueError("`class_labels` were given, but this network is unconditional. Leave them out.")
        labels = torch.as_tensor(class_labels, device="cpu").reshape(-1)
        if labels.is_floating_point() or len(labels) not in (1, batch_size):
            raise ValueError(
                f"`class_labels` must be one integer, or one for each of the `batch_size={batch_size}` images, "
                f"but got {class_labels!r}."
            )
        null = classes - 1 if null_class_label is None else null_class_label
        if int(labels.min()) < 0 or int(labels.max()) >= classes or not 0 <= null < classes:
            raise ValueError(
                f"`class_labels` and `null_class_label` must lie in 0 .. {classes - 1}, but got {labels.tolist()[:8]} "
                f"and {null}."
            )
        on_device = send(labels.long(), device).expand(batch_size)
        if scale == 1.0:
            return cls(on_device)
        if bool((labels == null).any()):
            raise ValueError(
                f"`class_labels` holds {null}, which stands for no class under guidance: there is nothing to guide "
                "to. Pass the label that the network was trained to take for no class as `null_class_label`."
            )
        return cls(on_device, torch.full_like(on_device, null), scale)

    def output(self, call: Callable[[Tensor, Tensor | None], Tensor], sample: Tensor) -> Tensor:
        """The network's output, guided, in float32.

        Args:
            call: the network, called as call(sample, labels).
            sample: its input (B, C, *).
        """
        if self.labels is None or self.null_labels is None:
            return call(sample, self.labels).float()
        both = call(torch.cat([sample, sample]), torch.cat([self.labels, self.null_labels]))
        output, unconditional = both.float().chunk(2)
        channels = sample.shape[1]
        mean = torch.lerp(unconditional[:, :channels], output[:, :channels], self.scale)
        return torch.cat([mean, output[:, channels:]], dim=1)
