"""Classes of a batch and guidance to them, in the pipeline."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from networks import pipeline, sample, spy_on_step, tiny_dit, tiny_unet

from ddpm_vlb import model_card

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_formula(kind, scale, monkeypatch):
    """The scheduler is given uncond + g (cond - uncond) in the mean half and cond in the variance half."""
    unet = tiny_unet(2, classes=4) if kind == "unet" else tiny_dit(2, classes=3)
    pipe = pipeline(unet)
    calls = spy_on_step(pipe, monkeypatch)
    sample(pipe, batch_size=2, class_labels=[0, 2], guidance_scale=scale)
    assert len(calls) == 4
    with torch.no_grad():
        for call in calls:
            t = torch.full((2,), int(call["timestep"]))
            cond = unet(call["image"], t, class_labels=torch.tensor([0, 2])).sample
            # The last label: of 4 for the U-Net; the DiT keeps label 3 besides its classes 0 .. 2.
            uncond = unet(call["image"], t, class_labels=torch.tensor([3, 3])).sample
            mean = uncond[:, :2] + scale * (cond[:, :2] - uncond[:, :2])
            expected = torch.cat([mean, cond[:, 2:]], dim=1)
            torch.testing.assert_close(call["output"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_unit_guidance_is_none(kind):
    """g = 1 is the conditional model itself, at one network evaluation per image and step."""
    unet = tiny_unet(2, classes=4) if kind == "unet" else tiny_dit()
    pipe = pipeline(unet)
    sizes = []
    unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    plain = sample(pipe, batch_size=2, class_labels=[0, 1])
    assert torch.equal(sample(pipe, batch_size=2, class_labels=[0, 1], guidance_scale=1.0), plain)
    assert set(sizes) == {2}
    assert not torch.allclose(sample(pipe, batch_size=2, class_labels=[0, 1], guidance_scale=4.0), plain, atol=1e-4)


def test_class_labels_decide_the_image():
    """Another class gives another image; one label for all is that label for each; a tensor works like a list."""
    pipe = pipeline(tiny_unet(classes=4))
    one = sample(pipe, batch_size=2, class_labels=1)
    assert torch.equal(one, sample(pipe, batch_size=2, class_labels=[1, 1]))
    assert torch.equal(one, sample(pipe, batch_size=2, class_labels=torch.tensor([1, 1])))
    assert not torch.allclose(one, sample(pipe, batch_size=2, class_labels=2), atol=1e-4)


def test_null_class_label_can_be_chosen():
    """The last label is the default; another one guides elsewhere; the class itself is refused."""
    pipe = pipeline(tiny_unet(classes=4))
    guided = sample(pipe, class_labels=1, guidance_scale=5.0)
    assert torch.equal(guided, sample(pipe, class_labels=1, guidance_scale=5.0, null_class_label=3))
    other = sample(pipe, class_labels=1, guidance_scale=5.0, null_class_label=0)
    assert not torch.allclose(other, guided, atol=1e-4)
    with pytest.raises(ValueError, match="null_class_label"):
        sample(pipe, class_labels=1, guidance_scale=5.0, null_class_label=1)


def test_guidance_of_a_fixed_variance_network():
    """Guidance needs no variance half."""
    pipe = pipeline(tiny_unet(out=1, classes=3), variance_type="fixed_small")
    assert sample(pipe, class_labels=0, guidance_scale=2.0).isfinite().all()


@pytest.mark.parametrize("two", [np.int64(2), np.uint8(2), torch.tensor(2)])
def test_counts_of_other_kinds(two):
    """Integers of numpy and of a tensor count images, steps and labels as Python's do."""
    pipe = pipeline(tiny_unet(classes=4))
    options = {"class_labels": np.int64(1), "guidance_scale": 2.0, "null_class_label": np.int64(3)}
    expected = sample(pipe, batch_size=2, class_labels=1, guidance_scale=2.0, steps=2)
    steps = two if isinstance(two, np.integer) else 2
    assert torch.equal(sample(pipe, batch_size=two, steps=steps, **options), expected)


@pytest.mark.parametrize("count", [2.0, np.float64(2), "2", None, -1, torch.tensor([1, 2])])
def test_counts_that_are_none(count):
    """Anything else is refused by name."""
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1"):
        sample(pipeline(), batch_size=count)


@pytest.mark.parametrize("labels", [None, 1, torch.ones(1, 32)])
@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_embeddings_of_classes(kind, labels):
    """Networks that take something else than labels are refused as such, and never called unconditional."""
    own = {"class_embed_type": kind, "num_class_embeds": 4}
    pipe = pipeline(UNet2DModel.from_config(tiny_unet().config, **own))
    assert pipe.num_classes is None and not pipe.portable
    with pytest.raises(ValueError, match=f"embeddings of classes .`class_embed_type='{kind}'"):
        sample(pipe, class_labels=labels)
    card = str(model_card(pipe, "me/embedded"))
    assert "A class-conditional" in card and "images = " not in card and "takes no class labels" in card
