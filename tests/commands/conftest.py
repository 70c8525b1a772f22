"""What the tests of the commands share."""

import contextlib
import io

import pytest
from diffusers import UNet2DModel
from processes import fresh_accelerate  # noqa: F401
from scoring_support import FEW, run_evaluate

from ddpm_vlb import VLBEstimator
from ddpm_vlb.commands import evaluate


@pytest.fixture(autouse=True)
def no_evaluation_pictures(monkeypatch):
    """Leave out the pictures, which take longer than the scoring."""
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, lambda *args, **options: None)


@pytest.fixture
def score(models, sets, tmp_path):
    """Evaluate a checkpoint on a data set with few calls, into the test's own folder `run`."""

    def scored(model="small", data="grey", options="", *more):
        where = ("--model", models.get(model, model), *sets[data].options, "--output_dir", tmp_path / "run")
        few = FEW[4:] if "full" in options else FEW  # which takes no calls and no pilot
        return run_evaluate(*where, *few, *options.split(), *more)

    return scored


@pytest.fixture(scope="session")
def base(home, models, sets):
    """A finished run with pictures: its folder, its metrics and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        where = ("--model", models["small"], *sets["grey"].options, "--output_dir", home / "base")
        metrics = run_evaluate(*where, *FEW, "--seed", 3)
    return home / "base", metrics, out.getvalue()


@pytest.fixture(scope="session")
def straight(home, models, sets):
    """The metrics of the run that other runs are stopped in."""
    return run_evaluate("--model", models["small"], *sets["grey"].options, "--output_dir", home / "straight", *FEW)


@pytest.fixture
def calls(monkeypatch):
    """What the network was called with: x_t, the timesteps and the class labels of each row."""
    rows, forward = [], UNet2DModel.forward

    def record(self, sample, timestep, class_labels=None, **options):
        labels = [None] * len(sample) if class_labels is None else class_labels.tolist()
        rows.extend(zip(sample, timestep.tolist(), labels, strict=True))
        return forward(self, sample, timestep, class_labels, **options)

    monkeypatch.setattr(UNet2DModel, "forward", record)
    return rows


@pytest.fixture
def scored(monkeypatch):
    """The images that were scored: (sweep, position, x_0)."""
    images, original = [], VLBEstimator.score

    def record(self, x_0, positions, conditioning=None, sweep=0):
        images.extend((sweep, position, image) for position, image in zip(positions, x_0, strict=True))
        return original(self, x_0, positions, conditioning, sweep)

    monkeypatch.setattr(VLBEstimator, "score", record)
    return images


@pytest.fixture
def pilots(monkeypatch, calls):
    """The pilots that were run: their images, and their rows of `calls`."""
    runs, original = [], evaluate.fit_pilot

    def record(model, reverse, x_0, *args, **options):
        before = len(calls)
        pilot = original(model, reverse, x_0, *args, **options)
        runs.append((x_0, range(before, len(calls))))
        return pilot

    monkeypatch.setattr(evaluate, "fit_pilot", record)
    return runs
