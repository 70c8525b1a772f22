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

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet1DModel, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import HfApi, ModelCard
from torch import Tensor

from .configurations import check_index, check_no_code, network_parts, read_config
from .described_chains import check_scheduler
from .few_step_store import check_image_shape
from .finite_samples import FiniteSamples
from .gaussian_paths import GaussianPath
from .guidance import Guidance, batch_count, called, check_no_embeddings, classes_of
from .model_card import model_card
from .path_checkpoints import chain_with, check_chain, default_chain, load_chain, path_of, save_chain, without_path
from .path_configurations import is_path
from .recorded_trajectories import DDPMVLBPipelineOutput, Recorder, check_tensor_inputs
from .repositories import (
    HUB_OPTIONS,
    forget_origin,
    load_part,
    load_parts,
    local_folder,
    read_index,
    weights_of,
    write_card,
    write_code,
)
from .sample_shapes import check_output_type, given_out, needed_shape, sample_shape
from .scheduling_ddpm_vlb import _INDEX_IS_OURS, DDPMVLBScheduler
from .swapped_schedulers import (
    is_portable,
    mean_half_whole,
    not_finite,
    set_timesteps,
    step_options,
    takes_variance,
    warn_of_another_chain,
)
from .walk import draw

_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder", "card")


class DDPMVLBPipeline(DiffusionPipeline):
    """Samples of a (class-conditional) DDPM: images, square or not, signals, volumes; any number of channels.

    Args:
        unet: the network, called as unet(sample, timestep[, class_labels=...]); its config gives `in_channels` and
            `sample_size`: an integer n is (n, n), or (n,) for a `UNet1DModel`, a tuple is (*) itself.
        scheduler: a `DDPMVLBScheduler`; a stock `DDPMScheduler` is replaced by one with the same configuration, any
            other scheduler of a chain of betas is kept, and so is one of flow matching or of the EDM family, whose
            network is then sampled and scored on `chain`.

    Raises:
        ValueError: a scheduler of another kind, or variances of another network's images.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel | UNet1DModel | DiTTransformer2DModel, scheduler: SchedulerMixin):
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMVLBScheduler.from_config(scheduler.config)
        if isinstance(scheduler, DDPMVLBScheduler):
            check_image_shape(scheduler.errors, sample_shape(unet))
        else:
            check_scheduler(scheduler)
        self._chain: DDPMVLBScheduler | None = None
        self._default_chain: DDPMVLBScheduler | None = None
        self.register_modules(unet=unet, scheduler=scheduler)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("unet", "scheduler"):  # which the default chain was made for
            self._default_chain = None
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline of ours or a stock DDPMPipeline, from a folder or the Hub.

        The scheduler is read as ours from the start: stock's class would warn of `levels` on the way. Its file and the
        network's may lie in the repository's root, as in some of 2022. Of a pipeline with a `transformer` (DiT) that
        and the scheduler are read.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a Hub repository.
            kwargs: those of `DiffusionPipeline.from_pretrained`, and `subfolder`, where the pipeline lies in it; with
                a `transformer`, the parts themselves and those of its weights. Weights are read from safetensors
                only, unless `use_safetensors=False` asks for pickles.

        Raises:
            OSError, ValueError: as `DiffusionPipeline.from_pretrained`; a model_index.json that no pipeline saves.
        """
        kwargs.setdefault("use_safetensors", True)
        where = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        subfolder = kwargs.pop("subfolder", None)
        if subfolder is not None:
            return cls.from_pretrained(local_folder(pretrained_model_name_or_path, subfolder, where), **kwargs)
        index, where = read_index(cls.load_config, pretrained_model_name_or_path, where)
        kwargs |= where
        check_index(index)
        if not kwargs.get("trust_remote_code"):
            check_no_code(index, Path(pretrained_model_name_or_path))
        if "scheduler" not in kwargs and list(index.get("scheduler", ())) == ["diffusers", "DDPMScheduler"]:
            kwargs["scheduler"] = load_part(
                DDPMVLBScheduler.from_pretrained, pretrained_model_name_or_path, "scheduler", where
            )
        with weights_of(pretrained_model_name_or_path, kwargs["use_safetensors"]):
            if "transformer" in network_parts(index):
                pipeline = cls(*load_parts(pretrained_model_name_or_path, index, where, kwargs))
                pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
            else:
                pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        chain = load_chain(pretrained_model_name_or_path, where) if is_path(pipeline.scheduler) else None
        if chain is not None:
            pipeline.chain = chain
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline of the parts of another, and with its chain where the network walks a Gaussian path.

        Args:
            pipeline: ours or a stock one, whose chain lies beside the files that it was loaded from: in the folder,
                or the Hub's repository as far as it is in the cache.
            kwargs: those of `DiffusionPipeline.from_pipe`.

        Raises:
            OSError, ValueError: as `DiffusionPipeline.from_pipe`, and for a chain that cannot be read.
        """
        made = super().from_pipe(pipeline, **kwargs)
        chain = chain_with(pipeline) if is_path(made.scheduler) else None
        if chain is not None:
            made.chain = chain
        return made

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
        save_chain(self._chain if is_path(self.scheduler) else None, folder)
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
        return_trajectory: bool = False,
    ) -> DDPMVLBPipelineOutput | tuple[Any, ...]:
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
            output_type: "pil" (images only), "np" (B, *, C in [0, 1]), "pt" (B, C, * in [0, 1]) or "latent" (B, C, *:
                x_0 as it is, not clamped, for a VAE to decode).
            return_dict: return a `DDPMVLBPipelineOutput`, which is an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each step; it may return
                a dict with a new "latents".
            callback_on_step_end_tensor_inputs: names of the tensors to hand to it: "latents", which is x_t.
            null_class_label: the label that stands for no class under guidance; the network's last when None.
            return_trajectory: give out states, outputs and log-probabilities of all steps too, as a `Trajectory`, in
                2 K + 1 times the memory, 3 K + 1 with a learned variance; under guidance those of the guided steps.

        Raises:
            ValueError: an unknown output type or callback tensor, a wrong number of generators, labels that the
                network does not take or that do not match the batch, guidance without labels, a scheduler of no chain
                of betas, steps that it refuses, a trajectory of steps without log-probability, or NaN or infinity,
                told after the last step with who made it.
        """
        device, batch_size, sample = self._execution_device, batch_count(batch_size), needed_shape(self.unet)
        if not isinstance(self.scheduler, DDPMVLBScheduler):  # it may have been replaced since
            check_scheduler(self.scheduler)
        check_no_embeddings(self.unet.config)
        check_tensor_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_output_type(output_type, sample)
        guidance = Guidance.of(batch_size, class_labels, guidance_scale, null_class_label, self.num_classes, device)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be one or a list of {batch_size}, but it holds {len(generator)}.")
        scheduler, network = self.chain, self.network
        set_timesteps(scheduler, num_inference_steps, timesteps, timestep_spacing, eta, device)
        # The chain runs in float32 whatever the network's precision: in half the last steps' noise would be lost.
        image = draw((batch_size, *sample), generator, device, torch.float32) * scheduler.init_noise_sigma
        options = step_options(scheduler, generator, eta)
        steps = scheduler.timesteps
        recorder = Recorder(scheduler, image, guidance.scale) if return_trajectory else None
        warn_of_another_chain(scheduler)
        self._num_timesteps, finite = len(steps), FiniteSamples()
        numbers = steps.tolist()
        for i, timestep in enumerate(self.progress_bar(numbers)):
            # Only a scheduler with fractional timesteps (Euler, LMS) needs its own tensor back.
            t = timestep if isinstance(timestep, int) else steps[i]
            scaled = scheduler.scale_model_input(image, t).to(self.unet.dtype)
            output = guidance.output(lambda x, labels: called(network, x, t, labels), scaled)  # noqa: B023
            finite.note(image, output)
            if output.shape[1] == 2 * len(image[0]) and not takes_variance(scheduler):
                output = output[:, : len(image[0])]
            if "prev_timestep" in options:
                options["prev_timestep"] = int(numbers[i + 1]) if i + 1 < len(steps) else None
            before = image
            with mean_half_whole(scheduler):
                image = scheduler.step(output, t, before, **options, return_dict=False)[0]
            if recorder is not None:
                recorder.note(before, output, image)
            if callback_on_step_end is not None:
                tensors = {name: image for name in callback_on_step_end_tensor_inputs}
                image = (callback_on_step_end(self, i, timestep, tensors) or {}).get("latents", image)
        finite.check(image, numbers, type(self.unet).__name__, not_finite(scheduler, len(steps)))
        images = given_out(image, output_type)
        self.maybe_free_model_hooks()
        found = (images,) if recorder is None else (images, recorder.trajectory(image))
        return DDPMVLBPipelineOutput(*found) if return_dict else found

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """The shape (C, *) of one sample; None where the network's config has no `sample_size`."""
        return sample_shape(self.unet)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call, for callbacks."""
        return self._num_timesteps

    @property
    def num_classes(self) -> int | None:
        """Number of labels that the network takes, the one for no class included; None for an unconditional one."""
        return classes_of(self.unet.config)

    @property
    def chain(self) -> Any:
        """What the network is scored and sampled on: `scheduler` where that is a chain of betas, else the path's own.

        Set it to what `path_chain` makes; where none was set or stored it is `path_chain(scheduler)`, and for a
        transformer, whose data are mostly latents, `path_chain(scheduler, levels=None)`.
        """
        if not is_path(self.scheduler):
            return without_path(self.scheduler, self._chain)
        if self._chain is None and self._default_chain is None:
            self._default_chain = default_chain(self.scheduler, self.unet)
        return self._chain or self._default_chain

    @chain.setter
    def chain(self, value: DDPMVLBScheduler) -> None:
        if not is_path(self.scheduler):
            raise ValueError("`chain` is `scheduler` itself where that is a chain of betas: set `pipeline.scheduler`.")
        check_chain(self.scheduler, value)
        check_image_shape(value.errors, sample_shape(self.unet))
        self._chain = value

    @property
    def path(self) -> GaussianPath | None:
        """The path of a flow matching or EDM scheduler on the levels of `chain`; None for a chain of betas."""
        return path_of(self.scheduler, self.chain) if is_path(self.scheduler) else None

    @property
    def network(self) -> Any:
        """The network as `chain` calls it, network(x_t, timesteps[, class_labels=...])."""
        path = self.path
        return self.unet if path is None else path.network(self.unet)

    @property
    def portable(self) -> bool:
        """Whether stock's DDPMPipeline samples this network and scheduler rightly, and is what we save it as."""
        return is_portable(self)

    def to_json_string(self) -> str:
        """model_index.json: stock's class names wherever stock can load and sample what they name."""
        index = json.loads(super().to_json_string())
        if type(self.scheduler) is DDPMVLBScheduler:
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        if self.portable:
            index["_class_name"] = "DDPMPipeline"
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
