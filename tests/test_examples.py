"""The single-file programs of examples/: each runs, says something true, and can be copied out of the repository."""

import ast
import copy
import functools
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from networks import pipeline as tiny_pipeline
from networks import seeded, tiny_unet
from PIL import Image
from processes import fresh_accelerate  # noqa: F401

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, fit_pilot, step_kl

FOLDER = Path(__file__).parents[1] / "examples"
PROGRAMS = "class_conditional digits dit_latents flow_matching outliers score_stock_checkpoint signals_1d".split() + [
    "compress_digits",
    "policy_gradient",
    "text_to_image_validation",
]
# Two programs in one, training and tuning; thirteen data sets and four scores; options, and what they refuse.
LINES = {"policy_gradient": 150, "outliers": 200, "text_to_image_validation": 200}
UNIFORM = 4.0875  # log2(17) bits/dim


@pytest.fixture
def program(request, tmp_path, monkeypatch):
    """A program as a module, loaded by its path, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A pilot of the usual size would take most of the time; with a smaller one the estimate is as unbiased.
    monkeypatch.setattr(module, "fit_pilot", functools.partial(fit_pilot, num_calls=128), raising=False)
    return module


def runs(name):
    """The program of this name for a test."""
    return pytest.mark.parametrize("program", [name], indirect=True, ids=[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_fits_on_a_page_and_stands_alone(name):
    """At most 100 lines, or `LINES`; nothing is imported but what is installed, of this package its public names."""
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LINES.get(name, 100)
    tree = ast.parse(text)
    assert f"python examples/{name}.py" in ast.get_docstring(tree)
    installed = {"accelerate", "datasets", "ddpm_vlb", "diffusers", "numpy", "PIL", "sklearn", "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= installed | sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in installed | sys.stdlib_module_names
            assert not node.module.startswith("ddpm_vlb.")
    assert not {path.stem for path in FOLDER.glob("*.py")} & (installed | sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["outliers", "score_stock_checkpoint"])
def test_the_model_is_an_option(name, tmp_path, monkeypatch):
    """Of the programs that take a pipeline, as it is of the commands: a folder that is none is told."""
    monkeypatch.setattr(sys, "argv", [name, "--model", str(tmp_path / "nowhere")])
    with pytest.raises((SystemExit, OSError), match="nowhere"):
        runpy.run_path(FOLDER / f"{name}.py", run_name="__main__")


@runs("digits")
def test_digits(program, tmp_path, capsys):
    """A few steps bring the bound below a uniform code, and stock diffusers loads what is saved."""
    score = program.main(steps=25, num_test=8, folder="trained")
    assert score.num_images == 8 and 1 < score.bits_per_dim < UNIFORM
    assert "uniform: 4.09" in capsys.readouterr().out
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path / "trained"), DDPMPipeline)


@runs("digits")
def test_baselines(program):
    """Of images that are all the same, the histogram knows each pixel, up to its prior; of random ones nothing."""
    same = torch.full((1000, 1, 8, 8), -1.0)
    random = torch.randint(0, 17, (2000, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 8 - 1
    codes = program.baselines(same, same)
    assert codes["histogram of each pixel"] == pytest.approx(-torch.tensor(1000.5 / 1008.5).log2().item(), rel=1e-4)
    assert codes["lzma"] < 0.05
    codes = program.baselines(random[:1000], random[1000:])
    assert codes["uniform"] == pytest.approx(UNIFORM, abs=1e-4)
    # Fitting 16 free frequencies of each pixel to 1000 images costs 16 / (2 x 1000 ln 2) bits on others.
    assert codes["histogram of each pixel"] - UNIFORM == pytest.approx(0.0115, abs=0.004)
    assert codes["lzma"] > UNIFORM


@runs("class_conditional")
def test_class_conditional(program, tmp_path):
    """Both scores are of the same images, the label matters, and the grid has a column for each digit."""
    told, untold = program.main(steps=15, num_test=8, sampling_steps=3)
    assert told.num_images == untold.num_images == 8 and not torch.equal(told.per_image, untold.per_image)
    assert told.bits_per_dim < 2 * UNIFORM and untold.bits_per_dim < 2 * UNIFORM
    assert Image.open(tmp_path / "class_conditional.png").size == (320, 128)


@runs("dit_latents")
def test_dit_latents(program, tmp_path):
    """A short training comes near the unit Gaussian that it starts from: log(2 pi e) / 2 nats/dim, or better."""
    score = program.main(steps=60, num_test=64, sampling_steps=3)
    assert 0 < score.nats_per_dim < 2.5
    assert Image.open(tmp_path / "dit_latents.png").size == (320, 128)


@runs("dit_latents")
def test_linear_coder(program):
    """Latents have variance 1; decoding loses what the first 16 components lack, encoding again nothing more."""
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    coder = program.LinearCoder(images)
    latents = coder.encode(images)
    assert latents.shape == (200, 4, 2, 2)
    torch.testing.assert_close(latents.square().mean(0), torch.ones(4, 2, 2), rtol=1e-4, atol=0)
    torch.testing.assert_close(coder.encode(coder.decode(latents)), latents, rtol=1e-3, atol=1e-4)


@runs("flow_matching")
def test_flow_matching(program, tmp_path):
    """The best ten steps are better than ten even ones, and stock diffusers loads what is saved."""
    scores = program.main(steps=8, num_test=4, num_fit=32, folder="trained")
    assert 0 < scores["the best 10"].bits_per_dim < min(scores["10 even steps"].bits_per_dim, UNIFORM)
    assert Image.open(tmp_path / "flow_matching.png").size == (320, 192)
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path / "trained"), DDPMPipeline)


@runs("signals_1d")
def test_signals(program, tmp_path):
    """Signals lie on their 256 levels, the bound on them is sane, and the samples are signals."""
    signals = program.plucked_strings(8)
    levels = (signals + 1) * 255 / 2
    assert signals.shape == (8, 1, 64) and (levels - levels.round()).abs().max() < 1e-4
    score = program.main(steps=40, num_test=8, sampling_steps=10)
    assert 2.4 < score.bits_per_dim < 8  # the noise alone, and a uniform code
    samples = torch.load(tmp_path / "signals_1d.pt")
    assert samples.shape == (32, 1, 64) and samples.isfinite().all() and samples.abs().max() < 3


@runs("policy_gradient")
def test_policy_gradient(program, tmp_path, monkeypatch, capsys):
    """The network that was is its own reference, the tuned one is another; the picture holds both and the curve."""
    monkeypatch.setattr(program, "make_unet", tiny_unet)
    before, after = program.main(steps=5, rounds=1, batch=16, num_test=2)
    assert before.num_images == after.num_images == 2 and not torch.equal(before.per_image, after.per_image)
    said = capsys.readouterr().out.splitlines()
    assert "KL 0.00 +- 0.00 nats" in said[0] and "KL 0.00" not in said[1]
    assert Image.open(tmp_path / "policy_gradient.png").size == (720, 240)


@runs("compress_digits")
def test_compress_digits(program, capsys):
    """Every pixel comes back, and what the file is compared with is long enough to be true."""
    scheduler = DDPMVLBScheduler(num_train_timesteps=50, variance_type="learned_range", levels=17)
    DDPMVLBPipeline(tiny_unet(), scheduler).save_pretrained("tiny")
    size = program.main("tiny", num_test=6, num_fit=16, steps=3)
    said = capsys.readouterr().out
    assert f"6 images: {size} bytes" in said and "raw: 384" in said and "Every pixel came back" in said


@runs("compress_digits")
def test_other_codecs_of_noise(program):
    """They take what noise takes, its entropy and little more."""
    noise = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    sizes = program.others(noise)
    assert sizes.pop("raw") == 2560 and all(2500 < size < 2800 for size in sizes.values())


@pytest.fixture
def policy(program):
    """A pipeline of a tiny network, what it sampled, and its copy, which is the reference."""
    pipe = tiny_pipeline()
    return pipe, pipe(16, generator=seeded(), **program.WALK), copy.deepcopy(pipe.unet).requires_grad_(False)


@runs("policy_gradient")
def test_the_surrogate_on_policy_is_reinforce(program, policy):
    """With the weights that sampled the ratio is 1 and the divergence 0, exactly; the gradient is A grad log p."""
    pipe, (_, walk), reference = policy[0], policy[1].to_tuple(), policy[2]
    advantage, weights = torch.linspace(-1, 2, 16), list(pipe.unet.parameters())
    for k in (0, 8):
        own, was = program.outputs(walk, k, pipe.unet, reference)
        loss = program.surrogate(walk, k, own, was, advantage)
        assert torch.equal(loss, -advantage.mean())
        reinforce = -(advantage * walk.log_prob(walk.reverse, own, k)).mean()
        found, expected = (torch.autograd.grad(of, weights, retain_graph=True) for of in (loss, reinforce))
        size = max(float(part.abs().max()) for part in expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)


@runs("policy_gradient")
def test_the_surrogate_off_policy_is_clipped_and_pays_for_its_divergence(program, policy):
    """A step that is more probable by CLIP already is not pushed on, nor one that is less so down; the KL is exact."""
    walk, k = policy[1].trajectory, 4
    own = walk.outputs[:, k] + 0.02 * torch.randn(16, 2, 8, 8, generator=seeded(1))
    own.requires_grad_()
    ratio = walk.log_ratio(walk.reverse, own, k).exp()
    assert (ratio > 1 + program.CLIP).any() and (ratio < 1 - program.CLIP).any()
    for sign, pushed in ((1.0, ratio < 1 + program.CLIP), (-1.0, ratio > 1 - program.CLIP)):
        (slope,) = torch.autograd.grad(
            program.surrogate(walk, k, own, own.detach(), torch.full((16,), sign)), own, retain_graph=True
        )
        assert torch.equal(slope.flatten(1).abs().sum(1) > 0, pushed)
    far = walk.outputs[:, k] + torch.randn(16, 2, 8, 8, generator=seeded(2))
    kl, back = (step_kl(walk.reverse, *pair, walk.states[:, k], walk.t(k)).mean() for pair in ((own, far), (far, own)))
    alone = program.surrogate(walk, k, own, far, torch.zeros(16))
    torch.testing.assert_close(alone, program.KL_WEIGHT * kl)
    assert kl > 1 and abs(back / kl - 1) > 1e-3


@runs("policy_gradient")
def test_a_round_makes_what_was_rewarded_more_probable(program, policy):
    """It gives out the reward of its samples, and correlates the change of their probability with their advantage."""
    pipe, sampled, reference = policy
    ink = sampled.images.mean((1, 2, 3))
    again = type("Again", (), {"unet": pipe.unet, "__call__": lambda *given, **options: sampled})()
    (told,) = program.tune(again, reference, lambda x: x.mean((1, 2, 3)), 1, 16)
    assert told == program.mean_and_error(ink)
    walk, gain = sampled.trajectory, torch.zeros(16)
    with torch.no_grad():
        for k in range(9):
            gain += walk.log_ratio(walk.reverse, program.outputs(walk, k, pipe.unet, reference)[0], k)
    assert torch.corrcoef(torch.stack([gain, ink]))[0, 1] > 0.5


@runs("score_stock_checkpoint")
def test_score_stock_checkpoint(program, tmp_path, monkeypatch):
    """The whole chain is the best; a stock folder of the user's is scored as it is, without training."""
    scores = program.main(steps=4, num_test=8)
    assert list(scores) == [1000, 100, 25]
    assert scores[1000].bits_per_dim < scores[100].bits_per_dim < scores[25].bits_per_dim
    program.train_stock(torch.zeros(64, 1, 8, 8), str(tmp_path / "stock"), steps=2)
    monkeypatch.delattr(program, "train_stock")
    scores = program.main(folder="stock", num_test=2)
    assert all(0 < score.bits_per_dim < float("inf") for score in scores.values())
