"""A checkpoint as its commands take it: the pipeline, held-out images, and how the network is called."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ddpm_vlb import (
    DISTILLED_SCHEDULERS,
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    GaussianPath,
    ReverseProcess,
    check_scorable,
    describe_path,
    path_chain,
    spaced_ratios,
    values_in_a_call,
)
from ddpm_vlb.runtime.image_data import HUB_HINT, named_data
from ddpm_vlb.runtime.launching import main_first
from ddpm_vlb.scoring.data import NetworkShape, ScoringData, load_scoring_data

RECORD = """
    dataset_name dataset_config_name train_data_dir image_column train_split test_split resolution test_fingerprint
    num_images
""".split()
FORMAT = 6  # of partial results; raise it when their meaning changes


def load_pipeline(args: argparse.Namespace) -> DDPMVLBPipeline:
    """The checkpoint as a pipeline of ours that can be scored."""
    pipeline = read_pipeline(args)
    check_scorable(pipeline, f"--model {args.model}")
    return pipeline


def read_pipeline(args: argparse.Namespace, option: str = "--model") -> DDPMVLBPipeline:
    """The checkpoint as a pipeline of ours, with any chain that it samples by; `option` is what messages name."""
    folder = Path(args.model)
    if not folder.is_dir() and (args.model.count("/") != 1 or args.model.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{option} {args.model}: there is no such folder, and it is no Hub name (user/name).")
    if folder.is_dir() and args.revision is not None:
        raise ValueError(
            f"--revision {args.revision} has no effect: {option} {args.model} is a folder, not on the Hub."
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{option} {args.model}: the folder holds no pipeline (no model_index.json).")
    try:
        if not folder.is_dir():
            _reach_hub(args)
        return DDPMVLBPipeline.from_pretrained(args.model, revision=args.revision, cache_dir=args.cache_dir)
    except Exception as error:  # the Hub client, diffusers and safetensors raise whatever they like
        said = str(error).rstrip(".")
        if not folder.is_dir():
            said = f"there is no such folder, and of the Hub: {said}. {HUB_HINT}"
        raise ValueError(f"{option} {args.model} cannot be loaded: {said}") from error


def name_distilled(pipeline: DDPMVLBPipeline) -> str | None:
    """The scheduler of a distilled network, which is scored on the chain of its betas; None of another's."""
    name = type(pipeline.scheduler).__name__
    if name not in DISTILLED_SCHEDULERS:
        return None
    if pipeline.path is None:
        pipeline.scheduler = DDPMVLBScheduler.from_config(pipeline.scheduler.config)
    return name


def _reach_hub(args: argparse.Namespace) -> None:
    """Ask for a model that is not in the cache once: the client waits a minute for a Hub that cannot be reached."""
    if try_to_load_from_cache(args.model, "model_index.json", args.cache_dir, args.revision) is None:
        with contextlib.suppress(HfHubHTTPError):  # the Hub's own answer comes again, and with retries
            HfApi().model_info(args.model, revision=args.revision, timeout=HF_HUB_ETAG_TIMEOUT)


def network_shape(pipeline: DDPMVLBPipeline, args: argparse.Namespace) -> NetworkShape:
    """What the checkpoint says of its data."""
    shape = pipeline.sample_shape
    levels = stated = pipeline.chain.config.get("levels", 256)
    path = describe_path(pipeline)  # whose chain by default states nothing
    if "levels" in args and stated not in (256, args.levels) and (path is None or path["stored"]):
        raise ValueError(f"--levels {args.levels} contradicts the checkpoint, whose scheduler says `levels` {stated}.")
    if "levels" in args:
        levels = args.levels
    return NetworkShape(pipeline.unet.config.in_channels, shape and shape[1:], levels, pipeline.num_classes)


def settle_chain(pipeline: DDPMVLBPipeline, args: argparse.Namespace, levels: int | None) -> dict[str, Any] | None:
    """Give a network of a Gaussian path its chain, where the checkpoint stores none; returns what is told of it."""
    told = describe_path(pipeline)
    if told is None or told["stored"]:
        if getattr(args, "ratios", None) is not None:
            why = "has a chain of betas" if told is None else "stores a chain of its own (chain/)"
            raise ValueError(
                f"--ratios has no effect: --model {args.model} {why}, which is what is scored. Leave it out."
            )
        return told
    given = getattr(args, "ratios", None)
    if given is not None and not given[0] < given[1] < math.inf:
        raise ValueError(f"--ratios must be two numbers of which the second is larger and finite, but are {given}.")
    ratios = None if given is None else spaced_ratios(given[0], given[1], told["steps"])
    variance_type = pipeline.chain.config.variance_type
    pipeline.chain = path_chain(pipeline.scheduler, levels, ratios, variance_type)
    return {**(describe_path(pipeline) or {}), "stored": False}


def read_record(path: Path) -> dict[str, Any] | None:
    """The data.json beside a model, if there is one."""
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{path} must be a file, the record of `ddpm-vlb train`, but is none. Move it away.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing = [name for name in RECORD if name not in record] if isinstance(record, dict) else RECORD
    wrong = [] if missing else _wrong_values(record)
    if missing or wrong:
        what = f"it lacks {missing}" if missing else f"the values of {wrong} are none"
        raise ValueError(f"{path} is no record of `ddpm-vlb train`: {what}. Name the data with `--dataset_name`.")
    return record


def _wrong_values(record: dict[str, Any]) -> list[str]:
    """The keys of a data.json whose values `ddpm-vlb train` does not write."""
    kinds: dict[str, tuple[type, ...]] = dict.fromkeys(RECORD[:6], (str, NoneType))
    kinds |= {"image_column": (str,), "train_split": (str,), "resolution": (int, NoneType)}
    kinds |= {"label_column": (str,)} if "label_column" in record else {}
    wrong = [name for name, own in kinds.items() if type(record[name]) not in own]
    if "resolution" not in wrong and record["resolution"] is not None and record["resolution"] < 1:
        wrong.append("resolution")
    known = {"levels": range(2, 2**16 + 1), "channels": (1, 3)}  # which old ones may lack
    return wrong + [name for name, own in known.items() if name in record and record[name] not in own]


def load_data(args: argparse.Namespace, network: NetworkShape, check: bool, pilot: bool = True) -> ScoringData:
    """The images to score, and others for the pilot if there is one; all of them checked, if asked for."""
    record = Path(args.model) / "data.json"
    with named_data(args.dataset_name or f"of {record}"):
        return load_scoring_data(
            network,
            args.split,
            read_record(record),
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            args.label_column,
            args.resolution,
            args.num_images,
            args.cache_dir,
            "levels" in args,
            check,
            pilot,
        )


def default_folder(model: str) -> Path:
    """The folder of a model's evaluation."""
    return Path(model) / "evaluation" if Path(model).is_dir() else Path("runs") / model.replace("/", "--")


class Checkpoint:
    """A checkpoint, held-out images, and how the network is called; loaded by all processes.

    Args:
        args: of the command.
        accelerator: of the run.
        command: named before messages.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, command: str):
        self.args, self.accelerator = args, accelerator

        def load() -> tuple[DDPMVLBPipeline, ScoringData, dict[str, Any]]:
            pipeline = read_pipeline(args)
            distilled = name_distilled(pipeline) if command == "evaluate" else None
            check_scorable(pipeline, f"--model {args.model}")
            data = load_data(args, network_shape(pipeline, args), accelerator.is_main_process)
            path = settle_chain(pipeline, args, data.levels)
            return pipeline, data, {"gaussian_path": path, "distilled": distilled}

        self.pipeline, data, self.told = main_first(accelerator, load, command, ValueError, OSError)
        record = broadcast_object_list([data.record])[0]  # with the main process's fingerprints
        self.data: ScoringData = dataclasses.replace(data, record=record)
        self.unet = self.pipeline.unet.to(accelerator.device).eval()
        self.network = self.pipeline.network
        self.weights = fingerprint_of(self.unet)
        self.told |= {"name_or_path": args.model, "revision": args.revision, "weights_sha256": self.weights}
        self.dims = self.batch([0])[0].numel()
        self.discrete = self.data.levels is not None
        self.unit = "bits/dim" if self.discrete else "nats/dim of density"

    def model(self, x_t: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        """The network, under the run's mixed precision."""
        with self.accelerator.autocast():
            output = self.network(x_t.to(self.unet.dtype), timesteps, **conditioning)
            return (output if isinstance(output, Tensor) else output.sample).float()

    def batch(self, positions: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images to score."""
        return self.data.batch(self.data.scored, positions)

    @property
    def values_per_call(self) -> int:
        """Values in a network call: as many as keep the device busy, or as asked for."""
        size = self.args.eval_batch_size
        return values_in_a_call(None if size is None else size * self.dims, self.accelerator.device)

    def key(self, processes: Sequence[ReverseProcess], **more: Any) -> str:
        """A hash over everything that the scores of some processes depend on."""
        content = {
            "format": [FORMAT, importlib.metadata.version("ddpm-vlb")],
            "weights": self.weights,
            "network": {k: v for k, v in json.loads(self.unet.to_json_string()).items() if not k.startswith("_")},
            "data": self.data.record,
            "mixed_precision": self.accelerator.mixed_precision,
            "values_per_call": self.values_per_call,
            "processes": [described(process) for process in processes],
            "path": hash_of_path(self.pipeline.path),
            **more,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint_of(module: torch.nn.Module) -> str:
    """A hash over all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def hash_of_path(path: GaussianPath | None) -> str | None:
    """A hash over a path's tables, as networks of two paths have chains that look alike; None of a chain of betas."""
    if path is None:
        return None
    return hashlib.sha256(torch.stack(list(vars(path).values())).numpy().tobytes()).hexdigest()


def described(reverse: ReverseProcess) -> list[Any]:
    """All that tells one reverse process from another."""
    m, first = reverse.x_0_mse, reverse.decoder_log_variance
    return [
        reverse.prediction_type,
        reverse.variance_type,
        reverse.clip_sample,
        reverse.thresholding,
        reverse.clip_sample_range,
        reverse.dynamic_thresholding_ratio,
        reverse.sample_max_value,
        reverse.levels,
        reverse.forward.timesteps.tolist(),
        reverse.forward.betas.tolist(),
        None if m is None else hashlib.sha256(m.double().cpu().numpy().tobytes()).hexdigest(),
        None if first is None else torch.as_tensor(first).tolist(),
        reverse.decoder_slope,
    ]
