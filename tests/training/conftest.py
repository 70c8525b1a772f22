"""Runs that several files of tests begin with."""

import shutil

import PIL.Image
import pytest
from processes import reset_accelerate
from reliability_support import EVERY, STEPS, ran
from sklearn.datasets import load_digits
from training_support import TINY

from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe


@pytest.fixture
def train_batches(monkeypatch):
    """What `train_batch` was called with: (the step, x_0, the micro step) of each call."""
    calls, train_batch = [], recipe.train_batch

    def record(run, x_0, micro_step, drawn):
        calls.append((run.progress.step, x_0, micro_step))
        return train_batch(run, x_0, micro_step, drawn)

    monkeypatch.setattr(recipe, "train_batch", record)
    return calls


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of image files."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(load_digits().images[:120] * 15):
        PIL.Image.fromarray(image.astype("uint8")).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy that a test may spoil, and the options for it; the sampler must not look at the images beforehand."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    options = f"{EVERY} --timestep_sampler uniform --train_data_dir", folder, "--cache_dir", tmp_path / "cache"
    return folder, options


@pytest.fixture(scope="session")
def straight(tmp_path_factory, few):
    """A run that nothing happened to, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    ran(folder, EVERY, *few)
    return folder


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of its folder that a test may spoil."""
    return shutil.copytree(straight, tmp_path / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory, few):
    """A `Run` in this process, whose checkpoints and training a test may call."""
    runs = []
    reset_accelerate()
    options = map(str, few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_and_finish", lambda run, loop: runs.append(run))
        folder = str(tmp_path_factory.mktemp("own"))
        fixed = f"--cpu --logger none {EVERY} --max_train_steps {STEPS}".split()
        train.main([*TINY, *fixed, "--output_dir", folder, *options])
    yield runs[0]
    reset_accelerate()


@pytest.fixture
def begin(run):
    """Load a checkpoint of a folder into the run; returns the run."""

    def begun(folder, name="latest"):
        run.checkpoints.folder = folder
        run.checkpoints.begin(name)
        return run

    return begun
