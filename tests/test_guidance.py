"""Classes of a batch and guidance to them, in the pipeline."""

import pytest
import torch
from networks import pipeline, sample, spy_on_step, tiny_dit, tiny_unet

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
