"""What all tests share: one thread, a Hub, and what is logged."""

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
