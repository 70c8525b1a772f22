"""`ddpm-vlb train` from end to end: what it trains and scores, and what a run leaves behind.

Most runs are of a tiny network, in this process; the slow ones start the command itself.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from hub_server import HubServer
from processes import fresh_accelerate  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_support import (
    check_metrics,
    checkpoint_weights,
    launch,
    launch_two,
    only_train,
    same_weights,
    tiny,
    weights,
)

from ddpm_vlb import DDPMVLBPipeline, estimate_vlb, fit_pilot, pilot_positions
from ddpm_vlb.commands import train
from ddpm_vlb.commands.train_options import parse_args
from ddpm_vlb.runtime.image_data import from_record


def scalars(folder):
    """The last value of each scalar in a run's logs, and the tags of its images."""
    events = EventAccumulator(str(folder / "logs" / "train")).Reload()
    tags = events.Tags()
    return {tag: events.Scalars(tag)[-1] for tag in tags["scalars"]}, tags["images"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder in which a run on the digits, with validation and pictures, has finished, and its metrics."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return folder, tiny(folder, "--max_train_steps 3 --validation_steps 2 --seed 5", pictures=True)


# What a run leaves behind


def test_metrics(base):
    """metrics.json holds the score with its parts and errors, the baselines, and how it came about."""
    folder, metrics = base
    check_metrics(metrics, folder)
    assert metrics["train"]["steps"] == 3 and metrics["train"]["device"] == "cpu"
    assert metrics["versions"]["torch"] == torch.__version__
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob(".write_test"))


def test_saved_options_are_a_config(base, tmp_path):
    """The options in metrics.json, given back as --config, are the options of the run."""
    _, metrics = base
    saved = metrics["options"]
    (tmp_path / "options.json").write_text(json.dumps(saved))
    again = vars(parse_args(["--config", str(tmp_path / "options.json")]))
    assert {name for name in saved if again[name] != saved[name]} == {"config"}


def test_the_report_is_printed(tmp_path, capsys, few):
    """The score with both errors, its parts, the other clipping, and every baseline."""
    metrics = tiny(tmp_path, "--max_train_steps 1", *few)
    out = capsys.readouterr().out
    test = metrics["test"]
    images = f"{test['image_se']:.3f}" if test["image_se"] else "n/a"
    assert f"{test['bits_per_dim']:.3f} +- {test['noise_se']:.3f} (noise) +- {images} (images) bits/dim" in out
    parts = f"L_T {test['prior']:.4f} + sum L_t {test['kl']:.4f} + L_0 {test['decoder']:.4f}"
    assert f"{parts}, x_0_hat clipped, as the checkpoint samples" in out
    assert f"  unclipped: {test['by_clipping']['unclipped']['bits_per_dim']:.3f} +- " in out
    assert all(f"{name:22} {value:.3f}" in out for name, value in metrics["baselines"].items())


@pytest.mark.parametrize("name", ["samples.png", "vlb_terms.png"])
def test_pictures_are_drawn(base, name):
    """Each opens, and both its halves show something."""
    picture = PIL.Image.open(base[0] / name)
    picture.load()
    levels = np.asarray(picture.convert("L"))
    assert min(levels.shape) >= 300
    for half in np.array_split(levels, 2, axis=1):
        # A blank half would be white all over.
        assert (half < 128).mean() > 0.002 and (half > 200).any()


def test_data_record(base):
    """data.json finds the same test images again."""
    folder, metrics = base
    record = json.loads((folder / "data.json").read_text())
    assert record == metrics["data"]
    assert from_record(record).record == record


def test_tensorboard_logs(base):
    """Losses by term and quartile of t, gradient norm, learning rate, speed, validation scores, a grid of samples."""
    values, images = scalars(base[0])
    names = {"loss", "grad_norm", "lr", "validation_bits_per_dim", "validation_se"}
    names |= {"loss_vlb", "loss_kl", "loss_decoder", "loss_q0", "loss_vlb_q0", "images_per_second", "skipped_steps"}
    assert values["skipped_steps"].value == 0 and values["images_per_second"].value > 0
    assert 0 <= values["data_wait_fraction"].value < 1
    assert values["loss_kl"].value + values["loss_decoder"].value == pytest.approx(values["loss"].value, rel=1e-5)
    assert names <= values.keys() and all(math.isfinite(values[name].value) for name in names)
    assert values["loss"].step == 3 and values["validation_se"].step == 2
    assert values["grad_norm"].value > 0 and values["validation_se"].value > 0
    assert any(tag.startswith("samples") for tag in images)


def test_no_logs_without_a_tracker(few_base):
    """--logger none leaves no log folder."""
    folder, metrics = few_base
    assert metrics["options"]["logger"] == "none"
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("loader, kind", [(DiffusionPipeline, DDPMPipeline), (DDPMVLBPipeline, DDPMVLBPipeline)])
def test_the_pipeline_loads_and_samples(base, loader, kind):
    """Stock's loader makes a stock pipeline of it, ours one of ours; both hold the trained weights and sample."""
    folder, _ = base
    pipeline = loader.from_pretrained(folder)
    assert type(pipeline) is kind
    assert isinstance(pipeline.scheduler, DDPMScheduler) == (kind is DDPMPipeline)
    assert same_weights(pipeline.unet.state_dict(), weights(folder))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 8, 8, 1)
    assert 0 <= images.min() < images.max() <= 1


def test_the_saved_pipeline_has_the_saved_score(base):
    """Scored again from what was saved, with the same seed, it comes to the number in metrics.json."""
    folder, metrics = base
    data = from_record(json.loads((folder / "data.json").read_text()))
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    reverse = pipeline.scheduler.reverse_process()
    also = [dataclasses.replace(reverse, clip_sample=False)]
    train_images = torch.stack(data.train.__getitems__(pilot_positions(len(data.train), 64)))
    estimate = estimate_vlb(
        pipeline.unet.eval(),
        reverse,
        [next(data.test.batches(8))],
        fit_pilot(pipeline.unet, reverse, train_images, seed=5, also=also),
        calls_per_image=8,
        seed=5,
        also=also,
    )
    for own, clipping in ((estimate, "clipped"), (estimate.also[0], "unclipped")):
        for name in ("bits_per_dim", "noise_se", "prior", "kl", "decoder"):
            assert getattr(own, name) == pytest.approx(metrics["test"]["by_clipping"][clipping][name], rel=1e-4)


def test_the_score_does_not_depend_on_the_batch_size(few_base, tmp_path, few):
    """--eval_batch_size changes how images are grouped for the network, and how many are sampled."""
    metrics = tiny(tmp_path, "--max_train_steps 3 --eval_batch_size 3", *few)
    for name in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder"):
        assert metrics["test"][name] == pytest.approx(few_base[1]["test"][name], rel=1e-4)


def test_baselines_are_those_of_the_stored_images(few_base, tmp_path, few):
    """--random_flip is for training: the histogram is fitted on images as they are."""
    metrics = tiny(tmp_path, "--max_train_steps 1 --random_flip", *few)
    assert metrics["baselines"] == few_base[1]["baselines"]


def die_after(count):
    """End this process instead of a further change of a name."""
    replace, left = os.replace, iter(range(count))
    os.replace = lambda *args: replace(*args) if next(left, None) is not None else os._exit(0)


def test_a_killed_save_leaves_no_half_of_two_pipelines(tmp_path, few):
    """Killed at any change of names, the folder holds the old one, the new one, or none that loads.

    What was measured of the old one is gone before the new one can be loaded.
    """
    measured = {"metrics.json", "samples.png", "vlb_terms.png", "data.json", "few_steps.json", "few_steps.png"}
    run = only_train(tmp_path / "run", "--max_train_steps 1", *few)
    network = run.averaged_network()
    with torch.no_grad():
        next(network.parameters()).add_(1)
    spacing = run.scheduler.config.timestep_spacing
    run.scheduler.register_to_config(timestep_spacing="trailing")  # a part that differs too
    for name in measured:
        (tmp_path / "run" / name).write_text("{}")
    found = set()
    for count in range(20):
        run.folder = shutil.copytree(tmp_path / "run", tmp_path / f"{count}")
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                die_after(count)
                train.save_pipeline(run, network)
            os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not (run.folder / "model_index.json").exists():
            found.add("none")
            with pytest.raises(OSError):
                DDPMVLBPipeline.from_pretrained(run.folder)
            continue
        loaded = DDPMVLBPipeline.from_pretrained(run.folder)
        parts = same_weights(loaded.unet.state_dict(), network.state_dict()), loaded.scheduler.config.timestep_spacing
        assert parts in ((False, spacing), (True, "trailing"))
        left = {path.name for path in run.folder.iterdir()} & measured
        assert left == (set() if parts[0] else measured)
        found.add("new" if parts[0] else "old")
        if ended:
            break
    assert found == {"old", "none", "new"} and not list(run.folder.glob(".pipeline-*"))


def test_a_power_cut_finds_a_whole_pipeline(tmp_path, few, monkeypatch):
    """All files are on the disk before they have their names, and those before model_index.json has its own."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replaced(source, target):
        done.append(("replace", Path(target).name))
        replace(source, target)

    run = only_train(tmp_path, "--max_train_steps 1", *few)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    train.save_pipeline(run, run.averaged_network())
    first = next(i for i, (event, _) in enumerate(done) if event == "replace")
    written = {path.name for name in ("unet", "scheduler") for path in (tmp_path / name).iterdir()}
    assert {name for _, name in done[:first]} == {*written, "model_index.json", "unet", "scheduler", "new"}
    assert done[-2:] == [("replace", "model_index.json"), ("fsync", tmp_path.name)]
    assert done[-3] == ("fsync", tmp_path.name) and done.count(("fsync", tmp_path.name)) == 3
    moves = [i for i, change in enumerate(done) if change in (("replace", "unet"), ("replace", "scheduler"))]
    assert done[min(moves[2:]) - 1] == ("fsync", tmp_path.name)


# What is trained


OBJECTIVES = {
    "simple": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
    "hybrid": ["learned_range", "learned", "learned_range", "learned"],
    "vlb": ["fixed_small", "fixed_large", "learned", "learned_range"],
}
SAMPLERS = ("uniform", "low_discrepancy", "loss_second_moment", "gaussian")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize(
    "objective, sampler, prediction, variance",
    [
        (objective, sampler, PREDICTIONS[(i + j) % 3], variances[j])
        for i, (objective, variances) in enumerate(OBJECTIVES.items())
        for j, sampler in enumerate(SAMPLERS)
    ],
)
def test_objectives_samplers_and_predictions(tmp_path, few, objective, sampler, prediction, variance):
    """They train, score, and are saved under diffusers' names."""
    metrics = tiny(
        tmp_path,
        f"--max_train_steps 2 --objective {objective} --timestep_sampler {sampler} "
        f"--prediction_type {prediction} --variance_type {variance}",
        *few,
    )
    check_metrics(metrics, tmp_path)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == prediction
    assert config["variance_type"] == ("fixed_large" if variance == "fixed_large_log" else variance)
    assert DDPMVLBPipeline.from_pretrained(tmp_path).unet.config.out_channels == 1 + variance.startswith("learned")
    # Stock knows `learned`, but samples it wrongly.
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ("DDPMVLBPipeline" if variance == "learned" else "DDPMPipeline")


@pytest.mark.parametrize(
    "options",
    [
        "--ddpm_num_steps 1 --ddpm_num_inference_steps 1",
        "--rescale_betas_zero_snr --prediction_type v_prediction",
        "--objective simple --snr_gamma 5",
        "--ddpm_beta_schedule squaredcos_cap_v2 --ddpm_num_steps 100",
        "--attention_levels 1 --dropout 0.1 --layers_per_block 2",
        "--timestep_spacing trailing",
        "--dataloader_num_workers 1",
        "--train_batch_size 400",  # more than there are
    ],
)
def test_other_options_train(tmp_path, few, options):
    """Edge cases of the chain, the network and the loader."""
    pictures = "--ddpm_num_steps 1 " in options  # whose curves are single points
    check_metrics(tiny(tmp_path, f"--max_train_steps 2 {options}", *few, pictures=pictures), tmp_path)


@pytest.mark.parametrize(
    "objective", ["vlb", *(pytest.param(own, marks=pytest.mark.slow) for own in ("hybrid", "simple"))]
)
def test_training_lowers_the_bound(tmp_path, few, objective):
    """Sixty steps are worth far more than the standard errors of the two scores, of what is trained: unclipped."""
    options = f"--objective {objective} --lr_scheduler constant --num_test_images 18"
    both = [tiny(tmp_path / f"{steps}", f"{options} --max_train_steps {steps}", *few)["test"] for steps in (1, 60)]
    before, after = (score["by_clipping"]["unclipped"] for score in both)
    errors = math.hypot(*(score[name] for score in (before, after) for name in ("noise_se", "image_se")))
    assert before["bits_per_dim"] - after["bits_per_dim"] > 5 * errors


def test_the_same_seed_gives_the_same_run(few_base, tmp_path, few):
    """Bit for bit, weights and scores."""
    folder, metrics = few_base
    again = tiny(tmp_path, "--max_train_steps 3", *few)
    assert again["test"] == metrics["test"]
    assert same_weights(weights(tmp_path), weights(folder))


def test_another_seed_gives_another_run(few_base, tmp_path, few):
    """On the same images."""
    folder, metrics = few_base
    other = tiny(tmp_path, "--max_train_steps 3 --seed 1", *few)
    assert other["test"]["bits_per_dim"] != metrics["test"]["bits_per_dim"]
    assert not same_weights(weights(tmp_path), weights(folder))
    assert other["data"] == metrics["data"]


def test_a_network_that_breaks_in_its_last_step_is_not_scored(tmp_path, few):
    """The evaluation names t, and there is no metrics.json."""
    with pytest.raises(SystemExit, match=r"at chain index t=\d+"):
        tiny(tmp_path, "--max_train_steps 1 --learning_rate 1e20 --lr_scheduler constant", *few)
    assert not (tmp_path / "metrics.json").exists()


def write_images(folder, count, sizes, mode):
    """Random images of the given sizes (height, width) in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    bands = {"L": (), "RGB": (3,)}[mode]
    for i in range(count):
        levels = rng.integers(0, 256, (*sizes[i % len(sizes)], *bands), dtype=np.uint8)
        PIL.Image.fromarray(levels).save(folder / f"{i:03d}.png")
    return folder


def test_colour_images_that_are_not_square(tmp_path):
    """A folder of 8 x 12 colour pictures: 256 levels, six output channels, stock samples of the same shape."""
    pictures = write_images(tmp_path / "pictures", 24, [(8, 12)], "RGB")
    options = ("--max_train_steps 2 --logger none --train_data_dir", pictures, "--cache_dir", tmp_path / "cache")
    metrics = tiny(tmp_path / "run", *options, "--num_test_images", 2, "--random_flip", pictures=True)
    assert metrics["baselines"]["uniform"] == 8
    assert metrics["data"]["num_images"] == {"train": 21, "validation": 1, "test": 2}
    assert math.isfinite(metrics["test"]["bits_per_dim"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is DDPMPipeline
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.out_channels) == (3, 6)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (12, 8)
    assert PIL.Image.open(tmp_path / "run" / "samples.png").size[0] > 300


def test_images_of_any_size_with_a_resolution(tmp_path):
    """Grey pictures of several sizes, resized; the record brings them back."""
    pictures = write_images(tmp_path / "pictures", 90, [(9, 13), (8, 8), (20, 11)], "L")
    options = ("--resolution 8 --max_train_steps 2 --logger none --train_data_dir", pictures)
    metrics = tiny(tmp_path / "run", *options, "--cache_dir", tmp_path / "cache")
    check_metrics(metrics, tmp_path / "run")
    assert metrics["data"]["size"] == [8, 8] and metrics["data"]["channels"] == 1
    assert from_record(metrics["data"], str(tmp_path / "cache")).record == metrics["data"]


def test_training_images_are_looked_at_where_data_is_loaded(monkeypatch):
    """Where a fault of one process ends all; later, all would look at them, and each meet it on its own."""
    data = train.load_data(parse_args([]))
    monkeypatch.setattr(type(data.train), "__getitems__", lambda *args: pytest.fail("decoded again"))
    assert len(data.train_fingerprint) == 32 and data.train_fingerprint != data.record["test_fingerprint"]


# As commands


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They finish together, with one report, one score, and a learning rate that counts updates, not processes."""
    options = "--max_train_steps 4 --checkpointing_steps 2 --validation_steps 2 --lr_scheduler constant_with_warmup"
    out = launch_two(tmp_path, f"{options} --lr_warmup_steps 8 --learning_rate 1e-3")
    assert out.count("Test bits/dim") == 1
    assert [path.parent for path in tmp_path.rglob("metrics.json")] == [tmp_path]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    check_metrics(metrics, tmp_path)
    assert metrics["train"]["steps"] == 4
    assert scalars(tmp_path)[0]["lr"].value == pytest.approx(3.75e-4)  # of the fourth step itself
    assert {path.name for path in (tmp_path / "checkpoint-4").glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert not same_weights(checkpoint_weights(tmp_path, 2), checkpoint_weights(tmp_path, 4))


@pytest.mark.slow
def test_two_processes_resume(tmp_path):
    """From a checkpoint in the second epoch on, they end in the same weights, bit for bit."""
    options = "--max_train_steps 6 --checkpointing_steps 4 --train_batch_size 300 --logger none"
    launch_two(tmp_path, options)
    straight = weights(tmp_path)
    assert "Resuming" in launch_two(tmp_path, f"{options} --resume_from_checkpoint latest")
    assert same_weights(weights(tmp_path), straight)


ROUNDS = """
import sys
import torch
from accelerate import PartialState
from ddpm_vlb.commands import train
from ddpm_vlb.training import paths
eigenvalues, finish = paths.covariance_eigenvalues, train.finish

def rounded(x_0):
    return eigenvalues(x_0) * (1 + PartialState().process_index)

def shown(run):
    torch.save(run.sampler.probabilities, run.folder / f"probabilities-{PartialState().process_index}")

paths.covariance_eigenvalues, train.finish = rounded, shown
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_draw_from_the_same_probabilities(tmp_path, few):
    """Also where their machines round differently; here, one would find twice the variances."""
    (tmp_path / "rounds.py").write_text(ROUNDS)
    options = "--max_train_steps 2 --timestep_sampler gaussian"
    launch_two(tmp_path / "run", " ".join([options, *map(str, few)]), script=str(tmp_path / "rounds.py"))
    assert torch.equal(*(torch.load(tmp_path / "run" / f"probabilities-{rank}") for rank in (0, 1)))


@pytest.mark.slow
def test_two_processes_without_data(tmp_path):
    """They end alike, soon, with one message."""
    started = time.monotonic()
    errors = launch_two(tmp_path / "run", f"--train_data_dir {tmp_path / 'nothing'}", code=1)
    assert time.monotonic() - started < 60
    assert errors.count(f"ddpm-vlb train: `--train_data_dir` '{tmp_path / 'nothing'}' is not a folder.") == 1
    assert "Another process" not in errors and 'train.py", line' not in errors


@pytest.mark.slow
def test_two_processes_that_may_not_publish(tmp_path):
    """The main one tells it, and nobody else."""
    with HubServer() as server:
        environment = server.environment(tmp_path / "home", HF_TOKEN="hf_wrong")
        options = "--max_train_steps 2 --push_to_hub --hub_model_id tester/model"
        errors = launch_two(tmp_path / "run", options, code=1, **environment)
    assert errors.count("--hub_model_id tester/model: ") == 1 and 'train.py", line' not in errors


@pytest.mark.slow
def test_the_default_command_learns_the_digits(tmp_path):
    """`accelerate launch examples/train.py`: at most 1.95 test bits/dim, also unclipped, all test images scored."""
    launch([], ["--output_dir", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["num_images"] == 297 and metrics["test"]["clip_sample"] is True
    assert all(own["bits_per_dim"] <= 1.95 for own in metrics["test"]["by_clipping"].values())
