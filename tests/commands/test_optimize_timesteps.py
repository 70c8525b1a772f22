"""`ddpm-vlb optimize-timesteps`: its contract, on every kind of checkpoint, and what it leaves when it fails.

Networks that have learned nothing on a chain of 20 steps; the numbers are compared with evaluate.py's, which scores
the stored chain from the saved files with the same draws.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from hub_server import HubServer
from processes import free_port, reset_accelerate
from scoring_support import ROOT, T, run_evaluate, strict_json

from ddpm_vlb import DDPMVLBPipeline, VLBEstimator, spaced_timesteps
from ddpm_vlb.commands import optimize_timesteps
from ddpm_vlb.few_steps import files

FEW = "--num_knots 8 --num_fit_images 40".split()
EVEN = ("leading", "linspace", "trailing", "quadratic")


def optimize(*options):
    """Optimize in this process, on the CPU; returns the content of few_steps.json."""
    reset_accelerate()
    return optimize_timesteps.main(["--cpu", *map(str, options)])


@pytest.fixture(scope="module")
def base(home, models, sets):
    """A finished run with a checkpoint of learned variance, into a folder of its own, and what was before."""
    before = {path: path.read_bytes() for path in Path(models["range"]).rglob("*") if path.is_file()}
    folder = home / "few"
    options = ("--output_dir", folder, "--steps", 1, 3, 6, "--seed", 4, "--num_images", 11)
    result = optimize("--model", models["range"], *sets["grey"].options, *FEW, *options)
    return folder, result, before


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave the picture empty, which takes longer than the scoring."""
    monkeypatch.setattr(files, "plot", lambda rows, path, unit: path.touch())


@pytest.fixture
def optimized(models, sets, tmp_path):
    """Optimize a copy of a checkpoint in place; returns its folder and the result."""

    def done(model="small", data="grey", *options):
        folder = tmp_path / "model"
        shutil.copytree(models[model], folder)
        return folder, optimize("--model", folder, *sets[data].options, *FEW, "--num_images", 6, *options)

    return done


def rows(result, **wanted):
    """The rows with these values."""
    return [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_every_option_has_a_help_text():
    """And the help renders."""
    parser = optimize_timesteps.build_parser()
    page = parser.format_help()
    for action in parser._actions:
        assert action.help and action.help.strip() and action.option_strings[0] in page


def test_the_table(base):
    """A row for each K, path and variance, with the score of every image and its errors, in strict JSON."""
    folder, result, _ = base
    assert strict_json(folder / "few_steps.json") == json.loads(json.dumps(result))
    variances = {"learned_range", "analytic", "per_pixel", "fixed_small", "fixed_large"}
    found = {(row["num_inference_steps"], row["path"], row["variance"]) for row in result["rows"]}
    assert found == {(k, p, v) for k in (1, 3, 6) for p in (*EVEN, "optimal") for v in variances}
    assert len(result["rows"]) == len(found)
    for row in result["rows"]:
        assert len(row["timesteps"]) == row["num_inference_steps"] == row["network_calls_per_image"]
        assert row["num_images"] == 11 and min(row["noise_se"], row["image_se"]) >= 0
        if row["path"] in EVEN:
            assert row["timesteps"] == spaced_timesteps(row["path"], row["num_inference_steps"], T)
        else:
            assert row["timesteps"][0] == T - 1
    for steps in (1, 3, 6):
        assert len(rows(result, num_inference_steps=steps, stored=True)) == 1
    assert {row["variance"] for row in result["all_steps"]} == variances
    assert (folder / "few_steps.png").read_bytes()[:4] == b"\x89PNG"


def test_the_model_stays_as_it_was(base, models):
    """With --output_dir the whole pipeline goes there, and nothing of --model changes."""
    folder, _, before = base
    now = {path: path.read_bytes() for path in Path(models["range"]).rglob("*") if path.is_file()}
    assert now == before
    one, other = (DDPMVLBPipeline.from_pretrained(own).unet.state_dict() for own in (folder, models["range"]))
    assert all(torch.equal(one[name], other[name]) for name in other)


# Each spacing with some number of steps, and each number with some spacing.
@pytest.mark.parametrize(
    "steps, spacing", [(1, None), (3, None), (6, "optimal"), *zip((1, 3, 6, 3), EVEN)], ids=lambda value: str(value)
)
def test_evaluate_scores_exactly_these_chains(base, sets, tmp_path, steps, spacing):
    """evaluate.py on the saved files gives the number of the table, of the stored chain and of any other."""
    folder, result, _ = base
    options = () if spacing is None else ("--timestep_spacing", spacing)
    where = ("--model", folder, "--output_dir", tmp_path, *sets["grey"].options, "--num_images", 11)
    metrics = run_evaluate(*where, "--estimator", "full", "--seed", 5, "--num_inference_steps", steps, *options)
    wanted = {"stored": True} if spacing in (None, "optimal") else {"path": spacing, "variance": "learned_range"}
    (row,) = rows(result, num_inference_steps=steps, **wanted)
    assert metrics["timesteps"][::-1] == row["timesteps"]
    for name in ("bits_per_dim", "image_se", "prior", "kl", "decoder"):
        assert metrics[name] == pytest.approx(row[name], rel=1e-6, abs=1e-9)


def test_the_pipeline_takes_the_stored_chain(base):
    """`num_inference_steps=3` walks the path of the table; 4, which is not stored, the configuration's spacing."""
    folder, result, _ = base
    (row,) = rows(result, num_inference_steps=3, stored=True)
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    pipeline(1, num_inference_steps=3)
    assert pipeline.scheduler.timesteps.tolist() == row["timesteps"]
    pipeline(1, num_inference_steps=4)
    assert pipeline.scheduler.timesteps.tolist() == spaced_timesteps("leading", 4, T)


def test_stock_samples_it_as_before(base, models):
    """DiffusionPipeline of the optimized folder gives the images of the plain one."""
    images = []
    for folder in (base[0], models["range"]):
        stock_pipeline = DiffusionPipeline.from_pretrained(folder)
        assert type(stock_pipeline) is DDPMPipeline
        generator = torch.Generator().manual_seed(0)
        images.append(stock_pipeline(2, generator, num_inference_steps=5, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_the_chosen_path_costs_least_in_training(base):
    """Of the variances that can be stored, by the expected costs of the table; and no even path is much cheaper."""
    _, result, _ = base
    for steps in (1, 3, 6):
        (kept,) = rows(result, num_inference_steps=steps, stored=True)
        storable = [
            row
            for row in rows(result, num_inference_steps=steps, path="optimal")
            if row["variance"] in ("learned_range", "analytic", "per_pixel")
        ]
        assert len(storable) == 3
        assert kept["expected"] <= min(row["expected"] for row in storable) + 2e-3  # a simpler one where it is close
    for steps in (3, 6):
        for variance in ("learned_range", "analytic", "per_pixel", "fixed_small", "fixed_large"):
            (best,) = rows(result, num_inference_steps=steps, variance=variance, path="optimal")
            others = [row for row in rows(result, num_inference_steps=steps, variance=variance) if row is not best]
            slack = 4 * max(row["noise_se"] for row in [best, *others])
            assert best["bits_per_dim"] <= min(row["bits_per_dim"] for row in others) + slack


def test_held_out_images_are_held_out(models, sets, tmp_path, monkeypatch):
    """Paths and variances see training images alone, scores the others; both with noise of their own."""
    fitted, scored = [], []

    def collect(model, reverse, x_0, *args, **options):
        fitted.append(x_0)
        return whole(model, reverse, x_0, *args, **options)

    def score(self, x_0, *args, **options):
        scored.append(x_0)
        return whole_score(self, x_0, *args, **options)

    whole, whole_score = optimize_timesteps.collect_statistics, VLBEstimator.score
    monkeypatch.setattr(optimize_timesteps, "collect_statistics", collect)
    monkeypatch.setattr(VLBEstimator, "score", score)
    where = ("--model", models["small"], "--output_dir", tmp_path / "few", *sets["grey"].options)
    optimize(*where, *FEW, "--steps", 2)

    def levels(images):
        return {tuple(image.flatten().tolist()) for image in ((images + 1) * 127.5).round()}

    assert levels(torch.cat(fitted)) == levels(sets["grey"].train)
    assert levels(torch.cat(scored)) == levels(sets["grey"].test)
    assert not levels(sets["grey"].train) & levels(sets["grey"].test)


def test_differences_are_paired(base, sets, tmp_path, monkeypatch):
    """Against the stored chain and against one variance for all pixels, with the spread of the images' differences."""
    _, result, _ = base
    (kept,) = rows(result, num_inference_steps=3, stored=True)
    assert kept["against_stored"]["difference"] == 0
    for row in rows(result, num_inference_steps=3):
        gap = row["against_stored"]
        assert gap["difference"] == pytest.approx(row["bits_per_dim"] - kept["bits_per_dim"], abs=1e-9)
        assert (row["against_analytic"] is not None) == (row["variance"] == "per_pixel")
    (other,) = rows(result, num_inference_steps=3, path="trailing", variance="fixed_large")
    # No more than the errors of both together, noise and images; a half more, as these are estimates.
    both = sum(math.hypot(row["noise_se"], row["image_se"]) for row in (kept, other))
    assert 0 < other["against_stored"]["se"] < 1.5 * both


def test_a_run_that_was_stopped_goes_on(models, sets, tmp_path, monkeypatch):
    """The scores of its chains are kept: the second run makes fewer calls and ends with the same numbers."""
    where = ("--model", models["small"], *sets["grey"].options, *FEW, "--steps", 2, 3)
    scored, calls, whole = [], [], VLBEstimator.score

    def count(self, x_0, positions, *args, **options):
        calls.append(len(positions) * self.calls_per_image)
        return whole(self, x_0, positions, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(VLBEstimator, "score", count)
        straight = optimize(*where, "--output_dir", tmp_path / "straight")

    def score(self, x_0, positions, *args, **options):
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(len(positions) * self.calls_per_image)
        return whole(self, x_0, positions, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(VLBEstimator, "score", score)
        with pytest.raises(SystemExit, match="130"):
            optimize(*where, "--output_dir", tmp_path / "stopped")
        first, scored[:] = sum(scored), [0] * 6
        again = optimize(*where, "--output_dir", tmp_path / "stopped")
    assert first > 0 and again["rows"] == straight["rows"]
    assert sum(scored[6:]) == sum(calls) - first
    assert not [path for path in (tmp_path / "stopped").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "model, data, more",
    [
        ("small", "grey", "--variance auto"),
        ("large", "grey", "--variance analytic"),
        ("colour", "colour", "--variance per_pixel"),
        ("classes", "labelled", "--reverse_variance per_pixel"),
        ("latents", "latents", "--variance network"),
    ],
)
def test_every_kind_of_checkpoint(optimized, model, data, more):
    """Fixed variances of stock, colour, classes, latents in nats: in place, loadable, and sampled."""
    folder, result = optimized(model, data, "--steps", 2, 4, *more.split())
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    paths = pipeline.scheduler.optimal_paths
    assert sorted(paths) == [2, 4]
    option, variance = more.split()
    if option == "--reverse_variance":
        assert pipeline.scheduler.config.reverse_variance == variance
    elif variance != "auto":
        assert {path.variance for path in paths.values()} == {variance}
    labels = {"class_labels": 1} if model == "classes" else {}
    for steps in (None, 4):
        images = pipeline(2, num_inference_steps=steps, output_type="latent", **labels).images
        assert bool(images.isfinite().all())
    unit = "nats_per_dim" if model == "latents" else "bits_per_dim"
    assert all(isinstance(row[unit], float) for row in result["rows"])
    assert (result["unit"] == "bits/dim") == (model != "latents")


def test_digits_by_default(models, tmp_path):
    """Without a data set: the digits, fitted on their training split and scored on their test split."""
    shutil.copytree(models["few levels"], tmp_path / "model")
    result = optimize("--model", tmp_path / "model", "--steps", 2, *FEW, "--num_images", 4)
    assert result["data"]["levels"] == 17 and result["data"]["split"] == "test" and result["fit_split"] == "train"


def test_what_was_stored_before_is_replaced(optimized, sets):
    """A second run takes the network's own variances again, and leaves no file of the first."""
    folder, first = optimized("small", "grey", "--steps", 2, 4, "--reverse_variance", "per_pixel")
    options = ("--num_images", 6, "--seed", 1, "--steps", 3)
    second = optimize("--model", folder, *sets["grey"].options, *FEW, *options)
    scheduler = DDPMVLBPipeline.from_pretrained(folder).scheduler
    assert list(scheduler.optimal_paths) == [3] and "reverse_variance" not in scheduler.config
    assert [path.name for path in (folder / "scheduler").glob("*.safetensors")] == [scheduler.errors_file]
    assert not list(folder.glob(".scheduler-*"))
    assert second["rows"] != first["rows"]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 21", "--steps 21 must lie in 1 .. 20"),
        ("--steps 2 --num_fit_images 20 --variance per_pixel", "at least 32 training images, but there are 20"),
        ("--steps 2 --num_fit_images 20 --reverse_variance per_pixel", "at least 32 training images"),
        ("--steps 2 --split nothing", "no split 'nothing'"),
        ("--steps 2 --output_dir {model}", "--output_dir is --model"),
        ("--steps 2 --output_dir {used}", "holds something else already (thesis.tex)"),
        ("--steps 2 --output_dir {trained}", "holds something else already (checkpoint-10)"),
        ("--steps 2 --split train", "--split train leaves only 'test'"),
        ("--steps 2 --model nobody", "--model nobody is no folder. If it is a Hub name, say with --output_dir"),
        ("--steps 2 --model nobody --output_dir {new}", "no such folder, and it is no Hub name"),
    ],
)
def test_bad_input_is_refused(models, sets, tmp_path, options, message):
    """Before anything is computed or written."""
    shutil.copytree(models["small"], tmp_path / "model")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    (tmp_path / "trained" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "trained" / "few_steps.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {name: tmp_path / name for name in ("model", "used", "trained", "new")}
    where = ("--model", tmp_path / "model", *sets["grey"].options)
    with pytest.raises(SystemExit, match=re.escape(message)):
        optimize(*where, *FEW, *options.format(**places).split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


BAD_OPTIONS = """
    --steps 0
    --steps -3
    --steps 2.5
    --steps
    --steps 2 --variance best
    --steps 2 --num_knots 1
"""


@pytest.mark.parametrize("options", [line.strip() for line in BAD_OPTIONS.strip().splitlines()])
def test_bad_options_are_refused(capsys, options):
    """By the command line itself, naming the option."""
    with pytest.raises(SystemExit) as stop:
        optimize("--model", "M", *options.split())
    name = options.split()[2] if len(options.split()) > 2 else "--steps"
    assert stop.value.code == 2 and f"argument {name}" in capsys.readouterr().err


def test_few_images_are_said(optimized, capsys):
    """Below the first number no variances of each pixel, below the second a warning."""
    _, result = optimized("small", "grey", "--steps", 2, "--num_fit_images", 20)
    assert "per_pixel" not in {row["variance"] for row in result["rows"]} and result["pseudo_images"] is None
    assert "Only 20 training images: no variances of each pixel below 32" in capsys.readouterr().out


def test_an_earlier_result_may_be_replaced(base, models, sets, tmp_path):
    """When told, the same --output_dir again: the new pipeline, whole, and nothing of the old one beside it."""
    folder = tmp_path / "few"
    shutil.copytree(base[0], folder)
    where = ("--model", models["range"], *sets["grey"].options, *FEW, "--output_dir", folder, "--overwrite_output_dir")
    optimize(*where, "--steps", 2, "--num_images", 4, "--variance", "per_pixel")
    scheduler = DDPMVLBPipeline.from_pretrained(folder).scheduler
    assert list(scheduler.optimal_paths) == [2]
    assert {path.name for path in folder.iterdir()} == {path.name for path in base[0].iterdir()}
    names = {path.name for path in (folder / "scheduler").iterdir()}
    assert names == {"scheduler_config.json", scheduler.config.few_steps_file, scheduler.errors_file}


def test_a_network_that_breaks_leaves_the_model_alone(models, sets, tmp_path, monkeypatch):
    """NaN from the network: the timestep and the image, and nothing written."""
    shutil.copytree(models["small"], tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    forward = optimize_timesteps.Optimization.model
    monkeypatch.setattr(
        optimize_timesteps.Optimization,
        "model",
        lambda self, x_t, t: forward(self, x_t, t) / (t != 19)[:, None, None, None],
    )
    with pytest.raises(SystemExit, match="index t=19, image 0"):
        optimize("--model", tmp_path / "model", *sets["grey"].options, *FEW, "--steps", 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


HUB = """
import sys
import torch
from huggingface_hub import HfApi
from ddpm_vlb import DDPMVLBPipeline
if sys.argv[1] == "up":
    DDPMVLBPipeline.from_pretrained(sys.argv[2]).push_to_hub(sys.argv[3])
    print(sorted(HfApi().list_repo_files(sys.argv[3])))
else:
    pipeline = DDPMVLBPipeline.from_pretrained(sys.argv[2])
    images = pipeline(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    scheduler = pipeline.scheduler
    torch.save([images, scheduler.errors.per_pixel, scheduler.optimal_paths[3].timesteps], sys.argv[3])
"""


@pytest.mark.slow
def test_from_the_hub_and_back(base, models, tmp_path):
    """A Hub model is optimized into a folder; pushed, it gives the same images from the Hub, offline too."""
    with HubServer() as server:
        environment = server.environment(tmp_path / "home", OMP_NUM_THREADS="1")

        def call(*arguments, **more):
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(
                command,
                env={**environment, **more},
                cwd=tmp_path,
                check=True,
                timeout=120,
                capture_output=True,
                text=True,
            ).stdout

        call("-c", HUB, "up", models["range"], "tester/plain")
        script = ROOT / "examples" / "optimize_timesteps.py"
        options = (*FEW, "--num_images", 4, "--steps", 3, "--variance", "per_pixel")
        out = call(script, "--model", "tester/plain", "--output_dir", tmp_path / "few", *options)
        assert "per_pixel" in out and (tmp_path / "few" / "few_steps.json").is_file()
        assert (tmp_path / "few" / "README.md").read_bytes() == server.files("tester/plain")["README.md"]
        pushed = call("-c", HUB, "up", tmp_path / "few", "tester/few")
        assert "x_0_mse-" in pushed
        call("-c", HUB, "down", tmp_path / "few", tmp_path / "folder.pt")
        call("-c", HUB, "down", "tester/few", tmp_path / "hub.pt")
        call("-c", HUB, "down", "tester/few", tmp_path / "offline.pt", HF_HUB_OFFLINE="1")
    folder, *others = (torch.load(tmp_path / f"{name}.pt") for name in ("folder", "hub", "offline"))
    for other in others:
        assert torch.equal(other[1], folder[1]) and other[2] == folder[2]
        torch.testing.assert_close(other[0], folder[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_same(models, sets, tmp_path):
    """The same paths, and the same scores but for the order of sums."""
    results = []
    for processes in (1, 2):
        multi = "--multi_gpu --num_processes 2 --num_machines 1" if processes == 2 else "--num_processes 1"
        launch = f"{multi} --mixed_precision no --dynamo_backend no --main_process_port {free_port()}"
        options = (*FEW, "--num_images", 9, "--steps", 2, 5, "--output_dir", tmp_path / str(processes), "--cpu")
        arguments = ["--model", models["range"], *sets["grey"].options, *options]
        command = ["accelerate", "launch", *launch.split(), ROOT / "examples" / "optimize_timesteps.py", *arguments]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), env=environment, check=True, timeout=300, capture_output=True)
        results.append(json.loads((tmp_path / str(processes) / "few_steps.json").read_text()))
    one, two = results
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert first["timesteps"] == second["timesteps"] and first["stored"] == second["stored"]
        assert first["bits_per_dim"] == pytest.approx(second["bits_per_dim"], rel=1e-9)
