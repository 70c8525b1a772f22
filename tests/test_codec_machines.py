"""A file decodes elsewhere: in another process, with other threads and instructions, and in years."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from networks import attentive, tiny_unet
from torch import Tensor, nn

from ddpm_vlb import (
    BitsBackCodec,
    CompressedFile,
    DDPMVLBScheduler,
    GaussianPath,
    ReverseProcess,
    compress,
    decompress,
)

GOLDEN = Path(__file__).parent / "golden"


class Waves(nn.Module):
    """A network of two convolutions whose weights are sines, the same in every version of torch."""

    def __init__(self, channels=1, out=2):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, out, 3, padding=1)
        for layer in (self.first, self.second):
            for weights in layer.parameters():
                values = torch.arange(weights.numel(), dtype=torch.float64).mul(1.7).sin() / 4
                weights.data = values.reshape(weights.shape).float()

    def forward(self, x_t, timesteps, class_labels=0):
        """Epsilon, or what a path's network gives, and v."""
        told = torch.as_tensor(timesteps + 100 * class_labels).reshape(-1, 1, 1, 1) / 1000
        return self.second(nn.functional.silu(self.first(x_t)) + told)


def pictures(count=8, size=8):
    """Images of 17 levels, the same in every version of torch."""
    k = torch.arange(count * size * size).reshape(count, 1, size, size)
    return ((k * k // 7) % 17).float() * 0.125 - 1


def chain(steps=8, levels=17, variance_type="learned_range"):
    """Of so many steps."""
    scheduler = DDPMVLBScheduler(variance_type=variance_type, levels=levels)
    return scheduler.reverse_process(num_inference_steps=steps)


def noise(levels, *shape):
    """Levels that nothing foretells."""
    i = torch.arange(math.prod(shape))
    return ((i * i + 12345) * 2654435761 % 2**32 // 2**9 % levels).reshape(shape)


def slope(levels, axis, *shape):
    """Levels that rise along an axis, from noise on."""
    rise = torch.full(shape, 3)
    rise.select(axis, 0).copy_(noise(levels, *shape).select(axis, 0))
    return rise.cumsum(axis) % levels


class Case(NamedTuple):
    """What a golden file holds, and how it is written."""

    model: nn.Module
    reverse: ReverseProcess
    k: Tensor
    parts: tuple[int, ...] = ()  # images of each file that is joined to the others
    lanes: int | None = None
    labels: Tensor | None = None
    names: tuple[str, ...] = ()


def wide_deflated():
    """Seeds that are deflated, and one image more, of three colours and 1200 dimensions."""
    return Case(Waves(3, 3), chain(2, 256, "fixed_large"), slope(256, -1, 3, 3, 20, 20))


def wide_counted():
    """Seeds that are counted on two stacks of 42 states, with 16 dimensions in the last row."""
    return Case(Waves(1, 1), chain(2, 2, "fixed_small"), noise(2, 5, 1, 32, 32), lanes=2)


def many_levels():
    """On each of three stacks seeds of another filter; a lonely step, and two images in the last round."""
    kinds = [noise(65536, 8, 1, 6, 6), slope(65536, -1, 8, 1, 6, 6), slope(65536, -2, 8, 1, 6, 6)]
    k = torch.stack([kinds[image % 3 if image < 6 else 0][image] for image in range(8)])
    return Case(Waves(), chain(1, 65536, "learned"), k, lanes=3)


def deflated_seeds():
    """Deflated on the first stack, and counted with them on the second; some of 8 bits less their neighbours."""
    k = noise(256, 7, 1, 8, 8)
    k[:4:2] = slope(256, -1, 2, 1, 8, 8)
    return Case(Waves(), chain(3, 256), k, lanes=2)


def constant_images():
    """Whose seeds are too short to borrow from: words that nobody pushed are drawn from, too."""
    return Case(Waves(), chain(3), torch.full((4, 1, 8, 8), 5))


def told(images, names, labels):
    """Labels and names, which are deflated where that is shorter."""
    return Case(Waves(), chain(2), noise(17, images, 1, 4, 4), labels=labels, names=names)


def flow(levels):
    """A network of another path."""
    path = GaussianPath.flow(levels)
    return Case(path.network(Waves(1, 1)), path.reverse_process(levels=17), noise(17, 5, 1, 6, 6))


LONG = tuple(f"pictures of a long day/été {i:02d} \udcff.png" for i in range(24))
CASES = {
    "eight_images": lambda: Case(Waves(), chain(), ((pictures() + 1) * 8).long()),
    "no_image": lambda: Case(Waves(), chain(3), noise(17, 0, 1, 8, 8)),
    "three_lanes": lambda: Case(Waves(), chain(3), noise(17, 11, 1, 8, 8), lanes=3),
    "constant_images": constant_images,
    "joined": lambda: Case(Waves(), chain(3), noise(17, 10, 1, 6, 6), parts=(1, 4, 5)),
    "told_as_it_is": lambda: told(5, tuple("abéde"), torch.tensor([3, 300, 0, 70000, 2**31 - 1])),
    "told_deflated": lambda: told(24, LONG, torch.arange(24) % 3),
    "wide_deflated": wide_deflated,
    "wide_counted": wide_counted,
    "many_levels": many_levels,
    "deflated_seeds": deflated_seeds,
    "flow": lambda: flow(torch.tensor([0.05, 0.2, 0.5, 0.9], dtype=torch.float64)),
}


def written(case: Case) -> bytes:
    """The file of a case, in which no chunk of several images is its first try."""
    codec, whole, start = BitsBackCodec(case.model, case.reverse), None, 0
    for images in case.parts or (len(case.k),):
        own, tries = slice(start, start + images), []

        def near(done, tries=tries):
            codec.coder.margin = min(codec.coder.margin, len(tries))
            tries.append(done)

        x_0 = case.k[own].double() * (2 / (case.reverse.levels - 1)) - 1
        labels = None if case.labels is None else {"class_labels": case.labels[own]}
        data = codec.compress(x_0, labels, case.names[own] or None, case.lanes, progress=near)
        whole = data if whole is None else CompressedFile.read(whole).joined(CompressedFile.read(data))
        start += images
    return whole


@pytest.mark.parametrize("name", CASES)
def test_golden_files_decode(name):
    """What was written with the format is what it was. To write new ones: python tests/test_codec_machines.py."""
    case = CASES[name]()
    own = BitsBackCodec(case.model, case.reverse).decompress((GOLDEN / f"{name}.dvlb").read_bytes())
    assert torch.equal(own.x_0, case.k.float() * (2 / (case.reverse.levels - 1)) - 1) and own.names == case.names
    assert own.class_labels is None if case.labels is None else torch.equal(own.class_labels, case.labels)


def test_another_number_of_threads():
    """Sums in another order."""
    data = compress(tiny_unet(), chain(4), pictures(7))
    torch.set_num_threads(2)
    try:
        assert torch.equal(decompress(tiny_unet(), chain(4), data), pictures(7))
    finally:
        torch.set_num_threads(1)


SETTINGS = {
    "threads": {"OMP_NUM_THREADS": "2"},
    "instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "no oneDNN": {"NO_ONEDNN": "1"},
    "compiled": {"COMPILED": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_fresh_process(setting, tmp_path):
    """With the settings of another machine: no image is wrong, with attention in the network too."""
    model = attentive()
    (tmp_path / "file").write_bytes(compress(model, chain(), pictures(24)))
    torch.save(model.state_dict(), tmp_path / "weights")  # other instructions would draw others
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **SETTINGS[setting]}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=600)


def other_machine(folder: Path) -> None:
    """Decode a file with this process' settings."""
    torch.backends.mkldnn.enabled = "NO_ONEDNN" not in os.environ
    model = attentive()
    model.load_state_dict(torch.load(folder / "weights"))
    if "COMPILED" in os.environ:
        model = torch.compile(model)
    assert torch.equal(decompress(model, chain(), (folder / "file").read_bytes()), pictures(24))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        other_machine(Path(sys.argv[1]))
    else:
        for name in CASES:
            if not (GOLDEN / f"{name}.dvlb").exists():  # what was written stays as it is
                (GOLDEN / f"{name}.dvlb").write_bytes(written(CASES[name]()))
