"""The pack on disk, and its codec in numpy; README.md beside this file says it in words.

    NAME.pack/meta.json     what is known of it as a whole, sealed by its own crc32; written last
    tiles.npy               ycc: uint8 [tiles, 48], a row for each 8x8 pixels
    pixels.npy              raw: uint8 [pixels, 3], in its place
    first.npy               int64 [rows + 1]: the first tile (or pixel) of each picture; the last is the total
    sizes.npy               int32 [rows, 2]: heights and widths
    labels.npy, keys.npy    int64 and uint64 [rows]
    paths.jsonl             {"path", "number"} of each row, as beside a .beton
    rejects.jsonl           {"path", "reason"} of each picture left out, where there are any

A tile is four BC4 blocks of Y (top left, top right, bottom left, bottom right), one of Cb and one of Cr, each for
4x4 samples in 8 bytes: two end points, and sixteen numbers of 3 bits that choose from the palette between them.
So a crop reads the tiles that it touches, at known places, and each tile decodes alone. All arithmetic is whole
numbers: every decoder gives the same bits.

YCbCr is JPEG's (full-range BT.601), in 16-bit fixed point with libjpeg's constants, both ways.
"""

from typing import Literal, TypeAlias

import cv2
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from fastrot.data.pack import bc4

VERSION = 1
META = "meta.json"
BLOCK = 2**26  # bytes of a file that one checksum covers
SIDE = 8  # pixels of a tile
Encoding: TypeAlias = Literal["ycc", "raw"]
BODY = {"ycc": "tiles.npy", "raw": "pixels.npy"}  # the array that holds the pictures
LENGTH = {"ycc": "tiles", "raw": "pixels"}  # how meta.json calls its length
WIDTH = {"ycc": 48, "raw": 3}  # bytes of a row of it


def arrays(encoding: str) -> dict[str, tuple[np.dtype, int | None]]:
    """The arrays of a pack by their files: dtype, and the length of their second axis (None: they have none)."""
    return {
        "first.npy": (np.dtype("<i8"), None),
        "sizes.npy": (np.dtype("<i4"), 2),
        "labels.npy": (np.dtype("<i8"), None),
        "keys.npy": (np.dtype("<u8"), None),
        BODY[encoding]: (np.dtype("u1"), WIDTH[encoding]),
    }


def lengths(sizes: Int32[np.ndarray, "n 2"], encoding: Encoding) -> Int64[np.ndarray, " n"]:
    """Tiles (ycc) or pixels (raw) of pictures of these heights and widths."""
    sides = sizes.astype(np.int64)
    if encoding == "ycc":
        sides = -(-sides // SIDE)
    return sides.prod(axis=1)


def firsts(sizes: Int32[np.ndarray, "n 2"], encoding: Encoding) -> Int64[np.ndarray, " m"]:
    """Where each picture begins, in tiles or pixels; the last is the total. m = n + 1."""
    return np.concatenate([[0], np.cumsum(lengths(sizes, encoding))])


def encode(picture: UInt8[np.ndarray, "h w 3"], encoding: Encoding) -> UInt8[np.ndarray, "t c"]:
    """The picture's tiles [t, 48], or its pixels [t, 3]."""
    return tiles_of(picture) if encoding == "ycc" else picture.reshape(-1, 3)


def decode(rows: UInt8[np.ndarray, "t c"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture whose tiles [t, 48] or pixels [t, 3] these are."""
    if rows.shape[1] == WIDTH["raw"]:
        return rows.reshape(height, width, 3)
    down, right = -(-height // SIDE), -(-width // SIDE)
    tiles = pixels_of(rows).reshape(down, right, SIDE, SIDE, 3)
    whole = tiles.swapaxes(1, 2).reshape(down * SIDE, right * SIDE, 3)
    return np.ascontiguousarray(whole[:height, :width])


# ---- pixels to tiles ----


def tiles_of(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "t 48"]:
    """The tiles of a picture."""
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


def _chroma(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w2"]:
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


# ---- tiles to pixels ----


def pixels_of(tiles: UInt8[np.ndarray, "t 48"]) -> UInt8[np.ndarray, "t 8 8 3"]:
    """The 8x8 pixels of each tile."""
    samples = bc4.decode(tiles.reshape(-1, 8)).reshape(-1, 6, 4, 4).astype(np.int32)
    y = samples[:, :4].reshape(-1, 2, 2, 4, 4).swapaxes(2, 3).reshape(-1, 8, 8)
    cb, cr = (samples[:, i].repeat(2, axis=1).repeat(2, axis=2) for i in (4, 5))
    return rgb_of(y, cb, cr)


def rgb_of(
    y: Int32[np.ndarray, "*s"], cb: Int32[np.ndarray, "*s"], cr: Int32[np.ndarray, "*s"]
) -> UInt8[np.ndarray, "*s 3"]:
    """Full-range BT.601 in whole numbers, as libjpeg has it."""
    cb, cr = cb - 128, cr - 128
    red = y + ((91881 * cr + 32768) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = y + ((116130 * cb + 32768) >> 16)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)
