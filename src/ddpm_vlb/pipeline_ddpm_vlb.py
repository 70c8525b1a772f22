"""DDPMVLBPipeline: sampling, saving and loading in diffusers' way, for networks with learned variance.

What it saves is plain diffusers wherever stock can sample it rightly: `DiffusionPipeline.from_pretrained` gives a
`DDPMPipeline`, `DDPMVLBPipeline.from_pretrained` gives this class, from the same files.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi, ModelCard
from torch import Tensor

from .configurations import check_index, check_no_code, read_config
from .few_step_store import check_image_shape
from .guidance import Guidance
from .model_card import model_card
from .repositories import forget_origin, local_folder, read_index, write_card, write_code
from .scheduling_ddpm_vlb import _INDEX_IS_OURS, DDPMVLBScheduler
from .swapped_schedulers import mean_half_whole, set_timesteps, step_options, takes_variance, warn_of_another_chain

logger = logging.get_logger(DiffusionPipeline.__module__)
_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder", "card")
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DDPMVLBPipeline(DiffusionPipeline):
    """Images from a (class-conditional) DDPM; any number of channels, square or not.

    Args:
        unet: the network, called as unet(sample, timestep[, class_labels=...]); its config gives `in_channels` and
            `sample_size`.
        scheduler: a `DDPMVLBScheduler`; a stock `DDPMScheduler` is replaced by one with the same configuration, any
            other scheduler is kept.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel | DiTTransformer2DModel, scheduler: SchedulerMixin):
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMVLBScheduler.from_config(scheduler.config)
        if isinstance(scheduler, DDPMVLBScheduler):
            check_image_shape(scheduler.errors, unet.config)
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline of ours or a stock DDPMPipeline, from a folder or the Hub.

        The scheduler is read as ours from the start: stock's class would warn of `levels` on the way.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a Hub repository.
            kwargs: those of `DiffusionPipeline.from_pretrained`, and `subfolder`, where the pipeline lies in it.
                Weights are read from safetensors only, unless `use_safetensors=False` asks for pickles.

        Raises:
            OSError, ValueError: as `DiffusionPipeline.from_pretrained`; a model_index.json that no pipeline saves.
        """
        kwargs.setdefault("use_safetensors", True)
        where = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        subfolder = kwargs.pop("subfolder", None)
        if subfolder is not None:
            return cls.from_pretrained(local_folder(pretrained_model_name_or_path, subfolder, where), **kwargs)
        index, where = read_index(cls.load_config, pretrained_model_name_or_path, where)
        kwargs |= where
        check_index(index)
        if not kwargs.get("trust_remote_code"):
            check_no_code(index, Path(pretrained_model_name_or_path))
        if "scheduler" not in kwargs:
            if list(index.get("scheduler", ())) == ["diffusers", "DDPMScheduler"]:
                kwargs["scheduler"] = DDPMVLBScheduler.from_pretrained(
                    pretrained_model_name_or_path, subfolder="scheduler", **where
                )
                # As the loader says of each component that it reads itself.
                logger.info(f"Loaded scheduler as DDPMVLBScheduler from {pretrained_model_name_or_path}.")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # diffusers' private name; its own would read a file of any size, and a test holds it to calling this one.
    _dict_from_json_file = staticmethod(read_config)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline to a folder, as plain diffusers wherever stock can sample it rightly.

        Args:
            save_directory: the folder; made if it is not there.
            safe_serialization: write safetensors.
            variant: put into the weights' file names, such as "fp16".
            max_shard_size: split weights above this size.
            push_to_hub: upload it as well, see `push_to_hub`; to `repo_id`, or the folder's name in your namespace.
            include_code: write this package's modules beside it, for those who do not have it installed.
            kwargs: with `push_to_hub`, its further arguments; else those of `DiffusionPipeline.save_pretrained`.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(save_directory)
        push = {name: kwargs.pop(name) for name in list(kwargs) if name in _PUSH_OPTIONS} if push_to_hub else {}
        if include_code:
            write_code(folder)
        token = _INDEX_IS_OURS.set(True)
        try:
            super().save_pretrained(
                folder, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size, **kwargs
            )
        finally:
            _INDEX_IS_OURS.reset(token)
        if push_to_hub:
            push.setdefault("repo_id", folder.resolve().name)
            push |= {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
            self.push_to_hub(**push, include_code=include_code)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        max_shard_size: int | str | None = None,
        include_code: bool = False,
        card: ModelCard | None = None,
    ) -> str:
        """Upload the pipeline to the Hub in one commit.

        Args:
            repo_id: "user/name", or a name in your own namespace; made if it is not there.
            commit_message: of the commit.
            private: make the repository private; an existing one stays as it is.
            token: True, or None, for the one that `hf auth login` or HF_TOKEN gave.
            create_pr: open a pull request instead of committing.
            safe_serialization: write safetensors.
            variant: put into the weights' file names, such as "fp16".
            subfolder: of the repository, to upload into; no card is written there.
            max_shard_size: split weights above this size.
            include_code: upload this package's modules as well, so that `DiffusionPipeline.from_pretrained(repo_id,
                custom_pipeline=repo_id, trust_remote_code=True)` works without it.
            card: the model card, as from `model_card`. None keeps the repository's own; where there is none, one
                without measurements is written.

        Raises:
            HfHubHTTPError: what the Hub answers: no or a wrong token (401), no right to write there (403).
            HFValidationError: `repo_id` is no name of a repository.
            ValueError: `card` is no `ModelCard`.
        """
        if card is not None and not isinstance(card, ModelCard):
            raise ValueError(f"`card` must be a huggingface_hub ModelCard, as from `model_card`, but is {card!r:.80}.")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size, include_code=include_code)
            forget_origin(Path(folder))
            if subfolder is None:
                own = functools.partial(model_card, self, repo_id, includes_code=include_code)
                write_card(Path(folder), api, repo_id, card, own)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=commit_message or "Upload DDPMVLBPipeline",
                create_pr=create_pr,
            )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        timestep_spacing: str | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
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
            timestep_spacing: of `num_inference_steps`: "leading", "linspace", "trailing", "quadratic" or "optimal",
                the stored path. None takes the stored path where there is one, else what the configuration says.
            eta: of DDIM, from 0 (no noise) to 1 (DDPM); None is the scheduler's default, 1 for ours.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent" (B, C, H, W: x_0
                as it is, not clamped, for a VAE to decode).
            return_dict: return an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each step; it may return
                a dict with a new "latents".
            callback_on_step_end_tensor_inputs: names of the tensors to hand to it: "latents", which is x_t.
            null_class_label: the label that stands for no class under guidance; the network's last when None.

        Raises:
            ValueError: an unknown output type or callback tensor, a wrong number of generators, labels that the
                network does not take or that do not match the batch, guidance without labels, or steps that the
                scheduler refuses.
        """
        device = self._execution_device
        classes = class_labels, guidance_scale, null_class_label, self.num_classes
        guidance = Guidance.of(batch_size, *classes, device)
        self._check_inputs(output_type, callback_on_step_end_tensor_inputs, num_inference_steps, timesteps)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be one or a list of {batch_size}, but it holds {len(generator)}.")
        size = self.unet.config.sample_size
        spatial = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, self.unet.config.in_channels, *spatial)
        # The chain runs in float32 whatever the network's precision: in half the last steps' noise would be lost.
        image = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        scheduler = self.scheduler
        set_timesteps(scheduler, num_inference_steps, timesteps, timestep_spacing, eta, device)
        image = image * scheduler.init_noise_sigma
        options = step_options(scheduler, generator, eta)
        steps = scheduler.timesteps
        warn_of_another_chain(scheduler)
        self._num_timesteps = len(steps)
        for i, timestep in enumerate(self.progress_bar(steps.tolist())):
            # Only a scheduler with fractional timesteps (Euler, LMS) needs its own tensor back.
            t = timestep if isinstance(timestep, int) else steps[i]
            output = self._predict(image, t, guidance)
            if "prev_timestep" in options:
                options["prev_timestep"] = int(steps[i + 1]) if i + 1 < len(steps) else None
            with mean_half_whole(scheduler):
                image = scheduler.step(output, t, image, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {name: image for name in callback_on_step_end_tensor_inputs}
                image = (callback_on_step_end(self, i, timestep, tensors) or {}).get("latents", image)
        if type(scheduler) is not DDPMVLBScheduler and not bool(image.isfinite().all()):
            raise ValueError(
                f"{type(scheduler).__name__} gave values that are not finite in {len(steps)} steps. Multistep "
                "solvers need fewer steps than the chain has: pass a smaller `num_inference_steps`."
            )
        images = self._finish(image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call, for callbacks."""
        return self._num_timesteps

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
            raise ValueError(f"PIL has no images of {channels} channels: use `output_type='np'`, 'pt' or 'latent'.")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, not {sorted(unknown)}."
            )
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("Pass only one of `num_inference_steps` and `timesteps`.")

    def _predict(self, image: Tensor, timestep: Any, guidance: Guidance) -> Tensor:
        """The network's output for the scheduler: guided, and cut to the mean half where that is all it takes."""
        sample = self.scheduler.scale_model_input(image, timestep).to(self.unet.dtype)
        output = guidance.output(lambda x, labels: self._call_unet(x, timestep, labels), sample)
        channels = image.shape[1]
        if output.shape[1] == 2 * channels and not takes_variance(self.scheduler):
            output = output[:, :channels]
        return output

    def _call_unet(self, sample: Tensor, timestep: Any, labels: Tensor | None) -> Tensor:
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if labels is None:
            return self.unet(sample, timesteps).sample
        return self.unet(sample, timesteps, class_labels=labels).sample

    @staticmethod
    def _finish(image: Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return image
        image = (image.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return image
        array = image.cpu().permute(0, 2, 3, 1).numpy()
        return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array

    @property
    def portable(self) -> bool:
        """Whether stock's DDPMPipeline samples this network and scheduler rightly, and is what we save it as."""
        config = self.unet.config
        if type(self.scheduler) not in (DDPMVLBScheduler, DDPMScheduler):
            return False
        if config.get("class_embed_type") is not None or self.num_classes is not None:
            return False
        variance_type = self.scheduler.config.variance_type
        if float(self.scheduler.alphas_cumprod[-1]) == 0 and self.scheduler.config.prediction_type == "epsilon":
            return False
        learned = variance_type == "learned_range"
        return variance_type != "learned" and (
            config.get("out_channels") == config.get("in_channels") * (2 if learned else 1)
        )

    def to_json_string(self) -> str:
        """model_index.json: stock's class names wherever stock can load and sample what they name."""
        index = json.loads(super().to_json_string())
        if type(self.scheduler) is DDPMVLBScheduler:
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        if self.portable:
            index["_class_name"] = "DDPMPipeline"
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
