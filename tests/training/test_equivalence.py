"""The same global batch is the same training, however it is spread over processes and micro batches."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Forked, as_rank, free_port, reset_accelerate
from training_support import difference

from ddpm_vlb.commands import train
from ddpm_vlb.training.global_batches import GlobalBatches, Noise, seed_of

OBJECTIVES = ("simple", "hybrid", "vlb")
SAMPLERS = ("uniform", "low_discrepancy", "loss_second_moment", "gaussian")
COMBINATIONS = [f"{objective}-{sampler}" for objective in OBJECTIVES for sampler in SAMPLERS]
# The warm-up is the default one. Adam's very first step is lr x sign(gradient), which turns the rounding of a gradient
# near zero into a whole step: without a warm-up single biases differ by up to 2e-4.
NETWORK = (
    "--block_out_channels 8 8 --norm_num_groups 4 --ddpm_num_steps 20 --ddpm_num_inference_steps 4 "
    "--max_train_steps 20 --checkpointing_steps 20 --validation_steps 100 --random_flip --class_conditional "
    "--label_dropout 0.3"
)
LAYOUTS = {"one": (1, 16, 1), "accumulated": (1, 8, 2), "two": (2, 8, 1), "four": (2, 4, 2)}  # processes, batch, micro


def work(runs: list[list[str]], *rank_and_port: int) -> None:
    """Train every run after the other, up to the last checkpoint."""
    train.finish = lambda run: None
    if rank_and_port:
        as_rank(*rank_and_port)
    for options in runs:
        reset_accelerate()
        train.main(options)


def train_in(folder: Path, layout: str, combinations: list[str], data: tuple[str | Path, ...]) -> None:
    """Train every combination for 20 steps in a layout, on that many processes."""
    processes, batch, micro = LAYOUTS[layout]
    runs = []
    for combination in combinations:
        objective, sampler = combination.split("-")
        options = f"{NETWORK} --objective {objective} --timestep_sampler {sampler} --train_batch_size {batch}"
        options += f" --cpu --gradient_accumulation_steps {micro} --output_dir"
        runs.append([*options.split(), str(folder / layout / combination), *map(str, data)])
    port = free_port()
    several = [Forked(work, runs, *((rank, port) if processes > 1 else ())) for rank in range(processes)]
    for process in several:
        assert process.end(600) == 0, process.err[-3000:]


def weights(folder: Path, layout: str, combination: str) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint."""
    return safetensors.torch.load_file(folder / layout / combination / "checkpoint-20" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few):
    """The folder with every combination in every layout."""
    folder = tmp_path_factory.mktemp("equivalence")
    for layout in LAYOUTS:
        train_in(folder, layout, COMBINATIONS, few)
    return folder


def test_two_processes_are_one_with_twice_the_batch(tmp_path, few):
    """The sampler with a history to share, on both terms of the hybrid loss; the slow tests take every combination."""
    combination = "hybrid-loss_second_moment"
    for layout in ("one", "four"):
        train_in(tmp_path, layout, [combination], few)
    assert difference(weights(tmp_path, "one", combination), weights(tmp_path, "four", combination)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["accumulated", "two", "four"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_global_batch_is_one_step_however_it_is_spread(trained, combination, layout):
    """One process, micro batches, two processes, and both: the same parameters after 20 steps, to 1e-5."""
    assert difference(weights(trained, "one", combination), weights(trained, layout, combination)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_differs_is_seen(trained, objective):
    """Another sampler's t, with the same weights, images and noise, is further away by orders of magnitude."""
    a, b = (weights(trained, "one", f"{objective}-{sampler}") for sampler in ("uniform", "low_discrepancy"))
    assert difference(a, b) > 1e-3


# --- where it comes from


@settings(deadline=None, max_examples=60)
@given(
    num_images=st.integers(1, 50),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    first_step=st.integers(0, 7),
)
def test_the_processes_share_one_endless_row(num_images, batch_size, accumulation, world_size, first_step):
    """Together they take what one process with the whole batch takes, from any step on; every epoch is whole."""
    size = batch_size * accumulation * world_size
    steps = 3
    row = GlobalBatches(num_images, size, 1, 0, 1, seed=3)
    expected = [row.image(position) for position in range(first_step * size, (first_step + steps) * size)]
    found = torch.full((steps * size,), -1)
    for rank in range(world_size):
        own = GlobalBatches(num_images, batch_size, accumulation, rank, world_size, seed=3)
        own.first_step = first_step
        stream = iter(own)
        for step in range(steps):
            for micro_step in range(accumulation):
                rows = own.rows(micro_step)
                found[step * size + rows.start : step * size + rows.stop] = torch.tensor(next(stream))
    assert found.tolist() == expected
    assert torch.cat([own.images(step) for step in range(first_step, first_step + steps)]).tolist() == expected
    for epoch in range(3):
        whole = [row.image(position) for position in range(epoch * num_images, (epoch + 1) * num_images)]
        assert sorted(whole) == list(range(num_images))


@given(batch_size=st.integers(1, 4), accumulation=st.integers(1, 3), world_size=st.integers(1, 4))
def test_what_is_gathered_comes_back_in_order(batch_size, accumulation, world_size):
    """Each process's values, micro batch after micro batch, take the places of their rows."""
    size = batch_size * accumulation * world_size
    values = torch.arange(2 * size).reshape(size, 2)
    parts = []
    for rank in range(world_size):
        own = GlobalBatches(9, batch_size, accumulation, rank, world_size, seed=0)
        parts.append(torch.cat([values[own.rows(micro_step)] for micro_step in range(accumulation)]))
    assert torch.equal(own.in_order(torch.stack(parts)), values)


def test_noise_belongs_to_the_image():
    """It is the same whichever batch its row lies in, and differs between rows, steps and seeds."""
    noise = Noise(seed=1)
    like = torch.empty(8, 3, 4, 4)
    whole = noise.draw(like, 5, slice(0, 8))
    assert torch.equal(noise.draw(like[:3], 5, slice(2, 5)), whole[2:5])
    others = [noise.draw(like, 6, slice(0, 8)), Noise(seed=2).draw(like, 5, slice(0, 8))]
    rows = torch.cat([whole, *others]).flatten(1)
    assert len({tuple(row.tolist()) for row in rows}) == 24
    assert len({seed_of(1, step, "noise") for step in range(2500)}) == 2500


@pytest.mark.parametrize(
    "num_images, size, epochs, steps", [(154, 22, 2, 14), (154, 44, 2, 7), (10, 64, 1, 1), (65, 64, 1, 2)]
)
def test_epochs_in_steps(num_images, size, epochs, steps):
    """As many as show every image that often."""
    assert GlobalBatches(num_images, size, 1, 0, 1, seed=0).steps(epochs) == steps
