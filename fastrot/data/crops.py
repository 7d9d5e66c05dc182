"""Which box and flip of row i: a pure function of (crop, seed, epoch, index, view).

A crop is nothing but a box rule, in numpy float64 on the CPU, always: every loader on every device gets the
same integers. A box is (y, x, height, width) in pixels of the picture after EXIF orientation; it may reach over
the border, where pixels are 0.
"""

import numpy as np

from fastrot.arrays import Boxes, Keys, Rows, RowSizes, Sizes
from fastrot.config import Crop, RandomResized, Shifted, UsageError, Whole, Within
from fastrot.data.sampler import GOLDEN, hash64, mix

TRIES = 10  # as torchvision's RandomResizedCrop, before it falls back to a centred box
_CROPS = 0x63726F7073  # "crops": keeps these draws apart from those of the order


def boxes(
    crop: Crop, sizes: RowSizes, *, seed: int, epoch: int, index: Rows, view: int = 0
) -> Boxes:
    """Boxes of pictures of these heights and widths, each addressed by (seed, epoch, view, index)."""
    draws = hash64(_CROPS, seed, epoch, view, index)
    h, w = sizes.T.astype(np.float64)
    if isinstance(crop, RandomResized):
        box = _random_resized(crop, h, w, draws)
    elif isinstance(crop, Within):
        side = np.maximum(np.rint(np.minimum(h, w) * crop.size / crop.short), 1)
        free_y, free_x = h - side, w - side
        if crop.random:
            box = _whole(draws, 1, free_y), _whole(draws, 2, free_x), side, side
        else:
            box = np.rint(free_y / 2), np.rint(free_x / 2), side, side
    elif isinstance(crop, Shifted):
        side = np.full(len(index), float(crop.size))
        free_y, free_x = h - side + 2 * crop.pad, w - side + 2 * crop.pad
        box = _whole(draws, 1, free_y) - crop.pad, _whole(draws, 2, free_x) - crop.pad, side, side
    else:
        box = np.zeros_like(h), np.zeros_like(w), h, w
    flip = _share(draws, 0) < 0.5 if crop.flip else np.zeros(len(index))
    return np.stack([index, *box, flip], axis=1, dtype=np.int64, casting="unsafe")


def _random_resized(crop: RandomResized, h, w, draws):
    """The distribution of torchvision: area and log aspect even, ten tries, then the largest centred box."""
    low, high = np.log(crop.ratio)
    y, x, bh, bw = (np.zeros_like(h) for _ in range(4))
    left = np.arange(len(h))  # still without a box
    for t in range(TRIES):
        d = draws[left]
        area = h[left] * w[left] * _between(d, 4 * t + 1, *crop.scale)
        ratio = np.exp(_between(d, 4 * t + 2, low, high))
        tw, th = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (tw >= 1) & (tw <= w[left]) & (th >= 1) & (th <= h[left])
        ty, tx = _whole(d, 4 * t + 3, h[left] - th), _whole(d, 4 * t + 4, w[left] - tw)
        done = left[fits]
        y[done], x[done], bh[done], bw[done] = ty[fits], tx[fits], th[fits], tw[fits]
        left = left[~fits]
        if not len(left):
            break
    if len(left):
        hl, wl = h[left], w[left]
        wide, tall = wl / hl > crop.ratio[1], wl / hl < crop.ratio[0]
        bw[left] = np.where(wide, np.maximum(np.rint(hl * crop.ratio[1]), 1), wl)
        bh[left] = np.where(tall, np.maximum(np.rint(wl / crop.ratio[0]), 1), hl)
        y[left], x[left] = np.floor((hl - bh[left]) / 2), np.floor((wl - bw[left]) / 2)
    return y, x, bh, bw


# ---- numbered draws, of pictures whose hashes are `draws` ----


def _share(draws: Keys, number: int) -> np.ndarray:
    """Even in [0, 1): 53 bits."""
    step = np.uint64((number + 1) * GOLDEN % 2**64)
    return (mix(draws + step) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _between(draws: Keys, number: int, low: float, high: float) -> np.ndarray:
    return low + (high - low) * _share(draws, number)


def _whole(draws: Keys, number: int, most: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to `most`, both included."""
    return np.floor(_share(draws, number) * (most + 1))


def plain(crop: Crop) -> Crop:
    """The evaluation view of a training crop: centred, never mirrored."""
    if isinstance(crop, (RandomResized, Within)):
        short = round(crop.size * 256 / 224)
        return Within(size=crop.size, short=short, random=False, flip=False)
    return Whole(size=crop.size, flip=False)


def check_sizes(
    crop: Crop, sizes: Sizes, *, enlarge: bool = False, asked: int | None = None
) -> None:
    """Refuse pictures that are smaller than the crop: each of them for Shifted, most of them otherwise. `asked`: of `View`."""
    short = sizes.min(axis=1)
    if isinstance(crop, Shifted) and crop.pad >= crop.size:  # a box could miss its picture
        raise UsageError(f"--method.crop.pad got {crop.pad}: it wants less than {crop.size} pixels")
    if isinstance(crop, Shifted) and (short < crop.size).any():
        raise UsageError(
            f"the crop is {crop.size} pixels a side, but row {int(short.argmin())} has a short side of "
            f"{int(short.min())}: set --image-size {int(short.min())}, or prepare larger pictures"
        )
    middle = int(np.median(short))
    if not isinstance(crop, (Shifted, Whole)) and middle < crop.size and not enlarge:
        raise UsageError(
            f"the crop is {crop.size} pixels a side, but half of the pictures have a short side of at most "
            f"{middle}: set --image-size {middle * (asked or crop.size) // crop.size} or smaller, or --enlarge to stretch them"
        )
