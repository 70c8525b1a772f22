"""DDPMVLBPipeline: sampling with real (tiny) networks, and files that stock diffusers and this package both read."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from networks import pipeline, quiet, sample, scheduler, seeded, spy_on_step, tiny_dit, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def aligned(pipe):
    """Loaded weights lie where the file has them; on some processors another alignment rounds sums otherwise."""
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    return pipe


# --- sampling


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
def test_unconditional_samples_equal_a_hand_loop(variance_type):
    """The pipeline is: noise, one network call and one scheduler step for each timestep, then [-1, 1] -> [0, 1]."""
    unet = tiny_unet(out=2 if variance_type.startswith("learned") else 1)
    pipe = pipeline(unet, variance_type=variance_type)
    images = sample(pipe, batch_size=3, steps=5)
    by_hand, generator = scheduler(variance_type), seeded()
    by_hand.set_timesteps(5)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in by_hand.timesteps:
            x = by_hand.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [8, (8, 8), (4, 12)])
def test_shapes(channels, size):
    """Any number of channels and non-square sizes come out as the network's config says."""
    pipe = pipeline(tiny_unet(channels, size=size))
    height, width = (size, size) if isinstance(size, int) else size
    images = sample(pipe, batch_size=2)
    assert images.shape == (2, channels, height, width) and images.isfinite().all()
    assert sample(pipe, batch_size=2, output_type="np").shape == (2, height, width, channels)


def test_output_types_agree():
    """pil, np and pt are the same images: np is pt with channels last, pil is np rounded to 8 bits."""
    for channels, mode in ((1, "L"), (3, "RGB")):
        pipe = pipeline(tiny_unet(channels, size=(8, 4)))
        pt, array, pil = (sample(pipe, batch_size=2, output_type=kind) for kind in ("pt", "np", "pil"))
        assert isinstance(pt, torch.Tensor) and isinstance(array, np.ndarray) and isinstance(pil, list)
        assert pt.dtype == torch.float32 and float(pt.min()) >= 0 and float(pt.max()) <= 1
        np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        for image, expected in zip(pil, array, strict=True):
            assert isinstance(image, PIL.Image.Image) and image.mode == mode and image.size == (4, 8)
            pixels = np.asarray(image).reshape(8, 4, channels)
            np.testing.assert_array_equal(pixels, (expected * 255).round().astype(np.uint8))


def test_return_dict():
    """The output is diffusers' ImagePipelineOutput, PIL by default, or a tuple."""
    pipe = pipeline()
    result = pipe(num_inference_steps=2, generator=seeded())
    assert isinstance(result, ImagePipelineOutput) and isinstance(result.images[0], PIL.Image.Image)
    (images,) = pipe(num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, sample(pipe, steps=2))


def test_steps_and_timesteps(monkeypatch):
    """A number of steps, the steps themselves, or neither (the whole chain) decide what the network is told."""
    pipe = pipeline(num_train_timesteps=20)
    told = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: told.append(int(inputs[1][0])))
    for arguments, expected in (
        ({"num_inference_steps": 4}, [15, 10, 5, 0]),
        ({"timesteps": [19, 7, 2]}, [19, 7, 2]),
        ({"timesteps": torch.tensor([19, 0])}, [19, 0]),
        ({}, list(range(20))[::-1]),
    ):
        told.clear()
        pipe(output_type="pt", generator=seeded(), **arguments)
        assert told == expected


def test_generator_decides_the_samples():
    """Equal generators give equal images, others different ones; without one torch's global seed decides."""
    pipe = pipeline()
    assert torch.equal(sample(pipe, 1), sample(pipe, 1)) and not torch.equal(sample(pipe, 1), sample(pipe, 2))
    torch.manual_seed(3)
    first = sample(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(first, sample(pipe, generator=None))


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_list_of_generators_equals_single_runs(kind):
    """With a generator for each image an image does not depend on the batch that it is sampled in."""
    pipe = pipeline(tiny_unet() if kind == "unet" else tiny_dit())
    labels = {} if kind == "unet" else {"class_labels": [2, 0, 1]}
    together = sample(pipe, batch_size=3, generator=[seeded(i) for i in range(3)], **labels)
    for i in range(3):
        label = {key: [value[i]] for key, value in labels.items()}
        torch.testing.assert_close(together[i : i + 1], sample(pipe, i, **label), rtol=0, atol=1e-5)


def test_callback():
    """The callback sees every step with its timestep and image, and may replace the image."""
    pipe = pipeline(num_train_timesteps=20)
    seen = []

    def replace(pipe_, step, timestep, tensors):
        seen.append((pipe_ is pipe, step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.full_like(tensors["latents"], -0.5)}

    images = sample(pipe, batch_size=2, callback_on_step_end=replace)
    assert seen == [(True, i, t, (2, 1, 8, 8)) for i, t in enumerate([15, 10, 5, 0])]
    assert torch.equal(images, torch.full_like(images, 0.25))
    untouched = sample(pipe, batch_size=2, callback_on_step_end=lambda *arguments: None)
    assert torch.equal(untouched, sample(pipe, batch_size=2))
    names = []
    sample(pipe, callback_on_step_end=lambda p, i, t, x: names.append(set(x)), callback_on_step_end_tensor_inputs=[])
    assert names == [set()] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network(dtype, monkeypatch):
    """A network in half is called in half, while the chain runs in float32; the images are near the float32 ones.

    One network call in bfloat16 is off by about 2^-8 of its output, which 4 steps of a clipped chain do not grow.
    """
    pipe = pipeline()
    reference = sample(pipe, batch_size=2)
    pipe.unet.to(dtype)
    calls = spy_on_step(pipe, monkeypatch)
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    images = sample(pipe, batch_size=2)
    assert set(inputs) == {dtype}
    assert {call["image"].dtype for call in calls} == {call["output"].dtype for call in calls} == {torch.float32}
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, reference, rtol=0, atol=0.03)


def test_progress_bar(capfd):
    """The progress bar obeys set_progress_bar_config: off it writes nothing, on it counts the steps."""
    pipe = pipeline()
    sample(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="sampling")
    sample(pipe)
    written = capfd.readouterr().err
    assert "sampling" in written and "4/4" in written


def test_sampling_builds_no_graph():
    """Images carry no gradient though the network's parameters do."""
    assert not sample(pipeline()).requires_grad


# --- saving and loading


SAVED = {
    "fixed_small": ({"out": 1}, {"variance_type": "fixed_small"}),
    "fixed_small_rgb": ({"channels": 3, "out": 3}, {"variance_type": "fixed_small", "num_train_timesteps": 50}),
    "learned_range": ({}, {"beta_schedule": "squaredcos_cap_v2"}),
    "learned_range_rgb": ({"channels": 3}, {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}),
    "fixed_large": ({"out": 1}, {"variance_type": "fixed_large", "clip_sample_range": 0.8}),
    "trained_betas": ({}, {"trained_betas": [0.01 * (i + 1) for i in range(20)], "num_train_timesteps": 20}),
    "levels": ({"out": 1}, {"variance_type": "fixed_small", "levels": 17}),
}
NOT_PORTABLE = {
    "learned": ({}, {"variance_type": "learned"}),
    "class_conditional": ({"classes": 4}, {}),
    "unused_variance": ({}, {"variance_type": "fixed_small"}),
}
LOAD_IN_STOCK = """
import json, sys, warnings
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
messages = []
handler = __import__("logging").Handler(level=30)
handler.emit = lambda record: messages.append(record.getMessage())
__import__("logging").getLogger("diffusers").addHandler(handler)
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    messages.clear()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder)
    except Exception as error:
        results[folder.name] = {"error": type(error).__name__}
        continue
    pipe.set_progress_bar_config(disable=True)
    results[folder.name] = {
        "classes": [type(x).__name__ for x in (pipe, pipe.unet, pipe.scheduler)],
        "modules": [type(x).__module__.split(".")[0] for x in (pipe, pipe.unet, pipe.scheduler)],
        "messages": list(messages),
    }
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=10, generator=generator, output_type="np").images
    torch.save(torch.from_numpy(images).permute(0, 3, 1, 2), folder / "samples.pt")
assert "ddpm_vlb" not in sys.modules
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Pipelines saved by us, and what a process that knows nothing of this package makes of their folders."""
    root = tmp_path_factory.mktemp("saved")
    for name, (network, config) in (SAVED | NOT_PORTABLE).items():
        pipeline(tiny_unet(**network), **config).save_pretrained(root / name)
    pipeline(tiny_dit()).save_pretrained(root / "dit")
    run = subprocess.run([sys.executable, "-c", LOAD_IN_STOCK, str(root)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return root, json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SAVED)
def test_portable_index_is_stock_s(saved, name):
    """model_index.json names DDPMPipeline, UNet2DModel and DDPMScheduler of diffusers, and nothing of ours."""
    index = json.loads((saved[0] / name / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"] and index["unet"] == ["diffusers", "UNet2DModel"]
    assert "ddpm_vlb" not in json.dumps(index)


@pytest.mark.parametrize("name", SAVED)
def test_stock_loads_and_samples_the_same(saved, name):
    """In a process without this package the folder gives stock classes, and the images of the same generator.

    Ten steps in float32 with stock's float32 tables; images of order 1 are off by some 1e-5, against
    differences of order 1 for any other algorithm, seed or weights.
    """
    root, results = saved
    assert results[name]["classes"] == ["DDPMPipeline", "UNet2DModel", "DDPMScheduler"]
    assert results[name]["modules"] == ["diffusers"] * 3
    ours = sample(quiet(DDPMVLBPipeline.from_pretrained(root / name)), batch_size=2, steps=10)
    torch.testing.assert_close(torch.load(root / name / "samples.pt"), ours, rtol=0, atol=3e-5)
    # Images that are all black and white would agree whatever the algorithm.
    assert float(((ours > 0) & (ours < 1)).float().mean()) > 0.2


@pytest.mark.parametrize("name", [name for name in SAVED if name != "levels"])
def test_stock_loads_without_a_warning(saved, name):
    """Where the data has 256 levels, stock has nothing to say of our files."""
    assert saved[1][name]["messages"] == []


@pytest.mark.parametrize("name", SAVED | NOT_PORTABLE | {"dit": None})
def test_ours_loads_what_it_saved(saved, name, diffusers_log):
    """Our class loads every folder: our scheduler with the same config and tables, the same weights, silently."""
    root, _ = saved
    network, config = (SAVED | NOT_PORTABLE).get(name, ({}, {}))
    original = pipeline(tiny_dit() if name == "dit" else tiny_unet(**network), **config)
    loaded = quiet(DDPMVLBPipeline.from_pretrained(root / name))
    assert type(loaded) is DDPMVLBPipeline and type(loaded.scheduler) is DDPMVLBScheduler
    own, other = (dict(pipe.scheduler.config) for pipe in (original, loaded))
    assert {k: v for k, v in other.items() if k in own and not k.startswith("_")} == {
        k: v for k, v in own.items() if not k.startswith("_")
    }
    assert torch.equal(loaded.scheduler.betas, original.scheduler.betas)
    assert loaded.scheduler.reverse_process().levels == original.scheduler.reverse_process().levels
    for (key, a), (other_key, b) in zip(
        original.unet.state_dict().items(), loaded.unet.state_dict().items(), strict=True
    ):
        assert key == other_key and torch.equal(a, b)
    labels = {"class_labels": 1} if name in ("dit", "class_conditional") else {}
    assert torch.equal(sample(aligned(loaded), **labels), sample(original, **labels))


def test_ours_loads_its_levels_silently(saved, diffusers_log):
    """Loading our own files with our own class warns of nothing, other levels included."""
    pipe = DDPMVLBPipeline.from_pretrained(saved[0] / "levels")
    assert pipe.scheduler.levels == 17
    assert not diffusers_log


@pytest.mark.parametrize("name", NOT_PORTABLE | {"dit": None})
def test_what_stock_would_get_wrong_is_ours_by_name(saved, name):
    """learned, class-conditional and 2C channels under a fixed variance carry our class name: stock refuses them."""
    root, results = saved
    index = json.loads((root / name / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMVLBPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert results[name] == {"error": "AttributeError"}


def test_saving_twice_is_stable(saved, tmp_path):
    """Loading and saving again writes the same configuration."""
    root, _ = saved
    for name in ("learned_range", "levels", "learned"):
        DDPMVLBPipeline.from_pretrained(root / name).save_pretrained(tmp_path / name)
        for file in ("model_index.json", "scheduler/scheduler_config.json"):
            first, second = (json.loads((folder / name / file).read_text()) for folder in (root, tmp_path))
            second.pop("_name_or_path", None)  # where it was loaded from; diffusers' own
            assert first == second


def test_repr_and_config_name_the_real_classes():
    """In memory the pipeline does not pretend: its components are ours."""
    pipe = pipeline()
    assert type(pipe.components["scheduler"]) is DDPMVLBScheduler and set(pipe.components) == {"unet", "scheduler"}
    assert "DDPMVLBPipeline" in repr(pipe).splitlines()[0]


def test_a_chain_without_a_last_step_is_not_portable():
    """Epsilon under zero-terminal SNR: the whole chain cannot be sampled, so that stock's default call would fail."""
    pipe = pipeline(tiny_unet(out=1), variance_type="fixed_small", rescale_betas_zero_snr=True)
    assert not pipe.portable
    with pytest.raises(ValueError, match="zero-terminal SNR"):
        sample(pipe, steps=1000)
    assert sample(pipe, steps=10).isfinite().all()


def test_swapped_in_scheduler_stays(tmp_path):
    """A DDIM put into the pipeline is saved and loaded as DDIM."""
    pipe = pipeline(tiny_unet(3))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    before = sample(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = quiet(DDPMVLBPipeline.from_pretrained(tmp_path))
    assert type(loaded.scheduler) is DDIMScheduler
    assert torch.equal(sample(aligned(loaded)), before)


def test_our_scheduler_can_be_passed_to_stock_s_loader(saved):
    """DiffusionPipeline.from_pretrained with our scheduler passed in gives the stock pipeline with it."""
    from diffusers import DiffusionPipeline

    folder = saved[0] / "learned_range"
    own = DDPMVLBScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = quiet(DiffusionPipeline.from_pretrained(folder, scheduler=own))
    assert type(pipe) is DDPMPipeline and type(pipe.scheduler) is DDPMVLBScheduler
    torch.testing.assert_close(sample(pipe), sample(DDPMVLBPipeline.from_pretrained(folder)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half(saved, dtype):
    """torch_dtype reaches the network, and the pipeline samples."""
    pipe = quiet(DDPMVLBPipeline.from_pretrained(saved[0] / "learned_range", torch_dtype=dtype))
    assert pipe.unet.dtype == dtype and sample(pipe).isfinite().all()


# --- errors


@pytest.mark.parametrize(
    ("classes", "arguments", "message"),
    [
        (None, {"batch_size": 0}, "batch_size"),
        (None, {"batch_size": 2.0}, "batch_size"),
        (None, {"output_type": "latents"}, "output_type.*pil.*latent"),
        (None, {"callback_on_step_end_tensor_inputs": ["image"]}, "latents.*image"),
        (None, {"num_inference_steps": 3, "timesteps": [3, 2]}, "only one"),
        (None, {"num_inference_steps": 1001}, "num_inference_steps"),
        (None, {"num_inference_steps": 0}, "num_inference_steps"),
        (None, {"num_inference_steps": None, "timesteps": [2, 3]}, "descending"),
        (None, {"class_labels": 0}, "unconditional"),
        (None, {"guidance_scale": 2.0}, "class_labels"),
        (4, {}, "class-conditional"),
        (4, {"guidance_scale": 2.0}, "class_labels"),
        (4, {"class_labels": 4}, r"0 \.\. 3"),
        (4, {"class_labels": -1}, r"0 \.\. 3"),
        (4, {"class_labels": 1, "null_class_label": 4}, r"0 \.\. 3"),
        (4, {"class_labels": [0, 1, 2], "batch_size": 2}, "one for each of the"),
        (4, {"class_labels": 0.5}, "integer"),
    ],
)
def test_errors(classes, arguments, message):
    """What the pipeline cannot do is refused by name before the network is called."""
    pipe = pipeline(tiny_unet(classes=classes))
    pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**({"output_type": "pt", "num_inference_steps": 2} | arguments))


def test_pil_needs_one_or_three_channels():
    """Four channels have no PIL image: refused before sampling, with the way out."""
    pipe = pipeline(tiny_unet(4))
    with pytest.raises(ValueError, match="4 channels.*'np'.*'pt'"):
        pipe(num_inference_steps=2)


def test_wrong_number_of_generators():
    """A list of generators of another length than the batch is refused."""
    with pytest.raises(ValueError):
        sample(pipeline(), batch_size=3, generator=[seeded(0), seeded(1)])


def test_timesteps_need_a_scheduler_that_takes_them():
    """Custom timesteps under a scheduler without them are refused by the scheduler's name."""
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipe(timesteps=[5, 3], output_type="pt")


def test_network_that_does_not_fit_the_variance_type():
    """A C-channel network under learned_range is refused by the first step, with the number of channels to build."""
    with pytest.raises(ValueError, match="out_channels=2"):
        sample(pipeline(tiny_unet(out=1)))
