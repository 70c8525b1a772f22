"""What was measured of a pipeline, for its model card: checked, as the Hub's results, and as tables.

Nothing is computed here: numbers come in as what `ddpm-vlb train` and `ddpm-vlb evaluate` write to metrics.json.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .sample_shapes import is_image, sample_shape

METRIC_TYPE, METRIC_NAME = "bits_per_dim", "Bits/dim (VLB)"
NATS_TYPE, NATS_NAME = "nats_per_dim", "Nats/dim (VLB)"
TASK_TYPE, TASK_NAME = "unconditional-image-generation", "Unconditional Image Generation"
Metrics = Mapping[str, Any]
_SCORE: tuple[str, ...] = ("bits_per_dim", "num_images", "network_calls_per_image")


def is_conditional(pipeline: Any) -> bool:
    """Whether its network is told classes, by labels or by embeddings.

    Args:
        pipeline: a `DDPMVLBPipeline`.
    """
    return pipeline.num_classes is not None or pipeline.unet.config.get("class_embed_type") is not None


def check_metrics(training: Any, evaluations: Any) -> None:
    """Refuse metrics that are not those of the two commands, or stand in each other's place.

    Args:
        training: the metrics.json of `ddpm-vlb train`, or a part of it.
        evaluations: those of `ddpm-vlb evaluate`.

    Raises:
        ValueError: such metrics.
    """
    if not isinstance(training, Mapping):
        raise ValueError(f"`training` must be the metrics.json of `ddpm-vlb train`, but is {training!r:.80}.")
    if "bits_per_dim" in training:
        raise ValueError(
            "`training` must be the metrics of `ddpm-vlb train`, but these are of `ddpm-vlb evaluate`: pass them as "
            "`evaluations=[...]`."
        )
    if isinstance(evaluations, (str, Mapping)) or not all(isinstance(own, Mapping) for own in evaluations):
        raise ValueError(
            f"`evaluations` must be a list of the metrics of `ddpm-vlb evaluate`, but is {evaluations!r:.80}."
        )
    needed = [("training", training[split], _SCORE) for split in ("test", "validation") if training.get(split)]
    needed += [("evaluations", own, (*_SCORE, "timesteps", "data")) for own in evaluations]
    for name, score, keys in needed:
        missing = [key for key in keys if key not in score]
        if missing:
            raise ValueError(f"`{name}` must hold scores with the keys {list(keys)}, but one lacks {missing}.")


def hub_metadata(
    pipeline: Any, name: str, scores: Sequence[tuple[Metrics, Metrics]], data: Metrics, license: str
) -> ModelCardData:
    """What the Hub reads: the task, the data set and the measured bound.

    Args:
        pipeline: a `DDPMVLBPipeline`.
        name: what `from_pretrained` is to be called with.
        scores: each with its data set.
        data: of the training.
        license: an identifier of the Hub's list.
    """
    conditional = is_conditional(pipeline)
    results = [
        _result(score, own, "class-conditional-image-generation" if conditional else TASK_TYPE)
        for score, own in scores
        if math.isfinite(_value(score))
    ]
    sets = [own for own in dict.fromkeys(hub_name(own) for own in (data, *(own for _, own in scores))) if own]
    tags = ["diffusers", "ddpm-vlb", "ddpm", "likelihood"] + (["class-conditional"] if conditional else [])
    return ModelCardData(
        license=license,
        library_name="diffusers",
        # The Hub has no task for images of a class.
        pipeline_tag=None if conditional or not is_image(sample_shape(pipeline.unet)) else TASK_TYPE,
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
        dataset_type=hub_name(data) or "custom",
        dataset_name=data_name(data),
        dataset_config=data.get("dataset_config_name"),
        dataset_split=data.get("split"),
        metric_type=METRIC_TYPE if discrete else NATS_TYPE,
        metric_name=METRIC_NAME if discrete else NATS_NAME,
        metric_value=round(_value(score), 6),
        metric_args={**errors, **how},
    )


def hub_name(data: Metrics) -> str | None:
    """The data set's name on the Hub; None for a folder, a file and the built-in digits.

    Args:
        data: of a metrics.json.
    """
    name = data.get("dataset_name")
    return (
        name
        if name and name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
        else None
    )


def data_name(data: Metrics) -> str:
    """The data set in words, without the folders that lead to it.

    Args:
        data: of a metrics.json.
    """
    given = data.get("dataset_name") or data.get("train_data_dir")
    if given is None:
        return "scikit-learn digits" if "dataset_name" in data else "unknown"
    return hub_name(data) or Path(given).name


def _value(score: Metrics) -> float:
    return score["nats_per_dim"] if score["bits_per_dim"] is None else score["bits_per_dim"]


def _number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _error(value: float | None) -> str:
    """A standard error; 0 means that it could not be told from the images."""
    return _number(value or None)


def unit(score: Metrics) -> str:
    """The unit of a measured bound.

    Args:
        score: of a metrics.json.
    """
    return "nats/dim" if score["bits_per_dim"] is None else "bits/dim"


def bound(score: Metrics) -> str:
    """A measured bound with its two standard errors.

    Args:
        score: of a metrics.json.
    """
    noise, images = _error(score.get("noise_se")), _error(score.get("image_se"))
    return f"{_number(_value(score))} ± {noise} (noise) ± {images} (images)"


def in_words(data: Metrics) -> str:
    """The data set and the split.

    Args:
        data: of a metrics.json.
    """
    split = data.get("split")
    return f"{data_name(data)} ({split} split)" if split else data_name(data)


def _cell(text: str) -> str:
    """Text that stays within its cell: on one line, each pipe escaped, and the backslashes before it."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.split()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells stay within their place.

    Args:
        header: of the columns.
        rows: of cells.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


_ERRORS = (
    "The two standard errors are independent (their squares add): *noise* is from the draws of t and of the noise, "
    "and falls with more network calls; *images* is from the choice of images, and n/a where they are too few to tell."
)


def _clipping(score: Metrics) -> str:
    return "clipped" if score.get("clip_sample") else "unclipped"


def likelihood_section(scores: Sequence[tuple[Metrics, Metrics]], baselines: Metrics, plotted: bool) -> str:
    """The bounds of the whole chain, and their terms.

    Args:
        scores: each with its data set.
        baselines: bits/dim of other codes, by name.
        plotted: vlb_terms.png lies beside the card.
    """
    if not scores:
        return ""
    rows, terms = [], []
    for score, data in scores:
        where = [in_words(data), str(score["num_images"])]
        rows.append(
            [*where, f"**{bound(score)}**", unit(score), str(score["network_calls_per_image"]), _clipping(score)]
        )
        terms.append([*where, *(_number(score.get(key), 4) for key in ("prior", "kl", "decoder"))])
    lines = [
        "## Likelihood",
        markdown_table(("data", "images", "bound ± SE", "unit", "network calls per image", "x_0 estimate"), rows),
        f"{_ERRORS} The bound is the sum of:",
        markdown_table(("data", "images", "L_T (prior)", "Σ L_t (KL)", "L_0 (decoder)"), terms),
    ]
    if baselines:
        named = [[key.replace("_", " "), _number(value)] for key, value in baselines.items()]
        lines += [
            "For comparison, codes that anyone has, on the images of the first row (10 000 at most):",
            markdown_table(("code", "bits/dim"), named),
        ]
    if plotted:
        lines.append("![L_t against t, with bands of one standard error, and the cumulative bound](vlb_terms.png)")
    return "\n\n".join(lines)


def few_steps_section(evaluations: Sequence[Metrics], explained: bool) -> str:
    """The bounds of shorter chains.

    Args:
        evaluations: metrics of `ddpm-vlb evaluate`.
        explained: the two standard errors were explained before.
    """
    if not evaluations:
        return ""
    rows = []
    for own in evaluations:
        where = [str(len(own["timesteps"])), in_words(own["data"]), str(own["num_images"])]
        rows.append([*where, bound(own), unit(own), str(own["network_calls_per_image"]), _clipping(own)])
    header = ("steps", "data", "images", "bound ± SE", "unit", "network calls per image", "x_0 estimate")
    lines = [
        "## Few steps",
        "The bound of the shorter chain that samples in so many steps.",
        markdown_table(header, rows),
    ]
    return "\n\n".join(lines if explained else [*lines, _ERRORS])
