"""Which of two checkpoints is better: `Validation` beside what trainers do, against the full 1000-step bound.

    python benchmarks/validation.py
    python benchmarks/validation.py --only_stops

Twenty checkpoints of a training run on the digits 0 to 4, and twenty of a fine-tune of its last one on 64 images of
the digits 5 to 9, which gets better and then overfits; each is validated on 64 held-out images of its own digits. The
truth is every term of their bound with the same noise for all checkpoints, the first 16 steps, where most of the noise
is, averaged over 8 draws; that of the coverage is the mean of 8 such, whose spread gives its error. Every method gets
8 network calls for each image, and the same draws for all checkpoints; the pilot's 990 are not counted. A pair of
checkpoints counts where the truth tells them apart by 2 paired standard errors.

`paired z` is the mean of the images' differences over its standard error, which the choice of images limits; `noise z`
the same over the standard deviation of that mean over seeds, on the same images: medians over the pairs. `calls for
our noise z` takes it to grow with the root of the calls.

False stops are simulated: each validation's images are normal numbers of deviation one about a mean that is the same
for all validations, or falls by `drift` paired standard errors from each to the next. `--patience` is asked after each
of them; whatever it ends, it ends wrongly.
"""

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Callable

import torch
from environment import describe
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddpm_vlb import (
    DDPMVLBScheduler,
    ImportanceTimesteps,
    ReverseProcess,
    Validation,
    beta_start_for_levels,
    covariance_eigenvalues,
    simple_loss,
    vlb_loss,
    vlb_term,
)
from ddpm_vlb.training.validations import Validations

CHECKPOINTS, CALLS = 20, 8
SIMULATED = ((40, 64, 0.0), (200, 64, 0.0), (40, 8, 0.0), (40, 64, 0.1), (40, 8, 0.1))
"""Validations, images and drift of the false stops."""
Scored = Callable[[nn.Module], Tensor]
"""A network's value for each image, (N,); lower is better."""


class Network(nn.Module):
    """Residual layers on all pixels, for the mean half and the variance half."""

    def __init__(self, width: int = 256, blocks: int = 3):
        super().__init__()
        self.image, self.time = nn.Linear(64, width), nn.Linear(32, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, 128)
        self.register_buffer("frequencies", torch.logspace(0, 3, 16) / 1000)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The output (B, 2, 8, 8)."""
        angles = timesteps[:, None] * self.frequencies
        h = self.image(x_t.flatten(1)) + self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(h).reshape(-1, 2, 8, 8)


def build() -> tuple[Network, ReverseProcess]:
    scheduler = DDPMVLBScheduler(beta_start=beta_start_for_levels(17), variance_type="learned_range", levels=17)
    return Network(), scheduler.reverse_process()


def train(network: Network, reverse: ReverseProcess, images: Tensor, steps: int, lr: float, decay: bool) -> list:
    """Copies of the network as it is trained, evenly spaced."""
    draws = ImportanceTimesteps.from_gaussian_model(
        reverse.forward.alphas_cumprod, covariance_eigenvalues(images) + 1e-3
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decay else None
    kept = []
    for step in tqdm(range(1, steps + 1), desc="Training"):
        x_0 = images[torch.randint(len(images), (64,))]
        t, weights = draws.sample(64)
        diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
        output = network(diffused.x_t, reverse.forward.timesteps[t])
        (weights * vlb_loss(reverse, output, diffused)).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        if step % (steps // CHECKPOINTS) == 0:
            kept.append(copy.deepcopy(network).eval().requires_grad_(False))
    return kept


def draws_at(t: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return t, torch.randn(*t.shape, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def terms(network: Network, reverse: ReverseProcess, x_0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The bound's term in bits/dim and the squared error of the mean output at t (N, K), both (N, K)."""
    of_the_mean = dataclasses.replace(reverse, variance_type="fixed_small")
    bound, simple = [], []
    image = torch.arange(len(x_0))[:, None].expand_as(t).flatten()
    for part in torch.arange(t.numel()).split(1024):
        diffused = reverse.forward.diffuse(x_0[image[part]], t.flatten()[part], noise.flatten(0, 1)[part])
        output = network(diffused.x_t, reverse.forward.timesteps[diffused.t])
        bound.append(vlb_term(reverse, output, diffused) / (64 * torch.log(torch.tensor(2.0))))
        simple.append(simple_loss(of_the_mean, output[:, :1], diffused))
    return torch.cat(bound).reshape(t.shape).double(), torch.cat(simple).reshape(t.shape).double()


def truth(reverse: ReverseProcess, x_0: Tensor, seed: int = 1, low: int = 16, draws: int = 8) -> Scored:
    """The bound less the prior term, which no network changes."""
    steps = len(reverse.forward)
    every = torch.cat([torch.arange(low).repeat(draws), torch.arange(low, steps)]).expand(len(x_0), -1)
    fixed, weights = draws_at(every, seed), torch.where(every < low, 1 / draws, 1.0)
    return lambda network: (weights * terms(network, reverse, x_0, *fixed)[0]).sum(1)


def habits(reverse: ReverseProcess, x_0: Tensor, seed: int) -> dict[str, Scored]:
    """What trainers do, each with fixed seeds: their loss, and the bound at the first one's draws."""
    steps, shape = len(reverse.forward), (len(x_0), CALLS)
    uniform = torch.randint(steps, shape, generator=torch.Generator().manual_seed(seed))
    middle = torch.full(shape, steps // 2)
    even = ((torch.arange(CALLS) + 0.5) * steps / CALLS).long().expand(shape)
    at = {"(a) uniform t, squared error": uniform, "(b) t = 500, squared error": middle}
    at["(c) 8 equidistant t, squared error"] = even
    fixed = {name: draws_at(t, seed) for name, t in at.items()}

    def squared(name: str) -> Scored:
        return lambda network: terms(network, reverse, x_0, *fixed[name])[1].mean(1)

    def bound(network: Network) -> Tensor:
        return steps * terms(network, reverse, x_0, *draws_at(uniform, seed))[0].mean(1)

    return {**{name: squared(name) for name in at}, "(a) with the bound's terms": bound}


def validation(reverse: ReverseProcess, x_0: Tensor, seed: int) -> Scored:
    ours = Validation(x_0, reverse, CALLS, seed)
    return lambda network: ours(network).per_image


class Split(list):
    """Images as `Validations` reads them."""

    def __getitems__(self, positions: list[int]) -> list[Tensor]:
        return [self[i] for i in positions]


def deciding(network: Network, reverse: ReverseProcess, x_0: Tensor, patience: int) -> Validations:
    """What `--patience` decides by; its one estimate is of these images, which others have to be of too."""
    decides = Validations(Split(x_0), reverse, CALLS, seed=0, keep_best=False, patience=patience)
    decides.add(decides.so_far.score(network), 0, network)
    return decides


def end(decides: Validations, values: Tensor, ends: Callable[[Validations], bool] = Validations.exhausted) -> int:
    """Which validation ends a run, from 1; 0: none does. From values (validations, images)."""
    own = next(iter(decides.so_far.history.values()))
    history = decides.so_far.history = {}
    for number, rows in enumerate(values, 1):
        history[number] = dataclasses.replace(own, per_image=rows, bits_per_dim=float(rows.mean()))
        if ends(decides):
            return number
    return 0


def beyond_two_errors(decides: Validations) -> bool:
    """The rule that asks for no more the more validations there are."""
    estimates, best = list(decides.so_far.history.values()), decides.so_far.history[decides.so_far.best]
    gaps = [own - best for own in estimates[-decides.patience :]]
    return len(gaps) == decides.patience and all(gap.bits_per_dim > 2 * gap.se for gap in gaps)


def false_stops(network: Network, reverse: ReverseProcess, x_0: Tensor, runs: int) -> None:
    """Print how many of the simulated runs are ended."""
    print(f"\n## False stops, {runs} simulated runs each\n")
    print("| rule | validations | images | drift | `--patience 1` | `--patience 3` |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    cases = [("surely worse", Validations.exhausted, *own) for own in SIMULATED]
    cases.append(("two standard errors", beyond_two_errors, *SIMULATED[0]))
    for rule, ends, count, images, drift in cases:
        cells = []
        for patience in (1, 3):
            decides, generator = deciding(network, reverse, x_0[:images], patience), torch.Generator().manual_seed(0)
            fall = drift * (2 / images) ** 0.5 * torch.arange(count)[:, None]
            made = (torch.randn(count, images, generator=generator).double() - fall for _ in range(runs))
            share = sum(end(decides, values, ends) > 0 for values in tqdm(made, rule, runs)) / runs
            cells.append(f"{100 * share:.1f} +- {100 * (share * (1 - share) / runs) ** 0.5:.1f} %")
        print(f"| {rule} | {count} | {images} | {drift} | {' | '.join(cells)} |", flush=True)


def paired(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the difference of all pairs of checkpoints, from values (checkpoints, images)."""
    first, second = torch.tensor(list(itertools.combinations(range(len(values)), 2))).T
    gaps = values[first] - values[second]
    return gaps.mean(1), gaps.std(1) / gaps.shape[1] ** 0.5


def rows(name: str, checkpoints: list, exact: Tensor, reverse: ReverseProcess, x_0: Tensor, seeds: int) -> None:
    """Print a table of all methods for one run."""
    gap, error = paired(exact)
    told = gap.abs() > 2 * error
    scored: dict[str, list[Tensor]] = {}
    for seed in tqdm(range(seeds), desc=name):
        methods = {"`Validation`, the bound": validation(reverse, x_0, seed), **habits(reverse, x_0, seed)}
        for method, score in methods.items():
            scored.setdefault(method, []).append(torch.stack([score(network) for network in checkpoints]))
    best = int(exact.mean(1).argmin())
    print(f"\n## {name}\n\nTruth: {', '.join(f'{v:.3f}' for v in exact.mean(1).tolist())} bits/dim less the prior.")
    print(f"It tells {int(told.sum())} of {len(told)} pairs apart; number {best + 1} is its best.\n")
    print("| method | Kendall's tau (worst seed) | wrong pairs | paired z | noise z | calls for our noise z |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    ours, lines = None, []
    for method, values in scored.items():
        pairs = [paired(own) for own in values]
        gaps = torch.stack([gap for gap, _ in pairs])[:, told]
        wrong = (gaps.sign() != gap[told].sign()).double().mean(1)
        z = float(torch.stack([(gap / error).abs()[told].median() for gap, error in pairs]).mean())
        noise_z = float((gaps.mean(0).abs() / gaps.std(0)).median())
        ours = noise_z if ours is None else ours
        print(
            f"| {method} | {1 - 2 * wrong.mean():.3f} ({1 - 2 * wrong.max():.3f}) | {100 * wrong.mean():.1f} % | "
            f"{z:.1f} | {noise_z:.1f} | {CALLS * (ours / noise_z) ** 2:.1f} |",
            flush=True,
        )
        lines.append(f"{method}: {', '.join(str(int(own.mean(1).argmin()) + 1) for own in values)}")
    print("\nThe best checkpoint by each, seed by seed. " + "; ".join(lines) + ".")
    decides = deciding(checkpoints[0], reverse, x_0, patience=3)
    ends = [end(decides, values) for values in scored["`Validation`, the bound"]]
    print(f"\n`--patience 3` stops at number (0: at none), seed by seed: {', '.join(map(str, ends))}.", flush=True)


def coverage(name: str, pair: list, reverse: ReverseProcess, x_0: Tensor, replicates: int, truths: int = 8) -> None:
    """How often the paired 95 % interval of images drawn anew from these holds their own difference.

    That is the mean of several truths, whose spread gives its error.
    """
    scores = [truth(reverse, x_0, seed) for seed in range(1, 1 + truths)]
    known = torch.stack([(score(pair[0]) - score(pair[1])).mean() for score in tqdm(scores, desc="Truth")])
    true = float(known.mean())
    pilot = Validation(x_0, reverse).fit(pair[0])
    gaps, errors = [], []
    for seed in tqdm(range(replicates), desc="Coverage"):
        chosen = torch.randint(len(x_0), (len(x_0),), generator=torch.Generator().manual_seed(seed))
        ours = Validation(x_0[chosen], reverse, CALLS, seed, pilot=pilot)
        difference = ours(pair[0]) - ours(pair[1])
        gaps.append(difference.bits_per_dim)
        errors.append(difference.se)
    gap, se = torch.tensor(gaps), torch.tensor(errors)
    held = 100 * float(((gap - true).abs() < 1.96 * se).double().mean())
    print(
        f"| {name} | {true:+.4f} +- {known.std() / truths**0.5:.4f} | "
        f"{gap.mean():+.4f} +- {gap.std() / len(gap) ** 0.5:.4f} | {gap.std():.4f} | "
        f"{se.square().mean().sqrt():.4f} | {held:.1f} % |",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="Of each run.")
    parser.add_argument("--images", type=int, default=64, help="Validation images.")
    parser.add_argument("--seeds", type=int, default=8, help="Of each method's draws.")
    parser.add_argument("--replicates", type=int, default=200, help="Of the coverage.")
    parser.add_argument("--runs", type=int, default=1000, help="Of each simulation of false stops.")
    parser.add_argument("--only_stops", action="store_true", help="Simulate these, and train nothing.")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe(), flush=True)
    data = load_digits()
    digits, low = torch.tensor(data.images[:, None] / 8 - 1, dtype=torch.float32), torch.tensor(data.target < 5)
    first, second = (digits[:1500][own[:1500]] for own in (low, ~low))
    held_out = [digits[1500:][own[1500:]][: args.images] for own in (low, ~low)]
    network, reverse = build()
    if args.only_stops:
        return false_stops(network, reverse, held_out[0], args.runs)
    runs = {"Training": train(network, reverse, first, args.steps, 5e-3, True)}
    runs["Fine-tune on 64 images"] = train(network, reverse, second[:64], args.steps, 2e-4, False)
    for (name, kept), x_0 in zip(runs.items(), held_out, strict=True):
        score = truth(reverse, x_0)
        rows(name, kept, torch.stack([score(own) for own in tqdm(kept, desc="Truth")]), reverse, x_0, args.seeds)
    print(f"\n## Coverage of the paired 95 % interval, {args.replicates} replicates\n")
    print("| checkpoints | truth | mean estimate | its standard deviation | paired SE | held |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, kept), x_0 in zip(runs.items(), held_out, strict=True):
        i, j = CHECKPOINTS - 3, CHECKPOINTS - 1
        coverage(f"{name}, {i + 1} and {j + 1}", [kept[i], kept[j]], reverse, x_0, args.replicates)
    false_stops(network, reverse, held_out[0], args.runs)


if __name__ == "__main__":
    main()
