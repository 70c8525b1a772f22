"""One convention for all commands: the checkpoint's own process first, the other number beside it."""

import dataclasses

import pytest
import torch

from ddpm_vlb import DDPMVLBScheduler, StoredPath, estimate_vlb, fit_pilot
from ddpm_vlb.scoring.report import both_clippings, bound_lines, clips, entry, in_one_line, path_lines, path_taken


def called(x_t, timesteps):
    return 2 * x_t


@pytest.fixture
def scored():
    """The entry of metrics.json of a checkpoint that clips, or does not."""

    def score(clip, asked=None):
        reverse = DDPMVLBScheduler(
            num_train_timesteps=20, clip_sample=clip, variance_type="fixed_small"
        ).reverse_process()
        first, other = both_clippings(reverse, asked)
        x_0 = (torch.randint(256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 / 255 - 1).float()
        pilot = fit_pilot(called, first, x_0, 100, also=[other])
        return entry(estimate_vlb(called, first, [x_0], pilot, 4, also=[other]), clips(first))

    return score


@pytest.mark.parametrize("clip, names", [(True, ("clipped", "unclipped")), (False, ("unclipped", "clipped"))])
def test_the_headline_is_the_checkpoint_s_own(scored, clip, names):
    """In metrics.json, in the report, and on a validation's line; the other is a larger or smaller number."""
    scores = scored(clip)
    values = {name: own["bits_per_dim"] for name, own in scores["by_clipping"].items()}
    assert scores["clip_sample"] is clip and values["clipped"] != values["unclipped"]
    assert scores["bits_per_dim"] == values[names[0]]
    first, parts, other = bound_lines(scores)
    assert first.startswith(f"{values[names[0]]:.3f} +- ")
    assert parts.endswith(f"x_0_hat {names[0]}, as the checkpoint samples")
    assert other.startswith(f"  {names[1]}: {values[names[1]]:.3f} +- ")
    assert in_one_line(scores) == f"{first}, x_0_hat {names[0]} ({names[1]} {values[names[1]]:.3f})"


def test_another_headline_says_that_it_was_asked_for(scored):
    """--no-clip_sample."""
    scores = scored(True, asked=False)
    assert scores["bits_per_dim"] == scores["by_clipping"]["unclipped"]["bits_per_dim"]
    assert bound_lines(scores, own=False)[1].endswith("x_0_hat unclipped, as asked for")


def test_thresholding_is_a_clipping():
    """And comes back unchanged."""
    reverse = dataclasses.replace(DDPMVLBScheduler().reverse_process(), clip_sample=False, thresholding=True)
    first, other = both_clippings(reverse)
    assert first == reverse and clips(first) and not clips(other)


def test_the_path_is_named():
    """The stored one where there is one and no other is asked for."""
    scheduler = DDPMVLBScheduler(num_train_timesteps=20, timestep_spacing="trailing")
    scheduler.store_few_steps([StoredPath((19, 5), "network", 0.0)])
    taken = [path_taken(scheduler, *chain) for chain in ((2, None), (3, None), (2, "leading"), (2, "optimal"))]
    assert taken == ["the stored path", "spacing trailing", "spacing leading", "the stored path"]


def test_a_chain_to_noise_alone_is_told_of():
    """metrics.json has no number there."""
    path = {"kind": "EDM", "scheduler": "EDMEulerScheduler", "ratios": [0.05, None], "steps": 9, "stored": True}
    assert "ratios 0.05 to noise alone" in path_lines({"gaussian_path": path})[0]
