"""`ddpm-vlb sample-quality`: the distances against closed forms, the features by hand, and the script as it is run.

The feature models are tiny and have learned nothing, but for the one that the script trains by itself.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import transformers
from diffusers import UNet2DModel
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from test_data import write_arrays, write_images
from test_evaluate import (  # noqa: F401
    T,
    fresh_accelerate,
    launcher,
    network,
    ours,
    reset_accelerate,
    stock,
    strict_json,
)

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, SquaredErrors, StoredPath
from ddpm_vlb.commands import sample_quality
from ddpm_vlb.evaluation import image_generator
from ddpm_vlb.quality.distances import compare, frechet_distance, kernel_distance, median_distance
from ddpm_vlb.quality.features import FeatureModel, quiet
from ddpm_vlb.scoring.checkpoint import fingerprint_of

ROOT = Path(__file__).parents[2]
TRAIN, TEST, SIZE = 40, 23, 8
CPU = torch.device("cpu")


# The distances


def moments(count, mean, covariance, seed=0):
    """Random features with exactly this sample mean and unbiased sample covariance."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance(dims, seed):
    a = np.random.default_rng(seed).standard_normal((dims, dims))
    return a @ a.T + 0.1 * np.eye(dims)


def gaussian_fd(mean_x, cov_x, mean_y, cov_y):
    """The closed form, with scipy's matrix root."""
    return ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)


@pytest.mark.parametrize("dims, counts", [(1, (5, 9)), (4, (50, 30)), (4, (5, 400)), (7, (8, 9))])
def test_frechet_distance_of_gaussians(dims, counts):
    """Whose means and covariances are known, of any shape: the covariances do not commute."""
    means = np.linspace(-1, 1, dims), np.linspace(2, 0.5, dims)
    covariances = covariance(dims, 1), covariance(dims, 2)
    x, y = (moments(*own) for own in zip(counts, means, covariances))
    expected = gaussian_fd(means[0], covariances[0], means[1], covariances[1])
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count, dims", [(30, 4), (4, 30)])
def test_frechet_distance_of_a_set_to_itself_is_zero(count, dims):
    """In another order too, and with more features than images; moved by one, it is the square of the way."""
    x = np.random.default_rng(0).standard_normal((count, dims))
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(x, x + 1) == pytest.approx(dims, rel=1e-12)


def test_a_count_is_a_repetition():
    """For the Frechet distance; the kernel distance does not pair a feature with its own copies."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((7, 3)) + 1
    v, w = (rng.multinomial(len(z), np.full(len(z), 1 / len(z))).astype(float) for z in (x, y))
    assert 0 in v and v.max() > 1
    copies = [np.repeat(z, counts.astype(int), 0) for z, counts in ((x, v), (y, w))]
    assert frechet_distance(x, y, v, w) == pytest.approx(frechet_distance(*copies), rel=1e-10)
    expected = double_sum(x, y, 1.5, v, w)
    assert kernel_distance(x, y, 1.5, v[None], w[None]) == pytest.approx([expected], rel=1e-10)


def double_sum(x, y, sigma, v, w):
    """1000 MMD^2 term by term."""

    def mean(a, b, s, t, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        k = [np.exp(-((a[i] - b[j]) ** 2).sum() / (2 * sigma**2)) for i, j in pairs]
        return np.average(k, weights=[s[i] * t[j] for i, j in pairs])

    return 1000 * (mean(x, x, v, v, True) + mean(y, y, w, w, True) - 2 * mean(x, y, v, w, False))


def test_kernel_distance_is_the_double_sum(monkeypatch):
    """In one block or in several."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((11, 3)), rng.standard_normal((8, 3)) + 0.5
    expected = pytest.approx([double_sum(x, y, 0.8, np.ones(11), np.ones(8))], rel=1e-10)
    assert kernel_distance(x, y, 0.8) == expected
    monkeypatch.setattr("ddpm_vlb.quality.distances.BLOCK", 3)
    assert kernel_distance(x, y, 0.8) == expected


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kernel_distance_is_unbiased(shift):
    """Its mean over 1000 pairs of small sets is the closed form, zero without a shift, within 4 standard errors."""
    rng, sigma, dims = np.random.default_rng(0), 1.2, 3
    values = np.array(
        [
            kernel_distance(rng.standard_normal((6, dims)), rng.standard_normal((5, dims)) + shift, sigma)[0]
            for _ in range(1000)
        ]
    )
    width = sigma**2 + 2  # E k of two standard normals whose means are `shift` apart in each dimension
    apart = 1 - np.exp(-dims * shift**2 / (2 * width))
    expected = 1000 * 2 * (sigma**2 / width) ** (dims / 2) * apart
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5
    # Pairs of a feature with itself would shift the mean by far more than that.
    assert 1000 * (1 - (sigma**2 / width) ** (dims / 2)) * (1 / 6 + 1 / 5) > 25 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("shift, mmd_ratio", [(1.0, (0.8, 1.25)), (0.0, (1.3, 2.2))])
def test_bootstrap_errors(shift, mmd_ratio):
    """The spread of the distances over 150 fresh pairs of sets; that of MMD is 3^(1/2) too large without a shift."""
    rng = np.random.default_rng(0)
    draws = [
        compare(rng.standard_normal((60, 4)), rng.standard_normal((80, 4)) + shift, 2.0, 50, seed)
        for seed in range(150)
    ]
    values = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
    fd = values["fd_se"].mean() / values["fd"].std()
    assert (0.8 < fd < 1.25) if shift else (0.8 < fd < 2)
    assert mmd_ratio[0] < values["mmd_se"].mean() / values["mmd"].std() < mmd_ratio[1]
    # The FD is too large, and by what the bootstrap says.
    bias = values["fd"].mean() - 4 * shift**2
    assert bias > 0 and values["fd_bias"].mean() == pytest.approx(bias, rel=0.5)


def test_compare_depends_on_its_seed_alone():
    """The distances not even on that."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 2)), rng.standard_normal((8, 2))
    first, again, other = (compare(x, y, 1.0, 10, seed) for seed in (0, 0, 1))
    assert first == again and first["fd_se"] != other["fd_se"] and first["fd"] == other["fd"]
    assert (first["num_samples"], first["num_images"]) == (9, 8)


def test_median_distance():
    """Of all pairs; features that are all the same are refused."""
    x = np.random.default_rng(0).standard_normal((20, 3))
    assert median_distance(x) == np.median(pdist(x))
    with pytest.raises(ValueError, match="equal"):
        median_distance(np.ones((20, 3)))


# Features

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def feature_models():
    """Tiny models by name, with random weights, and how each one's features are found by hand."""
    vit = {**TINY, "image_size": 8, "patch_size": 4}
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vit, projection_dim=12)
    dino = {name: value for name, value in vit.items() if name != "intermediate_size"}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}

    def cls(model, pixels):
        return getattr(model, "vit", model)(pixels).last_hidden_state[:, 0]

    def pooled(model, pixels):
        return model(pixels).pooler_output.flatten(1)

    def embeds(model, pixels):
        vision = model.vision_model(pixels) if hasattr(model, "vision_model") else model(pixels)
        embedded = vision.image_embeds if "image_embeds" in vision else model.visual_projection(vision.pooler_output)
        return embedded / embedded.norm(dim=1, keepdim=True)

    return {
        "dinov2": (transformers.Dinov2Model(transformers.Dinov2Config(**dino, mlp_ratio=1)), cls),
        "vit": (transformers.ViTModel(transformers.ViTConfig(**vit)), pooled),
        "classifier": (transformers.ViTForImageClassification(transformers.ViTConfig(**vit)), cls),
        "grey": (transformers.ViTModel(transformers.ViTConfig(**vit, num_channels=1)), pooled),
        "resnet": (transformers.ResNetModel(transformers.ResNetConfig(**resnet)), pooled),
        "clip": (transformers.CLIPModel(clip), embeds),
        "clip vision": (transformers.CLIPVisionModel(clip.vision_config), pooled),
        "clip projected": (transformers.CLIPVisionModelWithProjection(clip.vision_config), embeds),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sample_quality")


@pytest.fixture(scope="module")
def viewers(home):
    """Saved feature models: their folders, and (model, features by hand)."""
    torch.manual_seed(0)
    models, folders = feature_models(), {}
    for name, (model, _) in models.items():
        folders[name] = home / "viewers" / name
        channels = 1 if name == "grey" else 3
        with quiet():
            model.eval().requires_grad_(False).save_pretrained(folders[name])
            size = {"height": SIZE, "width": SIZE}
            processor = transformers.ViTImageProcessor(
                size=size, image_mean=[0.4] * channels, image_std=[0.2] * channels
            )
            processor.save_pretrained(folders[name])
    return folders, models


def some_images(channels, count=6):
    return torch.randint(256, (count, channels, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["dinov2", "vit", "classifier", "resnet", "clip", "clip vision", "clip projected"])
def test_features_of_any_vision_model(viewers, name, channels):
    """Those of the model itself on normalised pixels; grey images are repeated to three channels."""
    folders, models = viewers
    images = some_images(channels)
    features = FeatureModel(str(folders[name]), CPU)
    model, by_hand = models[name]
    expected = by_hand(model, ((images.float() / 255 - 0.4) / 0.2).expand(-1, 3, -1, -1))
    torch.testing.assert_close(features(images), expected.double(), rtol=1e-5, atol=1e-5)
    assert features(images).std(0).max() > 1e-4 and features.sigma == (
        10.0 if name in ("clip", "clip projected") else None
    )


def test_a_feature_model_of_grey_images(viewers):
    """Takes them as they are, and no others."""
    folders, models = viewers
    features = FeatureModel(str(folders["grey"]), CPU)
    expected = models["grey"][0]((some_images(1).float() / 255 - 0.4) / 0.2).pooler_output
    torch.testing.assert_close(features(some_images(1)), expected.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="grey.*colour"):
        features(some_images(3))


@pytest.mark.parametrize("name", ["grey", "dinov2"])
def test_grey_images_are_resized_too(viewers, name):
    """As one that is twice the model's size shows: the features are those of its half."""
    images = some_images(1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    half = [PIL.Image.fromarray(image[0].numpy()).resize((SIZE, SIZE), 2) for image in images]
    features = FeatureModel(str(viewers[0][name]), CPU)
    small = torch.from_numpy(np.stack([np.asarray(picture) for picture in half]))[:, None]
    torch.testing.assert_close(features(images), features(small), rtol=1e-5, atol=1e-5)


def test_images_are_resized_as_the_processor_says(home, viewers):
    """As PIL does it, here to the model's size from twice that."""
    folders, models = viewers
    images = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    pictures = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIZE, SIZE), 2) for image in images]
    small = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    features = FeatureModel(str(folders["dinov2"]), CPU)
    torch.testing.assert_close(features(images), features(small), rtol=1e-5, atol=1e-5)


# The script


@pytest.fixture(scope="module")
def models(home):
    """Pipelines that have learned nothing."""
    folder = home / "models"
    return {
        "grey": stock(folder / "grey"),
        "colour": stock(folder / "colour", 3, 6, variance_type="learned_range"),
        "classes": ours(folder / "classes", network(1, 1, num_class_embeds=5)),
        "latents": ours(folder / "latents", network(4, 4, 4), levels=None, clip_sample=False),
        "digits": ours(folder / "digits", network(), levels=17),
    }


@pytest.fixture(scope="module")
def sets(home):
    """The options that name data sets, and the labels of the labelled one."""
    counts = {"train": TRAIN, "test": TEST}
    labels = {split: np.random.default_rng(7).integers(0, 5, count).tolist() for split, count in counts.items()}
    folders = {
        "grey": write_images(home / "grey", counts)[0],
        "colour": write_images(home / "colour", counts, (8, 8, 3))[0],
        "labelled": write_images(home / "labelled", counts, labels=labels)[0],
        "latents": write_arrays(home / "latents", {"train": np.zeros((4, 4, 4, 4)), "test": np.zeros((4, 4, 4, 4))}),
        "one": write_images(home / "one", {"train": 5, "test": 1})[0],
    }
    cache = ["--cache_dir", str(home / "cache")]
    return {name: ["--dataset_name", folder, *cache] for name, folder in folders.items()} | {"labels": labels}


def run(*options):
    """Run in this process, on the CPU; returns what is in sample_quality.json."""
    reset_accelerate()
    return sample_quality.main(["--cpu", *map(str, options)])


FEW = "--steps 2 4 --num_bootstrap 20".split()


@pytest.fixture
def go(models, sets, viewers, tmp_path):
    """Compare a model with a data set into the test's own folder `run`."""

    def compared(model, data, *more, viewer="dinov2"):
        chosen = [] if viewer is None else ["--feature_model", viewers[0].get(viewer, viewer)]
        where = ("--model", models.get(model, model), *sets.get(data, []), "--output_dir", tmp_path / "run")
        return run(*where, *chosen, *FEW, *more)

    return compared


NUMBERS = ("fd", "fd_se", "fd_bias", "mmd", "mmd_se")


def numbers(content):
    return [row[name] for row in (content["baseline"], *content["results"]) for name in NUMBERS]


def test_every_option_has_a_help_text():
    """And the help renders, with all of them in it."""
    parser = sample_quality.build_parser()
    page = parser.format_help()
    for action in parser._actions:
        assert action.help and action.option_strings[0] in page


def test_what_a_run_leaves_behind(go, tmp_path, capsys):
    """Its file, its pictures and its table; the samples are as many as the test images."""
    content = go("grey", "grey")
    assert strict_json(tmp_path / "run" / "sample_quality.json") == json.loads(json.dumps(content))
    names = ["sample_quality.json", "sample_quality.png", "samples-2-default.png", "samples-4-default.png"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    for name in names[1:]:
        assert min(PIL.Image.open(tmp_path / "run" / name).size) > 300
    assert [(row["steps"], row["spacing"]) for row in content["results"]] == [(2, "default"), (4, "default")]
    for row in (content["baseline"], *content["results"]):
        assert row["num_samples"] == row["num_images"] == TEST and np.isfinite(numbers(content)).all()
    assert content["baseline"]["split"] == "train" and content["feature_model"]["num_features"] == 16
    out = capsys.readouterr().out
    assert re.search(r"^ +2 +default +\d", out, re.M) and re.search(r"train images +\d", out)


def test_the_numbers_are_those_of_the_pictures(go, models, sets, viewers, tmp_path):
    """Samples drawn by hand one by one, on the data's levels, and the test images, through the feature model."""
    content = go("digits", None)
    pipeline = DDPMVLBPipeline.from_pretrained(models["digits"])
    pipeline.set_progress_bar_config(disable=True)
    count = content["results"][0]["num_samples"]
    chosen = [image_generator(0, position) for position in range(count)]
    images = torch.cat([pipeline(1, generator=[g], num_inference_steps=2, output_type="pt").images for g in chosen])
    args = sample_quality.build_parser().parse_args(["--model", str(models["digits"])])
    test = sample_quality.load_part(args, pipeline, "test", False, 1000)
    assert count == len(test.images) == 297 and set(test.images.unique().tolist()) == {
        round(k * 255 / 16) for k in range(17)
    }
    features = FeatureModel(str(viewers[0]["dinov2"]), CPU)
    x, y = (features(part).numpy() for part in ((images * 16).round().mul(255 / 16).round().byte(), test.images))
    assert content["results"][0]["fd"] == pytest.approx(frechet_distance(x, y), rel=1e-3)
    sigma = content["kernel"]["sigma"]
    assert sigma == pytest.approx(median_distance(y)) and content["kernel"]["median"]
    assert content["results"][0]["mmd"] == pytest.approx(kernel_distance(x, y, sigma)[0], rel=1e-3)


@pytest.mark.parametrize("model, data, viewer", [("colour", "colour", "clip"), ("grey", "grey", "resnet")])
def test_batches_do_not_matter(go, model, data, viewer):
    """A sample depends on its position alone."""
    all_at_once, few = (go(model, data, "--eval_batch_size", size, viewer=viewer) for size in (64, 5))
    assert numbers(few) == pytest.approx(numbers(all_at_once), rel=1e-4, abs=1e-3)
    other = go(model, data, "--seed", 1, viewer=viewer)
    assert numbers(other) != pytest.approx(numbers(all_at_once), rel=1e-2, abs=1e-2)


def test_classes_are_those_of_the_test_images(monkeypatch, go, sets):
    """In turn, for more samples than test images too."""
    told, forward = [], UNet2DModel.forward

    def record(self, sample, timestep, class_labels=None, **options):
        told.extend(class_labels.tolist())
        return forward(self, sample, timestep, class_labels, **options)

    monkeypatch.setattr(UNet2DModel, "forward", record)
    content = go("classes", "labelled", "--num_samples", 30, "--steps", 1)
    assert len(told) == content["results"][0]["num_samples"] == 30
    assert sorted(told[:TEST]) == sorted(sets["labels"]["test"]) and told[TEST:] == told[: 30 - TEST]


def test_spacings(go, tmp_path):
    """Each one gives a row and a picture for each number of steps."""
    content = go("grey", "grey", "--timestep_spacing", "leading", "trailing")
    rows = [(row["spacing"], row["steps"]) for row in content["results"]]
    assert rows == [("leading", 2), ("leading", 4), ("trailing", 2), ("trailing", 4)]
    assert content["results"][0]["fd"] != content["results"][2]["fd"]
    assert (tmp_path / "run" / "samples-4-trailing.png").is_file()


@pytest.fixture
def few_steps(models, tmp_path):
    """A checkpoint with the errors that optimal variances come from, and a table of optimal paths beside it."""
    folder = tmp_path / "few"
    pipeline = DDPMVLBPipeline.from_pretrained(models["grey"])
    steps = torch.tensor([0, T - 1])
    errors = SquaredErrors(steps, torch.tensor([0.1, 0.9], dtype=torch.float64), torch.rand(2, 1, 8, 8) + 0.1)
    pipeline.scheduler.store_few_steps([StoredPath((T - 1, 5)), StoredPath((T - 1, 14, 6, 1))], errors)
    pipeline.save_pretrained(folder)
    paths = {"fixed_small": [[19, 3], [19, 8, 3, 0]], "per_pixel": [[19, 7], [19, 9, 4, 2]]}
    rows = [
        {"path": "optimal", "variance": name, "timesteps": path, "decoder_shift": 0.1}
        for name, own in paths.items()
        for path in own
    ]
    weights = fingerprint_of(pipeline.unet)
    (folder / "few_steps.json").write_text(json.dumps({"rows": rows, "model": {"weights_sha256": weights}}))
    return folder, paths


def test_variances(monkeypatch, go, few_steps, tmp_path):
    """Each variance is that of every chain, and the optimal paths are those that were found for it."""
    folder, paths = few_steps
    walked = []

    def record(self, *args, **options):
        original(self, *args, **options)
        walked.append(
            (tuple(self.timesteps.tolist()), self.reverse_process(num_inference_steps=2).x_0_mse is not None)
        )

    original = DDPMVLBScheduler.set_timesteps
    monkeypatch.setattr(DDPMVLBScheduler, "set_timesteps", record)
    variances = ("network", "stored", "per_pixel")
    content = go(folder, "grey", "--timestep_spacing", "optimal", "leading", "--variance", *variances)
    even, kept = [[10, 0], [15, 10, 5, 0]], [[T - 1, 5], [T - 1, 14, 6, 1]]
    expected = [*paths["fixed_small"], *even, *kept, *even, *paths["per_pixel"], *even]
    assert [row["timesteps"] for row in content["results"]] == expected
    chains = {(steps, own) for steps, own in walked}
    assert {own for steps, own in chains if list(steps) in paths["per_pixel"]} == {True}
    assert {own for steps, own in chains if list(steps) in paths["fixed_small"] + kept} == {False}
    rows = [(row["variance"], row["spacing"]) for row in content["results"][::2]]
    assert rows == [(variance, spacing) for variance in variances for spacing in ("optimal", "leading")]
    assert (tmp_path / "run" / "samples-2-optimal-per_pixel.png").is_file()


def test_variances_that_are_not_there(go, few_steps):
    """Optimal variances of a checkpoint without errors, and paths that no table has."""
    with pytest.raises(SystemExit, match="'analytic' needs `x_0_mse`"):
        go("grey", "grey", "--variance", "analytic")
    folder, _ = few_steps
    with pytest.raises(SystemExit, match="No path of 2 steps is stored"):
        go(folder, "grey", "--variance", "analytic", "--timestep_spacing", "optimal")
    with pytest.raises(SystemExit, match="No path of 7 steps is stored"):
        go(folder, "grey", "--timestep_spacing", "leading", "optimal", "--steps", 2, 7)
    table = json.loads((folder / "few_steps.json").read_text())
    (folder / "few_steps.json").write_text(json.dumps(table | {"model": {"weights_sha256": "another"}}))
    with pytest.raises(SystemExit, match="few_steps.json is of other weights"):
        go(folder, "grey", "--variance", "network")


def test_the_small_feature_model(go, tmp_path, capsys):
    """It tells the digits apart, stays for the next run, and is trained anew on other images."""
    first = go("digits", None, "--num_samples", 100, viewer=None)
    saved = tmp_path / "run" / "feature_model" / "model.safetensors"
    assert first["feature_model"]["training"]["test_accuracy"] > 0.95
    assert re.search(r"names 9\d\.\d% of other images rightly", capsys.readouterr().out)
    # A trained eye sees the noise of a network that has learned nothing, and nothing amiss in training images.
    assert first["results"][0]["mmd"] > 5 * first["results"][0]["mmd_se"]
    assert abs(first["baseline"]["mmd"]) < 4 * first["baseline"]["mmd_se"]
    written = saved.stat().st_mtime_ns
    again, fewer = (go("digits", None, "--num_samples", count, viewer=None) for count in (100, 9))
    assert saved.stat().st_mtime_ns == written and numbers(again) == numbers(first)
    assert fewer["feature_model"]["weights_sha256"] == first["feature_model"]["weights_sha256"]


def test_another_data_set_trains_another_feature_model(monkeypatch, go, tmp_path):
    """Into the same folder."""
    monkeypatch.setattr("ddpm_vlb.quality.features.TRAIN_STEPS", 2)
    go("classes", "labelled", viewer=None)
    record = tmp_path / "run" / "feature_model" / "training.json"
    before = strict_json(record)
    assert before["num_labels"] == 5 and before["num_images"] == TRAIN
    content = go("digits", None, "--num_samples", 9, viewer=None)
    assert strict_json(record)["fingerprint"] != before["fingerprint"]
    assert content["feature_model"]["training"]["num_labels"] == 10


def test_too_few_images_for_the_covariance(go, capsys):
    """Are warned of."""
    go("grey", "grey", "--num_samples", 9)
    assert "9 images are too few for the covariance of 16 features" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes(go, models, sets, viewers, tmp_path):
    """Give the numbers of one, to the last digit for the same batches."""
    alone = go("grey", "grey", "--eval_batch_size", 4)
    options = ["--model", models["grey"], *sets["grey"], "--output_dir", tmp_path / "two", *FEW]
    options += ["--feature_model", viewers[0]["dinov2"], "--eval_batch_size", 4]
    command = [*launcher(2), str(ROOT / "examples" / "sample_quality.py"), *map(str, options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    content = strict_json(tmp_path / "two" / "sample_quality.json")
    assert content["num_processes"] == 2 and numbers(content) == numbers(alone)
    assert done.stdout.count("samples-*.png") == 1


# What is refused

BAD = """
    --steps 0
    --steps
    --steps 2.5
    --num_samples 1
    --num_samples 0
    --num_bootstrap 1
    --eval_batch_size 0
    --seed -1
    --timestep_spacing even
"""


@pytest.mark.parametrize("options", [line.strip() for line in BAD.strip().splitlines()])
def test_bad_options_are_refused(tmp_path, capsys, options):
    """Exit code 2 and the option's name, before anything is loaded or written."""
    with pytest.raises(SystemExit) as stop:
        run("--model", tmp_path / "no", "--output_dir", tmp_path / "run", *options.split())
    assert stop.value.code == 2 and options.split()[0] in capsys.readouterr().err.partition("error: ")[2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, data, viewer, options, pattern",
    [
        ("grey", "grey", None, "", r"no column 'label'.*--label_column.*--feature_model"),
        ("grey", "labelled", None, "--label_column kind", r"no column 'kind'.*--label_column"),
        ("classes", "grey", "dinov2", "", r"class-conditional.*no column 'label'"),
        ("grey", "grey", "dinov2", "--steps 5 21", r"--steps 21 .* 1 \.\. 20"),
        ("grey", "one", "dinov2", "", "'test' has one image"),
        ("grey", "grey", "dinov2", "--split dev", "no split 'dev'"),
        ("latents", "latents", "dinov2", "", r"4 channel\(s\), no levels"),
        ("colour", "colour", "grey", "", "grey images, but these are in colour"),
        ("grey", "grey", "./no/where", "", r"--feature_model \./no/where cannot be loaded"),
        ("nowhere", "grey", "dinov2", "", "--model nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(
    monkeypatch, models, sets, viewers, tmp_path, model, data, viewer, options, pattern
):
    """In one line with the reason, and without a result."""
    message = refusal(
        monkeypatch, models.get(model, model), sets[data], viewers[0].get(viewer, viewer), tmp_path, options
    )
    assert re.search(pattern, message), message


def refusal(monkeypatch, model, data, viewer, tmp_path, options=""):
    """Run the script as a command in this process; returns what it says when it refuses."""
    chosen = [] if viewer is None else ["--feature_model", viewer]
    where = ["--model", model, *data, *chosen, *FEW, "--output_dir", tmp_path / "run", *options.split()]
    monkeypatch.setattr(sys, "argv", ["sample_quality.py", "--cpu", *map(str, where)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples" / "sample_quality.py"), run_name="__main__")
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("ddpm-vlb sample-quality: ") and "\n" not in message.strip()
    assert not (tmp_path / "run" / "sample_quality.json").exists()
    return message


def test_a_feature_model_without_all_its_weights_is_refused(monkeypatch, models, sets, viewers, tmp_path):
    """Its features would be random; so is one that reads text."""
    folder = tmp_path / "torn"
    model = feature_models()["dinov2"][0]
    with quiet():
        model.save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "layernorm.weight" in refusal(monkeypatch, models["grey"], sets["grey"], folder, tmp_path)
    reader = transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=10))
    with quiet():
        reader.save_pretrained(tmp_path / "reader")
    message = refusal(monkeypatch, models["grey"], sets["grey"], tmp_path / "reader", tmp_path)
    assert "cannot be loaded as a vision model" in message
