"""examples/text_to_image_validation.py: latents as stock makes them, captions told, a fine-tune told from its base."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from scoring_support import network

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tiny_pipelines


@pytest.fixture(scope="module")
def program():
    path = Path(__file__).parents[1] / "examples" / "text_to_image_validation.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder, in which `datasets` keeps its files too."""
    folder = tmp_path_factory.mktemp("text_to_image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def base(home):
    return tiny_pipelines.build(home / "words")


@pytest.fixture(scope="module")
def images(home):
    tiny_pipelines.draw_pictures(home / "images", 24)
    return home / "images"


@pytest.fixture(scope="module")
def data(program, images):
    return program.load_captioned(str(images), "train", "image", "text", 64)


@pytest.fixture(scope="module")
def folders(program, home, base, data):
    """The base, saved, and a fine-tune of it: the mean squared error on half the images."""
    base.save_pretrained(home / "base")
    tuned = StableDiffusionPipeline.from_pretrained(home / "base", safety_checker=None)
    x, told = program.encode_images(tuned, data[0][:12], None, 1), program.encode_captions(tuned, data[1][:12])
    tiny_pipelines.fine_tune(tuned, x, told)
    tuned.save_pretrained(home / "tuned")
    return {"base": str(home / "base"), "tuned": str(home / "tuned")}


def with_vae(base, **options):
    """The pipeline with another configuration of the same VAE."""
    vae = AutoencoderKL.from_config({**base.vae.config, "_use_default_values": [], **options})
    vae.load_state_dict(base.vae.state_dict())
    return with_part(base, vae=vae)


def with_part(base, **parts):
    return StableDiffusionPipeline(**{**base.components, **parts}, requires_safety_checker=False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# What is scored


def test_latents_are_stock_s(program, base, data):
    """Bit for bit those of its own processor, VAE and scaling: drawn in the order of the images, no mean."""
    generator, expected = seeded(5), []
    for image in data[0][:3]:
        pixels = base.image_processor.preprocess(image, 8, 8, resize_mode="crop")
        with torch.no_grad():
            drawn = retrieve_latents(base.vae.encode(pixels), generator=generator)
        expected.append(drawn * base.vae.config.scaling_factor)
    found = program.encode_images(base, data[0][:3], None, 5)
    assert found.shape == (3, 4, 4, 4) and torch.equal(found, torch.cat(expected))


def test_a_shift_is_taken_off_before_the_scale(program, base, data):
    """As stock does for the VAEs that have one."""
    plain = program.encode_images(base, data[0][:2], None, 0)
    shifted = program.encode_images(with_vae(base, shift_factor=0.5), data[0][:2], None, 0)
    torch.testing.assert_close(plain - shifted, torch.full_like(plain, 0.5 * 0.18215))


def test_captions_are_told_without_guidance(program, base, data):
    """What the text encoder makes of each caption, one row for an image; none is empty."""
    tokens = base.tokenizer(data[1], padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = base.text_encoder(tokens)[0]
    found = program.encode_captions(base, data[1])
    assert data[1][:2] == tiny_pipelines.WORDS and not torch.equal(found[0], found[1])
    torch.testing.assert_close(found, expected)


def test_a_fine_tune_is_told_from_its_base(program, folders, images, capsys):
    """By four calls for each of 24 images; the base is not told from itself."""
    where = ["--model", folders["base"], "--images", str(images), "--calls_per_image", "4", "--compare"]
    difference = program.main([*where, folders["tuned"]])
    said = capsys.readouterr().out.splitlines()
    assert difference.verdict == "better" and difference.bits_per_dim < -5 * difference.se
    assert said[0].startswith(f"{folders['base']}: ") and said[1].startswith(f"{folders['tuned']}: ")
    assert "nats/dim of latents, 24 images, 4 network calls each" in said[1]
    assert said[2].startswith("difference: -") and said[2].endswith("nats/dim of latents: better")
    same = program.main([*where, folders["base"], "--num_images", "8"])
    assert same.bits_per_dim == same.se == 0 and same.verdict == "cannot be told"


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(thresholding=True, clip_sample=False, **tiny_pipelines.BETAS),
        DDPMScheduler(variance_type="fixed_large", clip_sample=False, **tiny_pipelines.BETAS),
    ],
    ids=["thresholding", "fixed_large"],
)
def test_the_options_of_sampling_decide_nothing(program, folders, images, home, base, scheduler):
    """The same weights differ by 0, whichever scheduler samples from them."""
    folder = home / f"sampled-{type(scheduler).__name__}"
    with_part(base, scheduler=scheduler).save_pretrained(folder)
    where = ["--images", str(images), "--num_images", "4", "--calls_per_image", "4"]
    difference = program.main(["--model", folders["base"], "--compare", str(folder), *where])
    assert difference.bits_per_dim == difference.se == 0


def test_a_variance_half_is_scored(program, base):
    """A U-Net of twice as many channels has learned its variance, whatever its sampler can take."""
    config = {**base.unet.config, "_use_default_values": [], "out_channels": 8}
    wide = with_part(base, unet=UNet2DConditionModel.from_config(config))
    assert program.chain_of(base).variance_type == "fixed_small"
    assert program.chain_of(wide).variance_type == "learned_range"
    wide.scheduler = DDPMScheduler(variance_type="learned", clip_sample=False, **tiny_pipelines.BETAS)
    assert program.chain_of(wide).variance_type == "learned"


@pytest.mark.parametrize("option", [{"prediction_type": "v_prediction"}, {"beta_end": 0.02}], ids=str)
def test_another_chain_is_not_compared(program, base, option):
    """Other betas and predictions are refused, in one line."""
    other = with_part(base, scheduler=DDPMScheduler(**{**tiny_pipelines.BETAS, **option}, clip_sample=False))
    with pytest.raises(ValueError, match="m must have the betas and the `prediction_type` of the other") as raised:
        program.check_chain(program.chain_of(other), program.chain_of(base), "m")
    assert "\n" not in str(raised.value)


def test_a_scale_that_is_assumed_is_told(program, folders, home, capsys):
    """Of a vae/config.json without one; diffusers takes its default."""
    program.load_pipeline(folders["base"])
    assert "scaling_factor" not in capsys.readouterr().err
    folder = home / "unscaled"
    shutil.copytree(folders["base"], folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    program.load_pipeline(str(folder))
    said = "vae/config.json has no `scaling_factor`, and diffusers' default of 0.18215 is taken."
    assert f"{folder}: {said}" in capsys.readouterr().err.splitlines()


def test_another_network_s_latents_are_not_compared(program, folders, images, base, home):
    """A VAE of another scale makes other data: the paired difference refuses it."""
    with_vae(base, scaling_factor=1.0).save_pretrained(home / "rescaled")
    where = ["--model", folders["base"], "--images", str(images), "--num_images", "2", "--calls_per_image", "4"]
    with pytest.raises(SystemExit, match="must be of estimates with the same images"):
        program.main([*where, "--compare", str(home / "rescaled")])


# What is refused


def test_pipelines_that_cannot_be_scored(program, base):
    """Each in one line: no text, no scale, a chain without betas, a network that is told more."""
    inpainting = UNet2DConditionModel.from_config({**base.unet.config, "_use_default_values": [], "in_channels": 9})
    for pipe, pattern in [
        (DDPMPipeline(network(), DDIMScheduler()), "must be a StableDiffusionPipeline, but is a DDPMPipeline"),
        (with_vae(base, scaling_factor=None), "and its `scaling_factor`, not AutoencoderKL, None"),
        (with_part(base, scheduler=FlowMatchEulerDiscreteScheduler()), "a scheduler of betas, but has a FlowMatch"),
        (with_part(base, unet=inpainting), "the VAE's 4 channels, but it takes 9: an inpainting network"),
    ]:
        with pytest.raises(ValueError, match=pattern):
            program.check_pipeline(pipe, "m")
    program.check_pipeline(base, "m")


@pytest.mark.parametrize("caption", ["", None])
def test_a_missing_caption(program, home, images, caption):
    """The image is named; nothing is told in the place of its caption."""
    folder = home / f"captions-{caption}"
    folder.mkdir()
    lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(["dark", caption])]
    for line in lines:
        (folder / line["file_name"]).write_bytes((images / "00.png").read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit, match=r"a caption for each image, but that of number 1 is"):
        program.main(["--model", "m", "--images", str(folder)])


def test_a_folder_without_captions(program, home, images):
    """Pictures alone are no captioned images."""
    folder = home / "pictures"
    folder.mkdir()
    (folder / "0.png").write_bytes((images / "00.png").read_bytes())
    with pytest.raises(SystemExit, match=r"columns 'image' and 'text', but has \['image'\]: name them") as stop:
        program.main(["--model", "m", "--images", str(folder)])
    assert "\n" not in stop.value.code


def test_what_is_not_installed(program, monkeypatch, images):
    """Is named, with what to install."""
    monkeypatch.setattr(program, "is_peft_available", lambda: False)
    with pytest.raises(SystemExit, match="--lora needs peft: pip install peft"):
        program.main(["--model", "m", "--images", str(images), "--lora", "l"])
    monkeypatch.setattr(program, "is_transformers_available", lambda: False)
    with pytest.raises(SystemExit, match="Captions need transformers: pip install transformers"):
        program.main(["--model", "m", "--images", str(images)])


def test_there_is_no_guidance_scale(program, capsys):
    """No option of that name; the description says what is scored."""
    with pytest.raises(SystemExit):
        program.main(["--model", "m", "--images", "i", "--guidance_scale", "7.5"])
    assert "unrecognized arguments: --guidance_scale" in capsys.readouterr().err
    assert "guidance samples from has no density" in program.__doc__
