"""What a run's network scores: the bound of validation and test images, on all processes, in bounded time."""

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence

import torch
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_vlb import (
    Pilot,
    VLBEstimate,
    VLBEstimator,
    VLBScores,
    enough_replicates,
    estimate_from_scores,
    fit_pilot,
    pilot_positions,
    values_in_a_call,
)
from ddpm_vlb.runtime.image_sets import Images
from ddpm_vlb.scoring.checkpoint import FORMAT, described, fingerprint_of, hash_of_path
from ddpm_vlb.scoring.report import both_clippings
from ddpm_vlb.scoring.sweep import PartialScores, run_sweep, shared
from ddpm_vlb.training.paths import chain_network
from ddpm_vlb.training.run import Run
from ddpm_vlb.training.validations import spread

MOST_CALLS = 2**14  # network calls for the test images, unless their number is given
PILOT_CALLS = 1024  # of `fit_pilot`
USUAL_CALLS = 20  # for each image, unless their number is given
MORE_CALLS = 80  # for each, at most, where the noise hides what the images say
ENOUGH = 0.5  # the noise error's share of the image error above which it does


def selected(images: Images, positions: Sequence[int]) -> Images:
    """Some of the images.

    Args:
        images: of a split.
        positions: which.
    """
    part = copy.copy(images)
    part.data = images.data.select(positions)
    return part


def to_score(total: int, asked: int | None, calls_per_image: int | None) -> list[int]:
    """Positions of the test images to score: the first so many, or, drawn from all, what bounded calls allow.

    Args:
        total: number of test images.
        asked: how many are asked for; None: not said.
        calls_per_image: network calls for each; None: as usual.
    """
    if asked is not None:
        return list(range(min(asked, total)))
    return spread(total, max(2, MOST_CALLS // (calls_per_image or USUAL_CALLS)))


class Scoring:
    """Images that a run's network scores, with x_0_hat clipped as the checkpoint samples, and the other way.

    Args:
        run: the run.
        network: which is called.
        images: all of which are scored.
        calls_per_image: network calls for each, in one sweep.
        what: they are, for messages.
    """

    def __init__(self, run: Run, network: torch.nn.Module, images: Images, calls_per_image: int, what: str):
        self.run, self.network, self.images = run, network, images
        self._of_the_chain = chain_network(run.path, network, run.accelerator.device)
        self.calls, self.what = calls_per_image, what
        self.processes = both_clippings(run.reverse)

    def model(self, x_t: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        """The network, under the run's mixed precision."""
        with self.run.accelerator.autocast():
            return self._of_the_chain(x_t, timesteps, **conditioning).float()

    def batch(self, positions: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images to score, and their classes if the network is told them."""
        return self.images.batch(positions)

    def seconds(self, calls: int) -> float:
        """What so many network calls take on all processes, by one batch of them, timed after another."""
        (x_0, told), device = self.batch([0]), self.run.accelerator.device
        pairs = max(1, values_in_a_call(None, device) // x_0[0].numel())
        x_t = x_0[:1].to(device).expand(pairs, *x_0.shape[1:])
        told = {name: value.to(device).expand(pairs) for name, value in told.items()}
        for _ in range(2):
            started = time.perf_counter()
            with torch.no_grad():
                self.model(x_t, torch.zeros(pairs, dtype=torch.long, device=device), **told).sum().item()
        return (time.perf_counter() - started) * calls / pairs / self.run.accelerator.num_processes

    def pilot(self) -> Pilot:
        """One of training images."""
        train, dims = self.run.data.train, self.batch([0])[0].numel()
        x_0, told = train.batch(pilot_positions(len(train), dims))
        reverse, other = self.processes
        return fit_pilot(self.model, reverse, x_0, seed=self.run.args.seed, conditioning=told, also=[other])

    def sweep(
        self, pilot: Pilot, store: PartialScores | None = None, number: int = 0, calls: int | None = None
    ) -> tuple[VLBScores, ...]:
        """All images once, on all processes together; raises `Stopped` if the run is asked to stop."""
        run, (reverse, other), calls = self.run, self.processes, calls or self.calls
        replicates = enough_replicates(calls, len(self.images))
        scorer = VLBEstimator(self.model, reverse, pilot, calls, replicates, run.args.seed, also=[other])
        return run_sweep(
            run.accelerator,
            scorer,
            self.batch,
            range(len(self.images)),
            number,
            store,
            f"Scoring {self.what}",
            1 / math.log(2),
            run.stop.asked,
        )

    def key(self, weights: str, positions: Sequence[int]) -> str:
        """A hash over all that the scores of the images at these positions depend on, the same on all processes."""
        content = {
            "format": FORMAT,
            "weights": weights,
            "data": self.run.data.record,
            "images": [list(positions), self.calls, self.run.args.seed],
            "precision": [self.run.accelerator.mixed_precision, self.run.args.allow_tf32],
            "processes": [described(own) for own in self.processes],
            "path": hash_of_path(self.run.path),
        }
        own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return broadcast_object_list([own])[0]


def score_validation(run: Run, network: torch.nn.Module) -> VLBEstimate:
    """The bound of 64 validation images, which may end the run: --patience.

    Args:
        run: the run.
        network: which is called.

    Raises:
        Stopped: the run was asked to stop.
    """
    validations = run.validations
    images = selected(run.data.validation, validations.positions)
    scoring = Scoring(run, network, images, run.args.validation_calls, "validation images")
    if validations.so_far.pilot is None:  # of an earlier network it is as unbiased, and little less precise
        validations.so_far.pilot = shared(run.accelerator, scoring.pilot)
    estimate = validations.add(scoring.sweep(validations.so_far.pilot), run.progress.step, network)
    run.heed_patience()
    return estimate


def network_to_keep(run: Run) -> UNet2DModel:
    """The averaged network of the last step, or under --keep_best that of the best validation; on all processes.

    Args:
        run: the run.

    Raises:
        Stopped: the run was asked to stop.
    """
    network, step, history = run.averaged_network(), run.progress.step, run.validations.so_far.history
    if not run.args.keep_best:
        return network
    if step not in history:
        score_validation(run, network)
    best = run.validations.so_far.best
    assert best is not None
    if best != step:
        last = history[step] - history[best]
        run.accelerator.print(f"--keep_best: the network of step {best} is kept. The last, of {step}, is {last}.")
        network.load_state_dict(run.validations.best_weights)
    return network


class FinalScores:
    """The bound of the test images: its cost told beforehand, its parts kept until they are not needed.

    Args:
        run: the run.
        network: which is called.
        positions: of those to score in the test split, at least one.
    """

    def __init__(self, run: Run, network: torch.nn.Module, positions: Sequence[int]):
        self.images = selected(run.data.test, positions)
        calls = run.args.calls_per_image or USUAL_CALLS
        self.run, self.scoring = run, Scoring(run, network, self.images, calls, "test images")
        weights = fingerprint_of(network)
        key = self.scoring.key(weights, positions)
        self.own = f"scores-{weights[:8]}-*"
        self.store = PartialScores(run.folder / f"scores-{weights[:8]}-{key[:8]}", run.accelerator.print, key)
        if run.accelerator.is_main_process:
            for other in set(run.folder.glob("scores-*-*")) - set(run.folder.glob(self.own)):  # of an earlier network
                shutil.rmtree(other, ignore_errors=True)

    def estimate(self) -> VLBEstimate:
        """One sweep, and a longer one where noise hides the images and calls are left; may raise `Stopped`."""
        scoring, count = self.scoring, len(self.scoring.images)
        self._tell(
            f"Scoring {count} of {len(self.run.data.test)} test images with {scoring.calls} network calls each, "
            "after a pilot of some 1000",
            self.calls_ahead(),
            "; --num_test_images scores fewer, 0 none",
        )
        pilot = shared(self.run.accelerator, self._pilot)
        scores = scoring.sweep(pilot, self.store)
        estimate = estimate_from_scores(scores)
        more = min(MORE_CALLS, (MOST_CALLS // count - scoring.calls) // 2 * 2)
        hidden = estimate.noise_se > ENOUGH * estimate.image_se
        if self.run.args.calls_per_image is not None or not hidden or more < 2:
            return estimate
        noise = f"The noise, +- {estimate.noise_se:.3f}, hides what the images say"
        self._tell(f"{noise}: {more} calls more for each", more * count)
        further = scoring.sweep(pilot, self.store, 1, more)
        return estimate_from_scores(tuple(VLBScores.combine(own) for own in zip(scores, further)))

    def calls_ahead(self) -> int:
        """Network calls of the pilot and of the first sweep that are not kept from an earlier start."""
        kept = sum(len(scores[0].positions) for sweep, scores in self.store.load().values() if sweep == 0)
        pilot = 0 if (self.store.folder / "pilot.npz").exists() else PILOT_CALLS
        return pilot + max(0, len(self.scoring.images) - kept) * self.scoring.calls

    def _pilot(self) -> Pilot:
        saved = self.store.load_pilot()
        if saved is not None:
            return saved
        pilot = self.scoring.pilot()
        self.store.save_pilot(pilot)
        return pilot

    def _tell(self, what: str, calls: int, way_out: str = "") -> None:
        if self.run.accelerator.is_main_process:
            print(f"{what}: about {self.scoring.seconds(calls):.0f} s{way_out}.")

    def forget(self) -> None:
        """Remove the parts; on the main process, once the numbers are written."""
        for own in self.run.folder.glob(self.own):
            shutil.rmtree(own, ignore_errors=True)
