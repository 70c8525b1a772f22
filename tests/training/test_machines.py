"""Training on two machines: two hosts of a network of their own where that is allowed, else two nodes on loopback."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from network_namespaces import INTERFACE, two_hosts, why_not
from processes import ROOT, environment, free_port
from training_support import TINY, check_metrics, difference, same_weights, weights

pytestmark = pytest.mark.slow

# With a warm-up, as in test_equivalence.py; long enough that a host can be lost on the way.
RUN = (*TINY, *"--lr_warmup_steps 100 --max_train_steps 60 --checkpointing_steps 10 --validation_steps 25".split())
LOST = "Another process of this run has ended or does not answer"
PATIENCE = 60  # seconds for a launcher, on a busy machine, to notice that its process has ended; --ddp_timeout is 1800


class Machines:
    """Two machines, with a network between them, on which one training run of two processes can be started.

    Args:
        folder: for what they print.
        hosts: of the network; None for loopback.
    """

    def __init__(self, folder, hosts=None):
        self.folder, self.hosts = folder, hosts
        self.launchers, self.prints = [], []

    def start(self, *options):
        """Launch a run, with the options of each machine, or with those that both share."""
        port = free_port()
        told = environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME=INTERFACE if self.hosts else "lo")
        launchers = []
        for rank, own in enumerate(options * (2 // len(options))):
            launcher = (
                f"--multi_gpu --num_processes 2 --num_machines 2 --machine_rank {rank} --main_process_port {port} "
                f"--main_process_ip {self.hosts.addresses[0] if self.hosts else '127.0.0.1'} --mixed_precision no "
                "--dynamo_backend no examples/train.py"
            )
            command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), *own]
            if self.hosts:
                command = self.hosts.command(rank, *command)
            path = self.folder / f"{len(self.prints)}.txt"
            with open(path, "w") as prints:
                launchers.append(
                    subprocess.Popen(command, cwd=ROOT, env=told, stdout=prints, stderr=subprocess.STDOUT)
                )
            self.prints.append(path)
        self.launchers = launchers

    def said(self, rank):
        """Return what a machine has printed in the last run."""
        return self.prints[rank - 2].read_text()

    def ended(self, rank, seconds):
        """Return the exit code of a machine's launcher, which must come within some seconds."""
        try:
            return self.launchers[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"machine {rank} has not ended after {seconds} s:\n{self.said(rank)[-3000:]}")

    def kill(self, rank):
        """Kill all of a machine's processes."""
        if self.hosts:
            self.hosts.kill(rank)
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.launchers[rank].pid)
            for process in (launcher, *launcher.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def finish(self, *options):
        """Run to the end, and return what the machines printed."""
        self.start(*options)
        codes = [self.ended(rank, 300) for rank in (0, 1)]
        said = [self.said(rank) for rank in (0, 1)]
        assert codes == [0, 0], "\n".join(text[-3000:] for text in said)
        return said

    def reach(self, path, *options):
        """Start a run and return when a file or folder of it is there."""
        self.start(*options)
        until = time.monotonic() + 120
        while not path.exists():
            assert all(launcher.poll() is None for launcher in self.launchers), self.said(0) + self.said(1)
            assert time.monotonic() < until, self.said(0)
            time.sleep(0.01)


@contextlib.contextmanager
def open_machines(folder, network):
    """Two machines of a kind of network; nothing of them is left afterwards."""
    reason = why_not() if network == "namespaces" else None
    if reason:
        pytest.skip(reason)
    with contextlib.ExitStack() as cleanup:
        machines = Machines(folder, cleanup.enter_context(two_hosts()) if network == "namespaces" else None)
        try:
            yield machines
        finally:
            for rank, launcher in enumerate(machines.launchers):
                machines.kill(rank)
                launcher.wait(60)


@pytest.fixture
def machines(tmp_path):
    """Two hosts where they are allowed, else two nodes on loopback."""
    with open_machines(tmp_path, "loopback" if why_not() else "namespaces") as both:
        yield both


def train_alone(folder, options):
    """Take the same global batches on one process; returns the weights of its pipeline."""
    command = [sys.executable, "examples/train.py", *options, "--cpu", "--train_batch_size", "16"]
    done = subprocess.run(
        [*command, "--output_dir", str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return weights(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, few):
    """The weights that one undisturbed process ends with."""
    return train_alone(tmp_path_factory.mktemp("alone"), [*RUN, *few])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, few):
    """The weights that two undisturbed machines end with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with open_machines(folder, "loopback" if why_not() else "namespaces") as machines:
        machines.finish([*RUN, *few, "--output_dir", str(folder / "run")])
    return weights(folder / "run")


@pytest.mark.parametrize("network", ["namespaces", "loopback"])
def test_two_machines_train_one_network(tmp_path, few, alone, network):
    """They end as one process with both batches does, tell it once, and so does a resumed run, bit for bit."""
    folder = tmp_path / "run"
    options = [*RUN, *few, "--output_dir", str(folder)]
    with open_machines(tmp_path, network) as machines:
        said = machines.finish(options)
        assert [text.count("Test bits/dim") for text in said] == [1, 0]
        assert [len(re.findall(r"step \d+: validation", text)) for text in said] == [2, 0]
        assert [path.parent for path in tmp_path.rglob("metrics.json")] == [folder]
        metrics = json.loads((folder / "metrics.json").read_text())
        check_metrics(metrics, folder)
        assert (metrics["train"]["num_processes"], metrics["train"]["steps"]) == (2, 60)
        straight = weights(folder)
        assert difference(alone, straight) < 1e-5
        assert not same_weights(alone, straight)  # nobody has trained alone on both
        said = machines.finish([*options, "--resume_from_checkpoint", "checkpoint-30"])
        assert [text.count("Resuming from") for text in said] == [1, 1]
        assert same_weights(weights(folder), straight)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_is_lost(tmp_path, few, machines, alone, undisturbed, lost):
    """The other one says so and ends; from the last checkpoint two machines, or one process, end as undisturbed."""
    folder, left = tmp_path / "run", 1 - lost
    options = [*RUN, *few]
    machines.reach(folder / "checkpoint-20", [*options, "--output_dir", str(folder)])
    machines.kill(lost)
    assert machines.ended(left, PATIENCE) not in (0, None)
    said = machines.said(left)
    assert LOST in said and "is whole: go on with --resume_from_checkpoint latest" in said
    assert not (folder / "metrics.json").exists() and not (folder / "checkpoint-60").exists()
    shutil.copytree(folder, tmp_path / "copy")
    resumed = [*options, "--resume_from_checkpoint", "latest"]
    said = machines.finish([*resumed, "--output_dir", str(folder)])[0]
    last = re.search(r"Resuming from \S*checkpoint-(\d+)", said)
    assert last is not None and int(last[1]) >= 20
    assert same_weights(weights(folder), undisturbed)
    assert difference(alone, train_alone(tmp_path / "copy", resumed)) < 1e-5


def test_the_link_is_cut(tmp_path, few):
    """Neither end hears a word any more: both end after --ddp_timeout, and the checkpoint is whole."""
    folder, timeout = tmp_path / "run", 10
    options = [*RUN, *few, "--ddp_timeout", str(timeout), "--output_dir", str(folder)]
    with open_machines(tmp_path, "namespaces") as machines:
        machines.reach(folder / "checkpoint-20", options)
        machines.hosts.cut(1)
        cut = time.monotonic()
        while not all(LOST in machines.said(rank) for rank in (0, 1)):
            assert time.monotonic() < cut + timeout + 15, machines.said(0) + machines.said(1)
            time.sleep(0.1)
        assert time.monotonic() > cut + timeout / 2  # and not of something else
        codes = [machines.ended(rank, PATIENCE) for rank in (0, 1)]
        assert 0 not in codes
        machines.hosts.mend(1)
        machines.finish([*options, "--resume_from_checkpoint", "latest"])
    assert (folder / "metrics.json").exists()


def test_folders_that_are_not_shared_are_refused(tmp_path, few, machines):
    """Before anything is trained, on both machines, with the option and what to do."""
    machines.start(*([*RUN, *few, "--output_dir", str(tmp_path / name)] for name in ("mine", "yours")))
    codes = [machines.ended(rank, 90) for rank in (0, 1)]
    assert codes == [1, 1]
    for rank in (0, 1):
        said = machines.said(rank)
        assert "is another folder for the processes [1] than for process 0. Give one on a file system that" in said
        assert 'Traceback (most recent call last):\n  File "examples' not in said
        assert "images a step" not in said
    assert [list((tmp_path / name).iterdir()) for name in ("mine", "yours")] == [[], []]
