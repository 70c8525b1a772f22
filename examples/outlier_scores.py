"""Bits/dim of each image as a score of how unusual it is, and where that fails.

    python examples/outlier_scores.py

trains on scikit-learn's digits for half a minute and prints, for six kinds of changed test digits, their mean bits/dim
and the AUROC against the unchanged ones with its standard error (Hanley & McNeil 1982): 1 where every outlier scores
worse than every digit, 0.5 for a coin. Likelihood is no detector by itself: what is simpler than the data is cheap to
code, however unlike it is. Blank images and digits without their right half score better than digits, below 0.5.
"""

import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBScheduler,
    ImportanceTimesteps,
    ReverseProcess,
    beta_start_for_levels,
    covariance_eigenvalues,
    estimate_vlb,
    fit_pilot,
    vlb_loss,
)


def make_unet() -> UNet2DModel:
    """A small U-Net with a mean and a variance output."""
    blocks = dict(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(32, 64)
    )
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=2, layers_per_block=1, norm_num_groups=8, **blocks)


def train_network(unet: UNet2DModel, reverse: ReverseProcess, data: Tensor, steps: int) -> None:
    """Minimise the bound."""
    timesteps = ImportanceTimesteps.from_gaussian_model(reverse.forward.alphas_cumprod, covariance_eigenvalues(data))
    optimizer = torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for batch in torch.randint(len(data), (steps, 32)):
        t, weights = timesteps.sample(32)
        diffused = reverse.forward.diffuse(data[batch], t, torch.randn(32, *data.shape[1:]))
        output = unet(diffused.x_t, reverse.forward.timesteps[t]).sample
        (weights * vlb_loss(reverse, output, diffused)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def outliers(images: Tensor) -> dict[str, Tensor]:
    """Images that are no digits, on the same 17 levels."""
    order = torch.rand(len(images), 64).argsort(1)
    noisy = images + 0.25 * torch.randn_like(images)
    return {
        "inverted": -images,
        "shuffled pixels": images.flatten(1).gather(1, order).reshape(images.shape),
        "noisy": (noisy.clamp(-1, 1) * 8).round() / 8,
        "mirrored": images.flip(3),
        "right half erased": torch.where(torch.arange(8) < 4, images, -1),
        "blank": torch.full_like(images, -1),
    }


def auroc(usual: Tensor, unusual: Tensor) -> tuple[float, float]:
    """The chance that an unusual image scores above a usual one, and its standard error by Hanley & McNeil."""
    labels = torch.cat([torch.zeros(len(usual)), torch.ones(len(unusual))])
    area = float(roc_auc_score(labels, torch.cat([usual, unusual])))
    above, below = area / (2 - area), 2 * area**2 / (1 + area)
    spread = (len(unusual) - 1) * (above - area**2) + (len(usual) - 1) * (below - area**2)
    return area, ((area * (1 - area) + spread) / (len(usual) * len(unusual))) ** 0.5


def main(steps: int = 300, num_test: int = 297) -> dict[str, tuple[float, float]]:
    """Train, score `num_test` test digits and what becomes of them, compare."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    train, test = images[:1500], images[1500:][:num_test]
    scheduler = DDPMVLBScheduler(beta_start=beta_start_for_levels(17), variance_type="learned_range", levels=17)
    unet, reverse = make_unet(), scheduler.reverse_process()
    train_network(unet, reverse, train, steps)
    pilot = fit_pilot(unet.eval(), reverse, train)
    usual = estimate_vlb(unet, reverse, test.split(64), pilot).per_image
    print(f"digits: {usual.mean():.2f} bits/dim")
    areas = {}
    for name, changed in outliers(test).items():
        unusual = estimate_vlb(unet, reverse, changed.split(64), pilot).per_image
        area, error = areas[name] = auroc(usual, unusual)
        print(f"{name}: {unusual.mean():.2f} bits/dim, AUROC {area:.3f} +- {error:.3f}")
    return areas


if __name__ == "__main__":
    main()
