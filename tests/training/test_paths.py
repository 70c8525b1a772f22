"""Training on the paths of flow matching and EDM: the loss is the field's own, and stock samples what it can."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from processes import fresh_accelerate  # noqa: F401
from training_support import check_metrics, only_train, same_weights, tiny, until_training, weights

from ddpm_vlb import DDPMVLBPipeline, covariance_eigenvalues, spaced_ratios
from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.runtime.staging import stage_result

LEVELS = 256  # of the few images
STEP = "--max_train_steps 1 --lr_scheduler constant"


def direct(run, x_0, t, noise):
    """The field's |o - o*|^2 of each image, by its own formulas on the raw network."""
    ratios = spaced_ratios(None, 100.0, 20, LEVELS)[t].float().reshape(-1, 1, 1, 1)
    if run.args.path == "flow":
        sigma = ratios / (1 + ratios)
        seen, told, target = (1 - sigma) * x_0 + sigma * noise, 1000 * sigma, noise - x_0
    else:
        sigma, sd = ratios, run.stock.config.sigma_data
        x, c_in = x_0 + sigma * noise, (sigma**2 + sd**2).rsqrt()
        seen, told, target = c_in * x, sigma.log() / 4, (x_0 - (sd * c_in) ** 2 * x) / (sigma * sd * c_in)
    output = run.unet(seen, told.flatten()).sample[:, :1]
    return (output - target).square().flatten(1).mean(1)


@pytest.mark.parametrize(
    "options",
    [
        "--path flow",
        "--path flow --sigma_sampling logit_normal --timestep_sampler low_discrepancy",
        "--path edm",
    ],
)
def test_the_loss_is_the_field_s_own(tmp_path, few, options):
    """|o - o*|^2 by weight p_t / q_t, q_t being what t is drawn from: 1 by default."""
    run = only_train(tmp_path, f"{STEP} --objective simple {options}", *few)
    x_0, drawn = next(run.data.train.batches(8)), recipe.draw(run)
    values = recipe.train_batch(run, x_0, 0, drawn)[:, 0]
    noise = run.noise.draw(x_0, run.progress.step, slice(0, 8))
    p = paths_p(run)[drawn.t]
    expected = p / run.sampler.probabilities[drawn.t] * direct(run, x_0, drawn.t, noise)
    if "sampler" not in options:
        torch.testing.assert_close(run.sampler.probabilities, paths_p(run))
    torch.testing.assert_close((drawn.weights * values).double(), expected.detach(), rtol=2e-5, atol=1e-6)


def paths_p(run):
    """p_t of 20 levels even in u = log r: the density of sigma as one of u."""
    u = spaced_ratios(None, 100.0, 20, LEVELS).log()
    if run.args.path == "edm":
        p = (-0.5 * ((u + 1.2) / 1.2) ** 2).exp()
    elif run.args.sigma_sampling == "uniform":
        p = u.sigmoid() * (-u).sigmoid()
    else:
        p = (-0.5 * u**2).exp()
    return p / p.sum()


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_both_terms_of_the_hybrid_come_from_one_draw(tmp_path, few, path):
    """E_q[w (L_simple + 0.001 L_vlb)] is sum_t p_t |o - o*|^2 + 0.001 mean_t L_vlb, with weights of at most 10."""
    run = only_train(tmp_path, f"{STEP} --objective hybrid --path {path}", *few)
    q, p = run.sampler.probabilities, paths_p(run)
    torch.testing.assert_close(q, 0.9 * p + 0.1 / 20)
    x_0 = next(run.data.train.batches(1)).expand(20, -1, -1, -1)
    t, noise = torch.arange(20), torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    diffused = run.reverse.forward.diffuse(x_0, t, noise)
    with torch.no_grad():
        simple, vlb = recipe.call(run, diffused.x_t, diffused).unbind(1)
        raw = direct(run, x_0, t, noise)
    weights = 1 / (20 * q)
    assert weights.max() <= 10
    torch.testing.assert_close((q * weights * simple).sum(), (p * raw).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close((q * weights * vlb).sum(), vlb.double().mean(), rtol=1e-6, atol=0)
    assert run.term_weights == {"simple": 1.0, "vlb": 0.001}


def test_the_decoder_of_a_path_is_drawn_for_what_lies_below_it(tmp_path, few):
    """By the Gaussian model, SNR_0 mmse_0 / 2, which on these levels is not the neighbour's L_t."""
    run = only_train(tmp_path, f"{STEP} --objective vlb --path flow --timestep_sampler gaussian", *few)
    eigenvalues = covariance_eigenvalues(torch.cat(list(run.data.train.batches(256, limit=2048))))
    r2 = spaced_ratios(None, 100.0, 20, LEVELS).square()[:, None]
    mmse = (eigenvalues * r2 / (eigenvalues + r2)).mean(1)
    terms = 0.5 * (1 / r2[:, 0]).diff().neg() * mmse[1:]
    terms = torch.cat([0.5 * mmse[:1] / r2[0], terms])
    expected = 0.9 * terms / terms.sum() + 0.1 / 20
    torch.testing.assert_close(run.sampler.probabilities[0], expected[0], rtol=1e-4, atol=0)


def test_stock_samples_a_flow(tmp_path, few):
    """With a fixed variance: its own classes, from its own files; ours takes the chain beside them."""
    metrics = tiny(tmp_path, "--max_train_steps 2 --objective simple --path flow", *few)
    check_metrics(metrics, tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is DDPMPipeline and type(stock.scheduler) is FlowMatchEulerDiscreteScheduler
    stock.set_progress_bar_config(disable=True)
    images = stock(2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and images.std() > 0
    ours = DDPMVLBPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(ours.path.ratios, spaced_ratios(None, 100.0, 20, LEVELS))
    assert ours.chain.levels == LEVELS and ours.chain.config.variance_type == "fixed_small"
    assert metrics["path"]["scheduler"] == "FlowMatchEulerDiscreteScheduler" and metrics["path"]["steps"] == 20
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    stage_result(tmp_path, "me/flow", metrics, SimpleNamespace(hub_license="mit", hub_include_code=False))(uploaded)
    assert (uploaded / "chain" / "scheduler_config.json").is_file() and (uploaded / "README.md").is_file()


def test_edm_is_scaled_by_the_data(tmp_path, few):
    """Its sigma_data is their root mean square, and its sigmas begin where the network is trained."""
    run = only_train(tmp_path, f"{STEP} --path edm", *few)
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    images = torch.cat(list(run.data.train.batches(256)))
    assert scheduler.config.sigma_data == pytest.approx(float(images.square().mean().sqrt()), abs=0.005)
    assert scheduler.config.sigma_min == pytest.approx(0.4 * 2 / 255)
    ours = DDPMVLBPipeline.from_pretrained(tmp_path)
    assert ours.chain.config.variance_type == "learned_range"
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 17])
    network = run.averaged_network()
    torch.testing.assert_close(ours.network(x_t, t), run.path.network(network)(x_t, t))


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_a_path_goes_on_exactly(tmp_path, few, path):
    """One step, and one more from its checkpoint, are two; finished, it is known as saved."""
    options = f"--lr_scheduler constant --validation_steps 1 --checkpointing_steps 1 --path {path}"
    run = only_train(tmp_path / "straight", f"{options} --max_train_steps 2", *few)
    assert train.is_saved(run, run.averaged_network())
    only_train(tmp_path / "resumed", f"{options} --max_train_steps 1", *few)
    only_train(tmp_path / "resumed", f"{options} --max_train_steps 2 --resume_from_checkpoint latest", *few)
    assert same_weights(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))


def test_a_run_on_another_path_is_refused(tmp_path, few):
    """Also where its checkpoint is of a time that knew of no other."""
    only_train(tmp_path, f"{STEP} --checkpointing_steps 1 --prediction_type v_prediction", *few)
    other = f"{STEP} --path flow --resume_from_checkpoint latest"
    manifest = tmp_path / "checkpoint-1" / "checkpoint.json"
    written = json.loads(manifest.read_text())
    written["fixed"]["--prediction_type"] = "epsilon"
    for known in (True, False):
        if not known:
            del written["fixed"]["--path"]
        manifest.write_text(json.dumps(written))
        with pytest.raises(SystemExit, match="is of a run with --path ddpm, but this one has flow"):
            until_training(tmp_path, other, *few)


def test_a_pipeline_of_betas_takes_the_place_of_one_of_a_path(tmp_path, few):
    """And leaves no chain of it there."""
    only_train(tmp_path, f"{STEP} --path flow", *few)
    assert (tmp_path / "chain").is_dir()
    only_train(tmp_path, f"{STEP} --overwrite_output_dir", *few)
    assert not (tmp_path / "chain").exists() and DDPMVLBPipeline.from_pretrained(tmp_path).path is None
