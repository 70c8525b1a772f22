"""Half precision reaches the network and nothing else, and training in it comes to the same bound."""

import math

import pytest
import torch
from processes import fresh_accelerate, reset_accelerate  # noqa: F401
from training_support import check_metrics, only_train, same_weights, tiny, weights

from ddpm_vlb import LossSecondMomentTimesteps
from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe


@pytest.mark.parametrize("objective", ["vlb", "hybrid", "simple"])
def test_only_the_network_is_in_half_precision(tmp_path, few, monkeypatch, objective):
    """Under bf16 its convolutions are; x_0, x_t, noise, weights, losses, gradients and the average are in float32."""
    seen = {}
    train_batch, gradient_norm = recipe.train_batch, recipe.gradient_norm

    def watched_batch(run, x_0, micro_step, drawn):
        hook = run.unet.conv_in.register_forward_hook(
            lambda module, inputs, output: seen.update(convolution=output.dtype)
        )
        values = train_batch(run, x_0, micro_step, drawn)
        hook.remove()
        seen.update(values=values.dtype, draws=drawn.weights.dtype)
        return values

    def watched_norm(run):
        named = run.unet.named_parameters()
        seen.update({f"gradient {name}": p.grad.dtype for name, p in named if p.grad is not None})
        seen.update({f"average {i}": p.dtype for i, p in enumerate(run.ema.shadow_params)})
        return gradient_norm(run)

    def watched_loss(name):
        loss = getattr(recipe, name)

        def watched(reverse, output, diffused, *args, **options):
            result = loss(reverse, output, diffused, *args, **options)
            for field in ("x_0", "x_t", "noise"):
                seen[field] = getattr(diffused, field).dtype
            seen[f"{name} of"], seen[name] = output.dtype, result.dtype
            return result

        monkeypatch.setattr(recipe, name, watched)

    monkeypatch.setattr(recipe, "train_batch", watched_batch)
    monkeypatch.setattr(recipe, "gradient_norm", watched_norm)
    for name in ("vlb_loss", "simple_loss"):
        watched_loss(name)
    only_train(tmp_path, f"--max_train_steps 2 --mixed_precision bf16 --objective {objective}", *few)
    assert seen.pop("convolution") == torch.bfloat16
    assert {"x_0", "x_t", "noise", "values", "draws"} <= seen.keys()
    assert {"vlb": {"vlb_loss"}, "simple": {"simple_loss"}}.get(objective, {"vlb_loss", "simple_loss"}) <= seen.keys()
    assert len([name for name in seen if name.startswith("gradient ")]) > 50
    assert {name: dtype for name, dtype in seen.items() if dtype != torch.float32} == {}


def test_the_noise_of_the_first_steps_survives_half_precision(tmp_path, few, monkeypatch):
    """x_t is sqrt(alphabar_t) x_0 and all of its noise, to float32's rounding, at every t: bf16 would lose it."""
    seen = []
    vlb_loss = recipe.vlb_loss

    def watched(reverse, output, diffused, **options):
        seen.append((reverse, diffused))
        return vlb_loss(reverse, output, diffused, **options)

    monkeypatch.setattr(recipe, "vlb_loss", watched)
    options = "--max_train_steps 2 --mixed_precision bf16 --ddpm_num_steps 4000 --ddpm_beta_schedule squaredcos_cap_v2"
    only_train(tmp_path, f"{options} --timestep_sampler low_discrepancy --train_batch_size 200", *few)
    for reverse, (x_0, x_t, t, noise) in seen:
        alphabar = reverse.forward.log_alphas_cumprod.exp()[t].double()[:, None, None, None]
        expected = alphabar.sqrt() * x_0.double() + (1 - alphabar).sqrt() * noise.double()
        torch.testing.assert_close(x_t.double(), expected, rtol=0, atol=1e-6)
    assert min(int(t.min()) for _, (_, _, t, _) in seen) < 40


def test_bf16(few_base, tmp_path, few):
    """Mixed precision reaches the network; weights, losses and files stay in float32."""
    metrics = tiny(tmp_path, "--max_train_steps 3 --mixed_precision bf16", *few)
    check_metrics(metrics, tmp_path)
    half = weights(tmp_path)
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert not same_weights(half, weights(few_base[0]))


@pytest.mark.slow
def test_bf16_trains_to_the_same_bound(tmp_path):
    """The default digits run in bf16 is within 0.05 bits/dim of float32, all test images scored."""
    results = {}
    for precision in ("no", "bf16"):
        reset_accelerate()
        options = f"--cpu --logger none --mixed_precision {precision} --output_dir {tmp_path / precision}"
        results[precision] = train.main(options.split())["test"]
    assert all(score["num_images"] == 297 for score in results.values())
    assert abs(results["bf16"]["bits_per_dim"] - results["no"]["bits_per_dim"]) < 0.05
    assert results["no"]["bits_per_dim"] < 1.85


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["uniform", "gaussian", "loss_second_moment"])
def test_no_step_of_a_long_cosine_chain_is_lost(tmp_path, sampler):
    """2000 steps of L_vlb with T = 4000 and the cosine schedule: none is skipped, and the score is finite."""
    options = "--max_train_steps 2000 --objective vlb --ddpm_num_steps 4000 --ddpm_beta_schedule squaredcos_cap_v2"
    metrics = tiny(tmp_path, f"{options} --timestep_sampler {sampler} --validation_steps 5000")
    assert metrics["train"]["skipped_steps"] == 0 and metrics["train"]["steps"] == 2000
    assert math.isfinite(metrics["test"]["bits_per_dim"])


def test_a_bad_loss_does_not_poison_the_history():
    """The losses that are not finite are left out of the importance sampler's history, the others are kept."""
    sampler = LossSecondMomentTimesteps(3, history_per_term=1)
    sampler.update(torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 2.0, math.inf, math.nan]))
    assert sampler.probabilities.tolist() == pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities.isfinite().all() and sampler.probabilities[1] > sampler.probabilities[0]
