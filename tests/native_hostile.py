"""Arguments that do not fit, for fastrot.native, in a process whose annotations nobody checks but it itself.

Prints a line for each that was not refused.
"""

import sys
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import simplejpeg
from truth import photo

from fastrot import native


def jpeg_crops(records: native.Records, boxes: Any, out: Any, threads: int = 0) -> np.ndarray:
    """The pictures' states."""
    with closing(native.Pool(threads)) as pool:
        return pool.jpeg_crops(records, boxes, out).wait()


def pack_crops(threads: int = 0, **pack: Any) -> np.ndarray:
    """The pictures' states."""
    with closing(native.Pool(threads)) as pool:
        return pool.pack_crops(**pack).wait()


def refused(name: str, call: Callable[..., Any], **arguments: Any) -> None:
    try:
        call(**arguments)
    except (ValueError, IndexError):
        return
    print(f"not refused: {name}")


def packs() -> None:
    sizes = np.array([[9, 20], [16, 8]], np.int32)
    first, tiles = np.array([0, 6, 8]), np.zeros((8, 48), np.uint8)
    boxes = np.array([[0, 0, 0, 9, 20, 0], [1, 0, 0, 4, 4, 1]])
    fine: dict[str, Any] = {"data": tiles, "first": first, "sizes": sizes}
    fine |= {"boxes": boxes, "out": np.empty((2, 8, 8, 3), np.uint8)}
    assert not pack_crops(**fine).any()
    locked = np.empty((2, 8, 8, 3), np.uint8)
    locked.flags.writeable = False
    for name, wrong in {
        "data": [tiles[:-1], tiles[:, :47], tiles.astype(np.int8), tiles[:0]],
        "first": [first[:-1], first + 1, -first, first.astype(np.int32), first * 2**40],
        "sizes": [sizes + 8, sizes * 2, sizes * 0, -sizes, sizes[:1], sizes.astype(np.int64)],
        "boxes": [boxes[:, :5], boxes.astype(np.int32), boxes[:1], boxes + 2, boxes - 1],
        "out": [
            np.empty((2, 8, 8, 4), np.uint8),
            np.empty((1, 8, 8, 3), np.uint8),
            np.empty((2, 8, 8, 3), np.int8),
            np.empty((2, 3, 8, 8), np.uint8).transpose(0, 2, 3, 1),
            locked,
        ],
    }.items():
        for each in wrong:
            refused(f"pack, {name} {each}", pack_crops, **fine | {name: each})


def jpegs() -> None:
    each = [simplejpeg.encode_jpeg(photo(i)) for i in range(2)]
    memory = np.frombuffer(b"".join(each), np.uint8)
    lengths = np.array([len(one) for one in each])
    start, zeros = np.array([0, len(each[0])]), np.zeros(2, np.int64)
    sizes, raw = np.array([[60, 80]] * 2, np.int32), np.zeros(2, bool)
    crcs = np.array([zlib.crc32(one) for one in each], np.uint32)
    good = native.Records(native.Files([memory]), zeros, start, lengths, sizes, raw, crcs)
    boxes = [np.array([[i, 0, 0, 30, 30, 0] for i in range(2)])]
    out = [np.empty((2, 8, 8, 3), np.uint8)]
    assert not jpeg_crops(good, boxes, out).any()
    for name, wrong in {
        "which": [[0, 1], [0, -1], [0]],
        "start": [[0, -1], [1, start[1] + 1], [0, 2**62], [0]],
        "bytes": [[1, lengths[1] + 1], [0, 1], [-1, 1], [1, 2**62], [1]],
        "sizes": [sizes[:1], sizes.astype(np.int64)],
        "raw": [~raw, raw.astype(np.int64), raw[:1]],
        "crcs": [crcs[:1], crcs.astype(np.int64)],
    }.items():
        for value in wrong:
            records = good._replace(**{name: np.array(value)})
            refused(f"jpeg, {name} {value}", jpeg_crops, records=records, boxes=boxes, out=out)
    one = boxes[0]
    for wrong in ([one[:1]], [one[:, :5]], [one.astype(np.int32)], [], boxes * 2):
        refused("jpeg, boxes", jpeg_crops, records=good, boxes=wrong, out=out)
    for wrong in ([out[0][:1]], [out[0][:, :7]], [out[0][..., :2]], [], [out[0].astype(np.int8)]):
        refused("jpeg, out", jpeg_crops, records=good, boxes=boxes, out=wrong)


if __name__ == "__main__":
    packs()
    jpegs()
