"""The numbers of `ddpm-vlb evaluate`: those of plain numpy and of the core, for every kind of checkpoint and chain."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from scoring_support import (
    BITS,
    FEW,
    TEST,
    TRAIN,
    T,
    by_hand,
    estimate_by_hand,
    full_by_hand,
    run_evaluate,
    stock,
    strict_json,
    write_arrays,
    write_images,
    x_0_of,
)

from ddpm_vlb import DDPMVLBPipeline, VLBEstimator, fit_pilot, pilot_positions
from ddpm_vlb.commands import evaluate
from ddpm_vlb.runtime import reporting
from ddpm_vlb.scoring.checkpoint import fingerprint_of

# Stock checkpoints


@pytest.mark.parametrize(
    "model, data", [("small", "grey"), ("large", "grey"), ("range", "grey"), ("colour", "colour")], ids=str
)
def test_stock_checkpoints(score, models, sets, model, data):
    """Saved by plain diffusers, they are scored as `estimate_vlb` does it with what stock loads."""
    assert json.loads((models[model] / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    metrics, hand = score(model, data), estimate_by_hand(models[model], sets[data])
    assert metrics["clip_sample"] is (model != "large")
    assert metrics["per_image"] == pytest.approx(hand.per_image.tolist(), rel=1e-5)
    assert metrics["per_image_other_clipping"][0] == pytest.approx(hand.also[0].per_image.tolist(), rel=1e-5)
    for name in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder"):
        assert metrics[name] == pytest.approx(getattr(hand, name), rel=1e-5, abs=1e-7)
    stock_unet = DDPMPipeline.from_pretrained(models[model]).unet
    assert fingerprint_of(stock_unet) == metrics["model"]["weights_sha256"]


@pytest.mark.parametrize(
    "model, data", [("small", "grey"), ("large", "grey"), ("range", "grey"), ("colour", "colour")], ids=str
)
def test_the_full_loop_is_the_bound(score, calls, models, sets, model, data):
    """T calls for each image, and each image's value is that of plain numpy in float64 with the same noise."""
    metrics = score(model, data, "--estimator full --num_images 3")
    assert metrics["network_calls_per_image"] == T and metrics["pilot_calls"] == 0
    assert metrics["second_draw_calls"] == 3 * T and len(calls) == 6 * T
    x_0 = sets[data].test[:3]
    dims = x_0[0].numel()
    for clip, name in (
        (metrics["clip_sample"], "per_image"),
        (not metrics["clip_sample"], "per_image_other_clipping"),
    ):
        prior, terms = full_by_hand(models[model], x_0, clip=clip)
        found = metrics[name] if name == "per_image" else metrics[name][0]
        assert found == pytest.approx((prior + terms.sum(1)) * BITS / dims, rel=1e-4)


def test_the_full_loop_s_error_is_that_of_a_second_draw(score, models, sets):
    """Half the mean squared gap between two draws of an image is its noise variance; the mean has 1/N of it."""
    metrics = score("small", "grey", "--estimator full --num_images 4")
    first, second = (full_by_hand(models["small"], sets["grey"].test[:4], sweep=sweep)[1].sum(1) for sweep in (0, 1))
    variance = np.mean((first - second) ** 2 / 2) * (BITS / 64) ** 2
    assert metrics["noise_se"] == pytest.approx((variance / 4) ** 0.5, rel=1e-3)


def test_64_images_are_drawn_twice(models, tmp_path, home, calls, scored):
    """Spread over the data, not its first ones; of fewer images all are."""
    folder, _ = write_images(tmp_path / "set", {"train": 5, "test": 130})
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    metrics = run_evaluate("--model", models["small"], *options, "--estimator", "full", "--timesteps", 0, 9, 19)
    assert metrics["network_calls_per_image"] == 3 and metrics["second_draw_calls"] == 64 * 3
    assert len(calls) == (130 + 64) * 3
    assert [position for sweep, position, _ in scored if sweep == 0] == list(range(130))
    twice = [position for sweep, position, _ in scored if sweep == 1]
    assert len(set(twice)) == 64 and twice == sorted(twice)
    assert np.diff([0, *twice, 130]).max() <= 4


# Shorter chains


CHAINS = {
    "--num_inference_steps 5": ("leading", 5),
    "--num_inference_steps 5 --timestep_spacing leading": ("leading", 5),
    "--num_inference_steps 6 --timestep_spacing linspace": ("linspace", 6),
    "--num_inference_steps 3 --timestep_spacing trailing": ("trailing", 3),
    "--num_inference_steps 20": ("leading", 20),
    "--timesteps 17 3 9": [3, 9, 17],
    "--timesteps 7": [7],
}


@pytest.mark.parametrize("options", CHAINS)
def test_shorter_chains(score, calls, models, sets, options):
    """Exactly the chain that stock would sample is scored: its timesteps are told, and the bound is that of the chain.

    The bound of the respaced chain is that of plain numpy.
    """
    steps = CHAINS[options]
    if isinstance(steps, tuple):
        scheduler = DDPMScheduler(num_train_timesteps=T, timestep_spacing=steps[0])
        scheduler.set_timesteps(steps[1])
        steps = scheduler.timesteps.tolist()[::-1]
    metrics = score("small", "grey", f"{options} --estimator full --num_images 2")
    assert metrics["timesteps"] == steps and len(metrics["l_t"]["mean"]) == len(steps)
    assert sorted({told for _, told, _ in calls}) == steps
    assert metrics["network_calls_per_image"] == len(steps)
    prior, terms = full_by_hand(models["small"], sets["grey"].test[:2], timesteps=steps)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) * BITS / 64, rel=1e-4)


def test_a_shorter_chain_with_few_calls(score, calls, models, sets):
    """The pilot and the scores are of that chain: as by hand with `reverse_process(timesteps=...)`."""
    steps = [1, 3, 4, 6, 9, 11, 12, 15, 19]  # more than the calls
    metrics = score("range", "grey", "--timesteps 19 15 12 11 9 6 4 3 1")
    assert {told for _, told, _ in calls} == set(steps) and metrics["timesteps"] == steps
    reverse = DDPMVLBPipeline.from_pretrained(models["range"]).scheduler.reverse_process(timesteps=steps)
    hand = estimate_by_hand(models["range"], sets["grey"], timesteps=steps)
    assert torch.equal(reverse.forward.betas, by_hand(models["range"], timesteps=steps)[1].forward.betas)
    assert metrics["per_image"] == pytest.approx(hand.per_image.tolist(), rel=1e-5)


@pytest.mark.parametrize("steps", [[5, 19], [0, 2, 4, 6, 8, 10, 12, 19]])
def test_a_chain_of_no_more_steps_than_calls_is_walked(models, sets, capsys, tmp_path, steps):
    """Every step once, none drawn: the bound by plain numpy, and the report and metrics.json say so."""
    options = ("--num_images", 2, "--output_dir", tmp_path, "--timesteps", *steps)
    metrics = run_evaluate("--model", models["small"], *sets["grey"].options, *options)
    prior, terms = full_by_hand(models["small"], sets["grey"].test[:2], timesteps=steps)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) * BITS / 64, rel=1e-4)
    assert (metrics["estimator"], metrics["network_calls_per_image"]) == ("full", len(steps))
    assert "Every step was taken once, not drawn" in capsys.readouterr().out


# Class-conditional networks


def nearest(x_t, images):
    """The image of which x_t of an early step is a noisy version."""
    return int((images - x_t).flatten(1).square().sum(1).argmin())


def test_labels_reach_their_images(score, calls, pilots, sets):
    """Whatever the step and the batch, each row of the network's input comes with its own image's label."""
    score("classes", "labelled")
    ((_, pilot_rows),) = pilots
    data, early = sets["labelled"], 0
    for i, (x_t, told, label) in enumerate(calls):
        split = "train" if i in pilot_rows else "test"
        assert label is not None
        if told < 5:
            early += 1
            assert label == data.labels[split][nearest(x_t, getattr(data, split))]
    assert early > 100


def test_labels_matter(score, models, sets, tmp_path):
    """A class-conditional network is scored as by hand, and with other labels it scores otherwise."""
    labels = {split: torch.tensor(own) for split, own in sets["labelled"].labels.items()}
    metrics = score("classes", "labelled")
    hand = estimate_by_hand(models["classes"], sets["labelled"], conditioning=labels)
    assert metrics["per_image"] == pytest.approx(hand.per_image.tolist(), rel=1e-5)
    assert metrics["data"]["label_column"] == "label"
    permuted = {"train": labels["train"].tolist(), "test": labels["test"].flip(0).tolist()}
    folder, _ = write_images(tmp_path / "set", {"train": TRAIN, "test": TEST}, labels=permuted)
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "other")
    other = run_evaluate("--model", models["classes"], *options, *FEW)
    changed = [a != b for a, b in zip(permuted["test"], labels["test"].tolist())]
    assert any(changed) and not all(changed)
    for a, b, differs in zip(metrics["per_image"], other["per_image"], changed):
        assert (a != pytest.approx(b, rel=1e-6)) == differs


def test_changed_labels_are_scored_anew(models, tmp_path, calls):
    """In the same files under the same name: neither the result nor partial results of the old labels are reused."""
    labels = {"train": [0, 1, 2, 3], "test": [3, 1, 4, 0]}
    counts = {"train": 4, "test": 4}
    results = []
    for own in (labels, {**labels, "test": [0, 4, 1, 3]}):
        folder, _ = write_images(tmp_path / "set", counts, labels=own)
        options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
        calls.clear()
        results.append(run_evaluate("--model", models["classes"], *options, *FEW))
        assert calls
    assert results[0]["bits_per_dim"] != results[1]["bits_per_dim"]


# Continuous data


def test_latents_are_scored_in_nats(score, models, sets, tmp_path, capsys, monkeypatch):
    """A density has no bits: `bits_per_dim` is null, the value is nats_per_dim, and nothing it shows says bits."""
    figures = []
    monkeypatch.setattr(reporting, "save", lambda figure, path, **options: figures.append(figure))
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, getattr(reporting, name))
    metrics = score("latents", "latents")
    out, err = capsys.readouterr()
    assert "bits" not in out + err and "nats" in out.strip().splitlines()[0]
    assert out.strip().startswith(f"{metrics['nats_per_dim']:.3f} +- {metrics['noise_se']:.3f} (noise)")
    assert metrics["bits_per_dim"] is None and metrics["unit"].startswith("nats")
    for figure in figures:
        texts = [text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel())]
        texts += [text.get_text() for axis in figure.axes for text in axis.texts]
        assert not any("bit" in text for text in texts) and any("nats" in text for text in texts)
    hand = estimate_by_hand(models["latents"], sets["latents"], None, both=False)
    assert metrics["nats_per_dim"] == pytest.approx(hand.nats_per_dim, rel=1e-5)
    assert metrics["per_image"] == pytest.approx((hand.per_image / BITS).tolist(), rel=1e-5)
    for name in ("noise_se", "image_se", "prior", "kl", "decoder"):
        assert metrics[name] == pytest.approx(getattr(hand, name) / BITS, rel=1e-5, abs=1e-7)
    assert list(metrics["by_clipping"]) == ["unclipped"] and metrics["per_image_other_clipping"] == []
    assert strict_json(tmp_path / "run" / "metrics.json") == metrics


def test_the_density_of_latents(score, models, sets):
    """The full loop's is that of plain numpy, L_0 a Gaussian's density."""
    metrics = score("latents", "latents", "--estimator full --num_images 3")
    prior, terms = full_by_hand(models["latents"], sets["latents"].test[:3], None)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) / 64, rel=1e-4)
    assert metrics["decoder"] == pytest.approx(terms[:, 0].mean() / 64, rel=1e-4)


def test_a_stock_checkpoint_of_latents(tmp_path, sets):
    """Its config cannot say that its data is continuous: --levels none does."""
    model = stock(tmp_path / "model", 4, 4, 4, clip_sample=False)
    options = ("--model", model, *sets["latents"].options, *FEW, "--output_dir", tmp_path / "run")
    with pytest.raises(SystemExit, match="levels"):
        run_evaluate(*options)
    metrics = run_evaluate(*options, "--levels", "none")
    hand = estimate_by_hand(model, sets["latents"], None, both=False)
    assert metrics["nats_per_dim"] == pytest.approx(hand.nats_per_dim, rel=1e-5) and metrics["bits_per_dim"] is None


def test_levels_that_were_asked_for_are_kept(models, tmp_path):
    """Those of the digits are 17 unless --levels says otherwise; a number that was given is never changed silently."""
    options = ("--model", models["small"], "--num_images", 2, *FEW, "--output_dir", tmp_path)
    assert run_evaluate(*options, "--levels", 33)["model"]["levels"] == 33
    assert run_evaluate(*options, "--levels", 256)["model"]["levels"] == 256


# The pilot's images


def rows_in(images, whole):
    """The rows of `whole` that `images` are, each of which must be one."""
    return [int(((whole - image).abs() < 1e-6).flatten(1).all(1).nonzero()) for image in images]


@pytest.mark.parametrize("split, other", [("test", "train"), ("train", "test")])
def test_the_pilot_uses_another_split(score, pilots, scored, sets, split, other):
    """All the images of the split are scored once, and the pilot has seen none of them."""
    score("small", "grey", f"--split {split}")
    data = sets["grey"]
    ((pilot_images, _),) = pilots
    assert len(rows_in(pilot_images, getattr(data, other))) == len(getattr(data, other))
    assert rows_in([image for _, _, image in scored], getattr(data, split)) == list(range(len(getattr(data, split))))


def test_of_a_single_split_the_pilot_s_images_are_not_scored(models, tmp_path, pilots, scored):
    """They are kept back, and `num_images` counts the others."""
    folder, levels = write_images(tmp_path / "set", {"test": 30})
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    metrics = run_evaluate("--model", models["small"], *options, *FEW)
    ((pilot_images, _),) = pilots
    whole = x_0_of(levels["test"])
    seen, kept = rows_in([image for _, _, image in scored], whole), rows_in(pilot_images, whole)
    assert metrics["num_images"] == len(metrics["per_image"]) == len(seen) == 27
    assert sorted(seen + kept) == list(range(30)) and seen == sorted(seen)


def test_pilot_images_are_chosen_from_all(models, tmp_path, pilots):
    """As many as `pilot_positions` says, spread over the split."""
    rng = np.random.default_rng(0)
    levels = {"train": rng.integers(0, 256, (2100, 8, 8)), "test": rng.integers(0, 256, (3, 8, 8))}
    folder = write_arrays(tmp_path / "set", levels)
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    run_evaluate("--model", models["small"], *options, *FEW)
    expected = x_0_of(levels["train"])[pilot_positions(2100, 64)]
    assert len(expected) == 2048 and torch.allclose(pilots[0][0], expected, atol=2e-7)


# The tolerance


def test_the_tolerance_is_reached(score, straight, models, sets, capsys):
    """Sweeps go on until the noise error is below it, and count by their calls."""
    tolerance = 0.5 * straight["noise_se"]
    metrics = score("small", "grey", "--tolerance", tolerance)
    assert metrics["noise_se"] < tolerance and metrics["tolerance"] == tolerance
    more = [int(calls) for calls in re.findall(r"calls for each image: (\d+) more[,.]", capsys.readouterr().out)]
    assert more and metrics["network_calls_per_image"] == 8 + sum(more) < 80
    unet, reverse = by_hand(models["small"])
    also = [by_hand(models["small"], clip=False)[1]]
    pilot = fit_pilot(unet, reverse, sets["grey"].train, 230, 0, also=also)
    total, variance = 0.0, 0.0
    for sweep, calls in enumerate([8, *more]):
        scores = VLBEstimator(unet, reverse, pilot, calls, also=also).score(sets["grey"].test, range(TEST), {}, sweep)
        share = calls / metrics["network_calls_per_image"]
        total = total + share * (scores[0].kl + scores[0].decoder)
        variance = variance + share**2 * scores[0].noise_variance
    values = (total + scores[0].prior) * BITS / 64
    assert metrics["per_image"] == pytest.approx(values.tolist(), rel=1e-5)
    assert metrics["noise_se"] == pytest.approx(float(variance.mean() / TEST) ** 0.5 * BITS / 64, rel=1e-4)


def test_a_loose_tolerance_takes_one_sweep(score, straight, scored):
    """Nothing is scored twice when it is reached at once."""
    metrics = score("small", "grey", "--tolerance", 2 * straight["noise_se"])
    assert metrics["per_image"] == straight["per_image"] and len(scored) == TEST


@pytest.mark.parametrize("tolerance", ["1e-300", "1e-12"])
def test_a_tolerance_that_is_out_of_reach(score, tolerance):
    """More calls than can be counted are refused after the first sweep."""
    with pytest.raises(SystemExit, match=f"^ddpm-vlb evaluate: --tolerance {tolerance} is out of reach"):
        score("small", "grey", "--tolerance", tolerance)


def test_the_tolerance_of_latents_is_in_nats(score):
    """As the errors that are reported."""
    first = score("latents", "latents")
    assert score("latents", "latents", "--tolerance", 1.2 * first["noise_se"])["network_calls_per_image"] == 8
    metrics = score("latents", "latents", "--tolerance", 0.7 * first["noise_se"])
    assert metrics["noise_se"] < 0.7 * first["noise_se"]
