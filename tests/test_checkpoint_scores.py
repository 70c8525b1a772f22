"""A checkpoint and images in one call: the numbers of `ddpm-vlb evaluate`, the estimator's, and what is refused."""

import dataclasses
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from networks import tiny_dit
from PIL import Image
from processes import fresh_accelerate  # noqa: F401
from scoring_support import BETAS, T, network, run_evaluate

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, checkpoint_scores, estimate_vlb, fit_pilot, path_chain, score
from ddpm_vlb.commands import evaluate

BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
NUMBERS = "bits_per_dim noise_se image_se prior kl decoder".split()


def splits_of(home, own, column="image"):
    """A data set as a user of `datasets` has it."""
    data = datasets.load_dataset(own.folder, cache_dir=str(home / "cache"))
    return data if column == "image" else data.rename_column(column, "image")


def pipe_of(unet=None, **options):
    return DDPMVLBPipeline(unet or network(), DDPMVLBScheduler(num_train_timesteps=T, **BETAS, **options))


# The same numbers


@pytest.mark.parametrize(
    "model, data, column, calls",
    [
        ("colour", "colour", "image", T),  # every step is taken once
        ("classes", "labelled", "image", 8),
        ("latents", "latents", "latent", 8),
    ],
)
def test_the_number_is_evaluate_s(models, sets, home, tmp_path, monkeypatch, model, data, column, calls):
    """Bit for bit, with evaluate's pilot: of the training split, and for both clippings where there are both."""
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, lambda *args, **options: None)
    where = ("--model", models[model], *sets[data].options, "--output_dir", tmp_path / "run")
    metrics = run_evaluate(*where, "--calls_per_image", calls, "--seed", 5)
    found = score(models[model], splits_of(home, sets[data], column), calls_per_image=calls, seed=5)
    unit = 1.0 if metrics["unit"] == "bits/dim" else np.log(2)
    assert (found.per_image * unit).tolist() == metrics["per_image"]
    assert [(own.per_image * unit).tolist() for own in found.also] == metrics["per_image_other_clipping"]
    for name in NUMBERS[1:]:
        assert getattr(found, name) * unit == metrics[name]


def test_fewer_steps_are_evaluate_s(models, sets, home, tmp_path, monkeypatch):
    """By the checkpoint's own spacing."""
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, lambda *args, **options: None)
    where = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "run")
    metrics = run_evaluate(*where, "--num_inference_steps", 10, "--calls_per_image", 8)
    found = score(models["small"], splits_of(home, sets["grey"]), calls_per_image=8, num_inference_steps=10)
    assert found.per_image.tolist() == metrics["per_image"] and len(found.term_mean) == 10


def test_every_form_of_the_same_images(models, sets, home):
    """Tensors, levels, arrays, pictures and a data set are one thing."""
    split = splits_of(home, sets["colour"])["test"].select(range(6))
    k = ((sets["colour"].test[:6] + 1) * 127.5).round().to(torch.uint8)
    x_0 = k.float() * (2 / 255) - 1
    pictures = [Image.fromarray(own) for own in k.permute(0, 2, 3, 1).numpy()]
    forms = [x_0, x_0.numpy(), k, k.numpy(), pictures, split]
    pipe = DDPMVLBPipeline.from_pretrained(models["colour"])
    first, *others = (score(pipe, own, calls_per_image=T) for own in forms)
    assert first.num_images == 6 and all(torch.equal(own.per_image, first.per_image) for own in others)


def test_without_another_split_the_pilot_is_estimate_vlb_s(models, sets):
    """It is fitted to the scored images themselves, for both clippings; a stock pipeline is scored where it is."""
    x_0, pipe = sets["grey"].test, DDPMPipeline.from_pretrained(models["small"])
    reverse = DDPMVLBScheduler.from_config(pipe.scheduler.config).reverse_process()
    also = [dataclasses.replace(reverse, clip_sample=False)]
    by_hand = estimate_vlb(pipe.unet.eval(), reverse, [x_0], calls_per_image=8, seed=3, also=also)
    found = score(pipe, x_0, calls_per_image=8, seed=3)
    assert torch.equal(found.per_image, by_hand.per_image) and str(found) == str(by_hand)
    assert torch.equal(found.per_image_se, by_hand.per_image_se)


def test_a_pilot_may_be_given(models, sets):
    """Fitted already, or images to fit one to, spread over them: then it is evaluate's of the other split."""
    pipe, x_0 = DDPMVLBPipeline.from_pretrained(models["latents"]), sets["latents"]
    found = score(pipe, x_0.test, calls_per_image=8, pilot=x_0.train)
    pilot = fit_pilot(pipe.unet, pipe.scheduler.reverse_process(), x_0.train)
    again = score(pipe, x_0.test, calls_per_image=8, pilot=pilot)
    assert torch.equal(found.per_image, again.per_image) and (found - again).se == 0


def test_many_images_go_in_batches(monkeypatch):
    """Whose size moves the last bits at most: the draws are those of an image's position."""
    pipe, x_0 = pipe_of(), torch.arange(23 * 64).reshape(23, 1, 8, 8) % 256
    whole = score(pipe, x_0, calls_per_image=8)
    monkeypatch.setattr(checkpoint_scores, "_BATCH", 5)
    cut = score(pipe, x_0, calls_per_image=8)
    torch.testing.assert_close(cut.per_image, whole.per_image, rtol=1e-6, atol=0)


def test_a_network_in_training_is_left_so():
    """It is scored in evaluation mode; neither its mode nor a global generator knows of it."""
    pipe = pipe_of(network(dropout=0.5))
    pipe.unet.train()
    state, x_0 = torch.get_rng_state(), torch.zeros(3, 1, 8, 8).long()
    first, again = (score(pipe, x_0, calls_per_image=T) for _ in range(2))
    assert torch.equal(first.per_image, again.per_image) and pipe.unet.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_path_s_network_is_scored_on_its_chain(models):
    """Of flow matching, in stock's pipeline or ours: the estimator's on `pipeline.chain` and `pipeline.network`."""
    pipe = DDPMVLBPipeline(network(), FlowMatchEulerDiscreteScheduler())
    pipe.chain = path_chain(pipe.scheduler, ratios=torch.logspace(-2, 1, T, dtype=torch.float64))
    x_0 = torch.linspace(0, 255, 128).long().reshape(2, 1, 8, 8)
    reverse = pipe.chain.reverse_process()
    found = score(pipe, x_0, calls_per_image=T)
    by_hand = estimate_vlb(pipe.network, reverse, [x_0 * (2 / 255) - 1], estimator="full")
    assert torch.equal(found.per_image, by_hand.per_image)


def test_a_transformer_s_pipeline():
    """Stock's DiTPipeline is scored on its latents, given their classes; the label of no class is one of them."""
    chain = {"num_train_timesteps": 5, "variance_type": "learned_range", "levels": None, "clip_sample": False}
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    pipe = DiTPipeline(tiny_dit(), vae, DDPMVLBScheduler(**chain))
    x_0, labels = torch.linspace(-1, 1, 384).reshape(3, 2, 8, 8), torch.tensor([0, 1, 3])
    told = [(x_0, {"class_labels": labels})]
    by_hand = estimate_vlb(pipe.transformer.eval(), pipe.scheduler.reverse_process(), told, estimator="full")
    assert torch.equal(score(pipe, x_0, labels, calls_per_image=5).per_image, by_hand.per_image)


def test_pictures_of_fewer_levels_are_spread():
    """As evaluate reads them: black and white are 0 and 255 of 256, and 0 and 16 of 17 lie between no two of 255."""
    k = torch.arange(64).reshape(8, 8) % 3 == 0
    picture = Image.fromarray(k.numpy())
    assert picture.mode == "1"
    first, again = (score(pipe_of(), own, calls_per_image=T) for own in ([picture], k[None, None] * 255))
    assert torch.equal(first.per_image, again.per_image)


def test_grey_images_may_lack_their_channel():
    """(B, H, W) is (B, 1, H, W), and a coloured file whose channels are equal is grey."""
    k = torch.arange(128).reshape(2, 8, 8).to(torch.uint8)
    pictures = [Image.fromarray(own).convert("RGB") for own in k.numpy()]
    first, *others = (score(pipe_of(), own, calls_per_image=T) for own in (k[:, None], k, pictures))
    assert all(torch.equal(own.per_image, first.per_image) for own in others)


def test_a_distilled_network_is_scored_on_its_betas():
    """As evaluate does, and the pipeline keeps its scheduler."""
    pipe = DDPMVLBPipeline(network(), LCMScheduler(T, **BETAS, beta_schedule="linear", clip_sample=True))
    first, again = (score(own, X_0, calls_per_image=T) for own in (pipe, pipe_of()))
    assert torch.equal(first.per_image, again.per_image) and isinstance(pipe.scheduler, LCMScheduler)


# What is refused

X_0 = torch.zeros(3, 1, 8, 8).long()


def refused(pattern, images, *args, pipe=None, **options):
    with pytest.raises(ValueError, match=pattern) as error:
        score(pipe or pipe_of(), images, *args, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "images, pattern",
    [
        (X_0[:0], "`images` must hold at least one image, but is empty"),
        ([], "empty"),
        (X_0[:, :, :7], r"network's shape \(B, 1, 8, 8\), channels first, but have \(3, 1, 7, 8\)"),
        (X_0[0, 0], r"but have \(8, 8\)"),
        (X_0 + 2**40, "levels 0 .. 255, but go from 1099511627776"),
        (X_0 + 256, "levels 0 .. 255, but go from 256 to 256"),
        (X_0 + 0.3, "must lie on the 256 levels"),
        (np.array(["a"]), "in numbers"),
        ([np.zeros((1, 8, 8)), np.zeros((1, 8, 7))], "in numbers"),
        (datasets.Dataset.from_dict({"image": [[0]]}).to_iterable_dataset(), "all its rows, but is a IterableDataset"),
        ([Image.new("L", (8, 8)), Image.new("L", (9, 8))], "of one size"),
        ([Image.new("CMYK", (8, 8))], "number 0 must have a mode of .* but has CMYK"),
        ([Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))], r"1 channel\(s\), but has 3"),
        (iter([X_0]), "a list of PIL images or a data set"),
        ({"train": X_0}, "a split 'test' to be scored, but has .'train'"),
        (datasets.Dataset.from_dict({"img": [0]}), r"a column 'image', but has .'img'.: `rename_column"),
    ],
)
def test_images_that_do_not_fit(images, pattern):
    """Each is answered in one line, before any network call."""
    refused(pattern, images)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_of_pictures_is_told_how_to_be_read(tmp_path, kind):
    """What the message says to do gives the numbers of the pictures themselves."""
    pictures = [Image.fromarray(np.full((8, 8), 40 * i, dtype=np.uint8)) for i in range(5)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="`images` must be images, but is the path .* Read a folder of pict") as error:
        score(pipe_of(), kind(tmp_path))
    advice = re.search("`(datasets.*)`", str(error.value))[1]
    read = eval(advice.removesuffix(")") + f", cache_dir={str(tmp_path / 'cache')!r})", {"datasets": datasets})
    of_folder, of_pictures = (score(pipe_of(), own, calls_per_image=2) for own in (read, pictures))
    assert torch.equal(of_folder.per_image, of_pictures.per_image)


def test_levels_of_continuous_data():
    """Integers are none."""
    refused("must be floats", X_0, pipe=pipe_of(levels=None, clip_sample=False))


@pytest.mark.parametrize(
    "labels, pattern",
    [
        (None, "must come with labels 0 .. 4"),
        ([0, 1], "must be 3 integers of the network's classes 0 .. 4"),
        ([0, 1, 5], r"classes 0 .. 4, one for each image, but got \[0, 1, 5\]"),
        ([0, 1, 0.5], "3 integers"),
        (["a", "b", "c"], "3 integers"),
    ],
)
def test_labels_that_do_not_fit(labels, pattern):
    """Missing, of another number, out of range, or none."""
    refused(pattern, X_0, labels, pipe=pipe_of(network(num_class_embeds=5)))


def test_labels_of_a_data_set_that_has_none():
    """A class-conditional network asks for the column; pictures alone are not enough."""
    data = datasets.Dataset.from_dict({"image": X_0[:, 0].tolist()})
    refused("a column 'label', but has", data, pipe=pipe_of(network(num_class_embeds=5)))


def test_labels_without_effect():
    """An unconditional network takes none; guidance has no bound."""
    refused("`labels` has no effect: the network is unconditional", X_0, [0, 1, 2])
    refused("`guidance_scale` must be 1, but is 3.0: the network given its labels", X_0, guidance_scale=3.0)


def test_checkpoints_that_cannot_be_scored(models):
    """No pipeline, no chain with a bound, a network of another kind."""
    refused("is neither a pipeline's folder nor one on the Hub", X_0, pipe="runs/nowhere/at/all")
    refused("has a DDIMScheduler, whose chain has no variational bound", X_0, pipe=models["ddim"])
    refused("must be a folder, a Hub name or a pipeline", X_0, pipe=network())
    text = UNet2DConditionModel(8, block_out_channels=(32, 32), **BLOCKS, cross_attention_dim=8, layers_per_block=1)
    refused("a UNet2DConditionModel, none of x_t, t and labels alone", X_0, pipe=pipe_of(text))
    for pilot in (3, "a folder"):
        refused("`pilot` must be a `Pilot`, or images", X_0, pipe=pipe_of(), pilot=pilot, calls_per_image=2)
