"""Baselines from their definitions, what the pictures show, and JSON files that are whole or not there."""

import json
import math
import os

import numpy as np
import pytest
import torch

from ddpm_vlb import VLBEstimate
from ddpm_vlb.runtime import files, reporting
from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.runtime.reporting import baselines

# Baselines


class Levels:
    """Images with the given integer levels (N, C, H, W)."""

    def __init__(self, levels, number):
        self.array, self.levels = torch.as_tensor(levels), number

    def batches(self, batch_size, limit=None):
        """As `Images.batches`."""
        return (self.array[:limit].float() * (2 / (self.levels - 1)) - 1).split(batch_size)


@pytest.fixture(scope="module")
def digits():
    return load_image_data()


def test_the_digits_baselines(digits):
    """Uniform is log2 17; the histogram agrees with one written from its definition; lzma needs bits, but fewer."""
    result = baselines(digits.train, digits.test)
    assert result["uniform"] == math.log2(17)
    fitted, scored = (
        np.stack([np.rint((x_0.double().numpy() + 1) * 8).astype(int).ravel() for x_0 in part])
        for part in (digits.train, digits.test)
    )
    bits = 0.0
    for position in range(64):
        counts = np.bincount(fitted[:, position], minlength=17) + 0.5
        bits -= np.log2(counts / counts.sum())[scored[:, position]].sum()
    assert result["histogram_per_position"] == pytest.approx(bits / scored.size, rel=1e-12)
    assert 0 < result["lzma"] < math.log2(17)


def test_baselines_of_constant_images():
    """The histogram has Jeffreys' prior: a level seen N times of N costs log2 (N + L/2) / (N + 1/2), another more."""
    train_images = Levels(np.full((100, 3, 4, 4), 7), 256)
    seen = baselines(train_images, Levels(np.full((20, 3, 4, 4), 7), 256))
    other = baselines(train_images, Levels(np.full((20, 3, 4, 4), 9), 256))
    assert seen["histogram_per_position"] == pytest.approx(math.log2(228 / 100.5))
    assert other["histogram_per_position"] == pytest.approx(math.log2(228 / 0.5))
    assert 0 < seen["lzma"] < 1


def test_baselines_of_noise():
    """Uniform noise compresses to no less than its entropy, and a histogram fitted on little data costs more."""
    rng = np.random.default_rng(0)
    noise = [Levels(rng.integers(0, 256, (50, 1, 16, 16)), 256) for _ in range(2)]
    result = baselines(*noise)
    assert result["uniform"] == 8 and result["lzma"] >= 8 and result["histogram_per_position"] > 8


def test_baselines_of_many_levels():
    """65536 levels are neither cut nor counted all at once."""
    k = np.arange(65536 - 256, 65536).reshape(64, 1, 2, 2)
    result = baselines(Levels(k, 65536), Levels(k, 65536))
    assert result["uniform"] == 16
    assert result["histogram_per_position"] == pytest.approx(math.log2((64 + 32768) / 1.5))
    assert np.array_equal(reporting.integer_levels(Levels(k, 65536)), k)


# Pictures


def test_the_curve_of_the_terms(tmp_path, monkeypatch):
    """It draws each bin's mean term in its place, and the sum that ends in the bound; undrawn steps are left out."""
    figures = []
    monkeypatch.setattr(reporting, "save", lambda figure, path, **options: figures.append(figure))
    terms = torch.linspace(0.5, 0.1, 100, dtype=torch.float64)
    total = float(0.25 + terms.sum())
    estimate = VLBEstimate(
        total, 0.1, 0.1, 0.25, 1.0, 1.0, torch.ones(2), torch.zeros(2), 8, terms, torch.full((100,), 0.01)
    )
    reporting.plot_vlb_terms(estimate, tmp_path / "a.png")
    left, right = figures[0].axes
    x, y = (np.array(values, dtype=float) for values in left.lines[0].get_data())
    assert len(x) > 20 and (x[0], y[0]) == (1, 0.5)
    # The terms are linear in t; the geometric centre of a bin lies less than 0.2 steps below its middle.
    assert np.interp(x, np.arange(1, 101), terms) == pytest.approx(y, abs=0.2 * 0.4 / 99)
    summed = np.array(right.lines[0].get_ydata(), dtype=float)
    assert summed[-1] == pytest.approx(total) and (np.diff(summed) > 0).all()
    terms[1] = torch.nan
    reporting.plot_vlb_terms(estimate, tmp_path / "b.png")
    assert len(figures[1].axes[0].lines[0].get_data()[0]) == len(x) - 1


def test_samples_are_a_grid(tmp_path, monkeypatch):
    """Square, row by row, with a white pixel between images, the generated ones beside as many real ones."""
    figures = []
    monkeypatch.setattr(reporting, "save", lambda figure, path, **options: figures.append(figure))
    generated, real = torch.rand(2, 10, 3, 4, 5)
    reporting.plot_samples(generated, real, tmp_path / "a.png")
    for axis, images in zip(figures[0].axes, (generated, real)):
        grid = axis.images[0].get_array()
        assert grid.shape == (3 * 5, 3 * 6, 3)
        assert np.array_equal(grid[5:9, 12:17], images[5].permute(1, 2, 0))
        assert (grid[4::5] == 1).all() and (grid[:, 5::6] == 1).all()


# JSON


def test_json_is_never_half_written(tmp_path):
    """A failed write leaves the file that was there."""
    path = tmp_path / "a.json"
    files.write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        files.write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name is before the writing returns."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(source, target):
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_json({"a": 1}, tmp_path / "a.json")
    assert done == [str(tmp_path / "a.json.partial"), "replace", str(tmp_path)]
