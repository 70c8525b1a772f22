"""`ddpm-vlb evaluate --ode`: the decoder is the bound's, and neither score makes the other one again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from processes import reset_accelerate
from scoring_support import TEST, network, ours, run_evaluate, same_numbers

from ddpm_vlb import DDPMVLBPipeline, path_chain, spaced_ratios, vlb_term
from ddpm_vlb.commands.evaluate import Evaluation, parse_args
from ddpm_vlb.runtime.launching import patient_accelerator
from ddpm_vlb.scoring import ode
from ddpm_vlb.scoring.checkpoint import described


def evaluation(model, sets, *options):
    """What an evaluation's parts share, before anything is scored."""
    reset_accelerate()
    where = ("--model", model, *sets["grey"].options, "--output_dir", model / "run")
    args = parse_args(["--cpu", *map(str, (*where, *options))])
    return Evaluation(args, patient_accelerator(args))


def of_a_path(folder, scheduler, variance_type="fixed_small"):
    """A checkpoint with a chain of 20 steps."""
    pipe = DDPMVLBPipeline(network(out_channels=2 if "learned" in variance_type else 1), scheduler)
    pipe.chain = path_chain(scheduler, 256, spaced_ratios(0.01, 50.0, 20), variance_type)
    pipe.save_pretrained(folder)
    return folder


CHECKPOINTS = {
    "epsilon": lambda to: ours(to, network()),
    "v": lambda to: ours(to, network(), prediction_type="v_prediction"),
    "sample": lambda to: ours(to, network(), prediction_type="sample", clip_sample=False),
    "learned": lambda to: ours(to, network(out_channels=2), variance_type="learned"),
    "learned_range": lambda to: ours(to, network(out_channels=2), variance_type="learned_range"),
    "flow": lambda to: of_a_path(to, FlowMatchEulerDiscreteScheduler(), "learned_range"),
    "edm": lambda to: of_a_path(to, EDMEulerScheduler()),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_decoder_is_the_bound_s(sets, tmp_path, kind):
    """At t = 0 both read the network alike: x_0_hat, its clipping, the variance."""
    run = evaluation(CHECKPOINTS[kind](tmp_path / "model"), sets, "--ode", 8)
    x_0, zero = sets["grey"].test[:4], torch.zeros(4, dtype=torch.long)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    diffused = run.reverse.forward.diffuse(x_0, zero, noise)
    with torch.no_grad():
        output = run.model(diffused.x_t, run.reverse.forward.timesteps[zero])
        of_the_ode = run.ode.path.network(run.unet)(diffused.x_t, zero)
    process = run.ode.process.to(dtype=torch.float32)
    found = vlb_term(process, of_the_ode, process.forward.diffuse(x_0, zero, noise))
    torch.testing.assert_close(found, vlb_term(run.reverse, output, diffused), rtol=1e-4, atol=0)


def test_networks_of_two_paths_are_two_evaluations(sets, tmp_path):
    """Of the same weights on chains that look alike."""
    kinds = {"flow": FlowMatchEulerDiscreteScheduler(), "edm": EDMEulerScheduler()}
    runs = [evaluation(of_a_path(tmp_path / kind, scheduler), sets) for kind, scheduler in kinds.items()]
    assert runs[0].weights == runs[1].weights and described(runs[0].reverse) == described(runs[1].reverse)
    assert runs[0].run_key != runs[1].run_key


@pytest.mark.parametrize("change", [{"decoder_log_variance": -7.0}, {"decoder_slope": 0.5}])
def test_another_decoder_is_another_process(change):
    """Nothing else of it differs."""
    reverse = path_chain(FlowMatchEulerDiscreteScheduler(), 256, spaced_ratios(0.01, 50.0, 5), "learned_range")
    reverse = replace(reverse.reverse_process(), decoder_log_variance=-8.0)
    assert described(replace(reverse, **change)) != described(reverse)


@pytest.fixture
def finished(straight, home, tmp_path):
    """A copy of a finished evaluation, into which `score` goes."""
    return shutil.copytree(home / "straight", tmp_path / "run")


def test_an_ode_goes_beside_a_bound_that_is_there(score, straight, finished, calls, capsys):
    """Of the network only the ODE's calls are asked; when the bound is asked for again, the ODE stays."""
    metrics = score("small", "grey", "--ode 8")
    assert len(calls) == 8 * TEST and same_numbers(metrics, straight)
    assert "already holds this bound: only the ODE is scored" in capsys.readouterr().out
    written = (finished / "metrics.json").read_bytes()
    assert json.loads(written) == metrics and metrics["ode"]["network_calls_per_image"] == 8
    assert metrics["seconds"] == straight["seconds"] and [path.name for path in finished.parent.iterdir()] == ["run"]
    for options in ("", "--ode 8"):
        assert score("small", "grey", options) == metrics
        assert "nothing to do" in (out := capsys.readouterr().out) and "unclipped as the ODE is, - ODE:" in out
    assert len(calls) == 8 * TEST and (finished / "metrics.json").read_bytes() == written
    assert score("small", "grey", "--ode 4")["ode"]["network_calls_per_image"] == 4


def test_an_ode_that_fails_leaves_the_bound(score, straight, tmp_path, calls, monkeypatch):
    """It is written before."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="not differentiable"):
        patch.setattr(ode, "estimate_ode", lambda *args: exec("raise ValueError('not differentiable')"))
        score("small", "grey", "--ode 8")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert same_numbers(metrics, straight) and metrics["ode"] is None
    assert not list((tmp_path / "run").glob("partial-*"))


def test_a_chain_of_one_level_is_refused_before_it_is_scored(sets, tmp_path, calls):
    """There is nothing to integrate over."""
    DDPMPipeline(network(), DDPMScheduler(1)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="--ode integrates between the chain's levels, .* has 1: leave it out"):
        run_evaluate("--model", tmp_path / "model", *sets["grey"].options, "--ode")
    assert calls == []
