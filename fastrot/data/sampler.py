"""Which rows, this epoch, this rank, from where: a pure function of (seed, epoch, rank, start).

Order is ours in every loader. Up to 2**26 rows an epoch is an argsort of a 64-bit hash of (seed, epoch, row);
above, a four-round Feistel permutation with cycle walking, which needs no memory. `BlockSampler` is for data larger
than memory. A checkpoint resumed under another torch or numpy keeps its epoch: tests/data/test_order.py has golden values.
"""

import functools
import math

import numpy as np
from jaxtyping import UInt64

from fastrot.arrays import Rows

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's step
SORTED_UP_TO = 2**26  # rows; an argsort of more would cost a gigabyte and half a minute
_ORDER = 0x6F72646572  # "order": keeps these draws apart from those of the crops
_BLOCKS = 0x626C6F636B73  # "blocks"
_SHIFT, _OF_WHOLE, _OF_SMALL, _INSIDE, _TAIL = range(5)  # what is drawn of an order by blocks
RAMP = 4  # times the steady pace, at which an epoch's first window is read ahead
CHUNK = 2**13  # places that are computed at once: 1 us each; those of a batch of 64 alone take 15


def mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finaliser of splitmix64 (Steele 2014): a bijection on 64 bits that scatters them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*address: int | np.ndarray) -> UInt64[np.ndarray, "..."]:
    """A hash of an address, part by part: whole numbers and arrays of them, broadcast."""
    return _hashed_on(np.zeros(1, np.uint64), *address)


def _hashed_on(
    state: UInt64[np.ndarray, "..."], *address: int | np.ndarray
) -> UInt64[np.ndarray, "..."]:
    """The hash of an address that begins with the one hashed to `state`."""
    for part in address:
        if isinstance(part, int):
            part = np.array([part % 2**64], np.uint64)
        state = mix(state + np.uint64(GOLDEN) + part.astype(np.uint64, copy=False))
    return state


class Sampler:
    """Rows in data order, addressed by their places in an epoch: `sampler[places]`. `rows`: a number: all of so many."""

    def __init__(self, rows: Rows | int):
        self.images = rows if isinstance(rows, int) else len(rows)
        self._rows = None if isinstance(rows, int) else rows

    def __getitem__(self, places: Rows) -> Rows:
        return self._row(places)

    def ahead(self, first: int, stop: int, *, since: int, rank: int, world: int) -> Rows | None:
        """Rows to read ahead when places `first` to `stop` are asked for; None: those asked for alone."""
        return None

    def _row(self, at: Rows) -> Rows:
        return at if self._rows is None else self._rows[at]


class ShuffledSampler(Sampler):
    """One epoch's permutation."""

    def __init__(self, rows: Rows | int, *, seed: int, epoch: int):
        super().__init__(rows)
        self._key = (_ORDER, seed, epoch)
        self._sorted = None
        if self.images <= SORTED_UP_TO:
            of = np.arange(self.images) if self._rows is None else self._rows
            self._sorted = of[np.argsort(hash64(*self._key, of), kind="stable")]

    def __getitem__(self, places: Rows) -> Rows:
        if self._sorted is not None:
            return self._sorted[places]
        return self._row(feistel(places, self.images, *self._key))


class BlockSampler(Sampler):
    """One epoch's permutation for data larger than memory: blocks of neighbours, dealt out in windows; see README.md.

    block   pictures in a block, which lie side by side in the data
    window  blocks that are open at a time
    """

    def __init__(self, rows: Rows | int, *, seed: int, epoch: int, block: int, window: int):
        super().__init__(rows)
        self.block, self.window = block, min(window, self.images)
        self._key = (_BLOCKS, seed, epoch)
        self._stripe = self.images // self.window
        # windows of whole blocks, rows of a smaller one
        self._windows, self._small = divmod(self._stripe, block)
        self._whole = self._windows * self.window * block  # places in whole windows
        self._slots = (self._windows + 1) * self.window  # blocks, the small ones included, as dealt
        self._even = self._stripe * self.window  # places before the tail
        # the high half of a product: owned shares, which differ by a row, look at the same part of the data
        self._shift = int(hash64(*self._key, _SHIFT)[0]) * self.images >> 64
        self._chunk = functools.lru_cache(2)(self._chunk_of)  # epochs are walked through

    def __getitem__(self, places: Rows) -> Rows:
        rows, chunks = np.empty_like(places), places // CHUNK
        for number in np.unique(chunks).tolist():
            here = chunks == number
            rows[here] = self._chunk(number)[places[here] - number * CHUNK]
        return rows

    def _chunk_of(self, number: int) -> Rows:
        """Rows of CHUNK neighbouring places, fewer at the end."""
        places = np.arange(number * CHUNK, min((number + 1) * CHUNK, self.images), dtype=np.int64)
        at = np.empty_like(places)
        whole, tail = places < self._whole, places >= self._even
        small = ~whole & ~tail
        at[whole] = self._dealt(places[whole], 0, self.block)
        at[small] = self._dealt(places[small], self._whole, self._small)
        left = places[tail] - self._even
        at[tail] = self._even + feistel(left, self.images - self._even, *self._key, _TAIL)
        return self._row(at)

    def ahead(self, first: int, stop: int, *, since: int, rank: int, world: int) -> Rows:
        """Whole blocks, a window before their time; a rank is told those that its own places lie in.

        `since` is the place with which this epoch was begun or gone on. The window from there on is not waited
        for, but read at RAMP times the pace, beside the rows of each batch.
        """
        begun, end = (self._open_by(place, since) for place in (first, stop))
        own = math.gcd(world, self.window)
        runs = [np.zeros(0, np.int64)]
        for number in range(begun // self.window, -(-end // self.window)):
            first = number * self.window
            lanes = np.arange(max(begun - first, 0), min(end - first, self.window))
            lanes = lanes[lanes % own == rank % own]
            length = self.block if number < self._windows else self._small
            runs.append((self._starts(first + lanes)[:, None] + np.arange(length)).ravel())
        if begun < end == self._slots:
            runs.append(np.arange(self._even, self.images))
        return self._row(np.concatenate(runs))

    def _open_by(self, place: int, since: int) -> int:
        """How many blocks are announced before `place` is asked for."""
        length = self.block if since < self._whole else max(self._small, 1)
        ramp = min(since // self.block, self._slots) + -(-RAMP * (place - since) // length)
        return min(place // self.block + self.window, ramp, self._slots)

    def _dealt(self, places: Rows, begin: int, length: int) -> Rows:
        """Places of windows of blocks of `length` rows, the first of which begins at `begin`."""
        turn, lane = np.divmod(places - begin, self.window)
        number, turn = np.divmod(turn, max(length, 1))
        slots = begin // self.block + number * self.window + lane
        return self._starts(slots) + feistel(turn, length, *self._key, _INSIDE, slots)

    def _starts(self, slots: Rows) -> Rows:
        """Where the blocks begin that are dealt as number `slots`."""
        count = self._windows * self.window
        whole, at = slots < count, np.empty_like(slots)
        blocks = feistel(slots[whole], count, *self._key, _OF_WHOLE)
        stripe, of_stripe = np.divmod(blocks, max(self._windows, 1))
        at[whole] = stripe * self._stripe + of_stripe * self.block
        stripe = feistel(slots[~whole] - count, self.window, *self._key, _OF_SMALL)
        at[~whole] = stripe * self._stripe + self._windows * self.block
        return at

    def _row(self, at: Rows) -> Rows:
        return super()._row((at + self._shift) % self.images)


def feistel(places: Rows, images: int, *key: int | Rows) -> Rows:
    """A permutation of range(images), computed place by place (Luby-Rackoff; cycle walking after Black 2002).

    Parts of the key may be arrays: then each place is one of its own key's permutation.
    """
    half = max(1, (int(images - 1).bit_length() + 1) // 2)  # bits: the domain is 4**half >= images
    low = np.uint64(2**half - 1)
    x = places.astype(np.uint64)
    state = np.broadcast_to(hash64(*key), x.shape)
    outside = np.ones(len(x), bool)  # 3 in 4 places of the domain at the most: walks are short
    while outside.any():
        left, right = x[outside] >> np.uint64(half), x[outside] & low
        for turn in range(4):
            left, right = right, left ^ (_hashed_on(state[outside], turn, right) & low)
        x[outside] = (left << np.uint64(half)) | right
        outside[outside] = x[outside] >= images
    return x.astype(np.int64)


def places(images: int, *, batch: int, rank: int, world: int, number: int, ragged: bool) -> Rows:
    """Places of batch `number` of a rank: its share of the global batch, every world-th place.

    Shares never overlap and are never padded. `ragged` keeps what is left behind the last whole batch.
    """
    start, stop = number * batch * world, (number + 1) * batch * world
    return np.arange(start + rank, min(stop, images) if ragged else stop, world, dtype=np.int64)


def batches(images: int, *, batch: int, rank: int, world: int, ragged: bool) -> int:
    """How many batches a rank draws in an epoch."""
    whole, left = divmod(images, batch * world)
    return whole + (ragged and left > rank)
