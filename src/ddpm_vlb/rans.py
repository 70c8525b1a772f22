"""A stack of bits that takes and gives symbols by their counts: range asymmetric numeral systems.

What is pushed comes back last in, first out, and a pop with counts that nothing was pushed with draws from them: that
is what bits-back coding needs, and what an arithmetic coder, first in, first out, cannot give. A state x of 64 bits
holds the top of the stack, words of 32 bits the rest. For a symbol with f of 2^28 counts, after c of other symbols:

1. push: x = 2^28 floor(x / f) + x mod f + c, after the lower word of x was put away if x >= 2^36 f
2. pop: x = f floor(x / 2^28) + (x mod 2^28) - c, where x mod 2^28 tells the symbol; below 2^32 a word comes back

Data of many dimensions has many states side by side, which share the words.

Sources: Duda 2009 and 2014; Giesen 2014, "Interleaved entropy coders".
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .integer_gaussians import PRECISION, TOTAL, Bins, Integers

_WORD = 32
_LOWEST = 1 << _WORD
_DIMENSIONS_A_STATE = 24  # with fewer, rows are too short for numpy to be faster; a state costs four bytes of a file
_NARROW = 1000


class Stack:
    """A stack with one state, for data of few dimensions; `lends` is whether it goes on from the supply when empty.

    Args:
        supply: the n-th word that is there before anything is pushed, n = 0, 1 ..; zeros would not be drawn from.
        state: x; the first word of the supply when None.
        words: below it, 32 bits each, the top last.
    """

    def __init__(self, supply: Callable[[int], int], state: bytes = b"", words: bytes = b""):
        self._supply = supply
        self.supplied = 1
        self.lends = True
        self._x = int.from_bytes(state, "little") or _LOWEST | supply(0)
        self._words: list[int] = np.frombuffer(words, "<u4").tolist()

    def push(self, bins: Bins, j: Integers, m: Integers, s: Integers, whites: Integers | None = None) -> None:
        """Put symbols away; `pop` gives them back in their order.

        Args:
            bins: whose numbers the symbols are.
            j: the symbols, of any shape.
            m: of their Gaussians, in that shape.
            s: likewise.
            whites: of `pop`.
        """
        j, m, s = j.ravel(), m.ravel(), s.ravel()
        below = bins.counts_below(j, m, s)
        self.push_counts(below, bins.counts_below(j + 1, m, s) - below, whites)

    def push_counts(self, below: Integers, counts: Integers, whites: Integers | None = None) -> None:
        """The same, of any symbols.

        Args:
            below: c of each.
            counts: f of each.
            whites: of `pop`.
        """
        x, words, mask = self._x, self._words, _LOWEST - 1
        mixed = [0] * len(counts) if whites is None else whites.ravel().tolist()
        for c, f, white in zip(below[::-1].tolist(), counts[::-1].tolist(), reversed(mixed)):
            if x >= f << 2 * _WORD - PRECISION:
                words.append(x & mask)
                x >>= _WORD
            high, low = divmod(x, f)
            x = (high << PRECISION) + (low + c ^ white)
        self._x = x

    def pop(self, bins: Bins, m: Integers, s: Integers, whites: Integers | None = None) -> Integers:
        """Take symbols from the top.

        Args:
            bins: whose numbers the symbols shall be.
            m: of their Gaussians, of any shape.
            s: likewise.
            whites: numbers of 28 bits to mix the bits with that are drawn from; who gives them back mixes likewise.
        """
        mixed = [0] * m.size if whites is None else whites.ravel().tolist()
        j = []
        for own_m, own_s, white in zip(m.ravel().tolist(), s.ravel().tolist(), mixed):
            slot = self._x & TOTAL - 1 ^ white
            symbol, below, up_to = bins.find_one(slot, own_m, own_s)
            self._taken(slot - below, up_to - below)
            j.append(symbol)
        return np.array(j, dtype=np.int64).reshape(m.shape)

    def pop_counts(self, up_to: Integers) -> Integers:
        """Take symbols from the top by a table.

        Args:
            up_to: the counts of each symbol and all before it, a row for each pop.
        """
        j = []
        for row in up_to:
            slot = self._x & TOTAL - 1
            symbol = int(np.searchsorted(row, slot, side="right"))
            below = int(row[symbol - 1]) if symbol else 0
            self._taken(slot - below, int(row[symbol]) - below)
            j.append(symbol)
        return np.array(j, dtype=np.int64)

    def _taken(self, low: int, count: int) -> None:
        x = (self._x >> PRECISION) * count + low
        self._x = x if x >= _LOWEST else x << _WORD | self._word()

    def _word(self) -> int:
        if self._words:
            return self._words.pop()
        self._ask()
        self.supplied += 1
        return self._supply(self.supplied - 1)

    def _ask(self) -> None:
        """Refuse to go on from an empty stack that does not lend: who decodes has all that was pushed."""
        if not self.lends:
            raise ValueError("`data` is damaged: a stack is empty before its end.")

    def bits(self) -> float:
        """How much is on the stack beyond what was supplied."""
        return math.log2(self._x / (_LOWEST | self._supply(0))) + _WORD * (len(self._words) + 1 - self.supplied)

    def parts(self) -> tuple[bytes, bytes]:
        """`state` and `words` of a stack like this one."""
        return self._x.to_bytes(8, "little"), np.array(self._words, dtype="<u4").tobytes()

    def is_as_supplied(self) -> bool:
        """Whether all that was pushed has been popped, and all that was popped pushed back."""
        supplied = [self._supply(n) for n in range(len(self._words) + 1)]
        return self._x == _LOWEST | supplied[0] and self._words[::-1] == supplied[1:]


class WideStack(Stack):
    """A stack with many states, for data of many dimensions: symbols are pushed and popped a row at a time.

    Symbol i is the business of state i modulo their number. Arguments are those of `Stack`, and:

    Args:
        size: number of states, for the first words of the supply.
    """

    def __init__(self, supply: Callable[[int], int], size: int, state: bytes = b"", words: bytes = b""):
        self._supply = supply
        self.supplied = size
        self.lends = True
        self._states = np.frombuffer(state, "<u8").astype(np.uint64) if state else self._fresh(size)
        self._buffer = np.frombuffer(words, "<u4").astype(np.uint64)
        self._used = len(self._buffer)

    def _fresh(self, size: int) -> NDArray[np.uint64]:
        return np.array([_LOWEST | self._supply(n) for n in range(size)], dtype=np.uint64)

    def push_counts(self, below: Integers, counts: Integers, whites: Integers | None = None) -> None:
        """As of `Stack`."""
        size = len(self._states)
        c, f = below.astype(np.uint64), counts.astype(np.uint64)
        mixed = None if whites is None else whites.ravel().astype(np.uint64)
        for row in reversed(range(0, len(c), size)):
            own = slice(row, row + size)
            x = self._states[: len(c[own])]
            over = x >= f[own] << np.uint64(2 * _WORD - PRECISION)
            self._put(x[over] & np.uint64(_LOWEST - 1))
            x = np.where(over, x >> np.uint64(_WORD), x)
            high, low = np.divmod(x, f[own])
            low += c[own]
            self._states[: len(x)] = (high << np.uint64(PRECISION)) + (low if mixed is None else low ^ mixed[own])

    def pop(self, bins: Bins, m: Integers, s: Integers, whites: Integers | None = None) -> Integers:
        """As of `Stack`."""
        j, size = np.empty(m.size, dtype=np.int64), len(self._states)
        all_m, all_s = m.ravel(), s.ravel()
        mixed = None if whites is None else whites.ravel()
        for row in range(0, m.size, size):
            own = slice(row, row + size)
            slots = self._slots(len(j[own]))
            slots = slots if mixed is None else slots ^ mixed[own]
            j[own] = bins.find(slots, all_m[own], all_s[own])
            below = bins.counts_below(j[own], all_m[own], all_s[own])
            self._take(slots - below, bins.counts_below(j[own] + 1, all_m[own], all_s[own]) - below)
        return j.reshape(m.shape)

    def pop_counts(self, up_to: Integers) -> Integers:
        """As of `Stack`."""
        j, size = np.empty(len(up_to), dtype=np.int64), len(self._states)
        for row in range(0, len(j), size):
            own = up_to[row : row + size]
            slots = self._slots(len(own))
            symbols = (own <= slots[:, None]).sum(1)
            edges = np.pad(own, ((0, 0), (1, 0)))
            below, above = (np.take_along_axis(edges, symbols[:, None] + one, 1)[:, 0] for one in (0, 1))
            self._take(slots - below, above - below)
            j[row : row + size] = symbols
        return j

    def _slots(self, count: int) -> Integers:
        return (self._states[:count] & np.uint64(TOTAL - 1)).astype(np.int64)

    def _take(self, low: Integers, counts: Integers) -> None:
        x = (self._states[: len(low)] >> np.uint64(PRECISION)) * counts.astype(np.uint64) + low.astype(np.uint64)
        under = x < _LOWEST
        x[under] = x[under] << np.uint64(_WORD) | self._get(int(under.sum()))
        self._states[: len(low)] = x

    def _put(self, words: NDArray[np.uint64]) -> None:
        end = self._used + len(words)
        if end > len(self._buffer):
            self._buffer = np.concatenate([self._buffer[: self._used], np.empty(end, dtype=np.uint64)])
        self._buffer[self._used : end] = words
        self._used = end

    def _get(self, count: int) -> NDArray[np.uint64]:
        start = self._used - count
        missing = max(-start, 0)
        if missing:
            self._ask()
        supply = [self._supply(self.supplied + n) for n in reversed(range(missing))]
        taken = np.concatenate([np.array(supply, dtype=np.uint64), self._buffer[max(start, 0) : self._used]])
        self.supplied += missing
        self._used = max(start, 0)
        return taken

    def bits(self) -> float:
        """As of `Stack`."""
        states = np.log2(self._states.astype(np.float64)).sum() - np.log2(self._fresh(len(self._states))).sum()
        return float(states) + _WORD * (self._used + len(self._states) - self.supplied)

    def parts(self) -> tuple[bytes, bytes]:
        """As of `Stack`."""
        return self._states.astype("<u8").tobytes(), self._buffer[: self._used].astype("<u4").tobytes()

    def is_as_supplied(self) -> bool:
        """As of `Stack`."""
        size = len(self._states)
        supplied = [self._supply(size + n) for n in range(self._used)]
        return (
            bool((self._states == self._fresh(size)).all()) and self._buffer[: self._used][::-1].tolist() == supplied
        )


def stack_for(dimensions: int, supply: Callable[[int], int], state: bytes = b"", words: bytes = b"") -> Stack:
    """The kind of stack that is fast.

    Args:
        dimensions: of an image.
        supply: as of `Stack`.
        state: likewise.
        words: likewise.
    """
    size = dimensions // _DIMENSIONS_A_STATE if dimensions >= _NARROW else 1
    if len(state) not in (0, 8 * size):
        raise ValueError(f"`data` is damaged: a stack has {len(state) // 8} states, not {size}.")
    return Stack(supply, state, words) if dimensions < _NARROW else WideStack(supply, size, state, words)
