"""The model card of a pipeline: what it is, how to load it, and what was measured.

Nothing is computed here: numbers come in as what `ddpm-vlb train` and `ddpm-vlb evaluate` write to metrics.json.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from .card_results import (
    Metrics,
    bound,
    check_metrics,
    data_name,
    few_steps_section,
    hub_metadata,
    hub_name,
    in_words,
    is_conditional,
    likelihood_section,
    markdown_table,
    unit,
)
from .path_checkpoints import describe_path, stock_sigmas
from .sample_shapes import is_image, sample_shape

# Not on a line of its own: diffusers takes such a line in code from the Hub for an import of this module.
_IMPORT = "from ddpm_vlb import DDPMVLBPipeline"


def model_card(
    pipeline: Any,
    name: str,
    *,
    training: Metrics | None = None,
    evaluations: Sequence[Metrics] = (),
    pictures: Sequence[str] = (),
    license: str = "unknown",
    includes_code: bool = False,
    status: str | None = None,
) -> ModelCard:
    """The card of a pipeline.

    Args:
        pipeline: a `DDPMVLBPipeline`.
        name: what `from_pretrained` is to be called with, such as "me/digits".
        training: the metrics.json of `ddpm-vlb train`, or any of its parts "test", "validation", "baselines", "train",
            "data", "options" and "versions".
        evaluations: metrics.json files of `ddpm-vlb evaluate`. Those of the whole chain join the results, those of
            shorter ones make the table of few steps.
        pictures: "samples.png" and "vlb_terms.png", where they lie beside the card.
        license: an identifier of the Hub's list, such as "apache-2.0".
        includes_code: the repository carries pipeline.py.
        status: a sentence that goes first, such as that training is not finished.

    Raises:
        ValueError: metrics that are not those of the two commands, or stand in each other's place.
    """
    training = training or {}
    check_metrics(training, evaluations)
    steps = pipeline.chain.config.num_train_timesteps
    whole = [own for own in evaluations if len(own["timesteps"]) == steps]
    short = sorted((own for own in evaluations if len(own["timesteps"]) != steps), key=lambda m: len(m["timesteps"]))
    scores = [
        (training[split], {**training.get("data", {}), "split": training.get("data", {}).get(f"{split}_split", split)})
        for split in ("test", "validation")
        if training.get(split)
    ]
    scores += [(own, own["data"]) for own in whole]
    parts = [
        f"# {name}",
        f"> **{status}**" if status else "",
        _what(pipeline, scores),
        _loading(pipeline, name, includes_code),
        likelihood_section(scores, training.get("baselines", {}), "vlb_terms.png" in pictures),
        few_steps_section(short, bool(scores)),
        _samples(training, pictures),
        _training(pipeline, training),
        _versions(training, evaluations),
        _limitations(pipeline, bool(scores or short)),
    ]
    metadata, path = hub_metadata(pipeline, name, scores, training.get("data", {}), license), describe_path(pipeline)
    if path is not None:
        kind = path["kind"].split(",")[0].lower().replace(" ", "-")
        metadata.tags = [kind if tag == "ddpm" else tag for tag in metadata.tags or []]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def _shape(pipeline: Any) -> str:
    shape, channels = sample_shape(pipeline.unet), pipeline.unet.config.in_channels
    kind = "images" if shape is None or len(shape) == 3 else "samples"
    size = "any size" if shape is None else "x".join(map(str, shape[1:]))
    levels = pipeline.chain.config.get("levels", 256)
    values = "continuous values" if levels is None else f"{levels} levels"
    return f"{kind} of {size} with {channels} channel{'s' * (channels > 1)} of {values}"


def _what(pipeline: Any, scores: Sequence[tuple[Metrics, Metrics]]) -> str:
    config = pipeline.chain.config
    kind, path = "A class-conditional" if is_conditional(pipeline) else "An unconditional", describe_path(pipeline)
    predicts, variance_type = _PREDICTS[config.get("prediction_type", "epsilon")], config.get("variance_type")
    kind_of_variance = "learned" if str(variance_type).startswith("learned") else "fixed"
    variance = f"with {kind_of_variance} variance (`{variance_type}`), " if variance_type else ""
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    network = f"a `{type(pipeline.unet).__name__}` of {parameters / 1e6:.2f} M parameters"
    made = "Made with ddpm-vlb, a likelihood toolkit for 🤗 diffusers."
    if path is None:
        lines = [
            f"{kind} denoising diffusion model (DDPM) of {_shape(pipeline)}: {network} that predicts {predicts}, "
            f"{variance}over {config.num_train_timesteps} steps. {made}"
        ]
    else:
        low, high = ("noise alone" if r is None else f"{r:.4g}" for r in path["ratios"])
        lines = [
            f"{kind} model of {path['kind']} (`{path['scheduler']}`) of {_shape(pipeline)}: {network}. {made} It is "
            f"scored, and sampled by ddpm-vlb, on a chain of {path['steps']} steps with noise-to-signal ratios from "
            f"{low} to {high}, {variance.removesuffix(', ')}."
        ]
    if scores:
        (score, data), whose = scores[0], "its" if path is None else "that chain's"
        labels = "" if pipeline.num_classes is None else ", given their labels"
        lines.append(
            f"**{bound(score)} {unit(score)}** on {score['num_images']} images of {in_words(data)}{labels}, "
            f"{score['network_calls_per_image']} network calls each. This is {whose} variational bound, an upper "
            "bound on the negative log-likelihood of the data: lower is better."
        )
    return "\n\n".join(lines)


_PREDICTS = {"epsilon": "the noise", "sample": "the data", "v_prediction": "v"}


def _loading(pipeline: Any, name: str, includes_code: bool) -> str:
    config, image = pipeline.chain.config, is_image(sample_shape(pipeline.unet))
    steps = config.num_train_timesteps
    latents = not image and config.get("levels", 256) is None
    given = "batch_size=4"
    if pipeline.num_classes is not None:
        given += ", class_labels=0"
    if not image:
        given += ', output_type="latent"' if latents else ', output_type="np"'
    if "DDPM" not in type(pipeline.chain).__name__:
        given += f", num_inference_steps={max(1, min(50, steps // 2))}"
    call = f"pipeline({given})"
    # No pipeline hands embeddings of classes to a network.
    drawn = "" if is_conditional(pipeline) and pipeline.num_classes is None else f"\nimages = {call}.images"
    # Stock's default are 1000 steps, whatever the chain.
    stock_call = f"pipeline({given}, num_inference_steps={steps})" if steps < 1000 else call
    learned = " with the learned variance" if str(config.get("variance_type")).startswith("learned") else ""
    name = json.dumps(name, ensure_ascii=False)
    ours = f"""\
With ddpm-vlb: any number of steps{learned}, swapped schedulers, and the likelihood.

```python
{_IMPORT}

pipeline = DDPMVLBPipeline.from_pretrained({name}){drawn}
```{_stored(pipeline)}"""
    stock = f"""\
With 🤗 diffusers alone:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({name})
images = {stock_call}.images
```"""
    why, path = _why_not_stock(pipeline), describe_path(pipeline)
    if path is not None:
        stock = _stock_path(pipeline, name)
    elif why:
        stock = f"With 🤗 diffusers alone `DiffusionPipeline.from_pretrained` does not load this repository: {why}."
    elif latents:
        stock = (
            "With 🤗 diffusers alone it loads, but its `DDPMPipeline` clamps what it samples, which spoils latents."
        )
    # The loader of diffusers reads what model_index.json names, which the chain is not.
    load = f'\npipeline.chain = type(pipeline.chain).from_pretrained({name}, subfolder="chain")'
    own_chain = load if path is not None and path["stored"] else ""
    code = f"""\
Without installing ddpm-vlb, from the code that this repository carries. Read it first: `trust_remote_code=True` runs
it.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({name}, custom_pipeline={name}, trust_remote_code=True){own_chain}{drawn}
```"""
    if not includes_code:
        code = (
            "Without ddpm-vlb it cannot be loaded as `DDPMVLBPipeline`: this repository carries no code that "
            f"`custom_pipeline={name}, trust_remote_code=True` could run."
        )
    return "\n\n".join(["## How to load it", *([ours, stock] if why or latents else [stock, ours]), code])


def _stock_path(pipeline: Any, name: str) -> str:
    """How stock alone samples a network of a Gaussian path, and by which sigmas."""
    shape = sample_shape(pipeline.unet)
    network, scheduler = type(pipeline.unet).__name__, type(pipeline.scheduler).__name__
    if shape is None:
        return "With 🤗 diffusers alone its `unet` and its `scheduler` load by their own classes."
    stored = [own.timesteps for own in pipeline.chain.optimal_paths.values()]
    sigmas = [rows for rows in (stock_sigmas(pipeline, own) for own in stored) if rows]
    steps = f"sigmas=np.array({[float(f'{own:.6g}') for own in sigmas[0]]})" if sigmas else "50"
    if pipeline.scheduler.config.get("use_dynamic_shifting"):
        steps = "50, mu=1.0"
    labels = "" if pipeline.num_classes is None else ", class_labels=torch.zeros(4, dtype=torch.long)"
    learned = pipeline.unet.config.out_channels == 2 * shape[0]
    scaled = "scheduler.scale_model_input(x, t)" if hasattr(pipeline.scheduler, "scale_model_input") else "x"
    first = " * scheduler.init_noise_sigma" if hasattr(pipeline.scheduler, "init_noise_sigma") else ""
    told = "t" if pipeline.num_classes is None else "t.expand(4)"
    said = " `DiffusionPipeline.from_pretrained` gives a `DDPMPipeline` that does so too." if pipeline.portable else ""
    if sigmas:
        said += " These sigmas are the levels of the stored chain of fewest steps, which stock walks in its own way."
    elif stored:
        said += " It takes no sigmas as they are: the stored chains are sampled by ddpm-vlb alone."
    return f"""\
With 🤗 diffusers alone, by the scheduler that it was made for.{said}

```python
{"import numpy as np" + chr(10) if sigmas else ""}import torch
from diffusers import {network}, {scheduler}

unet = {network}.from_pretrained({name}, subfolder="unet")
scheduler = {scheduler}.from_pretrained({name}, subfolder="scheduler")
scheduler.set_timesteps({steps})
x = torch.randn(4, {", ".join(map(str, shape))}){first}
for t in scheduler.timesteps:
    with torch.no_grad():
        output = unet({scaled}, {told}{labels}).sample{"[:, : x.shape[1]]" if learned else ""}
    x = scheduler.step(output, t, x).prev_sample
```"""


def _stored(pipeline: Any) -> str:
    """What `num_inference_steps` finds in the checkpoint."""
    numbers = sorted(getattr(pipeline.chain, "optimal_paths", {}))
    if not numbers:
        return ""
    listed = ", ".join(map(str, numbers))
    return (
        f"\n\n`num_inference_steps` of {listed} takes the stored chain of so many steps with the lowest bound; "
        "`timestep_spacing` asks for another, as with 🤗 diffusers alone."
    )


def _why_not_stock(pipeline: Any) -> str | None:
    """Why stock's DDPMPipeline cannot have this pipeline; None where it can."""
    variance_type = pipeline.chain.config.get("variance_type")
    if pipeline.portable:
        return None
    if is_conditional(pipeline):
        return "its `DDPMPipeline` takes no class labels"
    shape = sample_shape(pipeline.unet)
    if shape is None or len(shape) != 3:
        return "its `DDPMPipeline` makes images of two dimensions and of a stated size only"
    if variance_type == "learned":
        return 'its `DDPMScheduler` samples `variance_type="learned"` wrongly'
    if not type(pipeline.chain).__name__.startswith(("DDPMVLB", "DDPMScheduler")):
        return f"its `DDPMPipeline` does not sample every network rightly with `{type(pipeline.chain).__name__}`"
    if pipeline.unet.config.out_channels == 2 * pipeline.unet.config.in_channels and variance_type != "learned_range":
        return f"its `DDPMPipeline` fails on a variance half that `{variance_type}` has no use for"
    return "its `DDPMPipeline` does not sample this network and chain rightly"


def _samples(training: Metrics, pictures: Sequence[str]) -> str:
    if "samples.png" not in pictures:
        return ""
    how = training.get("samples", {})
    drawn = f"{how['num_inference_steps']} steps, seed {how['seed']}, beside real images.\n\n" if how else ""
    return f"## Samples\n\n{drawn}![Generated images beside real ones](samples.png)"


def _training(pipeline: Any, training: Metrics) -> str:
    if not {"train", "data", "options"} & set(training):
        return ""
    lines, data, train = ["## Training"], training.get("data", {}), training.get("train", {})
    if data:
        counts = data.get("num_images", {})
        split = ", ".join(f"{count} {name}" for name, count in counts.items()) if isinstance(counts, Mapping) else ""
        lines.append(f"Data set: {_linked(data)}" + (f" ({split} images)." if split else "."))
    if train:
        kept = train.get("kept_step", train["steps"])
        best = "" if kept == train["steps"] else f" The network is that of step {kept}, the best validation's."
        lines.append(f"{train['steps']} steps in {train['seconds']:.0f} s on `{train['device']}`.{best}")
    options = {key: value for key, value in training.get("options", {}).items() if value not in (None, [])}
    if options.get("label_dropout"):
        lines.append(
            f"A share of {options['label_dropout']} of the labels was replaced by {pipeline.num_classes - 1}, which "
            "stands for no class: `guidance_scale` above 1 guides samples to theirs."
        )
    if options:
        rows = [[f"`{key}`", f"`{_plain(value)}`"] for key, value in sorted(options.items())]
        table = markdown_table(("option", "value"), rows)
        lines.append(f"<details><summary>All options of ddpm-vlb train</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(lines)


def _linked(data: Metrics) -> str:
    hub = hub_name(data)
    return f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else data_name(data)


def _plain(value: Any) -> str:
    """A value on one line of a table."""
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return " ".join(text.replace("`", "'").split()) or " "


def _versions(training: Metrics, evaluations: Sequence[Metrics]) -> str:
    versions: Metrics = next((own["versions"] for own in (training, *evaluations) if own.get("versions")), {})
    if not versions:
        return ""
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _limitations(pipeline: Any, measured: bool) -> str:
    levels = pipeline.chain.config.get("levels", 256)
    lines = ["- A bound is above the negative log-likelihood itself by a gap that is not known."]
    if levels is None:
        lines.append("- The data is continuous: its bound is one on a density and cannot be compared with bits/dim.")
    else:
        lines.append(
            f"- Bits/dim compare only between models of the same data: {_shape(pipeline)}, as they were "
            "prepared for this training."
        )
    if not measured:
        lines.append("- No likelihood was measured for this card.")
    lines += [
        "- A bound speaks of one chain. Samples of fewer steps, or of another scheduler, come from another "
        "distribution.",
        "- A good likelihood and good looking samples are different things, and neither shows that images of the "
        "training set are not reproduced. What the data lacks or overrepresents, so do the samples.",
    ]
    return "## Limitations\n\n" + "\n".join(lines)
