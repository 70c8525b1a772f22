"""Steps that are not finite, and faults of the disk and of the data: what the run does, and what is left."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
from reliability_support import (
    EVERY,
    RESUME,
    after_step,
    alike,
    bad_images,
    bad_loss,
    before,
    check_same,
    complained,
    content,
    cut,
    delete,
    fill,
    names,
    poison,
    ran,
    read_only,
    small_files,
    tensors_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.runtime.stopping import lost_contact

# Divergence


@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_the_last_good_checkpoint_is_kept(tmp_path, few, straight, value):
    """With a limit of 1: weights that broke just before they were saved do not push out the ones before."""
    options = f"{EVERY} --checkpoints_total_limit 1 --max_skipped_steps 3", *few
    hook = functools.partial(after_step, 10, functools.partial(poison, value=value))
    process = ran(tmp_path, *options, hooks=[hook], code=1)
    said = complained(process)
    assert re.search(
        r"Step 13 is not finite: L_t \(KL\) at t=\[\d.*diverged: 3 in a row\. "
        r"Renamed, .*: checkpoint-10 to diverged-10\. "
        "The last checkpoint, checkpoint-5, is whole",
        said,
    )
    assert process.out.count("It is skipped: number") == 2
    assert names(tmp_path) == {"checkpoint-5"} and names(tmp_path, "diverged-*") == {"diverged-10"}
    check_same(tmp_path / "checkpoint-5", straight / "checkpoint-5")
    ran(tmp_path, *options, RESUME)
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30")


BAD = {
    "images": (functools.partial(bad_images, (4,)), r"L_t \(KL\) at t=\[\d+.*the gradient's norm"),
    "KL": (functools.partial(bad_loss, 4, 1), r"L_t \(KL\) at t=\[1\]"),
    "decoder": (functools.partial(bad_loss, 4, 0), r"L_0 \(decoder\) at t=\[0\]"),
    "gradient": (functools.partial(bad_loss, 4, None), r"(?<=finite: )the gradient's norm\."),
    "simple": (functools.partial(bad_loss, 4, 1), r"L_simple at t=\[1\]"),
    "accumulated": (functools.partial(bad_images, (4,), 1), r"L_t \(KL\) at t=\[\d+"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_is_skipped(tmp_path, few, kind):
    """It is named and counted, and changes nothing: not the weights, the average, the moments, the history."""
    hook, said = BAD[kind]
    options = "--checkpointing_steps 1 --max_train_steps 6 --logger tensorboard --ddpm_num_steps 2"
    options += " --ddpm_num_inference_steps 2 --timestep_sampler loss_second_moment --train_batch_size 16"
    options += {"simple": " --objective simple", "accumulated": " --gradient_accumulation_steps 2"}.get(kind, "")
    process = ran(tmp_path, *few, options, hooks=[hook])
    assert re.search(rf"Step 4 is not finite: .*{said}", process.out) and process.out.count("It is skipped") == 1
    before, after, last = (content(tmp_path / f"checkpoint-{step}") for step in (3, 4, 6))
    for part in ("model.safetensors", "custom_checkpoint_1.pkl", "optimizer.bin"):
        if part == "optimizer.bin":  # its learning rate is the schedule's
            before[part], after[part] = before[part]["state"], after[part]["state"]
        assert alike(before[part], after[part]), part
    assert not alike(after["model.safetensors"], last["model.safetensors"])
    assert all(tensor.isfinite().all() for part in last.values() for tensor in tensors_of(part))
    done = last["custom_checkpoint_0.pkl"]
    assert (done["step"], done["skipped"], done["skipped_in_a_row"]) == (6, 1, 0)
    events = EventAccumulator(str(tmp_path / "logs" / "train")).Reload()
    assert [event.value for event in events.Scalars("skipped_steps")] == [1]


# Faults of other processes, of the disk and of the data


@pytest.mark.parametrize(
    "kind, text, lost",
    [
        (
            RuntimeError,
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]",
            True,
        ),
        (RuntimeError, "Application timeout caused pair closure", True),
        (RuntimeError, "The size of tensor a (3) must match the size of tensor b (4)", False),
        (ValueError, "Application timeout caused pair closure", False),
        (dist.DistNetworkError, "", True),
        (dist.DistBackendError, "NCCL error: remote process exited or there was a network error", True),
        (dist.DistBackendError, "NCCL error: unhandled cuda error", False),
    ],
)
def test_lost_contact_is_known_by_its_message(kind, text, lost):
    """Of this process's own faults none is taken for another's."""
    assert lost_contact(kind(text)) == lost


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_a_full_disk(disk, few, straight, logger):
    """The checkpoint that fails is named and leaves nothing; with room again, the run goes on from the one before."""
    hook = functools.partial(after_step, 7, functools.partial(fill, folder=disk))
    process = ran(disk / "run", EVERY, *few, "--logger", logger, hooks=[hook], code=1)
    assert re.search(r"checkpoint-10 could not be written.*checkpoint-5, is whole", complained(process))
    assert names(disk / "run") == {"checkpoint-5"} and not names(disk / "run", ".checkpoint-*")
    (disk / "filler").unlink()
    ran(disk / "run", "--checkpointing_steps 20 --checkpoints_total_limit 1", RESUME, *few)
    check_same(disk / "run" / "checkpoint-30", straight / "checkpoint-30")


@pytest.mark.parametrize("size", [1000, 90_000, 150_000])
def test_a_file_that_the_system_refuses(tmp_path, few, size):
    """As on a full disk, for every user: amid the progress, the average, the moments."""
    hook = functools.partial(after_step, 9, functools.partial(small_files, size=size))
    process = ran(tmp_path / "run", EVERY, *few, hooks=[hook], code=1)
    assert "checkpoint-10 could not be written" in process.err and "checkpoint-5, is whole" in process.err
    assert names(tmp_path / "run") == {"checkpoint-5"} and not names(tmp_path / "run", ".checkpoint-*")


def test_a_full_disk_at_the_end(disk, few):
    """The pipeline cannot be written: one line, and the checkpoint is whole."""
    hook = functools.partial(before, "save_pipeline", functools.partial(fill, folder=disk))
    process = ran(
        disk / "run", "--checkpointing_steps 20 --max_train_steps 20", *few, hooks=[hook], code=1, whole=True
    )
    assert re.search(r"cannot be written.*checkpoint-20, is whole", complained(process))


def test_a_read_only_disk(disk, few):
    """While it trains, and at the start."""
    hook = functools.partial(after_step, 7, functools.partial(read_only, folder=disk))
    process = ran(disk / "run", EVERY, *few, hooks=[hook], code=1)
    assert re.search(r"checkpoint-10 could not be written.*Read-only.*checkpoint-5, is whole", complained(process))
    again = ran(disk / "run", EVERY, RESUME, *few, code=1)
    assert re.search(r"--output_dir .* cannot be written: .*Read-only", complained(again))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["corrupt", "gone"])
def test_an_image_that_cannot_be_read(tmp_path, own_pictures, how, workers):
    """Found while it trains: it is named in one line, and the last checkpoint loads once it is mended."""
    folder, options = own_pictures
    images = sorted(folder.iterdir())
    positions = [i for i in range(2, 120) if i % 40 == 3]
    kept = {images[i]: images[i].read_bytes() for i in positions}
    data = load_image_data(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    trained = {Path(data.train.data[i]["image"]["path"]).name for i in range(len(data.train))}
    spoilt = [image for image in kept if image.name in trained]
    assert spoilt
    hook = functools.partial(after_step, 6, functools.partial(delete if how == "gone" else cut, files=spoilt))
    more = f"--dataloader_num_workers {workers} --checkpointing_steps 2"
    process = ran(tmp_path / "run", *options, more, hooks=[hook], code=1)
    said = complained(process)
    assert re.search(r"Step \d+: the training data cannot be read. Image .*\.png' cannot be read", said)
    assert re.search(r"The last checkpoint, checkpoint-\d+, is whole", said)
    for image, whole in kept.items():
        image.write_bytes(whole)
    again = ran(tmp_path / "run", *options, more, RESUME)
    assert "Resuming from" in again.out


@pytest.mark.parametrize("kind", ["train_data_dir", "dataset_name"])
def test_a_data_set_that_is_gone(tmp_path, own_pictures, kind):
    """At a resume: one line with its name."""
    folder, options = own_pictures
    options = [f"{EVERY} --max_train_steps 5 --timestep_sampler uniform --{kind}", *options[1:]]
    ran(tmp_path / "run", *options)
    shutil.rmtree(folder)
    process = ran(tmp_path / "run", *options, RESUME, code=1)
    assert str(folder) in complained(process)
    assert names(tmp_path / "run") == {"checkpoint-5"}
