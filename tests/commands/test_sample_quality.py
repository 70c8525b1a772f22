"""`ddpm-vlb sample-quality` as it is run.

The feature models are tiny and have learned nothing, but for the one that the command trains by itself.
"""

import json
import os
import re
import subprocess

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from processes import reset_accelerate
from scoring_support import ROOT, TEST, TRAIN, T, launcher, refusal_of, strict_json
from vision_models import SIZE, TINY, feature_models, save_feature_models

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, SquaredErrors, StoredPath
from ddpm_vlb.commands import sample_quality
from ddpm_vlb.evaluation import image_generator
from ddpm_vlb.quality.distances import frechet_distance, kernel_distance, median_distance
from ddpm_vlb.quality.features import FeatureModel, quiet
from ddpm_vlb.scoring.checkpoint import fingerprint_of


@pytest.fixture(scope="module")
def viewers(tmp_path_factory):
    """Saved feature models: their folders, and (model, features by hand)."""
    return save_feature_models(tmp_path_factory.mktemp("viewers"))


def run(*options):
    """Run in this process, on the CPU; returns what is in sample_quality.json."""
    reset_accelerate()
    return sample_quality.main(["--cpu", *map(str, options)])


FEW = "--steps 2 4 --num_bootstrap 20".split()


@pytest.fixture
def go(monkeypatch, models, sets, viewers, tmp_path):
    """Compare a model with a data set into the test's own folder `run`; pictures take longer than all else."""

    def compared(model, data, *more, viewer="dinov2", pictures=False):
        if not pictures:
            monkeypatch.setattr(sample_quality, "plot_samples", lambda made, shown, path: path.touch())
            monkeypatch.setattr(sample_quality, "plot", lambda content, path: path.touch())
        chosen = [] if viewer is None else ["--feature_model", viewers[0].get(viewer, viewer)]
        named = () if data is None else sets[data].options
        where = ("--model", models.get(model, model), *named, "--output_dir", tmp_path / "run")
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
    content = go("small", "grey", pictures=True)
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
    assert re.search(r"^ +2 +default \(spacing leading\) +\d", out, re.M) and re.search(r"train images +\d", out)


def test_the_chain_that_was_sampled_is_told(go, models, tmp_path):
    """Of a network of a path that stores none: it has the data's levels."""
    unet = DDPMVLBPipeline.from_pretrained(models["small"]).unet
    DDPMVLBPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    told = go(tmp_path / "flow", "grey")["model"]["gaussian_path"]
    assert (told["steps"], told["stored"], told["kind"]) == (1000, False, "flow matching")
    assert told["ratios"] == pytest.approx([0.8 / 255, 100])


def test_the_numbers_are_those_of_the_pictures(go, models, sets, viewers, tmp_path):
    """Samples drawn by hand, on the data's levels, and the test images, through the feature model."""
    content = go("few levels", None)
    pipeline = DDPMVLBPipeline.from_pretrained(models["few levels"])
    pipeline.set_progress_bar_config(disable=True)
    count = content["results"][0]["num_samples"]
    chosen = [image_generator(0, position) for position in range(count)]
    drawn = [
        pipeline(len(own), generator=own, num_inference_steps=2, output_type="pt").images
        for own in (chosen[:1], chosen[1:100], chosen[100:])
    ]
    images = torch.cat(drawn)
    args = sample_quality.build_parser().parse_args(["--model", str(models["few levels"])])
    test = sample_quality.load_part(args, pipeline, "test", False, 1000)
    assert count == len(test.images) == 297 and set(test.images.unique().tolist()) == {
        round(k * 255 / 16) for k in range(17)
    }
    features = FeatureModel(str(viewers[0]["dinov2"]), torch.device("cpu"))
    x, y = (features(part).numpy() for part in ((images * 16).round().mul(255 / 16).round().byte(), test.images))
    assert content["results"][0]["fd"] == pytest.approx(frechet_distance(x, y), rel=1e-3)
    sigma = content["kernel"]["sigma"]
    assert sigma == pytest.approx(median_distance(y)) and content["kernel"]["median"]
    assert content["results"][0]["mmd"] == pytest.approx(kernel_distance(x, y, sigma)[0], rel=1e-3)


@pytest.mark.parametrize("model, data, viewer", [("colour", "colour", "clip"), ("small", "grey", "resnet")])
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
    assert sorted(told[:TEST]) == sorted(sets["labelled"].labels["test"]) and told[TEST:] == told[: 30 - TEST]


def test_spacings(go, tmp_path):
    """Each one gives a row and a picture for each number of steps."""
    content = go("small", "grey", "--timestep_spacing", "leading", "trailing")
    rows = [(row["spacing"], row["steps"]) for row in content["results"]]
    assert rows == [("leading", 2), ("leading", 4), ("trailing", 2), ("trailing", 4)]
    assert content["results"][0]["fd"] != content["results"][2]["fd"]
    assert (tmp_path / "run" / "samples-4-trailing.png").is_file()


@pytest.fixture
def few_steps(models, tmp_path):
    """A checkpoint with the errors that optimal variances come from, and a table of optimal paths beside it."""
    folder = tmp_path / "few"
    pipeline = DDPMVLBPipeline.from_pretrained(models["small"])
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
        go("small", "grey", "--variance", "analytic")
    folder, _ = few_steps
    with pytest.raises(SystemExit, match="No path of 2 steps is stored"):
        go(folder, "grey", "--variance", "analytic", "--timestep_spacing", "optimal")
    with pytest.raises(SystemExit, match="No path of 7 steps is stored"):
        go(folder, "grey", "--timestep_spacing", "leading", "optimal", "--steps", 2, 7)
    table = json.loads((folder / "few_steps.json").read_text())
    (folder / "few_steps.json").write_text(json.dumps(table | {"model": {"weights_sha256": "another"}}))
    with pytest.raises(SystemExit, match="few_steps.json is of other weights"):
        go(folder, "grey", "--variance", "network")


def test_the_small_feature_model(monkeypatch, go, tmp_path, capsys):
    """It tells the digits apart, after a quarter of its steps already, and stays for the next run."""
    monkeypatch.setattr("ddpm_vlb.quality.features.TRAIN_STEPS", 100)
    first = go("few levels", None, "--num_samples", 100, viewer=None)
    saved = tmp_path / "run" / "feature_model" / "model.safetensors"
    assert first["feature_model"]["training"]["test_accuracy"] > 0.9
    assert re.search(r"names 9\d\.\d% of other images rightly", capsys.readouterr().out)
    # A trained eye sees the noise of a network that has learned nothing, and nothing amiss in training images.
    assert first["results"][0]["mmd"] > 5 * first["results"][0]["mmd_se"]
    assert abs(first["baseline"]["mmd"]) < 4 * first["baseline"]["mmd_se"]
    written = saved.stat().st_mtime_ns
    again, fewer = (go("few levels", None, "--num_samples", count, viewer=None) for count in (100, 9))
    assert saved.stat().st_mtime_ns == written and numbers(again) == numbers(first)
    assert fewer["feature_model"]["weights_sha256"] == first["feature_model"]["weights_sha256"]


@pytest.mark.slow
def test_the_small_feature_model_with_all_its_steps(go):
    """It tells the digits apart by far more than the noise of a network that has learned nothing."""
    content = go("few levels", None, "--num_samples", 100, viewer=None)
    assert content["feature_model"]["training"]["test_accuracy"] > 0.95
    assert content["results"][0]["mmd"] > 5 * content["results"][0]["mmd_se"]
    assert abs(content["baseline"]["mmd"]) < 4 * content["baseline"]["mmd_se"]


def test_another_data_set_trains_another_feature_model(monkeypatch, go, tmp_path):
    """Into the same folder."""
    monkeypatch.setattr("ddpm_vlb.quality.features.TRAIN_STEPS", 2)
    go("classes", "labelled", viewer=None)
    record = tmp_path / "run" / "feature_model" / "training.json"
    before = strict_json(record)
    assert before["num_labels"] == 5 and before["num_images"] == TRAIN
    content = go("few levels", None, "--num_samples", 9, viewer=None)
    assert strict_json(record)["fingerprint"] != before["fingerprint"]
    assert content["feature_model"]["training"]["num_labels"] == 10


def test_too_few_images_for_the_covariance(go, capsys):
    """Are warned of."""
    go("small", "grey", "--num_samples", 9)
    assert "9 images are too few for the covariance of 16 features" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes(go, models, sets, viewers, tmp_path):
    """Give the numbers of one, to the last digit for the same batches."""
    alone = go("small", "grey", "--eval_batch_size", 4)
    options = ["--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "two", *FEW]
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
        ("small", "grey", None, "", r"no column 'label'.*--label_column.*--feature_model"),
        ("small", "labelled", None, "--label_column kind", r"no column 'kind'.*--label_column"),
        ("classes", "grey", "dinov2", "", r"class-conditional.*no column 'label'"),
        ("small", "grey", "dinov2", "--steps 5 21", r"--steps 21 .* 1 \.\. 20"),
        ("small", "one", "dinov2", "", "'test' has one image"),
        ("small", "grey", "dinov2", "--split dev", "no split 'dev'"),
        ("latents", "latents", "dinov2", "", r"4 channel\(s\), no levels"),
        ("colour", "colour", "grey", "", "grey images, but these are in colour"),
        ("small", "grey", "./no/where", "", r"--feature_model \./no/where cannot be loaded"),
        ("nowhere", "grey", "dinov2", "", "--model nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(
    monkeypatch, models, sets, viewers, tmp_path, model, data, viewer, options, pattern
):
    """In one line with the reason, and without a result."""
    message = refusal(
        monkeypatch, models.get(model, model), sets[data].options, viewers[0].get(viewer, viewer), tmp_path, options
    )
    assert re.search(pattern, message), message


def refusal(monkeypatch, model, data, viewer, tmp_path, options=""):
    """Run the script as a command in this process; returns what it says when it refuses."""
    chosen = [] if viewer is None else ["--feature_model", viewer]
    where = ["--model", model, *data, *chosen, *FEW, "--output_dir", tmp_path / "run", *options.split()]
    message = refusal_of(monkeypatch, "sample_quality.py", *where)
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
    assert "layernorm.weight" in refusal(monkeypatch, models["small"], sets["grey"].options, folder, tmp_path)
    reader = transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=10))
    with quiet():
        reader.save_pretrained(tmp_path / "reader")
    message = refusal(monkeypatch, models["small"], sets["grey"].options, tmp_path / "reader", tmp_path)
    assert "cannot be loaded as a vision model" in message
