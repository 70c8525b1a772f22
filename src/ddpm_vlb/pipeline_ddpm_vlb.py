"""DDPMVLBPipeline: sampling, saving and loading in diffusers' way, for networks with learned variance.

What it saves is plain diffusers wherever stock can sample it rightly: `DiffusionPipeline.from_pretrained` gives a
`DDPMPipeline`, `DDPMVLBPipeline.from_pretrained` gives this class, from the same files.
"""

import inspect
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, DiTTransformer2DModel, UnCLIPScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .scheduling_ddpm_vlb import DDPMVLBScheduler

# The schedulers whose `step` takes the variance half of the channels; all others get the mean half only.
_TAKES_VARIANCE = (DDPMVLBScheduler, DDPMScheduler, DDPMParallelScheduler, UnCLIPScheduler)
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
OUTPUT_TYPES = ("pil", "np", "pt")


class DDPMVLBPipeline(DiffusionPipeline):
    """Images from a (class-conditional) DDPM; any number of channels, square or not.

    Args:
        unet: the network, called as unet(sample, timestep[, class_labels=...]); its config gives `in_channels` and
            `sample_size`.
        scheduler: a `DDPMVLBScheduler`; a stock `DDPMScheduler` is replaced by one with the same configuration, any
            other scheduler is kept.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["image"]

    def __init__(self, unet: UNet2DModel | DiTTransformer2DModel, scheduler: SchedulerMixin):
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            # Passed explicitly: values that stock left at its defaults are dropped on the way otherwise.
            scheduler = DDPMVLBScheduler.from_config(scheduler.config, variance_type=scheduler.config.variance_type)
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline of ours or a stock DDPMPipeline, from a folder or the Hub.

        The scheduler is read as ours from the start: stock's class would warn of `levels` on the way.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a Hub repository.
            kwargs: those of `DiffusionPipeline.from_pretrained`.

        Raises:
            OSError, ValueError: as `DiffusionPipeline.from_pretrained`.
        """
        if "scheduler" not in kwargs:
            where = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            index = cls.load_config(pretrained_model_name_or_path, **where)
            if list(index.get("scheduler", ())) == ["diffusers", "DDPMScheduler"]:
                kwargs["scheduler"] = DDPMVLBScheduler.from_pretrained(
                    pretrained_model_name_or_path, subfolder="scheduler", **where
                )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image",),
        null_class_label: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: number of images, at least 1.
            class_labels: a class for all images or one for each, for a class-conditional network.
            guidance_scale: classifier-free guidance g: uncond + g (cond - uncond) on the mean half; 1 is none. The
                variance half is the conditional one.
            generator: source of the noise, or a list with one for each image.
            num_inference_steps: K; the whole training chain when neither this nor `timesteps` is given.
            timesteps: the steps to visit, strictly descending, in place of a number.
            output_type: "pil", "np" (B, H, W, C in [0, 1]) or "pt" (B, C, H, W in [0, 1]).
            return_dict: return an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each step; it may return
                a dict with a new "image".
            callback_on_step_end_tensor_inputs: names of the tensors to hand to it; "image" is the one there is.
            null_class_label: the label that stands for no class under guidance; the network's last when None.

        Raises:
            ValueError: an unknown output type or callback tensor, a wrong number of generators, labels that the
                network does not take or that do not match the batch, guidance without labels, or steps that the
                scheduler refuses.
        """
        labels, null_labels = self._labels(batch_size, class_labels, guidance_scale, null_class_label)
        self._check_inputs(output_type, callback_on_step_end_tensor_inputs, num_inference_steps, timesteps)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be one or a list of {batch_size}, but it holds {len(generator)}.")
        device = self._execution_device
        size = self.unet.config.sample_size
        spatial = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, self.unet.config.in_channels, *spatial)
        # The chain runs in float32 whatever the network's precision: in half the last steps' noise would be lost.
        image = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self._set_timesteps(num_inference_steps, timesteps, device)
        image = image * self.scheduler.init_noise_sigma
        accepts = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepts else {}
        steps = self.scheduler.timesteps
        for i, timestep in enumerate(self.progress_bar(steps.tolist())):
            # Only a scheduler with fractional timesteps (Euler, LMS) needs its own tensor back.
            t = timestep if isinstance(timestep, int) else steps[i]
            output = self._predict(image, t, labels, null_labels, guidance_scale)
            image = self.scheduler.step(output, t, image, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {name: image for name in callback_on_step_end_tensor_inputs}
                image = (callback_on_step_end(self, i, timestep, tensors) or {}).get("image", image)
        images = self._finish(image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(
        self, batch_size: int, class_labels: Any, guidance_scale: float, null_class_label: int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, but got {batch_size!r}.")
        classes = self.num_classes
        if class_labels is None:
            if guidance_scale != 1.0:
                raise ValueError(
                    "`guidance_scale` needs `class_labels`: without a class there is nothing to guide to."
                )
            if classes is not None:
                raise ValueError(f"This network is class-conditional: pass `class_labels` (0 .. {classes - 1}).")
            return None, None
        if classes is None:
            raise ValueError("`class_labels` were given, but this network is unconditional. Leave them out.")
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
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
        labels = labels.long().expand(batch_size)
        if guidance_scale != 1.0 and bool((labels == null).any()):
            raise ValueError(
                f"`class_labels` holds {null}, which stands for no class under guidance: there is nothing to guide "
                "to. Pass the label that the network was trained to take for no class as `null_class_label`."
            )
        return labels, torch.full_like(labels, null) if guidance_scale != 1.0 else None

    @property
    def num_classes(self) -> int | None:
        """Number of labels that the network takes, the one for no class included; None for an unconditional one."""
        config = self.unet.config
        if config.get("num_class_embeds") is not None:
            return int(config["num_class_embeds"])
        # A DiT keeps one more label than it has classes, for no class.
        return config["num_embeds_ada_norm"] + 1 if config.get("num_embeds_ada_norm") is not None else None

    def _check_inputs(
        self, output_type: str, tensor_inputs: Sequence[str], num_inference_steps: int | None, timesteps: Any
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, but got {output_type!r}.")
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"PIL has no images of {channels} channels: use `output_type='np'` or 'pt'.")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, not {sorted(unknown)}."
            )
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("Pass only one of `num_inference_steps` and `timesteps`.")

    def _set_timesteps(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None, device: torch.device
    ) -> None:
        if timesteps is None:
            num = self.scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
            self.scheduler.set_timesteps(num, device=device)
        elif "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(timesteps=list(timesteps), device=device)
        else:
            raise ValueError(f"{type(self.scheduler).__name__} takes no `timesteps`: pass `num_inference_steps`.")

    def _predict(
        self, image: Tensor, timestep: Any, labels: Tensor | None, null_labels: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """The network's output for the scheduler: guided, and cut to the mean half where that is all it takes."""
        sample = self.scheduler.scale_model_input(image, timestep).to(self.unet.dtype)
        channels = image.shape[1]
        if null_labels is not None:
            assert labels is not None
            both = self._call_unet(torch.cat([sample, sample]), timestep, torch.cat([labels, null_labels]))
            output, unconditional = both.float().chunk(2)
            mean = torch.lerp(unconditional[:, :channels], output[:, :channels], guidance_scale)
            output = torch.cat([mean, output[:, channels:]], dim=1)
        else:
            output = self._call_unet(sample, timestep, labels).float()
        if output.shape[1] == 2 * channels and not self._scheduler_takes_variance:
            output = output[:, :channels]
        return output

    @property
    def _scheduler_takes_variance(self) -> bool:
        learned = str(self.scheduler.config.get("variance_type", "")).startswith("learned")
        return learned and isinstance(self.scheduler, _TAKES_VARIANCE)

    def _call_unet(self, sample: Tensor, timestep: Any, labels: Tensor | None) -> Tensor:
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if labels is None:
            return self.unet(sample, timesteps).sample
        return self.unet(sample, timesteps, class_labels=labels).sample

    @staticmethod
    def _finish(image: Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | Tensor:
        image = (image.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return image
        array = image.cpu().permute(0, 2, 3, 1).numpy()
        return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array

    @property
    def _portable(self) -> bool:
        """Whether stock's DDPMPipeline samples this network and scheduler rightly."""
        scheduler, config = self.scheduler, self.unet.config
        if config.get("class_embed_type") is not None or self.num_classes is not None:
            return False
        learned = scheduler.config.variance_type == "learned_range"
        return scheduler.config.variance_type != "learned" and (
            config.get("out_channels") == config.get("in_channels") * (2 if learned else 1)
        )

    def to_json_string(self) -> str:
        """model_index.json: stock's class names wherever stock can load and sample what they name."""
        index = json.loads(super().to_json_string())
        if type(self.scheduler) is DDPMVLBScheduler:
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
            if self._portable:
                index["_class_name"] = "DDPMPipeline"
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
