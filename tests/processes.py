"""What tests need to start processes, and to begin anew with Accelerate in this one."""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parents[1]
# For a test's own file that is launched as a script, which finds the modules beside this one as pytest does.
PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def reset_accelerate():
    """Accelerate keeps its settings for the whole process; each run here brings its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """For all tests of the module, or of the folder of the conftest.py, that imports this."""
    reset_accelerate()
    yield
    reset_accelerate()


def free_port():
    """One that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more):
    """That of a command."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wait_for(condition, seconds=120):
    """Poll."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class Forked:
    """A function that runs in a process, and a process group, of its own, with its output in files.

    Forked from this one, which has imported everything, it begins at once.
    """

    def __init__(self, function, *args):
        self._logs = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._logs.name) / "out", Path(self._logs.name) / "err"
        for path in (self._out, self._err):
            path.touch()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, *args))
        with warnings.catch_warnings():
            # Python 3.12 warns where there are threads; those of a worker of pytest-xdist wait, and hold no locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()

    def _run(self, function, *args):
        """What the process does; it takes nothing over of what pytest does with output and signals."""
        gc.freeze()  # what the parent has not collected yet is not this process's to end
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, path in ((1, self._out), (2, self._err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        logging.getLogger().handlers.clear()
        reset_accelerate()
        function(*args)

    @property
    def out(self):
        return self._out.read_text()

    @property
    def err(self):
        return self._err.read_text()

    def kill(self):
        self._process.kill()

    def end(self, seconds=120):
        """Wait for its end; returns the exit code, that of the signal, negative, where one killed it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running:\n{self.out}\n{self.err[-3000:]}")
        return self._process.exitcode


def as_rank(rank, port):
    """Tell this process what `accelerate launch` would tell one of two on this machine, and to take the CPU."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
