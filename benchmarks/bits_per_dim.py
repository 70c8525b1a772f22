"""Noise of the bits/dim estimators at the same network, images and number of calls; every draw a real network call.

ddpm-vlb train && python benchmarks/bits_per_dim.py --model runs/digits

Each row scores the same test images in independent replicates. The noise standard error of the mean over the images is
taken from the spread of each image's values over the replicates, pooled over the images; its own error is a bootstrap
over the images. VDM's draws tie the images of a batch together, so that row's is the spread of the means. `bias` is
the distance of the row's mean from the full loop's, in standard errors of the two.
"""

import argparse
import dataclasses

import torch
from environment import describe
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import (
    DDPMVLBPipeline,
    ImportanceTimesteps,
    LowDiscrepancyTimesteps,
    Pilot,
    ReverseProcess,
    VLBEstimator,
    covariance_eigenvalues,
    estimate_vlb,
    fit_pilot,
    nats_to_bits_per_dim,
    prior_kl,
    vlb_term,
)
from ddpm_vlb.runtime.image_data import load_image_data


def noise_se(values: Tensor) -> tuple[float, float]:
    """The noise standard error of a replicate's mean from values (replicates, images), and its bootstrap error."""
    variance, images = values.var(0), values.shape[1]
    chosen = torch.randint(images, (1000, images), generator=torch.Generator().manual_seed(0))
    spread = (variance[chosen].mean(1) / images).sqrt().std()
    return float((variance.mean() / images).sqrt()), float(spread)


def vdm(model: torch.nn.Module, reverse: ReverseProcess, x_0: Tensor, calls: int, seed: int) -> float:
    """Bits/dim with the t of the whole batch spread evenly over the chain, as VDM draws them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = len(x_0) * calls
    t, weights = LowDiscrepancyTimesteps(len(reverse.forward)).sample(pairs, generator=generator)
    image, terms = torch.arange(pairs) % len(x_0), []
    for part in torch.arange(pairs).split(1024):
        diffused = reverse.forward.diffuse(
            x_0[image[part]], t[part], torch.randn((len(part), *x_0.shape[1:]), generator=generator)
        )
        terms.append(vlb_term(reverse, model(diffused.x_t, reverse.forward.timesteps[t[part]]).sample, diffused))
    nats = prior_kl(reverse, x_0).mean() + len(reverse.forward) * (weights * torch.cat(terms)).mean()
    return float(nats_to_bits_per_dim(nats, x_0[0].numel()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/digits")
    parser.add_argument("--num_images", type=int, default=96)
    parser.add_argument("--replicates", type=int, default=20, help="Of the full loop.")
    parser.add_argument("--cheap_replicates", type=int, default=100, help="Of the other rows.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    pipeline = DDPMVLBPipeline.from_pretrained(args.model)
    unet = pipeline.unet.eval()
    reverse = dataclasses.replace(pipeline.scheduler.reverse_process(), clip_sample=False)
    data = load_image_data()
    x_0 = torch.cat(list(data.test.batches(256, args.num_images)))
    train = torch.cat(list(data.train.batches(256)))

    pilot = fit_pilot(unet, reverse, train)
    assert pilot.control is not None
    plain = fit_pilot(unet, reverse, train, control_variate=False).probabilities
    gaussian = ImportanceTimesteps.from_gaussian_model(
        reverse.forward.alphas_cumprod, covariance_eigenvalues(train)
    ).probabilities
    # Wrong on purpose: the decoder's step, a fifth of the bound, at a twentieth of its share, and slopes turned round.
    wrong = plain.clone()
    wrong[0] /= 20
    bad = Pilot(wrong / wrong.sum(), dataclasses.replace(pilot.control, slopes=-pilot.control.slopes))
    rows = [
        ("importance + control variate", pilot, 10, None),
        ("importance + control variate", pilot, 20, None),
        ("importance", plain, 10, None),
        ("importance", plain, 20, None),
        ("importance, closed-form Gaussian p_t", gaussian, 20, None),
        ("importance + control variate, a bad pilot", bad, 20, None),
        ("low-discrepancy t for each image", None, 20, None),
        ("independent uniform t", None, 20, 20),
    ]
    print(f"{args.num_images} test images, x_0 not clipped, pilot of {pilot.num_calls} calls on training images.\n")
    full = VLBEstimator(unet, reverse, estimator="full")
    values = torch.stack(
        [
            torch.cat([full.score(x, [i], sweep=r)[0].estimate().per_image for i, x in enumerate(x_0.split(1))])
            for r in tqdm(range(args.replicates), desc="full loop")
        ]
    )
    reference, reference_se = float(values.mean()), noise_se(values)[0] / args.replicates**0.5
    base, error = noise_se(values)
    print("| estimator | calls/image | replicates | noise SE | full loop = 1 | mean bits/dim | bias |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| full loop | {len(reverse.forward)} | {args.replicates} | {base:.4f} +- {error:.4f} | 1 | "
        f"{reference:.4f} +- {reference_se:.4f} | |"
    )
    for name, chosen, calls, replicates in rows:
        estimates = [
            estimate_vlb(unet, reverse, [x_0], chosen, calls, replicates, seed=1000 + seed)
            for seed in tqdm(range(args.cheap_replicates), desc=f"{name}, {calls}")
        ]
        values = torch.stack([estimate.per_image for estimate in estimates])
        se, error = noise_se(values)
        mean, mean_se = float(values.mean()), se / args.cheap_replicates**0.5
        bias = (mean - reference) / (mean_se**2 + reference_se**2) ** 0.5
        print(
            f"| {name} | {calls} | {args.cheap_replicates} | {se:.4f} +- {error:.4f} | {se / base:.2f} | "
            f"{mean:.4f} +- {mean_se:.4f} | {bias:+.1f} SE |",
            flush=True,
        )
    with torch.no_grad():
        seeds = tqdm(range(args.cheap_replicates), desc="VDM")
        means = torch.tensor([vdm(unet, reverse, x_0, 20, seed) for seed in seeds], dtype=torch.float64)
    count, se = args.cheap_replicates, float(means.std())
    mean_se = se / count**0.5
    print(
        f"| low-discrepancy t over the batch (VDM) | 20 | {count} | {se:.4f} +- {se / (2 * (count - 1)) ** 0.5:.4f} | "
        f"{se / base:.2f} | {float(means.mean()):.4f} +- {mean_se:.4f} | "
        f"{(float(means.mean()) - reference) / (mean_se**2 + reference_se**2) ** 0.5:+.1f} SE |"
    )


if __name__ == "__main__":
    main()
