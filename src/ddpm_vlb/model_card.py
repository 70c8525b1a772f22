"""The model card of a pipeline: what it is, how to load it, and what was measured.

Made with huggingface_hub's ModelCard and EvalResult, so that the Hub shows the bits/dim as a result of the model.
Nothing is computed here: numbers come in as what examples/train.py and examples/evaluate.py write to metrics.json.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

METRIC_TYPE, METRIC_NAME = "bits_per_dim", "Bits/dim (VLB)"
NATS_TYPE, NATS_NAME = "nats_per_dim", "Nats/dim (VLB)"
TASK_TYPE, TASK_NAME = "unconditional-image-generation", "Unconditional Image Generation"
Metrics = Mapping[str, Any]
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
        training: the metrics.json of train.py, or any of its parts "test", "validation", "baselines", "train", "data",
            "options" and "versions".
        evaluations: metrics.json files of evaluate.py. Those of the whole chain join the results, those of shorter
            ones make the table of few steps.
        pictures: "samples.png" and "vlb_terms.png", where they lie beside the card.
        license: an identifier of the Hub's list, such as "apache-2.0".
        includes_code: the repository carries pipeline.py.
        status: a sentence that goes first, such as that training is not finished.

    Raises:
        ValueError: metrics that are not those of the two scripts, or stand in each other's place.
    """
    training = training or {}
    _check_metrics(training, evaluations)
    steps = pipeline.scheduler.config.num_train_timesteps
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
        _results(scores, training.get("baselines", {}), "vlb_terms.png" in pictures),
        _few_steps(short, bool(scores)),
        _samples(training, pictures),
        _training(pipeline, training),
        _versions(training, evaluations),
        _limitations(pipeline, bool(scores or short)),
    ]
    metadata = _metadata(pipeline, name, scores, training.get("data", {}), license)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


_SCORE: tuple[str, ...] = ("bits_per_dim", "num_images", "network_calls_per_image")


def _check_metrics(training: Any, evaluations: Any) -> None:
    if not isinstance(training, Mapping):
        raise ValueError(f"`training` must be the content of train.py's metrics.json, but is {training!r:.80}.")
    if "bits_per_dim" in training:
        raise ValueError("`training` must be train.py's metrics; these are evaluate.py's: pass `evaluations=[...]`.")
    if isinstance(evaluations, (str, Mapping)) or not all(isinstance(own, Mapping) for own in evaluations):
        raise ValueError(f"`evaluations` must be a list of evaluate.py's metrics, but is {evaluations!r:.80}.")
    needed = [("training", training[split], _SCORE) for split in ("test", "validation") if training.get(split)]
    needed += [("evaluations", own, (*_SCORE, "timesteps", "data")) for own in evaluations]
    for name, score, keys in needed:
        missing = [key for key in keys if key not in score]
        if missing:
            raise ValueError(f"`{name}` must hold scores with the keys {list(keys)}, but one lacks {missing}.")


def _metadata(
    pipeline: Any, name: str, scores: Sequence[tuple[Metrics, Metrics]], data: Metrics, license: str
) -> ModelCardData:
    """What the Hub reads: the task, the data set and the measured bound."""
    conditional = pipeline.num_classes is not None
    results = [
        _result(score, own, "class-conditional-image-generation" if conditional else TASK_TYPE)
        for score, own in scores
        if math.isfinite(_value(score))
    ]
    sets = [own for own in dict.fromkeys(_hub_name(own) for own in (data, *(own for _, own in scores))) if own]
    tags = ["diffusers", "ddpm-vlb", "ddpm", "likelihood"] + (["class-conditional"] if conditional else [])
    return ModelCardData(
        license=license,
        library_name="diffusers",
        # The Hub has no task for images of a class.
        pipeline_tag=None if conditional or pipeline.unet.config.in_channels not in (1, 3) else TASK_TYPE,
        tags=tags,
        datasets=sets or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _result(score: Metrics, data: Metrics, task: str) -> EvalResult:
    """A measured bound as the Hub's EvalResult; its errors and how it was measured are the metric's arguments."""
    discrete = score["bits_per_dim"] is not None
    errors = {key: round(score[key], 6) for key in ("noise_se", "image_se") if score.get(key)}
    how = {key: score[key] for key in ("num_images", "network_calls_per_image", "clip_sample") if key in score}
    return EvalResult(
        task_type=task,
        task_name=TASK_NAME if task == TASK_TYPE else "Class-Conditional Image Generation",
        dataset_type=_hub_name(data) or "custom",
        dataset_name=_data_name(data),
        dataset_config=data.get("dataset_config_name"),
        dataset_split=data.get("split"),
        metric_type=METRIC_TYPE if discrete else NATS_TYPE,
        metric_name=METRIC_NAME if discrete else NATS_NAME,
        metric_value=round(_value(score), 6),
        metric_args={**errors, **how},
    )


def _hub_name(data: Metrics) -> str | None:
    """The data set's name on the Hub; None for a folder, a file and the built-in digits."""
    name = data.get("dataset_name")
    return (
        name
        if name and name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
        else None
    )


def _data_name(data: Metrics) -> str:
    """The data set in words, without the folders that lead to it."""
    given = data.get("dataset_name") or data.get("train_data_dir")
    if given is None:
        return "scikit-learn digits" if "dataset_name" in data else "unknown"
    return _hub_name(data) or Path(given).name


def _value(score: Metrics) -> float:
    return score["nats_per_dim"] if score["bits_per_dim"] is None else score["bits_per_dim"]


def _number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _error(value: float | None) -> str:
    """A standard error; 0 means that it could not be told from the images."""
    return _number(value or None)


def _unit(score: Metrics) -> str:
    return "nats/dim" if score["bits_per_dim"] is None else "bits/dim"


def _bound(score: Metrics) -> str:
    noise, images = _error(score.get("noise_se")), _error(score.get("image_se"))
    return f"{_number(_value(score))} ± {noise} (noise) ± {images} (images)"


def _shape(pipeline: Any) -> str:
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    levels = pipeline.scheduler.config.get("levels", 256)
    values = "continuous values" if levels is None else f"{levels} levels"
    return f"{height}x{width} with {channels} channel{'s' * (channels > 1)} of {values}"


def _what(pipeline: Any, scores: Sequence[tuple[Metrics, Metrics]]) -> str:
    config = pipeline.scheduler.config
    kind = "A class-conditional" if pipeline.num_classes is not None else "An unconditional"
    predicts, variance_type = _PREDICTS[config.get("prediction_type", "epsilon")], config.get("variance_type")
    kind_of_variance = "learned" if str(variance_type).startswith("learned") else "fixed"
    variance = f"with {kind_of_variance} variance (`{variance_type}`), " if variance_type else ""
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    lines = [
        f"{kind} denoising diffusion model (DDPM) of images of {_shape(pipeline)}: a "
        f"`{type(pipeline.unet).__name__}` of {parameters / 1e6:.2f} M parameters that predicts "
        f"{predicts}, {variance}over {config.num_train_timesteps} steps. Made with ddpm-vlb, a likelihood toolkit for "
        "🤗 diffusers."
    ]
    if scores:
        score, data = scores[0]
        lines.append(
            f"**{_bound(score)} {_unit(score)}** on {score['num_images']} images of {_in_words(data)}, "
            f"{score['network_calls_per_image']} network calls each. This is its variational bound, an upper bound on "
            "the negative log-likelihood of the data: lower is better."
        )
    return "\n\n".join(lines)


_PREDICTS = {"epsilon": "the noise", "sample": "the data", "v_prediction": "v"}


def _in_words(data: Metrics) -> str:
    split = data.get("split")
    return f"{_data_name(data)} ({split} split)" if split else _data_name(data)


def _loading(pipeline: Any, name: str, includes_code: bool) -> str:
    config, channels = pipeline.scheduler.config, pipeline.unet.config.in_channels
    steps = config.num_train_timesteps
    latents = channels not in (1, 3) and config.get("levels", 256) is None
    given = "batch_size=4"
    if pipeline.num_classes is not None:
        given += ", class_labels=0"
    if channels not in (1, 3):  # no image of PIL's
        given += ', output_type="latent"' if latents else ', output_type="np"'
    if "DDPM" not in type(pipeline.scheduler).__name__:
        given += f", num_inference_steps={max(1, min(50, steps // 2))}"
    call = f"pipeline({given})"
    # Stock's default are 1000 steps, whatever the chain.
    stock_call = f"pipeline({given}, num_inference_steps={steps})" if steps < 1000 else call
    learned = " with the learned variance" if str(config.get("variance_type")).startswith("learned") else ""
    name = json.dumps(name, ensure_ascii=False)
    ours = f"""\
With ddpm-vlb: any number of steps{learned}, swapped schedulers, and the likelihood.

```python
{_IMPORT}

pipeline = DDPMVLBPipeline.from_pretrained({name})
images = {call}.images
```{_stored(pipeline)}"""
    stock = f"""\
With 🤗 diffusers alone:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({name})
images = {stock_call}.images
```"""
    why = _why_not_stock(pipeline)
    if why:
        stock = f"With 🤗 diffusers alone `DiffusionPipeline.from_pretrained` does not load this repository: {why}."
    elif latents:
        stock = (
            "With 🤗 diffusers alone it loads, but its `DDPMPipeline` clamps what it samples, which spoils latents."
        )
    code = f"""\
Without installing ddpm-vlb, from the code that this repository carries. Read it first: `trust_remote_code=True` runs
it.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({name}, custom_pipeline={name}, trust_remote_code=True)
images = {call}.images
```"""
    if not includes_code:
        code = (
            "Without ddpm-vlb it cannot be loaded as `DDPMVLBPipeline`: this repository carries no code that "
            f"`custom_pipeline={name}, trust_remote_code=True` could run."
        )
    return "\n\n".join(["## How to load it", *([ours, stock] if why or latents else [stock, ours]), code])


def _stored(pipeline: Any) -> str:
    """What `num_inference_steps` finds in the checkpoint."""
    numbers = sorted(getattr(pipeline.scheduler, "optimal_paths", {}))
    if not numbers:
        return ""
    listed = ", ".join(map(str, numbers))
    return (
        f"\n\n`num_inference_steps` of {listed} takes the stored chain of so many steps with the lowest bound; "
        "`timestep_spacing` asks for another, as with 🤗 diffusers alone."
    )


def _why_not_stock(pipeline: Any) -> str | None:
    """Why stock's DDPMPipeline cannot have this pipeline; None where it can."""
    variance_type = pipeline.scheduler.config.get("variance_type")
    if pipeline.portable:
        return None
    if pipeline.num_classes is not None:
        return "its `DDPMPipeline` takes no class labels"
    if variance_type == "learned":
        return 'its `DDPMScheduler` samples `variance_type="learned"` wrongly'
    if not type(pipeline.scheduler).__name__.startswith(("DDPMVLB", "DDPMScheduler")):
        return f"its `DDPMPipeline` does not sample every network rightly with `{type(pipeline.scheduler).__name__}`"
    if pipeline.unet.config.out_channels == 2 * pipeline.unet.config.in_channels and variance_type != "learned_range":
        return f"its `DDPMPipeline` fails on a variance half that `{variance_type}` has no use for"
    return "its `DDPMPipeline` does not sample this network and chain rightly"


def _cell(text: str) -> str:
    """Text that stays within its cell: on one line, each pipe escaped, and the backslashes before it."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.split()))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


_ERRORS = (
    "The two standard errors are independent (their squares add): *noise* is from the draws of t and of the noise, "
    "and falls with more network calls; *images* is from the choice of images, and n/a where they are too few to tell."
)


def _clipping(score: Metrics) -> str:
    return "clipped" if score.get("clip_sample") else "unclipped"


def _results(scores: Sequence[tuple[Metrics, Metrics]], baselines: Metrics, plotted: bool) -> str:
    if not scores:
        return ""
    rows, terms = [], []
    for score, data in scores:
        where = [_in_words(data), str(score["num_images"])]
        rows.append(
            [*where, f"**{_bound(score)}**", _unit(score), str(score["network_calls_per_image"]), _clipping(score)]
        )
        terms.append([*where, *(_number(score.get(key), 4) for key in ("prior", "kl", "decoder"))])
    lines = [
        "## Likelihood",
        _table(("data", "images", "bound ± SE", "unit", "network calls per image", "x_0 estimate"), rows),
        f"{_ERRORS} The bound is the sum of:",
        _table(("data", "images", "L_T (prior)", "Σ L_t (KL)", "L_0 (decoder)"), terms),
    ]
    if baselines:
        named = [[key.replace("_", " "), _number(value)] for key, value in baselines.items()]
        lines += [
            "For comparison, codes that anyone has, on the images of the first row (10 000 at most):",
            _table(("code", "bits/dim"), named),
        ]
    if plotted:
        lines.append("![L_t against t, with bands of one standard error, and the cumulative bound](vlb_terms.png)")
    return "\n\n".join(lines)


def _few_steps(evaluations: Sequence[Metrics], explained: bool) -> str:
    """The bound of shorter chains."""
    if not evaluations:
        return ""
    rows = []
    for own in evaluations:
        where = [str(len(own["timesteps"])), _in_words(own["data"]), str(own["num_images"])]
        rows.append([*where, _bound(own), _unit(own), str(own["network_calls_per_image"]), _clipping(own)])
    header = ("steps", "data", "images", "bound ± SE", "unit", "network calls per image", "x_0 estimate")
    lines = ["## Few steps", "The bound of the shorter chain that samples in so many steps.", _table(header, rows)]
    return "\n\n".join(lines if explained else [*lines, _ERRORS])


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
        lines.append(f"{train['steps']} steps in {train['seconds']:.0f} s on `{train['device']}`.")
    options = {key: value for key, value in training.get("options", {}).items() if value not in (None, [])}
    if options:
        rows = [[f"`{key}`", f"`{_plain(value)}`"] for key, value in sorted(options.items())]
        table = _table(("option", "value"), rows)
        lines.append(f"<details><summary>All options of examples/train.py</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(lines)


def _linked(data: Metrics) -> str:
    hub = _hub_name(data)
    return f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else _data_name(data)


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
    levels = pipeline.scheduler.config.get("levels", 256)
    lines = ["- A bound is above the negative log-likelihood itself by a gap that is not known."]
    if levels is None:
        lines.append("- The data is continuous: its bound is one on a density and cannot be compared with bits/dim.")
    else:
        lines.append(
            f"- Bits/dim compare only between models of the same data: images of {_shape(pipeline)}, as they were "
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
