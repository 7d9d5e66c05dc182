"""BC4: 4x4 samples in 8 bytes, on all machines the same ones. README.md has the format; ops/tiles.py decodes.

Coding.  Always the palette of eight: step s = 0 (e0, the high end) to 7 (e1, the low one). The end points are the
         extremes of the block, and each sample takes the nearest step. Where that loses something, least squares fit
         the end points to these steps, and the better of the two is kept. (etcpak's coder loses more than the extremes
         alone do, and writes other bytes on other processors.)
Maths.   With weights v = s of the low end, u = 7 - s of the high one, and sums over the block's samples x:
         [uu uv; uv vv] [high; low] = 7 [ux; vx]. Between the ends the palette is rounded down, which costs 3/7 of a
         level at the mean: so much is added to such an x.
Speed.   The nearest step depends on a block's range and a sample's height above the low end alone. So one table of
         2^16 gives it, and another, in a word of 64 bits, all that is to be summed over the block.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16, UInt64

_INDEX = np.array([0, 2, 3, 4, 5, 6, 7, 1], np.uint64)  # of each step, in the format
_PLACES = 16 + 3 * np.arange(16, dtype=np.uint64)[:, None]  # the first bit of each sample's number
# first bit and bits of what is summed over a block: 16 times the largest value fits
_FIELDS = {"error": (0, 13), "s": (13, 7), "ss": (20, 10), "x": (30, 15), "sx": (45, 18)}


def encode(plane: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "_h4 _w4 8"]:
    """The blocks of a plane whose sides are multiples of 4."""
    down, right = plane.shape[0] // 4, plane.shape[1] // 4
    blocks = plane.reshape(down, 4, right, 4).transpose(1, 3, 0, 2)
    x = np.ascontiguousarray(blocks).reshape(16, -1)  # [16, blocks]: so sums are quick
    high, low = x.max(axis=0), x.min(axis=0)
    places = _places(x, high, low)
    sums = _tables().sums.take(places).sum(axis=0)

    lossy = np.flatnonzero(_field("error", sums))
    better, *fitted = _fitted(x.take(lossy, axis=1), low[lossy], sums[lossy])
    better = lossy[better]
    high[better], low[better], places[:, better] = fitted

    words = np.bitwise_or.reduce(_tables().indices.take(places) << _PLACES, axis=0)
    words |= low.astype(np.uint64) << np.uint64(8) | high
    return words.astype("<u8", copy=False).view(np.uint8).reshape(down, right, 8)


def _fitted(
    x: UInt8[np.ndarray, "16 n"], low: UInt8[np.ndarray, " n"], sums: UInt64[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which blocks [m] lose less with the ends of least squares, and these: high [m], low [m], places [16, m]."""
    high, low = _least_squares(sums, low)
    within = np.minimum(np.maximum(x, low), high)
    places = _places(within, high, low)
    beyond = (np.maximum(x, within) - np.minimum(x, within)).astype(np.uint16)
    errors = _tables().errors.take(places).sum(axis=0, dtype=np.int64)
    errors += (beyond * beyond).sum(axis=0, dtype=np.int64)
    better = np.flatnonzero(errors < _field("error", sums))
    return better, high[better], low[better], places.take(better, axis=1)


def _least_squares(
    sums: UInt64[np.ndarray, " n"], low: UInt8[np.ndarray, " n"]
) -> tuple[UInt8[np.ndarray, " n"], UInt8[np.ndarray, " n"]]:
    """The ends, high and low, of blocks that lose something: such have steps 0 and 7, so the ends stay apart."""
    # x in sevenths, above low
    s, vv, x, vx = (_field(name, sums) for name in ("s", "ss", "x", "sx"))
    uu, uv, ux = 16 * 49 - 14 * s + vv, 7 * s - vv, 7 * x - vx
    # the quotient of two float64 is rounded everywhere alike
    scale = (uu * vv - uv * uv).astype(np.float64)
    high = np.rint((vv * ux - uv * vx) / scale) + low
    under = np.rint((uu * vx - uv * ux) / scale) + low
    return high.clip(0, 255).astype(np.uint8), under.clip(0, 255).astype(np.uint8)


def _places(x: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Of samples [16, n] in the tables: none lies outside its block's ends."""
    return (x - low).astype(np.intp) | (high - low).astype(np.intp) << 8


def _field(name: str, words: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """One of the sums that stand beside each other in a word."""
    first, bits = _FIELDS[name]
    return (words >> np.uint64(first) & np.uint64(2**bits - 1)).astype(np.int64)


class _Tables(NamedTuple):
    """By a block's range and a sample's height above its low end: place 256 range + height."""

    sums: UInt64[np.ndarray, " n"]  # of _FIELDS, which fit 16 times the largest
    errors: UInt16[np.ndarray, " n"]  # squared distance to the nearest step
    indices: UInt64[np.ndarray, " n"]  # its number in the format


@functools.cache
def _tables() -> _Tables:
    spread, above = np.arange(256)[:, None], np.arange(256)[None]
    apart = np.abs(above[..., None] - (7 - np.arange(8)) * spread[..., None] // 7)
    step = apart.argmin(axis=2)
    error = np.square(apart.min(axis=2))
    x = 7 * above + 3 * ((step > 0) & (step < 7))
    each = {"error": error, "s": step, "ss": step * step, "x": x, "sx": step * x}
    words = sum(
        np.where(above <= spread, each[name], 0).astype(np.uint64) << np.uint64(first)
        for name, (first, _) in _FIELDS.items()
    )
    assert isinstance(words, np.ndarray)
    return _Tables(words.ravel(), error.astype(np.uint16).ravel(), _INDEX[step].ravel())
