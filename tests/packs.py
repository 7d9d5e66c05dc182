"""A pack of pictures in memory, and what its tiles hold."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastrot.data.pack import write
from fastrot.data.pack.layout import Encoding
from fastrot.data.prepare.encode import Chunk, EncodeSpec, encode_chunk
from fastrot.data.prepare.parts import PartStats
from fastrot.data.prepare.writer import Converted
from fastrot.data.sources.records import InMemory, Record


def write_pack(
    path: str | Path,
    pictures: Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    encoding: Encoding = "ycc",
    paths: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """A pack of pictures in memory, as a conversion writes it. It replaces what stands there.

    `labels`: None: -1 each. `paths`: the rows' names, from which their keys are made.
    """
    path = Path(path)
    names = [f"{row:08d}" for row in range(len(pictures))] if paths is None else paths
    known = [-1] * len(pictures) if labels is None else labels
    records = [Record(name, int(label)) for name, label in zip(names, known, strict=True)]
    source = InMemory(root=path, records=records, classes=tuple(classes), pictures=pictures)
    stats = PartStats()
    coded = [*stats.kept(encode_chunk(EncodeSpec(write.Coder(encoding)), Chunk(0, source)))]
    assert len(coded) == len(records)
    converted = Converted(source, {"encoding": encoding}, [], stats)
    sizes = np.array([(picture.height, picture.width) for picture in coded], np.int32)
    new = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    body = (picture.data[write.HEAD.itemsize :] for picture in coded)
    write.write_folder(new, encoding, converted, sizes, body)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(new, path)
    return path


# ---- the format, said once more ----


def bc4(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 8] -> int [n, 4, 4], as the format says it."""
    e0, e1 = blocks[:, 0].astype(int), blocks[:, 1].astype(int)
    bits = sum(blocks[:, 2 + i].astype(np.int64) << (8 * i) for i in range(6))
    index = bits[:, None] >> (3 * np.arange(16)) & 7
    eight = [e0, e1] + [((8 - i) * e0 + (i - 1) * e1) // 7 for i in range(2, 8)]
    six = (
        [e0, e1]
        + [((6 - i) * e0 + (i - 1) * e1) // 5 for i in range(2, 6)]
        + [e0 * 0, e0 * 0 + 255]
    )
    palette = np.where((e0 > e1)[:, None], np.stack(eight, 1), np.stack(six, 1))
    return np.take_along_axis(palette, index, 1).reshape(-1, 4, 4)


def untiled(tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [n, 48] -> uint8 [height, width, 3]."""
    down, across = -(-height // 8), -(-width // 8)
    a, b, c, d, cb, cr = (bc4(tiles[:, 8 * k : 8 * k + 8]) for k in range(6))
    luma = np.block([[a, b], [c, d]])
    cb, cr = (each.repeat(2, 1).repeat(2, 2) - 128 for each in (cb, cr))
    red = luma + ((91881 * cr + 32768) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = luma + ((116130 * cb + 32768) >> 16)
    pixels = np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)
    pixels = pixels.reshape(down, across, 8, 8, 3).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(8 * down, 8 * across, 3)[:height, :width]
