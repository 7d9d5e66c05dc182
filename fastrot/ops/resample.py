"""A box of a picture -> a crop, by OpenCV: what every reader does with pixels, and every kernel repeats to the bit."""

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from fastrot.arrays import Picture

Box = Int64[np.ndarray, " 6"]  # index, y, x, height, width, flip

cv2.setNumThreads(1)  # our threads work picture by picture; its own would fight them for the cores


def cut(picture: Picture, row: Box) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The box of `row` (index, y, x, height, width, flip): a view, or a copy where it reaches over the border.

    Raises ValueError for a box that lies outside the picture altogether.
    """
    _, y, x, h, w, _ = row.tolist()
    height, width = picture.shape[:2]
    if y >= 0 and x >= 0 and y + h <= height and x + w <= width:
        return picture[y : y + h, x : x + w]
    top, left = max(y, 0), max(x, 0)
    inside = picture[top : max(y + h, 0), left : max(x + w, 0)]
    if not inside.size:
        raise ValueError(f"the box {(y, x, h, w)} lies outside the picture of {height} x {width}")
    box = np.zeros((h, w, 3), np.uint8)
    box[top - y : top - y + inside.shape[0], left - x : left - x + inside.shape[1]] = inside
    return box


def resample(picture: Picture, row: Box, out: UInt8[np.ndarray, "s s 3"]) -> None:
    """Write the box of `row` (index, y, x, height, width, flip) into `out`: outside is 0, mirrored if flip.

    OpenCV's INTER_LINEAR, which is whole numbers throughout, so that other decoders give the same bits. Where a
    side shrinks to less than half, plain bilinear would skip pixels: there the box goes to n times the size, the
    least power of two that is enough, and each pixel is the mean of n x n of these.
    """
    box, size, n = cut(picture, row), out.shape[0], 1
    h, w = box.shape[:2]
    while max(h, w) > 2 * n * size:
        n *= 2
    if n > 1:
        box = cv2.resize(box, (n * size, n * size), interpolation=cv2.INTER_LINEAR)
        cv2.resize(box, (size, size), dst=out, interpolation=cv2.INTER_AREA)  # the mean of n x n
    elif (h, w) != (size, size):
        cv2.resize(box, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        out[:] = box
    if row[5]:
        cv2.flip(out, 1, dst=out)
