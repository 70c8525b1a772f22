"""What all tests share: one thread, a Hub, what is logged, and what the tests of several folders need of training."""

import logging

import pytest
import torch
from hub_server import HubServer
from sharing_support import client_of

# The tensors here are too small for more threads to help, and sums must not depend on the machine's number of cores.
torch.set_num_threads(1)


@pytest.fixture
def diffusers_log():
    """The messages of warning level and above that diffusers logs."""
    messages: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that this process' client talks to."""
    with HubServer() as server:
        client_of(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def log():
    """The messages of warning level and above of diffusers and of this package."""
    messages: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "ddpm_vlb")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """The options for a data set of 154, 8 and 18 images and their labels, to save the digits' loading time."""
    from sklearn.datasets import load_digits
    from training_support import write_data

    folder = tmp_path_factory.mktemp("few")
    data = write_data(folder / "data", load_digits().images[:180] * 15, load_digits().target[:180])
    return "--dataset_name", data, "--cache_dir", folder / "cache", "--logger", "none"


@pytest.fixture(scope="session")
def few_base(tmp_path_factory, few):
    """A folder in which a run on them, of three steps without validation, has finished, and its metrics."""
    from training_support import reset_accelerate, tiny

    folder = tmp_path_factory.mktemp("few_base") / "run"
    metrics = tiny(folder, "--max_train_steps 3", *few)
    reset_accelerate()
    return folder, metrics


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder for what is scored."""
    return tmp_path_factory.mktemp("scored")


@pytest.fixture(scope="session")
def models(home):
    """Checkpoints by what is special about them."""
    from scoring_support import save_models

    return save_models(home / "models")


@pytest.fixture(scope="session")
def sets(home):
    """Data sets by name: the options that name them, and the images by split as x_0."""
    from scoring_support import save_sets

    return save_sets(home)
