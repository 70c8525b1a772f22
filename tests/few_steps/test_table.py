"""What is printed and drawn of the chains of few steps."""

import pytest

from ddpm_vlb.few_steps import report
from ddpm_vlb.few_steps.report import plot, worse_than_others


def row(steps, path, variance, difference, se, stored=False):
    against = {"difference": difference, "se": se}
    score = {"bits_per_dim": 2 + difference, "noise_se": 0.01, "image_se": 0.02}
    return {
        "num_inference_steps": steps,
        "path": path,
        "variance": variance,
        "stored": stored,
        "against_stored": against,
    } | score


@pytest.mark.parametrize("difference, se, told", [(-0.05, 0.02, True), (-0.03, 0.02, False), (0.05, 0.02, False)])
def test_a_stored_chain_that_is_worse_is_told(difference, se, told):
    """Beyond two errors of the difference on the same images: the worst for its number of steps, in one line."""
    rows = [row(5, "optimal", "per_pixel", 0.0, 0.0, stored=True), row(5, "linspace", "analytic", -0.001, se)]
    rows += [row(5, "optimal", "analytic", difference, se), row(9, "optimal", "network", 0.0, 0.0, stored=True)]
    lines = worse_than_others(rows, "bits/dim")
    assert len(lines) == told
    if told:
        assert lines[0].startswith("5 steps: the stored chain (optimal, per_pixel) costs 0.0500 +- 0.0200 bits/dim ")
        assert "more than optimal, analytic" in lines[0]


def test_of_one_image_nothing_is_told():
    """Which has no error."""
    rows = [row(5, "optimal", "per_pixel", 0.0, None, stored=True), row(5, "optimal", "analytic", -1.0, None)]
    assert worse_than_others(rows, "bits/dim") == []


def test_the_legends_cover_no_lines(tmp_path, monkeypatch):
    """They stand below their axes, and within the picture."""
    figures, save = [], report.save
    monkeypatch.setattr(report, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    paths, variances = (
        ("leading", "linspace", "trailing", "quadratic", "optimal"),
        ("network", "analytic", "per_pixel"),
    )
    rows = [row(k, path, v, 1 / k, 0.01, path == "optimal") for k in (5, 10) for path in paths for v in variances]
    plot([*rows, *(row(20, "all", v, 0.0, 0.01) for v in variances)], tmp_path / "few.png", "bits/dim")
    for axes in figures[0].axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert legend.y0 >= 0 and legend.x0 >= 0 and legend.x1 <= figures[0].bbox.x1
