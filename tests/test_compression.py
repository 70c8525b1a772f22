"""Compression without loss: images come back, files are as long as the bound says, and damaged ones are refused."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import BETAS, PosteriorMean, images, process
from diffusers.models.embeddings import Timesteps
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import attentive, tiny_unet
from path_networks import rewritten

from ddpm_vlb import CompressedFile, DDPMVLBScheduler, make_betas
from ddpm_vlb.compressed_files import Header, read_index
from ddpm_vlb.compression import BitsBackCodec, compress, decompress
from ddpm_vlb.exact_networks import Float64Timesteps
from ddpm_vlb.integer_gaussians import OCTAVE, PLACES, exact_power
from ddpm_vlb.seed_images import lanes_for

TWO = process(17, betas=BETAS[:2])


def same(ours, x_0, levels):
    """Whether the levels are alike, whichever way they were made numbers."""
    return torch.equal(*(((own.double() + 1) * ((levels - 1) / 2)).round() for own in (ours, x_0)))


def restored(reverse, x_0, model=None, **options):
    """The images through a file, and the file."""
    codec = BitsBackCodec(PosteriorMean(reverse.forward) if model is None else model, reverse)
    data = codec.compress(x_0, **options)
    return codec.decompress(data), data


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 5), (2, 7)])
def test_every_image_comes_back(levels, shape):
    """Any number of levels, channels and dimensions."""
    x_0 = images(6, shape, levels, dtype=torch.float32)
    assert same(restored(process(levels), x_0)[0].x_0, x_0, levels)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("lanes", [1, 4])
def test_any_number_of_images(count, lanes):
    """None and one too, one after another and side by side."""
    x_0 = images(count, levels=17, dtype=torch.float32)
    assert torch.equal(restored(process(17), x_0, lanes=lanes)[0].x_0, x_0)


UNLIKE = {
    "noise": lambda: torch.randint(0, 17, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0)),
    "constant": lambda: torch.full((6, 1, 4, 4), 5),
    "extremes": lambda: torch.arange(96).reshape(6, 1, 4, 4) % 2 * 16,
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_images_unlike_any_that_the_network_knows(kind):
    """They cost more, and come back."""
    x_0 = UNLIKE[kind]() * 0.125 - 1
    assert torch.equal(restored(process(17), x_0)[0].x_0, x_0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_every_kind_of_chain(variance_type, steps):
    """All variances, and few steps and many, with a real network."""
    learned = variance_type.startswith("learned")
    scheduler = DDPMVLBScheduler(variance_type=variance_type, levels=17)
    reverse = scheduler.reverse_process(num_inference_steps=steps)
    x_0 = images(5, (1, 8, 8), 17, dtype=torch.float32)
    assert torch.equal(restored(reverse, x_0, tiny_unet(out=1 + learned))[0].x_0, x_0)


def test_many_dimensions():
    """Rows of symbols at once."""
    x_0 = images(4, (3, 20, 20), 256, dtype=torch.float32)
    assert same(restored(process(256), x_0)[0].x_0, x_0, 256)


def test_colour_of_32_by_32_with_attention():
    """In 256 levels, by a U-Net as they are trained."""
    model = attentive(channels=3, size=32)
    reverse = DDPMVLBScheduler(variance_type="learned_range").reverse_process(num_inference_steps=2)
    x_0 = images(4, (3, 32, 32), 256, dtype=torch.float32)
    own = decompress(model, reverse, compress(model, reverse, x_0))
    assert torch.equal(own, ((x_0 + 1) * 127.5).round() * (2 / 255) - 1)


@settings(max_examples=16, deadline=None)
@example(steps=100, levels=256, kind="learned_range", factor=1.1, lanes=2)
@given(
    steps=st.integers(1, 100),
    levels=st.sampled_from([2, 17, 256]),
    kind=st.sampled_from(["fixed_small", "fixed_large", "learned", "learned_range"]),
    factor=st.floats(0.5, 1.5),
    lanes=st.integers(1, 2),
)
def test_any_number_of_steps(steps, levels, kind, factor, lanes):
    """From 1 to 100, with variances of every kind and networks right and wrong, on one stack and on two."""
    reverse = process(levels, betas=make_betas("linear", steps, 0.05, 0.5), variance_type=kind)
    mean = PosteriorMean(reverse.forward, factor)

    def model(x_t, timesteps):
        own = mean(x_t, timesteps)
        return torch.cat([own, x_t.sin()], 1) if kind.startswith("learned") else own

    x_0 = images(2 * lanes + 2, (1, 2, 3), levels, dtype=torch.float32)
    assert same(restored(reverse, x_0, model, lanes=lanes, verify=False)[0].x_0, x_0, levels)


def test_each_image_s_bits_are_told(monkeypatch):
    """But the seeds', by its number in whichever chunk it is; what else is on a chunk's stacks is these seeds'."""
    monkeypatch.setattr("ddpm_vlb.compression._CHUNK_VALUES", 16 * 20)
    bits = {}
    data = restored(process(17), images(40, levels=17), lanes=2, bits=bits.__setitem__)[1]
    assert set(bits) == {*range(4, 20), *range(24, 40)}
    file = CompressedFile.read(data)
    for index, own in enumerate((range(4, 20), range(24, 40))):
        written = 8 * sum(len(state) + len(words) for state, words in file.chunk(index).stacks)
        # 64 values of 17 levels, and two stacks' whole words and first draws
        assert 64 * 2.5 < written - sum(bits[image] for image in own) < 64 * 4.5 + 2 * 96


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_progress_goes_on_while_it_verifies(monkeypatch, verify, count):
    """Image by image, over chunks too, to the number of them or twice that; so it does when they are decoded."""
    monkeypatch.setattr("ddpm_vlb.compression._CHUNK_VALUES", 4 * 16)
    codec, x_0 = BitsBackCodec(PosteriorMean(TWO.forward), TWO), images(count, levels=17, dtype=torch.float32)
    encoded, decoded = [], []
    data = codec.compress(x_0, lanes=1, verify=verify, progress=encoded.append)
    codec.decompress(data, progress=decoded.append)
    for told, end in ((encoded, count * (1 + verify)), (decoded, count)):
        steps = np.diff([0, *told])
        assert (
            told[-1] == end and steps.min() >= 0 and steps.max() <= 2
        )  # of the first two, which no bits come back of


def test_class_labels_and_names_are_stored():
    """The file holds what the network needs to know, and the names in their order."""
    reverse = DDPMVLBScheduler(variance_type="learned_range", levels=17).reverse_process(num_inference_steps=3)
    x_0, labels, names = images(5, (1, 8, 8), 17, dtype=torch.float32), torch.tensor([2, 0, 1, 2, 2]), tuple("edcba")
    own, _ = restored(reverse, x_0, tiny_unet(classes=3), conditioning={"class_labels": labels}, names=names)
    assert torch.equal(own.x_0, x_0) and torch.equal(own.class_labels, labels) and own.names == names


class Trembling(PosteriorMean):
    """A network whose values differ a little from call to call, as those of other machines do."""

    size = 1e-13

    def __call__(self, x_t, timesteps):
        """x_0_hat."""
        out = super().__call__(x_t, timesteps)
        return out + self.size * torch.randn(out.shape, dtype=out.dtype)


def test_last_digits_do_not_matter():
    """Values that tremble by 1e-13 are rounded to the same integers."""
    torch.manual_seed(0)
    reverse = process(17)
    x_0 = images(12, levels=17, dtype=torch.float32)
    assert torch.equal(restored(reverse, x_0, Trembling(reverse.forward))[0].x_0, x_0)


def test_a_network_that_is_not_exact_is_refused():
    """What trembles by 1e-4 is found out before a file is made."""
    torch.manual_seed(0)
    reverse = process(17)
    model = Trembling(reverse.forward)
    model.size = 1e-4
    with pytest.raises(ValueError, match="`x_0` is not decoded to itself"):
        compress(model, reverse, images(12, levels=17))


class NearABoundary(PosteriorMean):
    """A network whose first estimate of x_0 is within 1e-10 of being rounded otherwise."""

    def __init__(self, reverse):
        super().__init__(reverse.forward)
        self.step, self.unit = (
            reverse.coefficients(0, torch.zeros(1, 1, dtype=torch.float64)),
            2 / (reverse.levels - 1),
        )
        self.near = True

    def __call__(self, x_t, timesteps):
        """x_0_hat."""
        x_0 = super().__call__(x_t, timesteps)
        if self.near:  # of the decoder, whose mean it is
            self.near = False
            octaves = round(OCTAVE * math.log2(float(self.step.log_variance_offset.exp().sqrt()) / self.unit))
            x_0 = x_0.clone()
            x_0.view(-1)[0] = (0.5 + 1e-10) / PLACES * exact_power(octaves) * self.unit - 1
        return x_0


def test_a_number_near_a_boundary_is_coded_anew():
    """A chunk in which a mean is within 1e-9 of being rounded otherwise gets another whitening."""
    reverse = process(17)
    model = NearABoundary(reverse)
    codec = BitsBackCodec(model, reverse)
    k = np.random.default_rng(0).integers(0, 17, (6, 1, 4, 4))
    chunk = codec.encode(k, verify=False)
    assert len(model.told) == (1 + 4) * len(reverse.forward)  # one image until then, and all but two seeds
    assert chunk.nonce == 1 and codec.encode(k).nonce == 0
    assert (codec.decode(chunk, k.shape[1:]) == k).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_images_in_any_lanes(draw):
    """Constant ones and noise, first or later, side by side or not: seeds of either code among them."""
    levels, lanes = draw.draw(st.sampled_from([2, 17, 256])), draw.draw(st.integers(1, 6))
    constant = draw.draw(st.lists(st.booleans(), min_size=1, max_size=16))
    rng = np.random.default_rng(len(constant))
    k = np.stack([np.full((1, 4, 4), 1) if own else rng.integers(0, levels, (1, 4, 4)) for own in constant])
    codec = BitsBackCodec(PosteriorMean(TWO.forward), process(levels, betas=BETAS[:2]))
    assert (codec.decode(codec.encode(k, lanes=lanes, verify=False), (1, 4, 4)) == k).all()


def test_a_file_does_not_depend_on_the_precision_of_the_process():
    """Float32 tables, on the way, are float64's, made anew: a command's file and a program's are the same."""
    for variance_type in ("learned_range", "fixed_small", "fixed_large"):
        scheduler = DDPMVLBScheduler(variance_type=variance_type, levels=17)
        model = tiny_unet(out=1 + (variance_type == "learned_range"))
        files = {
            compress(model, scheduler.reverse_process(dtype=dtype, num_inference_steps=4), images(6, (1, 8, 8), 17))
            for dtype in (torch.float32, torch.float64)
        }
        assert len(files) == 1


def test_a_network_of_another_precision_is_refused():
    """A function around a float32 network would make files that other machines cannot read."""
    reverse, unet = DDPMVLBScheduler(levels=17).reverse_process(num_inference_steps=2), tiny_unet(out=1)
    with pytest.raises(ValueError, match="^`model` must compute in torch.float64, but gives torch.float32"):
        compress(lambda x_t, timesteps: unet(x_t.float(), timesteps).sample, reverse, images(6, (1, 8, 8), 17))


FORGED = {
    "many images": {"images": 2**15},
    "more than fit": {"images": 2**20},
    "no seeds": {"seeds": 0},
    "more seeds": {"seeds": 6},
    "an empty stack": {"stacks": ((b"\1" * 8, b""),)},
    "two states": {"stacks": ((b"\1" * 16, b""),)},
    "no stack": {"stacks": ()},
    "a label": {"labels": (1,) * 8},
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_chunks_are_refused_soon(made, kind):
    """What is sealed anew after a change has a right CRC, and is refused all the same, in one line and no time."""
    codec, data = made
    file = CompressedFile.read(data)
    forged = replace(file.chunk(0), names=(), **FORGED[kind]).to_bytes()
    start = time.process_time()
    with pytest.raises(ValueError, match="^`data` [^\n]*$"):
        codec.decode_part(forged, file.header.shape)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("shape", [(1, 0), (1, 5, 5), (2**14, 2**14)])
def test_forged_headers_are_refused(made, shape):
    """Another shape, none, or one that no memory holds."""
    codec, data = made
    header, start = Header.read(data)
    with pytest.raises(ValueError, match="^`data` [^\n]*$"):
        codec.decompress(replace(header, shape=shape).to_bytes() + data[start:])


@pytest.fixture(scope="module")
def made():
    """A codec and a file of it."""
    reverse = process(17)
    codec = BitsBackCodec(PosteriorMean(reverse.forward), reverse)
    return codec, codec.compress(images(8, levels=17), names=[f"image {i}" for i in range(8)])


def test_every_flipped_bit_is_refused(made):
    """With one line, whichever bit it is."""
    codec, data = made
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="^`data` [^\n]*$"):
            codec.decompress(bytes(wrong))


def test_every_truncation_is_refused(made):
    """Wherever it is cut off."""
    codec, data = made
    for length in range(len(data)):
        with pytest.raises(ValueError, match="^`data` [^\n]*$"):
            codec.decompress(data[:length])


@settings(max_examples=60, deadline=2000)
@given(st.data())
def test_random_damage_is_refused(made, draw):
    """Bytes put in, taken out or replaced."""
    codec, data = made
    begin = draw.draw(st.integers(0, len(data)))
    wrong = data[:begin] + draw.draw(st.binary(max_size=40)) + data[begin + draw.draw(st.integers(0, 40)) :]
    if wrong != data:
        with pytest.raises(ValueError, match="^`data` [^\n]*$"):
            codec.decompress(wrong)


def test_a_damaged_chunk_costs_itself_only(monkeypatch):
    """The others are decoded from their places."""
    monkeypatch.setattr("ddpm_vlb.compression._CHUNK_VALUES", 16 * 3)
    reverse = process(17)
    codec = BitsBackCodec(PosteriorMean(reverse.forward), reverse)
    x_0 = images(9, levels=17, dtype=torch.float32)
    data = bytearray(codec.compress(x_0))
    places = read_index(bytes(data), Header.read(bytes(data))[1])
    data[places[1][0] + 9] ^= 1
    with pytest.raises(ValueError, match="CRC"):
        codec.decompress(bytes(data))
    whole = [codec.decode_part(bytes(data[begin:end]), x_0.shape[1:]) for begin, end, _ in (places[0], places[2])]
    assert torch.equal(torch.cat([own.x_0 for own in whole]), x_0[[0, 1, 2, 6, 7, 8]])


def test_another_network_is_refused():
    """By its weights, before anything is decoded."""
    reverse = DDPMVLBScheduler(variance_type="learned_range", levels=17).reverse_process(num_inference_steps=2)
    data = compress(tiny_unet(), reverse, images(4, (1, 8, 8), 17))
    with pytest.raises(ValueError, match="another network"):
        decompress(tiny_unet(seed=1), reverse, data)


@pytest.mark.parametrize("change", [{"levels": 33}, {"variance_type": "fixed_large"}, {"clip_sample": True}])
def test_another_chain_is_refused(made, change):
    """By what is made of it."""
    _, data = made
    reverse = process(**({"levels": 17} | change))
    with pytest.raises(ValueError, match="another chain"):
        decompress(PosteriorMean(reverse.forward), reverse, data)


@pytest.mark.parametrize(
    "names, said", [("ab", "2"), (("a", "", "c"), "''"), (("a", "b", "c\nd"), "c.n"), ("aba", "'a'")]
)
def test_bad_names_are_refused(made, names, said):
    """Too few of them, an empty one, and one of two lines or images, by its name."""
    with pytest.raises(
        ValueError, match=f"^`names` must be a line for each of 3 images, all different, but got .*{said}"
    ):
        made[0].compress(images(3, levels=17), names=names)


def test_chunks_of_a_long_chain_are_small(monkeypatch):
    """Of 100 steps a fifth as many images as of 20: as many numbers are rounded in each."""
    monkeypatch.setattr("ddpm_vlb.compression._CHUNK_VALUES", 16 * 10)
    reverse = process(17, betas=make_betas("linear", 100, 0.01, 0.1))
    x_0 = images(4, levels=17, dtype=torch.float32)
    own, data = restored(reverse, x_0)
    assert torch.equal(own.x_0, x_0) and [part[2] for part in CompressedFile.read(data).places] == [2, 2]


@pytest.mark.parametrize("images, dims, lanes", [(10_000, 64, 16), (297, 64, 1), (341, 3072, 5), (1, 3072, 1)])
def test_lanes_by_default(images, dims, lanes):
    """More for larger sets and images, of which two seeds for each are a smaller part."""
    assert lanes_for(images, images * dims, None) == lanes and lanes_for(images, images * dims, 2) == min(images, 2)


REFUSED = {
    "continuous": (lambda: (process(None), images(2)), "continuous data"),
    "off its levels": (lambda: (process(17), images(2)), "levels"),
    "captions": (lambda: (process(17), images(2, levels=17), {"encoder_hidden_states": torch.zeros(2, 3)}), "labels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused(kind):
    """In one line."""
    make, message = REFUSED[kind]
    reverse, *rest = make()
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        compress(PosteriorMean(reverse.forward), reverse, *rest)


def test_a_file_of_another_version_is_refused(made):
    """And says which."""
    codec, data = made
    with pytest.raises(ValueError, match="version 1"):
        codec.decompress(data[:4] + b"\x01" + data[5:])


def test_diffusers_embedding_in_float64():
    """It is diffusers' to float32's precision, in either order of its halves and with an odd number of channels."""
    for options in ((32, True, 0), (32, False, 1), (9, True, 0.5, 2)):
        own, timesteps = Timesteps(*options), torch.tensor([0, 3, 999])
        exact = Float64Timesteps(own)(timesteps)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact.float(), own(timesteps), atol=2e-4, rtol=0)
        torch.testing.assert_close(exact[:2].float(), own(timesteps[:2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_every_path(kind):
    """A network of another Gaussian path is coded on its chain."""
    path, model = rewritten(kind)
    reverse = path.reverse_process(levels=17)
    x_0 = images(5, (1, 4, 4), 17, dtype=torch.float32)
    assert torch.equal(restored(reverse, x_0, path.network(model))[0].x_0, x_0)


@pytest.mark.parametrize("beside", [0, 1, 5])
def test_decoding_in_batches_of_another_shape(beside):
    """The network's calls may hold any number of images beside."""
    reverse = DDPMVLBScheduler(variance_type="learned_range", levels=17).reverse_process(num_inference_steps=4)
    codec = BitsBackCodec(tiny_unet(), reverse)
    k = codec.levels_of(images(9, (1, 8, 8), 17))
    assert (codec.decode(codec.encode(k, lanes=2, verify=False), k.shape[1:], beside=beside) == k).all()


def test_a_device_that_is_full_is_no_damage(made):
    """The network's lack of memory is told as it is."""
    codec, data = made
    full = BitsBackCodec(codec.coder.model, codec.coder.reverse)

    def no_memory(*given):
        raise torch.OutOfMemoryError("out of memory")

    full.coder.model = no_memory
    with pytest.raises(torch.OutOfMemoryError):
        full.decompress(data)
