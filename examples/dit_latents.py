"""Train a small class-conditional DiT on latents: continuous data, scored by its density in nats per dimension.

    python examples/dit_latents.py

The latents are the first 16 principal components of scikit-learn's digits, each scaled to variance 1, in the shape
(4, 2, 2). It prints the test nats/dim of density given the labels, with its two standard errors, beside a Gaussian for
all labels and one for each; and writes dit_latents.png: samples decoded to images, a column for each digit.
"""

import math

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from diffusers.utils import make_image_grid, pt_to_pil
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ImportanceTimesteps,
    ReverseProcess,
    VLBEstimate,
    covariance_eigenvalues,
    estimate_vlb,
    fit_pilot,
    vlb_loss,
)


class LinearCoder:
    """Principal components of the training images, in the place of an autoencoder."""

    def __init__(self, images: Tensor):
        self.mean = images.flatten(1).mean(0)
        _, singular, basis = torch.linalg.svd(images.flatten(1) - self.mean, full_matrices=False)
        self.basis, self.scale = basis[:16], singular[:16] / len(images) ** 0.5

    def encode(self, images: Tensor) -> Tensor:
        """Latents (N, 4, 2, 2) of images (N, 1, 8, 8)."""
        return ((images.flatten(1) - self.mean) @ self.basis.T / self.scale).reshape(-1, 4, 2, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents."""
        return (latents.flatten(1) * self.scale @ self.basis + self.mean).reshape(-1, 1, 8, 8).clamp(-1, 1)


def train_network(dit: DiTTransformer2DModel, reverse: ReverseProcess, x: Tensor, labels: Tensor, steps: int) -> None:
    """Minimise the bound given the labels; a DiT drops a tenth of them by itself while it trains."""
    timesteps = ImportanceTimesteps.from_gaussian_model(reverse.forward.alphas_cumprod, covariance_eigenvalues(x))
    optimizer = torch.optim.AdamW(dit.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for batch in torch.randint(len(x), (steps, 64)):
        t, weights = timesteps.sample(64)
        diffused = reverse.forward.diffuse(x[batch], t, torch.randn(64, *x.shape[1:]))
        output = dit(diffused.x_t, reverse.forward.timesteps[t], class_labels=labels[batch]).sample
        (weights * vlb_loss(reverse, output, diffused)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def gaussian_nats(train: Tensor, test: Tensor) -> Tensor:
    """Minus the log density of each test latent by a Gaussian fitted to the training latents, nats/dim."""
    fitted = torch.distributions.MultivariateNormal(train.flatten(1).mean(0), train.flatten(1).T.cov())
    return -fitted.log_prob(test.flatten(1)) / test[0].numel()


def sample_latents(pipeline: DiffusionPipeline, steps: int) -> Tensor:
    """Four latents of each digit."""
    digits = torch.arange(10).repeat(4)
    return pipeline(40, digits, guidance_scale=1.5, num_inference_steps=steps, output_type="latent").images


def main(steps: int = 1500, num_test: int = 297, sampling_steps: int = 100) -> VLBEstimate:
    """Encode, train, score the first `num_test` test latents, sample, decode."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    coder, labels = LinearCoder(images[:1500]), torch.tensor(load_digits().target)
    (x, test_x), (y, test_y) = coder.encode(images).split([1500, 297]), labels.split([1500, 297])
    sizes = dict(num_layers=3, num_attention_heads=4, attention_head_dim=16, sample_size=2, patch_size=1)
    dit = DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=10, **sizes)  # mean and variance
    # Latents are neither discrete nor bounded: no levels, no clipping.
    scheduler = DDPMVLBScheduler(beta_start=0.001, variance_type="learned_range", levels=None, clip_sample=False)
    reverse = scheduler.reverse_process()
    train_network(dit, reverse, x, y, steps)
    pilot = fit_pilot(dit.eval(), reverse, x, conditioning={"class_labels": y})
    score = estimate_vlb(dit, reverse, [(test_x[:num_test], {"class_labels": test_y[:num_test]})], pilot)
    nats = [math.log(2) * bits for bits in (score.bits_per_dim, score.noise_se, score.image_se)]
    print("{:.3f} +- {:.3f} (noise) +- {:.3f} (images) nats/dim of density".format(*nats))
    own = torch.cat([gaussian_nats(x[y == label], test_x[test_y == label]) for label in range(10)])
    print(f"one Gaussian: {gaussian_nats(x, test_x).mean():.3f}, one for each label: {own.mean():.3f}")
    latents = sample_latents(DDPMVLBPipeline(dit, scheduler), sampling_steps)
    grid = [image.resize((32, 32), resample=0) for image in pt_to_pil(coder.decode(latents))]
    make_image_grid(grid, rows=4, cols=10).save("dit_latents.png")
    return score


if __name__ == "__main__":
    main()
