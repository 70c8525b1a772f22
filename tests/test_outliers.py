"""examples/outliers.py: its data, its scores of networks in closed form, its AUROC, and benchmarks/outliers.py."""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import pipeline, tiny_unet
from sklearn.metrics import roc_auc_score

from ddpm_vlb import ForwardProcess, ReverseProcess, evaluate_vlb, fit_pilot, make_betas
from ddpm_vlb.runtime.image_data import load_image_data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("outliers_benchmark", ROOT / "benchmarks" / "outliers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def program(benchmark):
    """The example as the benchmark loads it."""
    return benchmark.example


class Wiener:
    """E[x_0 | x_t] of Gaussian data with the mean and the covariance of images: x_0_hat itself."""

    def __init__(self, images, forward):
        flat, abar = images.flatten(1).double(), forward.alphas_cumprod[:, None, None].double()
        self.mean, covariance = flat.mean(0), torch.cov(flat.T)
        noised = abar * covariance + (1 - abar) * torch.eye(len(covariance))
        self.root, self.gain = abar.sqrt()[:, 0], abar.sqrt() * torch.linalg.solve(noised, covariance)

    def __call__(self, x_t, timesteps):
        centred = x_t.flatten(1) - self.root[timesteps] * self.mean
        return (self.mean + torch.einsum("bd,bde->be", centred, self.gain[timesteps])).to(x_t.dtype).reshape(x_t.shape)


@pytest.fixture(scope="module")
def gaussian(program):
    """The scores of a Gaussian model of the digits."""
    train, _ = program.digits()
    reverse = ReverseProcess(
        ForwardProcess.from_betas(make_betas("linear", 40, 0.0025, 0.4)),
        prediction_type="sample",
        clip_sample=False,
        levels=17,
    )
    return program.Scores(Wiener(train, reverse.forward), reverse, train[:128])


def test_the_digits_are_those_of_the_commands(program):
    """The test digits are the command's, and no training digit is one."""
    ours, theirs = program.digits(), load_image_data()
    assert torch.equal(ours[1], next(theirs.test.batches(297)))
    assert len(ours[0]) == len(theirs.train) + len(theirs.validation)


def test_each_kind_is_of_images_on_the_levels(program):
    """As many as the digits, in [-1, 1], and none of them what it is made of."""
    test = program.digits()[1][:9]
    for kind, images in program.outliers(test).items():
        steps = (images + 1) * 8
        assert images.shape == test.shape and images.dtype == test.dtype and images.abs().max() <= 1, kind
        assert torch.equal(steps, steps.round()) and not (images == test).flatten(1).all(1).any(), kind


def test_every_codec_finds_blank_images_simple(program):
    """And uniform noise, of which none can take less than the log2(17) bits that there are, complex."""
    noise = torch.randint(17, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 8 - 1
    for codec in program.CODECS:
        assert program.coded(torch.full_like(noise, -1), codec).max() < program.coded(noise, codec).min(), codec
        assert program.coded(noise, codec).mean() > 4.08, codec


def test_terms_are_those_of_the_bound(program, gaussian):
    """With the same noise for all images, every one of them, in every order."""
    x_0, steps = program.digits()[1][:3], torch.arange(39, -1, -1)
    noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    every = noise.flip(0)[:, None].expand(-1, 3, -1, -1, -1)
    terms = program.terms_at(gaussian.model, gaussian.reverse, x_0, steps, seed=5)
    expected = evaluate_vlb(gaussian.model, gaussian.reverse, x_0, every).terms.flip(1)
    torch.testing.assert_close(terms, expected.double(), rtol=1e-5, atol=1e-5)


def test_terms_of_training_images_are_standard(program, gaussian):
    """The mean of the squares over n of them is (n - 1) / n, whatever the network."""
    train = program.digits()[0][:128]
    assert gaussian(train)["L_t"].mean() == pytest.approx(127 / 128, rel=1e-4)


def test_the_codec_is_chosen_on_training_images(gaussian):
    """The one whose lengths follow the bits best."""
    assert gaussian.spreads[gaussian.codec] == min(gaussian.spreads.values())


def test_what_is_more_likely_than_the_data_is_found_by_its_terms(program, gaussian):
    """The mean digit is no digit, but more likely than all of them under a Gaussian."""
    usual = gaussian(program.digits()[1][:32])
    mean = program.on_levels(program.digits()[0].mean(0))
    unusual = gaussian(mean.expand(32, -1, -1, -1).clone())
    assert program.auroc(usual["bits"], unusual["bits"])[0] < 0.02
    assert program.auroc(usual["L_t"], unusual["L_t"])[0] > 0.98


def test_the_correction_finds_what_is_simple(program, gaussian):
    """Digits without their right half, of which the bits alone miss many."""
    test = program.digits()[1][:32]
    usual, halves = gaussian(test), gaussian(program.outliers(test)["right half erased"])
    areas = {name: program.auroc(usual[name], halves[name])[0] for name in usual}
    assert areas["bits"] < 0.8 and areas["bits - codec"] > 0.9


def test_auroc(program):
    """Scikit-learn's, of ties too, and where two normals are a standard deviation apart the spread of many samples."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (2, 30), generator=generator).double()
    labels = np.repeat([0, 1], 30)
    assert program.auroc(a, b)[0] == pytest.approx(roc_auc_score(labels, torch.cat([a, b])), abs=1e-12)
    samples = torch.stack(
        [program.auroc(*(torch.randn(2, 60, generator=generator) + torch.tensor([[0], [1]])), 200) for _ in range(100)]
    )
    truth = 0.5 * (1 + torch.erf(torch.tensor(0.5)))
    assert abs(samples[:, 0].mean() - truth) < 4 * samples[:, 0].std() / 100**0.5
    assert samples[:, 1:].std(1).mean() == pytest.approx(samples[:, 0].std().item(), rel=0.2)


def test_resamples_keep_pairs_together(program):
    """Where each outlier is its digit and a little more, the pairs' common luck is in both."""
    a = torch.randn(80, generator=torch.Generator().manual_seed(0)).double()
    paired, apart = program.auroc(a, a + 0.5), program.auroc(a, a.roll(1) + 0.5)
    assert paired[1:].std() < 0.5 * apart[1:].std()


def test_a_folder_without_a_pipeline_is_one_line(program, tmp_path):
    """It says what to do."""
    with pytest.raises(SystemExit, match="^--model must hold .* has none: run `ddpm-vlb train`") as error:
        program.main(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "unet, levels, message",
    [
        ({"classes": 10}, 17, "no class labels.* has 10: run"),
        ({"channels": 3}, 17, r"samples of shape \(1, 8, 8\), .* has \(3, 8, 8\): run"),
        ({}, 256, "levels: 17, as the digits do, .* has 256: run"),
        ({}, None, "levels: 17, as the digits do, .* has None: run"),
    ],
    ids=str,
)
def test_a_pipeline_of_other_data_is_one_line(program, tmp_path, unet, levels, message):
    """Of labels, of other images, of other levels: what it has is told."""
    pipeline(tiny_unet(**unet), levels=levels).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        program.main(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_benchmark(benchmark, tmp_path, capsys, monkeypatch):
    """All of it on an untrained network and three of the kinds: a row for each in each table, and the picture."""
    monkeypatch.chdir(tmp_path)
    example = benchmark.example
    train, test = example.digits()
    kinds = dict(list(example.outliers(test[:6]).items())[:3])
    monkeypatch.setattr(example, "CALLS", 2)
    monkeypatch.setattr(example, "digits", lambda: (train[:32], test))
    monkeypatch.setattr(example, "outliers", lambda images: kinds)
    monkeypatch.setattr(example, "fit_pilot", functools.partial(fit_pilot, num_calls=64))
    pipeline(tiny_unet(), levels=17).save_pretrained("runs/digits")
    benchmark.main(["--seeds", "2", "--num_test", "6"])
    said = capsys.readouterr().out
    assert set(benchmark.HARD) < set(kinds) and all(said.count(f"\n| {kind} | ") == 3 for kind in kinds)
    assert all(f"\n| {codec} | " in said for codec in example.CODECS)
    assert (tmp_path / "outliers.png").stat().st_size > 10_000
