"""The codec's network and process compute in float64 from end to end, whatever the network is made of."""

import warnings

import numpy as np
import pytest
import torch
from diffusers.models.activations import FP32SiLU
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from networks import attentive, tiny_dit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_vlb import BitsBackCodec, DDPMVLBScheduler, GaussianPath
from ddpm_vlb.exact_networks import exact_network


class Coarse(TorchDispatchMode):
    """Collects the operations that yield floating-point numbers other than float64."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """What the operation gives."""
        out = operation(*args, **(kwargs or {}))
        for own in tree_leaves(out):
            if isinstance(own, torch.Tensor) and own.is_floating_point() and own.dtype != torch.float64:
                self.found.append((str(operation), own))
        return out


def coarse(model, channels=1, path=None, variance_type="learned_range", **told):
    """Coarse operations of one step of the codec."""
    scheduler = DDPMVLBScheduler(variance_type=variance_type, levels=17)
    reverse = path.reverse_process(levels=17) if path else scheduler.reverse_process(num_inference_steps=3)
    codec, j = BitsBackCodec(model, reverse), np.arange(128 * channels).reshape(2, channels, 8, 8) % 9 - 4
    with Coarse() as mode:
        codec.coder.pushed_with(1, j, told)
    return mode.found


LABELS = {"class_labels": torch.tensor([2, 0])}
NETWORKS = {
    "positional": lambda: (attentive(),),
    "fourier": lambda: (attentive(time_embedding_type="fourier"),),
    "learned": lambda: (attentive(time_embedding_type="learned", num_train_timesteps=1000),),
    "classes": lambda: (attentive(num_class_embeds=3), LABELS),
    "classes as timesteps": lambda: (attentive(class_embed_type="timestep"), LABELS),
    "scale and shift": lambda: (attentive(resnet_time_scale_shift="scale_shift"),),
    "resnets between": lambda: (attentive(downsample_type="resnet", upsample_type="resnet"),),
    "a transformer": lambda: (tiny_dit(channels=1), LABELS),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_is_computed_in_less_than_float64(kind):
    """In U-Nets with attention and every embedding of diffusers', and in a transformer."""
    model, *told = NETWORKS[kind]()
    assert not coarse(model, **told[0] if told else {})


@pytest.mark.parametrize("path", [GaussianPath.flow, GaussianPath.edm])
def test_nor_in_a_network_of_another_path(path):
    """Its scales of inputs and outputs too."""
    own = path(torch.tensor([0.1, 0.5, 0.9]))
    assert not coarse(own.network(attentive(out_channels=1)), path=own)


def processed_by(processor):
    """A U-Net whose attention is computed so, and the layers of it."""
    model = attentive()
    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    for layer in layers:
        layer.set_processor(processor())
    return model, layers


PROCESSORS = {"plain": AttnProcessor, "fused": AttnProcessor2_0, "sliced": lambda: SlicedAttnProcessor(2)}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_nor_in_attention_that_casts_up(kind):
    """To float32, which was up once: by either of its switches, in every processor."""
    model, layers = processed_by(PROCESSORS[kind])
    for layer in layers:
        layer.upcast_attention = layer.upcast_softmax = True
    assert layers and not coarse(model)


def test_what_is_coarse_is_found():
    """The network as it was before, in float64 but with its casts and its embedding of timesteps."""
    model, _ = processed_by(AttnProcessor)
    with Coarse() as mode, torch.no_grad():
        model.double()(torch.zeros(1, 1, 8, 8, dtype=torch.float64), 3)
    assert {"aten.sin.default", "aten._softmax.default"} <= {name for name, _ in mode.found}


def test_filters_of_skips_are_exact():
    """They are made in float32, of numbers that it holds."""
    options = {"out_channels": 3, "block_out_channels": (32, 64), "norm_num_groups": 32}
    down, up = ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D")
    model = attentive(3, down_block_types=down, up_block_types=up, **options)
    found = [own for _, own in coarse(model, channels=3, variance_type="fixed_small")]
    assert found and all(own.numel() <= 16 and torch.equal((64 * own).round(), 64 * own) for own in found)


def test_switches_are_turned_off_without_a_warning():
    """Diffusers warns who asks a model for what is in its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact_network(tiny_dit())


@pytest.mark.parametrize("layer", [FP32SiLU(), FP32LayerNorm(4), RMSNorm(4, 1e-5)], ids=lambda own: type(own).__name__)
def test_layers_that_are_float32_whatever_they_are_given_are_refused(layer):
    """But for files that say so."""
    model = torch.nn.Sequential(layer)
    with pytest.raises(ValueError, match=f"^`model` must compute in float64, but its {type(layer).__name__} does not"):
        exact_network(model)
    exact_network(model, torch.float32)
