"""`evaluate` and `optimize-timesteps` on checkpoints of flow matching, EDM and their kin."""

import argparse
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    AmusedScheduler,
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DDPMPipeline,
    DiTPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from networks import tiny_dit
from processes import reset_accelerate
from scoring_support import FEW, network, options_for, run_evaluate, write_splits

from ddpm_vlb import DDPMVLBPipeline, GaussianPath, estimate_ode, estimate_vlb, fit_pilot, path_chain, spaced_ratios
from ddpm_vlb.commands import optimize_timesteps
from ddpm_vlb.runtime.publisher import OURS
from ddpm_vlb.runtime.staging import stage_result

RATIOS = spaced_ratios(0.01, 100.0, 20)
SHORT = "--num_fit_images 20 --num_knots 6 --num_images 8".split()


def foreign(folder, scheduler):
    """A checkpoint as stock saves it."""
    DDPMPipeline(network(), scheduler).save_pretrained(folder)
    return folder


def stored(folder, scheduler):
    """One that was saved with a chain of 20 steps."""
    pipe = DDPMVLBPipeline(network(), scheduler)
    pipe.chain = path_chain(scheduler, 256, RATIOS)
    pipe.save_pretrained(folder)
    return folder


def optimize(*options):
    """Optimize in this process, on the CPU; returns the content of few_steps.json."""
    reset_accelerate()
    return optimize_timesteps.main(["--cpu", *map(str, options)])


def test_a_foreign_flow_is_scored_on_the_ratios_asked_for(sets, tmp_path, capsys):
    """The number is the estimator's on the path by hand; what is printed and kept says which chain it is of."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    folder, grey = foreign(tmp_path / "flow", scheduler), sets["grey"]
    where = ("--model", folder, *grey.options, "--output_dir", tmp_path / "run")
    metrics = run_evaluate(*where, *FEW, "--ratios", 0.01, 50)
    path = GaussianPath.from_config(scheduler, spaced_ratios(0.01, 50.0, 1000))
    model, reverse = path.network(network().eval()), path.reverse_process(256).to(dtype=torch.float32)
    also = [replace(reverse, clip_sample=False)]
    pilot = fit_pilot(model, reverse, grey.train, 230, also=also)
    estimate = estimate_vlb(model, reverse, [grey.test], pilot, 8, also=also)
    assert metrics["bits_per_dim"] == pytest.approx(estimate.bits_per_dim, rel=1e-4)
    told = metrics["model"]["gaussian_path"]
    assert told.pop("ratios") == pytest.approx([0.01, 50])
    assert told == {"kind": "flow matching", "scheduler": type(scheduler).__name__, "steps": 1000, "stored": False}
    said = capsys.readouterr().out
    assert "chain of 1000 steps, noise-to-signal ratios 0.01 to 50, chosen here" in said


def test_few_steps_lie_in_the_chain(sets, tmp_path, capsys):
    """Stock's files stay as they were; the sigmas of a row take stock's scheduler to the same levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    folder, options = stored(tmp_path / "flow", scheduler), sets["grey"].options
    before = {path: path.read_bytes() for path in folder.rglob("*.json") if path.parent.name != "chain"}
    result = optimize("--model", folder, *options, *SHORT, "--steps", 3, "--variance", "analytic")
    assert {path: path.read_bytes() for path in before} == before
    (row,) = (row for row in result["rows"] if row["stored"])
    chain = DDPMVLBPipeline.from_pretrained(folder).chain
    assert list(chain.optimal_paths[3].timesteps) == row["timesteps"] and chain.errors is not None
    scheduler.set_timesteps(sigmas=row["sigmas"])
    wanted = GaussianPath.from_config(scheduler, RATIOS).sigma[row["timesteps"]]
    assert torch.allclose(scheduler.sigmas[:-1].double(), wanted, rtol=1e-5, atol=0)
    capsys.readouterr()
    metrics = run_evaluate("--model", folder, *options, "--num_inference_steps", 3, "--output_dir", tmp_path / "run")
    said = capsys.readouterr().out
    assert "3 steps (the stored path)" in said and "the checkpoint's own" in said
    assert metrics["timesteps"] == row["timesteps"][::-1]


def test_a_dit_of_a_flow_is_scored_on_latents(tmp_path):
    """Its network is a `transformer` with labels, its autoencoder is not read; its chain begins where stock's does."""
    vae = AutoencoderKL(latent_channels=2, norm_num_groups=2, block_out_channels=(4,))
    DiTPipeline(tiny_dit(), vae, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / "vae" / "config.json").unlink()
    arrays = np.random.default_rng(0).standard_normal((20, 2, 8, 8)).astype(np.float32)
    columns = {split: {"image": list(arrays), "label": [0, 1] * 10} for split in ("train", "test")}
    kinds = {"image": datasets.Array3D((2, 8, 8), "float32"), "label": datasets.Value("int64")}
    data = options_for(tmp_path, write_splits(tmp_path / "set", columns, **kinds))
    where = ("--model", tmp_path / "dit", *data, "--output_dir", tmp_path / "run", "--levels", "none")
    metrics = run_evaluate(*where, *FEW)
    assert metrics["unit"].startswith("nats") and metrics["model"]["gaussian_path"]["ratios"][0] == pytest.approx(
        1 / 999
    )
    assert np.isfinite(metrics["nats_per_dim"])


@pytest.mark.parametrize("cls", [LCMScheduler, TCDScheduler, FlowMatchLCMScheduler])
def test_distilled_networks_are_scored_and_named(sets, tmp_path, capsys, cls):
    """Of betas or of a path."""
    folder = foreign(tmp_path / "model", cls())
    where = ("--model", folder, *sets["one"].options, "--output_dir", tmp_path / "run")
    metrics = run_evaluate(*where, "--pilot_calls", 20, "--calls_per_image", 6)
    assert metrics["model"]["distilled"] == cls.__name__
    assert f"{cls.__name__} is of a distilled network" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make, options, words",
    [
        (lambda to: stored(to, EDMEulerScheduler()), "--ratios 0.01 50", "--ratios has no effect: .* stores a chain"),
        (lambda to: foreign(to, EDMEulerScheduler()), "--ratios 5 2", "second is larger"),
        (lambda to: foreign(to, CMStochasticIterativeScheduler()), "", "noise levels of another kind"),
        (lambda to: foreign(to, AmusedScheduler(mask_token_id=1)), "", "noise levels of another kind"),
        (lambda to: foreign(to, FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), "", "invert_sigmas"),
    ],
)
def test_what_is_refused(sets, tmp_path, make, options, words):
    """In one line."""
    with pytest.raises(SystemExit, match=words) as refusal:
        run_evaluate("--model", make(tmp_path / "model"), *sets["one"].options, *options.split())
    assert "\n" not in str(refusal.value)


def test_ratios_of_a_chain_of_betas_are_refused(models, sets, tmp_path):
    """They are the betas' own."""
    with pytest.raises(SystemExit, match="--ratios has no effect: .* has a chain of betas"):
        run_evaluate("--model", models["small"], *sets["one"].options, "--ratios", 0.01, 50)


@pytest.mark.parametrize("kind", ["flow", "betas"])
def test_the_ode_stands_beside_the_bound(models, sets, tmp_path, capsys, kind):
    """By hand: the path on CALLS / 2 + 1 levels over the chain's range, and the decoder that was scored."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    folder, grey = (stored(tmp_path / "flow", scheduler) if kind == "flow" else models["small"]), sets["grey"]
    where = ("--model", folder, *grey.options, "--num_images", 5, "--output_dir", tmp_path / "run")
    metrics = run_evaluate(*where, "--ode", 8)
    chain = DDPMVLBPipeline.from_pretrained(folder).chain.reverse_process(dtype=torch.float64)
    abar = chain.forward.log_alphas_cumprod.exp()
    low, high = (float((1 / abar[t] - 1).sqrt()) for t in (0, -1))
    ratios = spaced_ratios(low, high, 5)
    betas = GaussianPath.ddpm(abar, ratios)
    path = GaussianPath.from_config(scheduler, ratios) if kind == "flow" else betas
    first = float(chain.coefficients(0, torch.zeros(1, 1).double()).log_variance_offset)
    reverse = path.reverse_process(256, decoder_log_variance=first).to(dtype=torch.float32)
    estimate = estimate_ode(path.network(network().eval()), reverse, [grey.test[:5]])
    ode, unclipped = metrics["ode"], metrics["by_clipping"]["unclipped"]["bits_per_dim"]
    assert ode["per_image"] == pytest.approx(estimate.per_image.tolist(), rel=1e-4)
    assert (ode["network_calls_per_image"], ode["probes"]) == (8, 2)
    assert ode["difference"] == pytest.approx(unclipped - ode["bits_per_dim"], abs=1e-9)
    said = capsys.readouterr().out
    assert "bound, unclipped as the ODE is, - ODE:" in said and "an estimate, no bound" in said and "--ode 16" in said


@pytest.mark.parametrize(
    "options, words",
    [("--ode 6", "multiple of 4"), ("--ode --timesteps 3 0", "ode has no effect beside fewer")],
)
def test_odes_that_are_refused(options, words, capsys):
    """Steps of four calls each, on the whole chain."""
    with pytest.raises(SystemExit):
        run_evaluate("--model", "m", *options.split())
    assert words in capsys.readouterr().err


def test_a_published_run_has_its_chain(tmp_path):
    """What is staged for the Hub has the chain beside stock's files, and a card that says which it is."""
    folder = stored(tmp_path / "flow", FlowMatchEulerDiscreteScheduler())
    options = argparse.Namespace(hub_include_code=False, hub_license="mit")
    stage_result(folder, "me/flow", {}, options)(tmp_path)
    staged = DDPMVLBPipeline.from_pretrained(tmp_path)
    assert len(staged.chain) == 20 and (tmp_path / "chain/scheduler_config.json").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "- flow-matching" in card and "20 steps with noise-to-signal ratios from 0.01 to 100" in card
    assert "chain/scheduler_config.json" in OURS
