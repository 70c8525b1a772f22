"""A file decodes elsewhere: in another process, with other threads and instructions, and in years."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import tiny_unet
from torch import nn

from ddpm_vlb import DDPMVLBScheduler, compress, decompress

GOLDEN = Path(__file__).parent / "golden" / "eight_images.dvlb"


class Waves(nn.Module):
    """A network of two convolutions whose weights are sines, the same in every version of torch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        for layer in (self.first, self.second):
            for weights in layer.parameters():
                values = torch.arange(weights.numel(), dtype=torch.float64).mul(1.7).sin() / 4
                weights.data = values.reshape(weights.shape).float()

    def forward(self, x_t, timesteps):
        """Epsilon and v."""
        return self.second(nn.functional.silu(self.first(x_t)) + timesteps.reshape(-1, 1, 1, 1) / 1000)


def pictures(count=8, size=8):
    """Images of 17 levels, the same in every version of torch."""
    k = torch.arange(count * size * size).reshape(count, 1, size, size)
    return ((k * k // 7) % 17).float() * 0.125 - 1


def chain(steps=8):
    """Of 17 levels."""
    return DDPMVLBScheduler(variance_type="learned_range", levels=17).reverse_process(num_inference_steps=steps)


def test_the_golden_file_decodes():
    """The file of the format's first version is what it was. To write another: python tests/test_codec_machines.py."""
    assert torch.equal(decompress(Waves(), chain(), GOLDEN.read_bytes()), pictures())


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


def attentive():
    """A U-Net with attention."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        layers_per_block=1,
    ).eval()


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
        GOLDEN.write_bytes(compress(Waves(), chain(), pictures()))
