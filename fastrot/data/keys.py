"""A picture's key, 64 bits that stand for its path in every prepared format; and what is decided by keys alone."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int8, Int64

from fastrot.arrays import Keys, Numbers
from fastrot.data.sampler import hash64

_HELD_OUT = 0x68656C64  # "held": keeps these draws apart from those of order and crops
_FOLD = 0x666F6C64  # "fold": and from these
_FEW = 0x666577  # "few": and these


def path_key(path: str) -> int:
    """64 bits that stand for a path relative to the source's root, in every format the same."""
    raw = path.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def path_keys(paths: Iterable[str]) -> Keys:
    return np.fromiter((path_key(path) for path in paths), np.uint64)


def order_fingerprint(keys: Keys, labels: Numbers) -> str:
    """Which picture is which row, in 32 hex digits: equal for a folder and for files prepared from it."""
    raw = keys.astype("<u8", copy=False).tobytes() + labels.astype("<i8", copy=False).tobytes()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def held_out(keys: Keys, share: float) -> Bool[np.ndarray, " n"]:
    """Rows set aside to validate, chosen by the key alone: other pictures come and go, a choice stays.

    At least one row and never all, where 0 < share < 1; of a single row none.
    """
    draw = hash64(_HELD_OUT, keys)  # keys of synthetic data are row numbers: scatter them
    aside = (draw >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share
    if 0 < share < 1 and len(keys):
        aside[draw.argmin()] = True
        aside[draw.argmax()] = False
    return aside


def fold_of(keys: Keys, folds: int) -> Int8[np.ndarray, " n"]:
    """Each row's fold, by the key alone; folds are about equal, and apart from what is held out."""
    return (hash64(_FOLD, keys) % np.uint64(folds)).astype(np.int8)


def some(keys: Keys, count: int) -> Int64[np.ndarray, " c"]:
    """So many places of `keys` or all of them, in rising order: by the key alone, so that they stay."""
    return np.sort(np.argsort(hash64(_FEW, keys), kind="stable")[:count])


def few_of_each(
    keys: Keys, labels: Numbers, left_out: Bool[np.ndarray, " n"], few: float, seed: int
) -> Bool[np.ndarray, " n"]:
    """So many rows of each class, or below 1 such a share of it, at least one, of those that are not `left_out`.

    Drawn by seed and key: fewer of the same seed are among more of them.
    """
    rows = np.flatnonzero(~left_out)
    draw = hash64(_FEW, seed, keys[rows])
    rows = rows[np.lexsort((draw, labels[rows]))]  # class by class
    _, first, count = np.unique(labels[rows], return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(first, count)
    wanted = np.full(len(count), few) if few >= 1 else np.ceil(np.round(few * count, 9))
    chosen = np.zeros(len(keys), bool)
    chosen[rows[place < np.repeat(wanted, count)]] = True
    return chosen
