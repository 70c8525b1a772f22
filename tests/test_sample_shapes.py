"""Samples of any shape (B, C, *): signals of one dimension and volumes beside images, sampled and saved as such."""

import json

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet1DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import pipeline, quiet, sample, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, SquaredErrors, model_card
from ddpm_vlb.sample_shapes import sample_shape

FIXED = {"variance_type": "fixed_small"}


def signals(size: int = 64, channels: int = 2) -> UNet1DModel:
    """A network of signals."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (32, 32, 32), "extra_in_channels": 64}
    return UNet1DModel(sample_size=size, in_channels=channels, out_channels=channels, **widths).eval()


class Pointwise(ModelMixin, ConfigMixin):
    """A network that takes any number of dimensions."""

    @register_to_config
    def __init__(self, sample_size=(4, 6, 8), in_channels: int = 1, out_channels: int = 1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.scale * sample)


NETWORKS = {
    "signal": (signals, (2, 64)),
    "one channel": (lambda: signals(channels=1), (1, 64)),
    "a list": (lambda: Pointwise([10], 3, 3), (3, 10)),
    "volume": (Pointwise, (1, 4, 6, 8)),
    "image": (lambda: Pointwise((4, 6), 3, 3), (3, 4, 6)),
    "square": (lambda: Pointwise(4), (1, 4, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_have_the_network_s_shape(name):
    """As "latent" and "pt" (B, C, *), as "np" with channels last; "pil" is for images."""
    make, shape = NETWORKS[name]
    pipe = pipeline(make(), **FIXED)
    assert pipe.sample_shape == shape
    latent, pt, array = (sample(pipe, batch_size=2, output_type=kind) for kind in ("latent", "pt", "np"))
    assert latent.shape == pt.shape == (2, *shape) and array.shape == (2, *shape[1:], shape[0])
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, pt.movedim(1, -1).numpy())
    if len(shape) == 3:
        assert sample(pipe, output_type="pil")[0].size == (shape[2], shape[1])
        return
    with pytest.raises(ValueError, match="PIL has no images of shape .*output_type='np'"):
        pipe(num_inference_steps=2)


@pytest.mark.parametrize("name", ["signal", "one channel", "image"])
def test_saved_honestly(name, tmp_path):
    """What stock's DDPMPipeline would sample as images, or not at all, is not saved under its name."""
    make, shape = NETWORKS[name]
    pipe = pipeline(make(), **FIXED)
    image = len(shape) == 3
    assert pipe.portable == image
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ("DDPMPipeline" if image else "DDPMVLBPipeline")
    if not image:
        again = quiet(DDPMVLBPipeline.from_pretrained(tmp_path))
        torch.testing.assert_close(sample(again, output_type="latent"), sample(pipe, output_type="latent"))


def test_the_card_of_signals():
    """It speaks of samples, not of images of a square, asks for arrays, and says why stock has no part in it."""
    card = str(model_card(pipeline(signals(), **FIXED, levels=None, clip_sample=False), "me/audio"))
    assert "of samples of 64 with 2 channels of continuous values" in card and "64x64" not in card
    assert 'output_type="latent"' in card and "images of two dimensions" in card
    assert 'output_type="np"' in str(model_card(pipeline(signals(channels=1), **FIXED), "me/audio"))


def test_errors_of_each_value_of_a_signal():
    """Variances of each value are held against the signal's shape, and sampled with."""
    pipe = pipeline(signals(), **FIXED, num_train_timesteps=5)
    errors = SquaredErrors(torch.arange(5), torch.full((5,), 0.1, dtype=torch.float64), torch.full((5, 2, 64), 0.1))
    pipe.scheduler.store_few_steps((), errors, "per_pixel")
    assert sample(DDPMVLBPipeline(signals(), pipe.scheduler)).shape == (1, 2, 64)
    with pytest.raises(ValueError, match=r"\(2, 64\), but the network makes \(2, 32\)"):
        DDPMVLBPipeline(signals(32), pipe.scheduler)


def test_without_a_size():
    """A network that states no size can be scored, but not sampled: said before it is called, with the way."""
    pipe = pipeline(tiny_unet(size=None))
    assert pipe.sample_shape is None and not pipe.portable
    with pytest.raises(ValueError, match=r"no `sample_size`.*register_to_config\(sample_size=32\)"):
        sample(pipe)
    pipe.unet.register_to_config(sample_size=8)
    assert sample(pipe).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("size", [0, -3, True, 2.5, "8", [], [8, 0], [8, None]])
def test_sizes_that_are_none(size):
    """Refused in one line."""
    with pytest.raises(ValueError, match="`sample_size` must be a positive integer or a list"):
        sample_shape(Pointwise(size))
