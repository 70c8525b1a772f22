"""Scoring in pieces: part files that are whole or set aside, units that do not move, sweeps that go on."""

import dataclasses
import functools
import io
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from processes import reset_accelerate

from ddpm_vlb import DDPMVLBScheduler, VLBEstimator, VLBScores, fit_pilot, merge_scores
from ddpm_vlb.scoring import sweep as scoring
from ddpm_vlb.scoring.sweep import PartialScores, RunningEstimate, Saver, run_sweep, shared, units

T, LEVELS = 6, 17
REVERSE = DDPMVLBScheduler(num_train_timesteps=T, levels=LEVELS).reverse_process()


def half(x_t, timesteps):
    """A network."""
    return 0.5 * x_t


def images(count, seed=0):
    """Images on 17 levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LEVELS, (count, 1, 2, 2), generator=generator) * (2 / (LEVELS - 1)) - 1


def scores_of(positions, seed=0, also=1):
    """Scores of images, as a scorer might give them."""
    generator = torch.Generator().manual_seed(seed)
    count = len(positions)
    return tuple(
        VLBScores(
            torch.tensor(positions),
            *torch.rand(4, count, generator=generator, dtype=torch.float64),
            torch.rand(6, T, generator=generator, dtype=torch.float64),
            dims=4,
            calls=4,
            images=torch.tensor(positions),
            draws=torch.tensor([[1, 2, 3]]),
        )
        for _ in range(1 + also)
    )


def same(a, b):
    """The same scores, bit for bit."""
    states = [(one.state_dict(), other.state_dict()) for one, other in zip(a, b)]
    return len(a) == len(b) and all(torch.equal(one[name], other[name]) for one, other in states for name in one)


def same_pilot(a, b):
    """The same pilot, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def told():
    return []


@pytest.fixture
def store(tmp_path, told):
    """A store, the messages of which are in `told`."""
    return PartialScores(tmp_path / "partial", told.append)


@pytest.fixture
def accelerator():
    reset_accelerate()
    yield Accelerator(cpu=True)
    reset_accelerate()


# Part files


@pytest.mark.parametrize("also", [0, 1, 2])
def test_parts_come_back_as_they_were(store, told, also):
    """Every number, bit for bit, of every process, NaN among them, under the sweep that they were saved for."""
    first, second = scores_of([3, 4, 5], 0, also), scores_of([9], 1, also)
    first[0].noise_variance[1] = torch.nan
    store.save(0, first)
    store.save(12, second)
    found = sorted(store.load().values(), key=lambda part: part[0])
    assert [sweep for sweep, _ in found] == [0, 12] and told == []
    (_, again), (_, other) = found
    assert again[0].noise_variance.isnan().tolist() == [False, True, False]
    for part in (first, again):
        part[0].noise_variance[1] = 0
    assert same(again, first) and same(other, second)


def test_nothing_is_written_before_there_is_something(store):
    """An empty or missing folder has no parts and no pilot, and looking for them makes none."""
    assert store.load() == {} and store.load_pilot() is None
    assert not store.folder.exists()


def test_parts_of_the_same_images_do_not_overwrite_each_other(store):
    """Two machines that share a folder cannot destroy each other's work."""
    store.save(0, scores_of([3, 4]))
    store.save(0, scores_of([3, 4], 1))
    assert len(store.load()) == 2


def test_other_files_are_left_alone(store, told):
    """Torn temporary files above all: a part is written aside and renamed."""
    store.save(0, scores_of([3, 4]))
    whole = next(store.folder.glob("*.npz")).read_bytes()
    for name in (".000-000000007-abcdef12.writing", ".pilot.writing", "notes.txt", "old.corrupt"):
        (store.folder / name).write_bytes(whole[: len(whole) // 3])
    assert len(store.load()) == 1 and store.load_pilot() is None and told == []
    assert len(list(store.folder.iterdir())) == 5


def test_a_part_is_there_only_when_it_is_whole(store, monkeypatch):
    """Killed while it writes, the file has another name."""

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(0, scores_of([3, 4]))
    assert [path.suffix for path in store.folder.iterdir()] == [".writing"] and store.load() == {}


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def flipped(whole, index, mask=0xFF):
    content = bytearray(whole)
    content[index] ^= mask
    return bytes(content)


CORRUPT = {
    "empty": lambda whole: b"",
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "last byte missing": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "first byte": lambda whole: flipped(whole, 0),
    "a flipped number": lambda whole: flipped(whole, whole.index(b"0.kl.npy") + 128 + 2),
    "foreign npz": lambda whole: npz(a=np.zeros(3)),
    "empty npz": lambda whole: npz(),
    "npz with objects": lambda whole: npz(count=np.array([{}], dtype=object), sweep=np.int64(0)),
    "npy": lambda whole: npy(np.zeros(3)),
    "text": lambda whole: b"not an archive",
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_parts_are_set_aside(store, told, kind):
    """Moved out of the way, kept, and reported with their name; the others are read."""
    store.save(0, scores_of([3, 4]))
    path = next(store.folder.glob("*.npz"))
    broken = CORRUPT[kind](path.read_bytes())
    assert broken != path.read_bytes()
    path.write_bytes(broken)
    store.save(0, scores_of([7], 1))
    ((_, found),) = store.load().values()
    assert same(found, scores_of([7], 1))
    (aside,) = store.folder.glob("*.corrupt")
    assert aside.stem == path.stem and aside.read_bytes() == broken and not path.exists()
    assert len(told) == 1 and path.name in told[0] and aside.name in told[0]
    assert len(store.load()) == 1 and len(told) == 1


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_any_flipped_byte_is_noticed_or_without_effect(store, mask):
    """In a part file's numbers, headers and directory: it is set aside, or the scores are the same bit for bit."""
    whole_scores = scores_of([3, 4], also=0)
    store.save(5, whole_scores)
    path = next(store.folder.glob("*.npz"))
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    aside = 0
    for index in [*range(0, directory, 7), *range(directory, len(whole))]:
        path.write_bytes(flipped(whole, index, mask))
        for sweep, found in store.load().values():
            assert sweep == 5 and same(found, whole_scores), index
        aside += not path.exists()
    assert aside > 200


@pytest.fixture(scope="module")
def pilots():
    """With and without a control variate."""
    return [fit_pilot(half, REVERSE, images(40), 300, control_variate=use) for use in (True, False)]


def test_the_pilot_comes_back_as_it_was(store, told, pilots):
    """A later run must draw as the first one did."""
    for pilot in pilots:
        store.save_pilot(pilot)
        assert same_pilot(store.load_pilot(), pilot)
    assert [path.name for path in store.folder.iterdir()] != [] and told == []


def pilot_file(store):
    (path,) = store.folder.glob("pilot.*")
    return path


@pytest.mark.parametrize("kind", ["empty", "cut in half", "zeros", "first byte", "foreign npz", "text"])
def test_a_corrupt_pilot_is_set_aside(store, told, pilots, kind):
    """And reported: it is run anew."""
    store.save_pilot(pilots[0])
    path = pilot_file(store)
    path.write_bytes(CORRUPT[kind](path.read_bytes()))
    assert store.load_pilot() is None and not path.exists()
    assert path.with_suffix(".corrupt").exists() and len(told) == 1 and path.name in told[0]
    assert store.load_pilot() is None and len(told) == 1


def test_any_flipped_byte_of_a_pilot_is_noticed_or_without_effect(store, pilots):
    """Other probabilities than those of the parts that are there would make one number from two."""
    store.save_pilot(pilots[0])
    path = pilot_file(store)
    whole = path.read_bytes()
    for index in range(0, len(whole), 17):
        path.write_bytes(flipped(whole, index, 0x10))
        found = store.load_pilot()
        assert found is None or same_pilot(found, pilots[0]), index


# When parts are written


class Clock:
    """`time.monotonic` that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(scoring, "time", clock)
    return clock


def positions_of(store):
    return sorted(int(p) for _, scores in store.load().values() for p in scores[0].positions)


def test_a_second_is_the_most_that_is_lost_at_first(store, clock):
    """Scores that are a second old are written; younger ones wait for company."""
    saver = Saver(store, 0)
    for i in range(8):
        clock.now += 0.3
        saver.add(scores_of([i]))
    assert positions_of(store) == list(range(8)) and len(store.load()) == 2
    clock.now += 0.3
    saver.add(scores_of([8]))
    assert positions_of(store) == list(range(8))
    saver.flush()
    assert positions_of(store) == list(range(9))


def test_long_runs_do_not_drown_in_files(store, clock):
    """Half an hour of units of half a second each: at most a fiftieth of the time is lost, and there are few files."""
    saver = Saver(store, 3)
    for i in range(3600):
        clock.now += 0.5
        saver.add(scores_of([i]))
        waiting = sum(len(part[0]) for part in saver.pending)
        assert waiting * 0.5 <= max(1.5, 0.02 * 0.5 * (i + 1) + 0.5)
    assert 50 < len(list(store.folder.glob("*.npz"))) < 250
    saver.flush()
    assert positions_of(store) == list(range(3600))
    assert {sweep for sweep, _ in store.load().values()} == {3}


def test_flushing_twice_writes_once(store, clock):
    """Nothing counts double."""
    saver = Saver(store, 0)
    saver.add(scores_of([0]))
    for _ in range(2):
        saver.flush()
    assert len(store.load()) == 1


def test_no_store_is_no_trouble(clock):
    """Scores may be kept nowhere."""
    saver = Saver(None, 0)
    clock.now += 5
    saver.add(scores_of([0]))
    saver.flush()


# Units


@given(st.integers(1, 7), st.integers(1, 40), st.data())
def test_units_are_aligned(size, total, data):
    """Whatever is asked for, each position comes once, in order, and units hold what lies in one stretch of `size`."""
    positions = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    groups = list(units(positions, size))
    assert [p for group in groups for p in group] == positions
    stretches = [{p // size for p in group} for group in groups]
    assert all(len(stretch) == 1 for stretch in stretches)
    assert len({min(stretch) for stretch in stretches}) == len(groups)


@given(st.integers(1, 7), st.integers(1, 40), st.data())
def test_the_remaining_units_are_the_same(size, total, data):
    """Once some units are finished, those that are left are the ones that there were."""
    whole = list(units(range(total), size))
    assert [len(group) for group in whole[:-1]] == [size] * (len(whole) - 1)
    left = [group for group in whole if data.draw(st.booleans())]
    assert list(units([p for group in left for p in group], size)) == left


# The running estimate


def test_the_running_estimate():
    """Mean and standard error over the images so far, in the unit that it is told."""
    running, parts = RunningEstimate(2.0), [scores_of([0, 1, 2], 0), scores_of([5], 1), scores_of([7, 8], 2)]
    for part in parts:
        running.add(part[0])
    merged = merge_scores(parts)[0]
    values = 2 * (merged.kl + merged.decoder + merged.prior) / 4
    assert str(running) == f"{values.mean():.3f} +- {values.std() / 6**0.5:.3f}"


def test_the_running_estimate_of_few():
    """One image has no error yet; images that are all the same have an error of 0, whatever the rounding."""
    running, part = RunningEstimate(1.0), scores_of([0])[0]
    running.add(part)
    assert "+-" not in str(running)
    for _ in range(100):
        running.add(part)
    assert str(running).endswith("+- 0.000")


# A sweep


@dataclasses.dataclass
class Sweep:
    """A sweep over 11 images in units of 2, and what was scored in it."""

    accelerator: Accelerator
    pilot: object
    scored: list

    def __call__(self, store=None, positions=range(11), sweep=0, stop_after=None, **options):
        self.scored.clear()
        x_0 = images(11)

        def batch(where):
            return x_0[where], {}

        def model(x_t, timesteps):
            if stop_after is not None and len(self.scored) == stop_after:
                raise KeyboardInterrupt
            return half(x_t, timesteps)

        scorer = VLBEstimator(model, REVERSE, self.pilot, 4, also=[dataclasses.replace(REVERSE, clip_sample=False)])
        scorer = dataclasses.replace(scorer, values_per_call=2 * 4 * 4)
        score = scorer.score

        def note(x_0, where, *rest):
            result = score(x_0, where, *rest)
            self.scored.append(list(where))
            return result

        object.__setattr__(scorer, "score", note)
        return run_sweep(self.accelerator, scorer, batch, positions, sweep, store, **options)


@pytest.fixture
def sweep(accelerator, pilots):
    return Sweep(accelerator, pilots[0], [])


def expected(pilot, positions, number=0):
    """Each image scored alone."""
    scorer = VLBEstimator(half, REVERSE, pilot, 4, also=[dataclasses.replace(REVERSE, clip_sample=False)])
    return merge_scores([scorer.score(images(11)[[p]], [p], None, number) for p in positions])


def close(a, b):
    """The same scores but for the rounding of a larger batch and of the order of the curve's sums."""
    names = ("positions", "kl", "decoder", "prior", "noise_variance", "curve")
    return len(a) == len(b) and all(
        torch.allclose(getattr(one, name).double(), getattr(other, name).double(), rtol=1e-5, atol=1e-6)
        for one, other in zip(a, b)
        for name in names
    )


@pytest.mark.parametrize("positions", [range(11), [10], [0, 3, 4, 5, 9]])
def test_a_sweep_scores_each_image_once(sweep, store, positions):
    """In the order of the data, as if it were alone, with its draws of this sweep; all of it is kept."""
    for number in (0, 3):
        found = sweep(store, positions, number)
        assert found[0].positions.tolist() == list(positions) and len(found) == 2
        assert [p for unit in sweep.scored for p in unit] == list(positions)
        assert all(len(unit) <= 2 for unit in sweep.scored)
        assert close(found, expected(sweep.pilot, positions, number))
    assert not torch.equal(found[0].kl, sweep(None, positions, 0)[0].kl)
    assert positions_of(store) == sorted([*positions, *positions])


def test_a_sweep_without_a_store(sweep):
    """Keeps nothing and gives the same."""
    assert close(sweep(), expected(sweep.pilot, range(11)))


def test_a_stopped_sweep_goes_on(sweep, store):
    """What was finished is kept when it is stopped; the rest is scored, in the same units, to the same bits."""
    straight = sweep()
    for done in range(6):
        with pytest.raises(KeyboardInterrupt):
            sweep(store, stop_after=done)
        finished = positions_of(store)
        assert finished == list(range(2 * done))
        found = sweep(store)
        assert [p for unit in sweep.scored for p in unit] == list(range(2 * done, 11))
        for name in ("positions", "kl", "decoder", "prior", "noise_variance"):
            for one, other in zip(found, straight):
                assert torch.equal(getattr(one, name), getattr(other, name))
        assert close(found, straight)
        for path in store.folder.iterdir():
            path.unlink()


def test_a_finished_sweep_is_only_read(sweep, store):
    """Not an image is scored again."""
    first = sweep(store)
    again = sweep(store)
    assert sweep.scored == [] and close(again, first) and torch.equal(again[0].kl, first[0].kl)


def test_sweeps_do_not_take_each_other_s_parts(sweep, store):
    """The second sweep's draws are others."""
    sweep(store, sweep=0)
    sweep(store, sweep=1)
    assert [p for unit in sweep.scored for p in unit] == list(range(11))
    assert len(positions_of(store)) == 22


def test_an_image_in_two_parts_counts_once(sweep, store):
    """As two runs leave them that were started together in one folder, and killed."""
    straight = sweep()
    sweep(store, range(0, 6))
    (part,) = store.folder.iterdir()
    shutil.copy(part, part.with_name("000-000000000-0123abcd.npz"))
    found = sweep(store)
    assert [p for unit in sweep.scored for p in unit] == list(range(6, 11))
    assert torch.equal(found[0].kl, straight[0].kl) and close(found, straight)


@pytest.mark.parametrize("kind", ["empty", "a flipped number", "foreign npz"])
def test_a_corrupt_part_is_scored_again(sweep, store, told, kind):
    """Its images only, and the result is the same."""
    straight = sweep()
    for start in (0, 4, 8):
        sweep(store, range(start, min(11, start + 4)))
    path = next(store.folder.glob("000-000000004-*.npz"))
    path.write_bytes(CORRUPT[kind](path.read_bytes()))
    found = sweep(store)
    assert [p for unit in sweep.scored for p in unit] == [4, 5, 6, 7]
    assert len(told) == 1 and torch.equal(found[0].kl, straight[0].kl)


def test_the_bar_shows_the_estimate(sweep, capsys, monkeypatch):
    """The estimate so far with its error, the images done and the time left."""
    monkeypatch.setattr(scoring, "tqdm", functools.partial(scoring.tqdm, mininterval=0))
    found = sweep(description="Scoring something", report_unit=2.0)[0]
    values = 2 * (found.kl + found.decoder + found.prior)[:10] / 4
    (line,) = [line for line in capsys.readouterr().err.split("\r") if " 10/11 " in line]
    assert line.startswith("Scoring something:") and "<00:00" in line
    assert f"{values.mean():.3f} +- {values.std() / 10**0.5:.3f}" in line


def test_the_pilot_is_handed_to_all(accelerator, pilots):
    """As it is."""
    assert same_pilot(shared(accelerator, lambda: pilots[0]), pilots[0])
