"""BC4: 4x4 samples in 8 bytes, and back. Whole numbers throughout: all machines write and read the same bits.

Format.  Two end points e0, e1 and sixteen numbers of 3 bits, row by row, little-endian, that choose from a palette:
         e0 > e1:    e0, e1, then ((8 - i) e0 + (i - 1) e1) // 7 for i = 2 ... 7
         otherwise:  e0, e1, then ((6 - i) e0 + (i - 1) e1) // 5 for i = 2 ... 5, then 0, 255
Coding.  Always the palette of eight: step s = 0 (e0, the high end) to 7 (e1, the low one). The end points are the
         extremes of the block, and each sample takes the nearest step. Then least squares fit the end points to these
         steps, and the better of the two is kept. (etcpak's coder loses more than the extremes alone do, and writes
         other bytes on other processors.)
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
_PLACES = (
    16 + 3 * np.arange(16, dtype=np.uint64)[:, None]
)  # bits of a block before each sample's number
_FIELDS = {
    "error": (0, 13),
    "s": (13, 7),
    "ss": (20, 10),
    "x": (30, 15),
    "sx": (45, 18),
}  # first bit, bits

# the palette of a block whose first end point is the larger, and of all others: (first e0 + second e1) // of
_EIGHT = np.array([[7, 0, 6, 5, 4, 3, 2, 1], [0, 7, 1, 2, 3, 4, 5, 6]], np.int32)
_SIX = np.array([[5, 0, 4, 3, 2, 1, 0, 0], [0, 5, 1, 2, 3, 4, 0, 0]], np.int32)
_ENDS = np.array([0, 0, 0, 0, 0, 0, 0, 255], np.int32)  # which has black and white besides


def encode(plane: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "_h4 _w4 8"]:
    """The blocks of a plane whose sides are multiples of 4."""
    down, right = plane.shape[0] // 4, plane.shape[1] // 4
    blocks = plane.reshape(down, 4, right, 4).transpose(1, 3, 0, 2)
    x = np.ascontiguousarray(blocks).reshape(
        16, -1
    )  # [16, blocks]: sums over the samples are then quick
    high, low = x.max(axis=0), x.min(axis=0)
    places = _places(x, high, low)
    sums = _sums(_tables().sums.take(places).sum(axis=0))

    fitted_high, fitted_low = _fit(sums, low)
    fits = fitted_high > fitted_low
    fitted_high, fitted_low = np.where(fits, fitted_high, high), np.where(fits, fitted_low, low)
    within = np.minimum(np.maximum(x, fitted_low), fitted_high)
    fitted_places = _places(within, fitted_high, fitted_low)
    beyond = (x - within.astype(np.int16)).astype(np.int32)
    error = _tables().errors.take(fitted_places).sum(axis=0, dtype=np.int64) + (
        beyond * beyond
    ).sum(axis=0)

    better = error < sums["error"]
    high, low = np.where(better, fitted_high, high), np.where(better, fitted_low, low)
    np.copyto(places, fitted_places, where=better)
    words = np.bitwise_or.reduce(_tables().indices.take(places) << _PLACES, axis=0)
    words |= low.astype(np.uint64) << np.uint64(8) | high
    return words.astype("<u8", copy=False).view(np.uint8).reshape(down, right, 8)


def _places(x: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Of samples [16, n] in the tables: none lies outside its block's ends."""
    return (x - low).astype(np.intp) | (high - low).astype(np.intp) << 8


def _sums(words: UInt64[np.ndarray, " n"]) -> dict[str, Int64[np.ndarray, " n"]]:
    """The sums that stand beside each other in a word."""
    return {
        name: (words >> np.uint64(first) & np.uint64(2**bits - 1)).astype(np.int64)
        for name, (first, bits) in _FIELDS.items()
    }


def _fit(
    sums: dict[str, Int64[np.ndarray, " n"]], low: UInt8[np.ndarray, " n"]
) -> tuple[UInt8[np.ndarray, " n"], UInt8[np.ndarray, " n"]]:
    """The ends of least squares, high and low; equal ones where the steps do not tell."""
    vv, uv = sums["ss"], 7 * sums["s"] - sums["ss"]
    uu = 16 * 49 - 14 * sums["s"] + vv
    vx, ux = sums["sx"], 7 * sums["x"] - sums["sx"]  # sevenths, above the low end
    scale = uu * vv - uv * uv
    told = scale > 0
    twice = 2 * np.where(told, scale, 1)
    ends = ((2 * top + scale) // twice + low for top in (vv * ux - uv * vx, uu * vx - uv * ux))
    high, under = ((end * told).clip(0, 255).astype(np.uint8) for end in ends)
    return high, under


class _Tables(NamedTuple):
    """By a block's range and a sample's height above its low end: place 256 range + height."""

    sums: UInt64[
        np.ndarray, " n"
    ]  # the fields of _FIELDS: at most 16 times what they hold fits them
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


# ---- and back ----


def decode(blocks: UInt8[np.ndarray, "n 8"]) -> UInt8[np.ndarray, "n 16"]:
    """The samples of each block, row by row: what texture2ddecoder gives, to the bit."""
    palette = _palettes()[blocks[:, 0], blocks[:, 1]]
    bits = np.zeros((len(blocks), 8), np.uint8)
    bits[:, :6] = blocks[:, 2:]
    numbers = bits.view("<u8") >> np.arange(0, 48, 3, dtype=np.uint64) & np.uint64(7)
    return np.take_along_axis(palette, numbers.astype(np.intp), axis=1)


@functools.cache
def _palettes() -> UInt8[np.ndarray, "256 256 8"]:
    """By both end points: half a megabyte."""
    e0, e1 = np.arange(256, dtype=np.int32)[:, None, None], np.arange(256, dtype=np.int32)[:, None]
    eight = (_EIGHT[0] * e0 + _EIGHT[1] * e1) // 7
    six = (_SIX[0] * e0 + _SIX[1] * e1) // 5 + _ENDS
    return np.where(e0 > e1, eight, six).astype(np.uint8)
