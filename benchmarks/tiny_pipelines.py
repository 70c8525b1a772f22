"""A tiny text-to-image pipeline with random weights, pictures for it, and changes of its network."""

import copy
import json
import string
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpm_vlb import DDPMVLBScheduler, simple_loss

WORDS = ["dark", "light"]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def tokenizer_of(folder: Path) -> CLIPTokenizer:
    """Of single letters, from the two files that every version of transformers reads."""
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def build(folder: Path) -> StableDiffusionPipeline:
    """A tiny pipeline of the parts that a Stable Diffusion has, with random weights."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **ends)).eval()
    coder = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=8, **coder)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    widths = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    unet = UNet2DConditionModel(4, mid_block_type=None, cross_attention_dim=16, **blocks, **widths)
    parts = vae, text, tokenizer, unet, PNDMScheduler(skip_prk_steps=True, **BETAS), None, None
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def draw_pictures(folder: Path, count: int) -> None:
    """A folder of dark and light pictures, and captions that say which; a size that must be cut."""
    rng, lines = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(count):
        levels = rng.integers(0, 128, (8, 12, 3)) + 128 * (i % 2)
        Image.fromarray(levels.astype(np.uint8)).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": WORDS[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def fine_tune(pipe: StableDiffusionPipeline, x: Tensor, told: Tensor, steps: int = 40) -> None:
    """Train the pipeline's U-Net on latents and what is told of each, by the mean squared error."""
    reverse = DDPMVLBScheduler.from_config(pipe.scheduler.config, levels=None, clip_sample=False).reverse_process()
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=3e-3)
    for step in range(steps):
        t, noise = torch.Generator().manual_seed(step), torch.Generator().manual_seed(-step)
        drawn = torch.randint(len(reverse.forward), (len(x),), generator=t)
        diffused = reverse.forward.diffuse(x, drawn, torch.randn(x.shape, generator=noise))
        output = pipe.unet(diffused.x_t, diffused.t, encoder_hidden_states=told).sample
        simple_loss(reverse, output, diffused).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def changed(unet: nn.Module, size: float, seed: int) -> nn.Module:
    """A copy with noise added to all weights."""
    other, generator = copy.deepcopy(unet), torch.Generator().manual_seed(seed)
    for own in other.parameters():
        own.data += size * own.data.square().mean().sqrt() * torch.randn(own.shape, generator=generator)
    return other
