"""Which rows, this epoch, this rank, from where: a pure function of (seed, epoch, rank, start).

Order is ours in every loader. Up to 2**26 rows an epoch is an argsort of a 64-bit hash of (seed, epoch, row);
above, a four-round Feistel permutation with cycle walking, which needs no memory. Golden values of both stand
in tests/data/test_order.py, so that a checkpoint resumed under another torch or numpy keeps its epoch.
"""

import numpy as np
from jaxtyping import Int64, UInt64

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's step
SORTED_UP_TO = 2**26  # rows; an argsort of more would cost a gigabyte and half a minute
_ORDER = 0x6F72646572  # "order": keeps these draws apart from those of the crops


def mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finaliser of splitmix64 (Steele 2014): a bijection on 64 bits that scatters them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*address: int | np.ndarray) -> UInt64[np.ndarray, "..."]:
    """A hash of an address, part by part: whole numbers and arrays of them, broadcast."""
    state = np.zeros(1, np.uint64)
    for part in address:
        if isinstance(part, int):
            part = np.array([part % 2**64], np.uint64)
        state = mix(state + np.uint64(GOLDEN) + part.astype(np.uint64, copy=False))
    return state


class Shuffled:
    """One epoch's permutation, addressed by place: `order[places]` gives rows."""

    def __init__(self, rows: Int64[np.ndarray, " n"] | int, *, seed: int, epoch: int):
        self.images = rows if isinstance(rows, int) else len(rows)
        self._rows = None if isinstance(rows, int) else rows
        self._key = (_ORDER, seed, epoch)
        self._sorted = None
        if self.images <= SORTED_UP_TO:
            of = np.arange(rows, dtype=np.int64) if isinstance(rows, int) else rows
            self._sorted = of[np.argsort(hash64(*self._key, of), kind="stable")]

    def __getitem__(self, places: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        if self._sorted is not None:
            return self._sorted[places]
        rows = feistel(places, self.images, *self._key)
        return rows if self._rows is None else self._rows[rows]


class InOrder:
    """Data order, addressed the same way."""

    def __init__(self, rows: Int64[np.ndarray, " n"] | int):
        self._rows = None if isinstance(rows, int) else rows

    def __getitem__(self, places: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        return places if self._rows is None else self._rows[places]


def feistel(places: Int64[np.ndarray, " b"], images: int, *key: int) -> Int64[np.ndarray, " b"]:
    """A permutation of range(images), computed place by place (Luby-Rackoff; cycle walking after Black 2002)."""
    half = max(1, (int(images - 1).bit_length() + 1) // 2)  # bits: the domain is 4**half >= images
    low = np.uint64(2**half - 1)
    x = places.astype(np.uint64)
    outside = np.ones(
        len(x), bool
    )  # at most 3 in 4 places of the domain lie outside: walks are short
    while outside.any():
        left, right = x[outside] >> np.uint64(half), x[outside] & low
        for turn in range(4):
            left, right = right, left ^ (hash64(*key, turn, right) & low)
        x[outside] = (left << np.uint64(half)) | right
        outside[outside] = x[outside] >= images
    return x.astype(np.int64)


def places(
    images: int, *, batch: int, rank: int, world: int, number: int, ragged: bool
) -> Int64[np.ndarray, " b"]:
    """Places of batch `number` of a rank: its share of the global batch, every world-th place.

    Shares never overlap and are never padded. `ragged` keeps what is left behind the last whole batch.
    """
    start, stop = number * batch * world, (number + 1) * batch * world
    return np.arange(start + rank, min(stop, images) if ragged else stop, world, dtype=np.int64)


def batches(images: int, *, batch: int, rank: int, world: int, ragged: bool) -> int:
    """How many batches a rank draws in an epoch."""
    whole, left = divmod(images, batch * world)
    return whole + (ragged and left > rank)
