"""How a run ends before its last step: SIGTERM and Ctrl-C, a launcher or another process that is gone, and faults.

A signal only asks: the training loop finishes its step, saves and returns. A fault that can be foreseen becomes one
clear message and exit code 1.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import get_int_from_env

REPEATS = 2.0  # seconds within which a launcher may pass on what the terminal has sent already
PAUSE = 0.5
PATIENCE = 5.0
GO_ON = ("evaluate", "optimize-timesteps")  # commands that keep what is finished at any moment
MENDABLE = (ValueError, OSError, FloatingPointError)  # bad values, the system's faults, a network's NaN


class Stop:
    """Notes that the run was asked to stop; a context manager that catches the signals.

    A second Ctrl-C, more than `REPEATS` seconds after the first, interrupts at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}
        # Of `accelerate launch` alone: another parent, a shell say, may leave for good reasons.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main one may
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT and time.monotonic() - self._since > REPEATS:
            raise KeyboardInterrupt
        if self.reason is None:
            self.reason, self._since = signal.Signals(number).name, time.monotonic()

    def asked(self) -> bool:
        """Whether this process was asked to stop, or its launcher has gone without a word."""
        if self.reason is None and self._launcher is not None and os.getppid() != self._launcher:
            self.reason = "the end of `accelerate launch`"
        return self.reason is not None


def own_process_group(worker_id: int) -> None:
    """For the data loader's workers: what is sent to the whole group must not kill them in the last step.

    Args:
        worker_id: not used.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def leave(accelerator: Accelerator) -> None:
    """Close the trackers and the process group; all processes must come here."""
    if accelerator.num_processes > 1:
        # Gloo's thread gives back the last collective's tensors, for which it needs the interpreter, under a lock that
        # the group's end takes while it holds the interpreter: one that comes too soon hangs for ever.
        time.sleep(PAUSE)
    accelerator.end_training()


def end(accelerator: Accelerator, message: str) -> NoReturn:
    """End all processes with exit code 1 and one message on each machine; all of them must come here."""
    with contextlib.suppress(Exception):  # a tracker's, which cannot write, say
        leave(accelerator)
    raise SystemExit(message if accelerator.is_local_main_process else 1)


def lost_contact(error: BaseException) -> bool:
    """Whether an exception says that another process has ended or does not answer."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error)
    if isinstance(error, dist.DistBackendError):  # NCCL's; its other messages speak of this process's own GPU
        signs = ["remote process exited", "ncclRemoteError", "imeout", "timed out", "ncclUniqueId", "was aborted"]
        return any(sign in text for sign in signs)
    signs = ["gloo/transport/", "Application timeout caused pair closure"]
    return type(error) is RuntimeError and any(sign in text for sign in signs)  # Gloo's have no type of their own


@contextlib.contextmanager
def clear_faults(folder: Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turn faults of the disk and of other processes into one message.

    Args:
        folder: where the run writes.
        advice: called for what can be done now.

    Raises:
        SystemExit: in place of an OSError that says that nothing can be written, of lost contact, and of a network
            whose output is not finite.
    """
    try:
        yield
    except Exception as error:
        if lost_contact(error):
            raise SystemExit(
                "Another process of this run has ended or does not answer; what it printed, on its machine, says why. "
                f"{advice()}. ({_first_line(error)})"
            ) from error
        if isinstance(error, FloatingPointError):
            raise SystemExit(f"{error} {advice()}.") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO):
            raise SystemExit(f"{folder} cannot be written any more: {error}. {advice()}.") from error
        raise


@contextlib.contextmanager
def refused(command: str, kinds: tuple[type[Exception], ...] = MENDABLE) -> Iterator[None]:
    """Turn exceptions that name what the user can mend into one line.

    Args:
        command: its name behind `ddpm-vlb`.
        kinds: which.

    Raises:
        SystemExit: in their place.
    """
    try:
        yield
    except kinds as error:
        if process_index() > 0:
            # What is wrong for all is told by the main process, at whose end the launcher ends this one.
            time.sleep(PATIENCE)
        raise SystemExit(f"ddpm-vlb {command}: {' '.join(str(error).split())}") from error
    except KeyboardInterrupt:
        if command not in GO_ON:
            raise
        if process_index() == 0:
            print(f"ddpm-vlb {command}: stopped. What is finished is kept: the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


def process_index() -> int:
    """This process's number among those of the run, also before Accelerate is asked."""
    if get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1) < 2:
        return 0  # a cluster may number what runs alone
    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
