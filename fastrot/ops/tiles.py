"""A pack's tiles -> pixels, on a CPU, to the bit as C++ and the kernel make them: data/pack/README.md has the format."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def decoded(tiles: UInt8[np.ndarray, "r c 48"]) -> UInt8[np.ndarray, "_h _w 3"]:
    """A rectangle of tiles as pixels."""
    rows, columns = tiles.shape[:2]
    blocks = tiles.reshape(rows, columns, 6, 8)
    luma = blocks[:, :, :4].reshape(rows, columns, 2, 2, 8).swapaxes(1, 2)
    y = plane_of(luma.reshape(2 * rows, 2 * columns, 8)).astype(np.int32)
    chroma = plane_of(np.concatenate([blocks[:, :, 4], blocks[:, :, 5]]))  # Cb above Cr
    chroma = chroma.repeat(2, axis=0).repeat(2, axis=1).astype(np.int32) - 128
    cb, cr = np.split(chroma, 2)
    red = y + ((91881 * cr + 32768) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = y + ((116130 * cb + 32768) >> 16)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def plane_of(blocks: UInt8[np.ndarray, "_h4 _w4 8"]) -> UInt8[np.ndarray, "_h _w"]:
    """The samples of BC4 blocks."""
    down, right = blocks.shape[:2]
    return np.array(Image.frombytes("L", (4 * right, 4 * down), blocks.tobytes(), "bcn", 4))
