"""A checkpoint as its commands take it: fingerprints of its weights."""

import torch
from torch import nn

from ddpm_vlb.scoring.checkpoint import fingerprint_of


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
