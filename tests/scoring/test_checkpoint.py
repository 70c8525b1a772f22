"""A checkpoint as its commands take it: where it is looked for, its data, and fingerprints of its weights."""

import argparse
import time

import datasets
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet1DModel
from hub_server import HubServer
from huggingface_hub import HfApi
from networks import tiny_dit
from scoring_support import write_splits
from sharing_support import client_of
from torch import nn

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, path_chain
from ddpm_vlb.scoring.checkpoint import fingerprint_of, load_pipeline, network_shape
from ddpm_vlb.scoring.data import NetworkShape, load_scoring_data


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))


def test_the_fingerprint_is_that_of_the_weights():
    """Not of the object, its mode or how the memory is laid out."""
    first, other = network(), network()
    assert fingerprint_of(first) == fingerprint_of(other.eval().to(memory_format=torch.channels_last))
    assert fingerprint_of(first.half()) == fingerprint_of(network().half())


def test_the_fingerprint_knows_every_weight():
    """One bit of any of them, buffers included, is another network; so is another name, shape or type."""
    seen = {fingerprint_of(network())}
    for name in network().state_dict():
        changed = network()
        tensor = changed.state_dict()[name].view(-1)
        tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(9.0)) if tensor.is_floating_point() else tensor[-1] + 1
        seen.add(fingerprint_of(changed))
    assert len(seen) == 1 + len(network().state_dict())
    others = [nn.ModuleDict({"a": network()}), network().bfloat16(), network()[:1], nn.Module()]
    seen.update(map(fingerprint_of, others))
    assert len(seen) == 5 + len(network().state_dict())


def test_the_fingerprint_knows_shapes():
    """The same numbers as another matrix are another network."""
    wide, tall = nn.Linear(2, 8, bias=False), nn.Linear(8, 2, bias=False)
    tall.weight.data = wide.weight.data.reshape(2, 8)
    assert fingerprint_of(wide) != fingerprint_of(tall)


def test_a_misspelt_folder(hub, tmp_path):
    """A name that could be the Hub's is looked up there, and the message says that it is no folder either."""
    args = argparse.Namespace(model="runs/digts", revision=None, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="^--model runs/digts .*: there is no such folder, and of the Hub"):
        load_pipeline(args)


def test_a_misspelt_folder_without_a_connection(monkeypatch, tmp_path):
    """Is told at once: the Hub's client would try again, and sleep in between."""
    with HubServer() as server:
        client_of(server, monkeypatch, tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(ValueError, match="^--model runs/digts .*: there is no such folder, and of the Hub"):
        load_pipeline(argparse.Namespace(model="runs/digts", revision=None, cache_dir=str(tmp_path)))


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch, tmp_path):
    """As behind a firewall: the one question has an end."""
    asked = {}
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **options: asked.update(options) or 1 / 0)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_pipeline(argparse.Namespace(model="runs/digts", revision=None, cache_dir=str(tmp_path)))
    assert 0 < asked["timeout"] <= 30


def test_a_folder_has_no_revision(tmp_path):
    """The number would be recorded under a name that it is not of."""
    with pytest.raises(ValueError, match="--revision v1 has no effect: --model .* is a folder"):
        load_pipeline(argparse.Namespace(model=str(tmp_path), revision="v1", cache_dir=None))


@pytest.mark.parametrize("channels", [1, 2])
def test_signals_are_arrays_of_their_shape(tmp_path, channels):
    """The network's own shape (C, L) is what its data must have: lists and arrays, and (L,) for one channel."""
    config = {"sample_size": 64, "block_out_channels": (32, 32, 32), "extra_in_channels": 64}
    unet = UNet1DModel(in_channels=channels, out_channels=channels, **config)
    pipe = DDPMVLBPipeline(unet, DDPMVLBScheduler(num_train_timesteps=20, levels=None, clip_sample=False))
    network = network_shape(pipe, argparse.Namespace(model="m"))
    assert network == NetworkShape(channels, (64,), None, None)
    x_0 = np.random.default_rng(0).standard_normal((6, channels, 64)).astype(np.float32)
    nested = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    features = {"x": nested, "y": datasets.Array2D((channels, 64), "float32"), "z": nested}
    columns = {"x": x_0.tolist(), "y": list(x_0), "z": x_0[:, :, 1:].tolist()}
    if channels == 1:
        columns, features = columns | {"flat": x_0[:, 0].tolist()}, features | {"flat": nested.feature}
    folder = write_splits(tmp_path / "set", {"train": columns, "test": columns}, **features)
    where = {"dataset_name": folder, "cache_dir": str(tmp_path / "cache")}
    for column in [name for name in columns if name != "z"]:
        data = load_scoring_data(network, image_column=column, **where)
        assert torch.equal(data.batch(data.scored, [4, 1])[0], torch.from_numpy(x_0[[4, 1]]))
    with pytest.raises(ValueError, match=rf"\({channels}, 63\), but the model takes \({channels}, 64\)"):
        load_scoring_data(network, image_column="z", **where)


def test_levels_are_asked_for_where_no_chain_states_them():
    """A transformer of images is scored on theirs; a chain that was set is contradicted."""
    pipe, args = (
        DDPMVLBPipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler()),
        argparse.Namespace(levels=17, model=""),
    )
    assert network_shape(pipe, args).levels == 17
    pipe.chain = path_chain(pipe.scheduler, None)
    with pytest.raises(ValueError, match="--levels 17 contradicts"):
        network_shape(pipe, args)
