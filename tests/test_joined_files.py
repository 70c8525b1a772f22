"""Two compressed files as one: all images in order without the network, or a refusal."""

from dataclasses import replace

import pytest
import torch
from analytic import BETAS, PosteriorMean, images, process

from ddpm_vlb import BitsBackCodec, CompressedFile
from ddpm_vlb.compressed_files import file_of, index_of, read_index

REVERSE = process(17, betas=BETAS[:2])
X_0 = images(9, levels=17, dtype=torch.float32)
NAMES = tuple("ihgfedcba")
LABELS = torch.arange(9) % 4


class Labelled(PosteriorMean):
    """A network that may be told labels."""

    def __call__(self, x_t, timesteps, class_labels=None):
        """x_0_hat."""
        return super().__call__(x_t, timesteps) + (
            0 if class_labels is None else class_labels.reshape(-1, 1, 1, 1) / 9
        )


CODEC = BitsBackCodec(Labelled(REVERSE.forward), REVERSE)


def file(start, stop, names=False, labels=False, lanes=None):
    """Of some of the images, and of what is known of them."""
    own = slice(start, stop)
    told = {"class_labels": LABELS[own]} if labels else None
    return CompressedFile.read(CODEC.compress(X_0[own], told, NAMES[own] if names else None, lanes))


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_images_of_both_come_back_in_their_order(names, labels):
    """With all that is known of them, from files of any lanes and numbers of images, joined in any order."""
    first, second, third = (file(*own, names, labels, lanes) for *own, lanes in ((0, 5, 1), (5, 6, 1), (6, 9, 2)))
    left = CompressedFile.read(CompressedFile.read(first.joined(second)).joined(third))
    assert left.data == first.joined(CompressedFile.read(second.joined(third)))
    own = CODEC.decompress(left.data)
    assert torch.equal(own.x_0, X_0) and own.names == (NAMES if names else ())
    assert torch.equal(own.class_labels, LABELS) if labels else own.class_labels is None


def test_chunks_stay_as_they_are():
    """Behind one header and before one index, and no image changes nothing."""
    first, second, none = file(0, 5), file(5, 9), file(0, 0)
    whole = CompressedFile.read(first.joined(second))
    assert [whole.part(0), whole.part(1)] == [first.part(0), second.part(0)] and whole.images == 9
    assert len(whole.data) <= len(first.data) + len(second.data) - 20
    assert first.joined(none) == none.joined(first) == first.data


def test_where_a_file_was_made_does_not_matter():
    """The first one's environment is told of both."""
    first, second = file(0, 5), file(5, 9)
    elsewhere = replace(second, header=replace(second.header, environment="2.0 z80"))
    assert first.joined(elsewhere) == first.joined(second)


OTHER = {
    "network": bytes(range(6)),
    "chain": bytes(range(6)),
    "steps": 3,
    "dtype": "float32",
    "levels": 16,
    "shape": (1, 2, 8),
}


@pytest.mark.parametrize("what", OTHER)
def test_files_of_other_codecs_are_refused(what):
    """In one line that says what both have."""
    first, second = file(0, 5), file(5, 9)
    other = replace(second, header=replace(second.header, **{what: OTHER[what]}))
    own, came = (
        str(told.hex() if isinstance(told, bytes) else told) for told in (getattr(first.header, what), OTHER[what])
    )
    with pytest.raises(ValueError, match=f"^`other` must have this file's {what}, [^\n]*$") as stop:
        first.joined(other)
    assert f", {own}, but has {came}: " in str(stop.value)


TOLD = {
    "names": ({"names": True}, "`other` must be {} names, as this file, but is {}"),
    "labels": ({"labels": True}, "`other` must be {} class labels, as this file, but is {}"),
}


@pytest.mark.parametrize("what", TOLD)
def test_what_is_known_of_some_images_only_is_refused(what):
    """Either way round; a file that was made so in spite of it is not decompressed, but its chunks are."""
    options, message = TOLD[what]
    told, untold = file(0, 5, **options), file(5, 9)
    for pair, words in (((told, untold), ("with", "without")), ((untold, told), ("without", "with"))):
        with pytest.raises(ValueError, match=f"^{message.format(*words)}: [^\n]*$"):
            pair[0].joined(pair[1])
    made = CompressedFile.read(file_of(told.header, [(told.part(0), 5), (untold.part(0), 4)]))
    with pytest.raises(ValueError, match="^`data` contradicts itself: [^\n]*$"):
        CODEC.decompress(made.data)
    assert torch.equal(CODEC.decode_part(made.part(1), X_0.shape[1:]).x_0, X_0[5:])


def test_two_images_of_one_name_are_refused():
    """Files of them could not be written."""
    with pytest.raises(ValueError, match="^`other` must have names of its own, but has this file's 'e': [^\n]*$"):
        file(0, 5, names=True).joined(file(2, 9, names=True))


def test_damaged_files_are_not_joined():
    """Neither a chunk that is not whole, nor one of other images than the index says."""
    first, second = file(0, 5), file(5, 9)
    damaged = bytearray(second.data)
    damaged[second.places[0][0] + 9] ^= 1
    for data in (bytes(damaged), file_of(second.header, [(second.part(0), 5)])):
        for pair in ((first, CompressedFile.read(data)), (CompressedFile.read(data), first)):
            with pytest.raises(ValueError, match="^`data` is damaged: [^\n]*$"):
                pair[0].joined(pair[1])


@pytest.mark.parametrize("chunks", [0, 1, 61, 62, 63, 64, 65, 300])
def test_an_index_of_any_length(chunks):
    """Its length takes a byte, and five from 255 bytes on."""
    told = index_of([(1000, 7)] * chunks)
    places = read_index(bytes(3 + 1000 * chunks) + told, 3)
    assert places == [(3 + 1000 * i, 1003 + 1000 * i, 7) for i in range(chunks)]
