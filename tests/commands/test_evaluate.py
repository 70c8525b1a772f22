"""`ddpm-vlb evaluate`: its options, what a run leaves behind and prints, and several processes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hub_server import HubServer
from scoring_support import (
    BITS,
    FEW,
    ROOT,
    SCORE,
    TEST,
    T,
    by_hand,
    full_by_hand,
    launcher,
    run_evaluate,
    same_numbers,
    strict_json,
)

from ddpm_vlb import VLBEstimator, fit_pilot
from ddpm_vlb.commands import evaluate
from ddpm_vlb.runtime import reporting
from ddpm_vlb.runtime.image_data import load_image_data

# Options


def test_every_option_has_a_help_text():
    """And the help renders, with all of them in it."""
    parser = evaluate.build_parser()
    page = parser.format_help()
    for action in parser._actions:
        assert action.help and action.help.strip(), action.option_strings
        assert action.option_strings[0] in page


def test_the_command_line_of_the_contract():
    """All options have their names, and those that may be left out their defaults."""
    options = "--model M --dataset_name D --split S --num_images 7 --estimator full --seed 5 --output_dir O"
    args = evaluate.parse_args(options.split())
    assert (args.model, args.dataset_name, args.split, args.num_images) == ("M", "D", "S", 7)
    assert (args.estimator, args.seed, args.output_dir) == ("full", 5, "O")
    args = evaluate.parse_args("--model M --tolerance 0.002".split())
    assert (args.dataset_name, args.split, args.num_images, args.tolerance) == (None, "test", None, 0.002)
    assert (args.estimator, args.calls_per_image, args.seed, args.output_dir) == ("importance", 20, 0, None)


BAD = """
    --calls_per_image 1
    --calls_per_image 0
    --calls_per_image 2.5
    --num_images 0
    --tolerance 0
    --tolerance -0.1
    --tolerance nan
    --tolerance 0.1 --estimator full
    --calls_per_image 9 --estimator full
    --pilot_calls 500 --estimator full
    --no-control_variate --estimator full
    --seed -1
    --estimator exact
    --pilot_calls 0
    --eval_batch_size 0
    --resolution 0
    --levels 1
    --levels many
    --num_inference_steps 0
    --num_inference_steps 5 --timesteps 1 2
    --timesteps -1
    --timesteps
    --timestep_spacing trailing
    --timestep_spacing even --num_inference_steps 5
    --mixed_precision fp8
    --calls 8
"""


@pytest.mark.parametrize("options", [line.strip() for line in BAD.strip().splitlines()])
def test_bad_options_are_refused(tmp_path, capsys, options):
    """Exit code 2 and the option's name, before anything is loaded or written."""
    with pytest.raises(SystemExit) as stop:
        run_evaluate("--model", tmp_path / "no", "--output_dir", tmp_path / "run", *options.split())
    message = capsys.readouterr().err.partition("error: ")[2]
    assert stop.value.code == 2 and re.search(rf"{options.split()[0]}\b", message)
    assert "\n" not in message.strip() and not (tmp_path / "run").exists()


def test_a_model_must_be_named(capsys):
    """There is no default."""
    with pytest.raises(SystemExit) as stop:
        run_evaluate()
    assert stop.value.code == 2 and "--model" in capsys.readouterr().err


# What a run leaves behind


def test_metrics(base, models):
    """metrics.json holds the bound, its errors and parts, each image's, L_t, and how they came about."""
    folder, metrics, _ = base
    assert strict_json(folder / "metrics.json") == metrics
    numbers = [metrics[name] for name in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder")]
    assert all(math.isfinite(number) for number in numbers)
    assert metrics["noise_se"] > 0 and metrics["image_se"] >= 0 and metrics["prior"] > 0 and metrics["decoder"] > 0
    assert metrics["prior"] + metrics["kl"] + metrics["decoder"] == pytest.approx(metrics["bits_per_dim"], rel=1e-12)
    assert np.mean(metrics["per_image"]) == pytest.approx(metrics["bits_per_dim"], rel=1e-12)
    assert len(metrics["per_image"]) == metrics["num_images"] == TEST
    assert len(metrics["l_t"]["mean"]) == len(metrics["l_t"]["se"]) == T
    assert metrics["timesteps"] == list(range(T)) and metrics["clip_sample"] is True and metrics["seed"] == 3
    assert metrics["network_calls_per_image"] == 8 and 0 < metrics["pilot_calls"] <= 230
    assert metrics["model"]["name_or_path"] == str(models["small"]) and metrics["unit"] == "bits/dim"
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["device"] == "cpu"
    assert not list(folder.glob("partial-*")) and not list(folder.rglob("*.writing"))


def test_the_terms_are_the_mean_over_the_images(score, models, sets):
    """Of the full loop, L_t is the mean of all images at every step, and its error that of a mean."""
    metrics = score("small", "grey", "--estimator full --num_images 6")
    terms = full_by_hand(models["small"], sets["grey"].test[:6])[1] * BITS / 64
    assert metrics["l_t"]["mean"] == pytest.approx(terms.mean(0), rel=1e-4)
    assert metrics["l_t"]["se"] == pytest.approx(terms.std(0, ddof=1) / 6**0.5, rel=1e-3)


def test_one_image(score, tmp_path):
    """Has no image error: null, not NaN; steps that were not drawn have no L_t."""
    metrics = score("small", "grey", "--num_images 1")
    assert strict_json(tmp_path / "run" / "metrics.json") == metrics
    assert metrics["image_se"] is None and metrics["num_images"] == 1 and metrics["noise_se"] > 0
    assert None in metrics["l_t"]["mean"] and set(metrics["l_t"]["se"]) == {None}


def test_per_image_is_in_the_order_of_the_data(base, models, sets):
    """Each image scored alone, at its position, comes to its value."""
    _, metrics, _ = base
    unet, reverse = by_hand(models["small"])
    also = [by_hand(models["small"], clip=False)[1]]
    pilot = fit_pilot(unet, reverse, sets["grey"].train, 230, 3, also=also)
    scorer = VLBEstimator(unet, reverse, pilot, 8, seed=3, also=also)
    for position in (0, 1, 11, TEST - 1):
        alone = [s.estimate() for s in scorer.score(sets["grey"].test[[position]], [position])]
        assert metrics["per_image"][position] == pytest.approx(alone[0].bits_per_dim, rel=1e-5)
        assert metrics["per_image_other_clipping"][0][position] == pytest.approx(alone[1].bits_per_dim, rel=1e-5)


def test_the_digits_are_the_default(models, tmp_path):
    """Without a data set's name the embedded digits are scored, on their 17 levels."""
    options = ("--estimator", "full", "--num_images", 4, "--output_dir", tmp_path)
    metrics = run_evaluate("--model", models["small"], *options)
    assert metrics["data"]["dataset_name"] is None and metrics["model"]["levels"] == 17
    prior, terms = full_by_hand(models["small"], next(load_image_data().test.batches(4)), 17)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) * BITS / 64, rel=1e-4)


def test_the_default_folder_is_the_model_s(models, tmp_path, monkeypatch):
    """evaluation/ in it, beside nothing that the training left; for a model of the Hub it is runs/."""
    model = shutil.copytree(models["small"], tmp_path / "model")
    run_evaluate("--model", model, *FEW, "--num_images", 2)
    assert (model / "evaluation" / "metrics.json").is_file() and not (model / "metrics.json").exists()
    monkeypatch.chdir(tmp_path)
    assert evaluate.default_folder("user/name") == Path("runs/user--name")


def test_network_calls_are_counted(score, calls, pilots):
    """Those on the scored images, for each of them, and the pilot's, which are other images'."""
    metrics = score()
    ((_, rows),) = pilots
    assert len(rows) == metrics["pilot_calls"] and metrics["second_draw_calls"] == 0
    assert len(calls) - len(rows) == TEST * metrics["network_calls_per_image"] == TEST * 8


def test_both_clippings_come_from_the_same_calls(score, base):
    """Either may come first: the checkpoint's, or as asked for; the numbers are the same."""
    _, metrics, _ = base
    other = score("small", "grey", "--no-clip_sample --seed 3")
    assert metrics["clip_sample"] is True and other["clip_sample"] is False
    assert metrics["bits_per_dim"] != pytest.approx(other["bits_per_dim"], rel=1e-3)
    assert metrics["by_clipping"]["unclipped"]["bits_per_dim"] == pytest.approx(other["bits_per_dim"], rel=1e-9)
    for name in ("clipped", "unclipped"):
        for key, value in metrics["by_clipping"][name].items():
            assert value == pytest.approx(other["by_clipping"][name][key], rel=1e-9)
    assert metrics["per_image"] == pytest.approx(other["per_image_other_clipping"][0], rel=1e-9)


def test_the_report_is_printed(base):
    """The bound with both errors first, its three parts, the other clipping, and the calls that it took."""
    folder, metrics, out = base
    lines = out.strip().splitlines()
    assert SCORE.fullmatch(lines[0]) and lines[0] == reporting.describe(metrics)
    parts = [metrics[name] for name in ("prior", "kl", "decoder")]
    assert "L_T {:.4f} + sum L_t {:.4f} + L_0 {:.4f}".format(*parts) in lines[1] and "x_0_hat clipped" in lines[1]
    (other,) = [line for line in lines if line.strip().startswith("unclipped:")]
    assert SCORE.search(other)[0] == reporting.describe(metrics["by_clipping"]["unclipped"])
    calls = f"8 network calls each (+ {metrics['pilot_calls']} the pilot's)"
    assert f"{TEST} images of {metrics['data']['dataset_name']}, split 'test' (256 levels), {T} steps, {calls}" in out
    assert str(folder) in out


@pytest.mark.parametrize("name", ["vlb_terms.png", "per_image.png"])
def test_pictures_are_drawn(base, name):
    """Each opens, and both its halves show something."""
    picture = PIL.Image.open(base[0] / name)
    picture.load()
    levels = np.asarray(picture.convert("L"))
    assert min(levels.shape) >= 300
    for half in np.array_split(levels, 2, axis=1):
        # A blank half would be white all over.
        assert (half < 190).mean() > 0.005 and (half > 200).any()


def test_the_pictures_show_the_estimate(score, monkeypatch):
    """The curve ends in the bound; the histogram holds every image."""
    figures = []
    monkeypatch.setattr(reporting, "save", lambda figure, path, **options: figures.append(figure))
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, getattr(reporting, name))
    metrics = score("small", "grey", "--estimator full --num_images 6")
    curve, histogram = figures
    assert curve.axes[1].lines[0].get_ydata()[-1] == pytest.approx(metrics["bits_per_dim"], rel=1e-6)
    assert sum(patch.get_height() for patch in histogram.axes[0].patches) == 6


# Several processes and the Hub


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_several_processes(models, sets, straight, tmp_path, processes):
    """Each image once, with the values of one process, though none of the numbers divides the images."""
    options = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "run", *FEW)
    command = [*launcher(processes), str(ROOT / "examples" / "evaluate.py"), *map(str, options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert metrics["num_processes"] == processes and metrics["num_images"] == TEST
    assert metrics["per_image"] == straight["per_image"]
    assert metrics["bits_per_dim"] == pytest.approx(straight["bits_per_dim"], abs=1e-6)
    assert same_numbers(metrics, straight)
    assert len(SCORE.findall(done.stdout)) == 2 and done.stdout.count("metrics.json") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.json",
        "per_image.png",
        "vlb_terms.png",
    ]


@pytest.mark.slow
def test_a_model_and_a_data_set_on_the_hub(models, sets, tmp_path):
    """By their names, over the network, with the real client: the numbers of the same files in folders."""
    upload = """
import sys
from huggingface_hub import HfApi
api = HfApi()
for kind, folder in zip(("model", "dataset"), sys.argv[1:]):
    api.create_repo("tester/" + kind, repo_type=kind)
    api.upload_folder(repo_id="tester/" + kind, folder_path=folder, repo_type=kind)
"""
    local = dict(zip(sets["grey"].options[::2], sets["grey"].options[1::2]))
    folders = [str(models["small"]), str(local["--dataset_name"])]
    with HubServer() as server:
        environment = server.environment(tmp_path / "home", OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, "-c", upload, *folders], env=environment, check=True, timeout=120)
        for name, model, data in (("hub", "tester/model", "tester/dataset"), ("folder", *folders)):
            options = ["--model", model, "--dataset_name", data, *FEW, "--output_dir", str(tmp_path / name)]
            command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), *options]
            subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    hub, folder = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("hub", "folder"))
    assert hub["per_image"] == folder["per_image"] and hub["data"]["fingerprint"] == folder["data"]["fingerprint"]
