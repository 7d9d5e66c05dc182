"""The pack on disk, and its codec on a CPU: README.md beside this file tells both.

A tile decodes alone, at a known place, and all arithmetic is whole numbers: every decoder gives the same bits.
"""

from typing import Literal, TypeAlias

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from fastrot.arrays import Numbers, Picture, Sizes
from fastrot.data.pack import bc4
from fastrot.ops.tiles import decoded

VERSION = 1
META = "meta.json"
BLOCK = 2**26  # bytes of a file that one checksum covers
SIDE = 8  # pixels of a tile
Encoding: TypeAlias = Literal["ycc", "raw"]
BODY = {"ycc": "tiles", "raw": "pixels"}  # the array of all pictures; in meta.json its length
WIDTH = {"ycc": 48, "raw": 3}  # bytes of a row of it
Tiles = UInt8[np.ndarray, "t c"]  # tiles [t, 48] or pixels [t, 3], one picture after the other


def arrays(encoding: str, rows: int, body: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of a pack's arrays, by their files. `body`: all tiles or pixels."""
    each = {
        BODY[encoding]: ("u1", (body, WIDTH[encoding])),
        "first": ("<i8", (rows + 1,)),
        "sizes": ("<i4", (rows, 2)),
        "labels": ("<i8", (rows,)),
        "keys": ("<u8", (rows,)),
    }
    return {f"{name}.npy": (np.dtype(kind), shape) for name, (kind, shape) in each.items()}


def lengths(sizes: Sizes, encoding: Encoding) -> Numbers:
    """Tiles (ycc) or pixels (raw) of pictures of these heights and widths."""
    sides = sizes.astype(np.int64)
    if encoding == "ycc":
        sides = -(-sides // SIDE)
    return sides.prod(axis=1)


def firsts(sizes: Sizes, encoding: Encoding) -> Int64[np.ndarray, " m"]:
    """Where each picture begins, in tiles or pixels; the last is the total. m = n + 1."""
    return np.concatenate([[0], np.cumsum(lengths(sizes, encoding))])


def encode(picture: Picture, encoding: Encoding) -> Tiles:
    """The picture's tiles [t, 48], or its pixels [t, 3]."""
    if encoding == "raw":
        return picture.reshape(-1, 3)
    height, width = picture.shape[:2]
    below, beside = -height % SIDE, -width % SIDE
    if below or beside:
        picture = cv2.copyMakeBorder(picture, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    down, right = picture.shape[0] // SIDE, picture.shape[1] // SIDE
    tiles = np.empty((down, right, WIDTH["ycc"]), np.uint8)
    luma = bc4.encode(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    quads = luma.reshape(down, 2, right, 2, 8).swapaxes(1, 2)
    tiles[..., :32].reshape(down, right, 2, 2, 8)[:] = quads
    chroma = bc4.encode(_chroma(picture))  # Cb above Cr
    tiles[..., 32:40], tiles[..., 40:] = chroma[:down], chroma[down:]
    return tiles.reshape(-1, WIDTH["ycc"])


def _chroma(picture: Picture) -> UInt8[np.ndarray, "h w2"]:
    """Cb of each 2x2 pixels, and below it Cr: of their mean, rounded once. Sides are even."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    sums = cv2.resize(
        picture.astype(np.uint16) * np.uint16(4), (width, height), interpolation=cv2.INTER_AREA
    )
    red, green, blue = (channel.astype(np.int32) for channel in cv2.split(sums))  # of four pixels
    half = (128 << 18) + (1 << 17)
    cb = (32768 * blue - 11059 * red - 21709 * green + half) >> 18
    cr = (32768 * red - 27439 * green - 5329 * blue + half) >> 18
    return np.minimum(np.concatenate([cb, cr]), 255).astype(np.uint8)


def decode(rows: Tiles, height: int, width: int) -> Picture:
    """The picture whose tiles [t, 48] or pixels [t, 3] these are."""
    if rows.shape[1] == WIDTH["raw"]:
        return rows.reshape(height, width, 3)
    tiles = rows.reshape(-(-height // SIDE), -(-width // SIDE), WIDTH["ycc"])
    return np.ascontiguousarray(decoded(tiles)[:height, :width])
