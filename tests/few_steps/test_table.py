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


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The picture of five paths and variances at some numbers of steps, the bits of each told by a function."""
    figures, save = [], report.save
    monkeypatch.setattr(report, "save", lambda figure, path: (figures.append(figure), save(figure, path)))

    def plotted(steps, bits):
        paths = ("leading", "linspace", "trailing", "quadratic", "optimal")
        variances = ("learned_range", "analytic", "per_pixel", "fixed_small", "fixed_large")
        rows = [
            row(k, path, v, bits(k, v), 0.01, path == "optimal") for k in steps for path in paths for v in variances
        ]
        plot([*rows, *(row(20, "all", v, 0.0, 0.01) for v in variances)], tmp_path / "few.png", "bits/dim")
        return figures[0]

    return plotted


def test_the_legends_cover_no_lines(drawn):
    """They stand below their axes, and within the picture."""
    figure = drawn((5, 10), lambda k, variance: 1 / k)
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert legend.y0 >= 0 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_one_number_of_steps_is_drawn_side_by_side(drawn):
    """Each chain in a place of its own, under its name and with its number, of what is above the picture too."""
    figure = drawn((10,), lambda k, variance: 60 if variance == "fixed_small" else 1 / k)
    for axes, number in zip(figure.axes, (5, 10)):
        places = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert places == axes.get_xticks().tolist() == list(range(number))
        names, numbers = ([text.get_text() for text in own] for own in (axes.get_xticklabels(), axes.texts))
        told = dict(zip(names, numbers, strict=True))
        assert told["optimal, learned_range"] == "2.100"
        assert axes is figure.axes[0] or told["optimal, fixed_small"] == "62.000, above"
        for text in (*axes.get_xticklabels(), *axes.texts):
            own, whole = text.get_window_extent(), figure.bbox
            assert own.x0 >= 0 and own.y0 >= 0 and own.x1 <= whole.x1 and own.y1 <= whole.y1
