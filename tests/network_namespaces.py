"""Two hosts on one machine, as two network namespaces of the test's own joined by a virtual cable."""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "eth0"
_numbers = itertools.count()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


@dataclass(frozen=True)
class Hosts:
    """Two running hosts, numbered 0 and 1."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.213.0.1", "10.213.0.2")

    def command(self, host: int, *arguments: str | os.PathLike) -> list[str]:
        """Return the command line that runs the arguments on a host, in the process it is started as."""
        return ["ip", "netns", "exec", self.names[host], *map(os.fspath, arguments)]

    def pids(self, host: int) -> list[int]:
        """Return the ids of the processes on a host."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[host]).split()]

    def kill(self, host: int) -> None:
        """Kill every process on a host; its kernel lives on and closes their connections, unlike after cut()."""
        for _ in range(50):  # a process may be starting another one, and one just killed is listed for a moment
            if not (pids := self.pids(host)):
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut(self, host: int) -> None:
        """Take a host off the network, so that to the other one it has vanished without a word."""
        _ip("-n", self.names[host], "link", "set", INTERFACE, "down")

    def mend(self, host: int) -> None:
        """Undo cut()."""
        _ip("-n", self.names[host], "link", "set", INTERFACE, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts that reach each other and nothing else, and remove them and their processes afterwards."""
    number = next(_numbers)
    hosts = Hosts((f"test-{os.getpid()}-{number}-0", f"test-{os.getpid()}-{number}-1"))
    with contextlib.ExitStack() as cleanup:
        for host, name in enumerate(hosts.names):
            _ip("netns", "add", name)
            cleanup.callback(_ip, "netns", "del", name)
            cleanup.callback(hosts.kill, host)
        first, second = hosts.names
        _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", INTERFACE, "up")
        yield hosts


@functools.cache
def why_not() -> str | None:
    """Return the reason why there can be no two hosts here, None where there is none."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    try:
        with two_hosts() as hosts:
            for host in (0, 1):
                subprocess.run(hosts.command(host, "true"), check=True, capture_output=True, text=True, timeout=60)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    return None
