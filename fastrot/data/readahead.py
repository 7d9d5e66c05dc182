"""Which bytes to ask the system for before they are read: neighbours in one piece."""

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from fastrot.core import CropRequest

GAP = 2**14  # bytes between two records that are read along: fewer than a seek or a request costs
# bytes of one piece of advice: Linux silently reads no more at once than the larger of its read-ahead, 128 kB
# where nobody has set it, and the largest request of the disk
PIECE = 2**17
Whole = Integer[np.ndarray, " n"]


def announce(
    request: CropRequest, maps: Sequence[Any], place: Callable[[np.ndarray], tuple[np.ndarray, ...]]
) -> None:
    """Tell the system which bytes will be read: a slow disk gets a whole batch to sort, not one a thread.

    `maps`: the files' memory maps; `place`: file, first byte and bytes of rows, as `runs` wants them. It costs 13 us a
    record that is not in memory, 2.7 us one that is.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    for rows in (request.rows[0][:, 0], request.prefetch):
        if rows is None or not len(rows):
            continue
        with contextlib.suppress(OSError):  # it is only advice
            for file, start, length in runs(*place(rows)):
                maps[file].madvise(mmap.MADV_WILLNEED, start, length)


def runs(files: Whole, ptr: Whole, size: Whole) -> Iterator[tuple[int, int, int]]:
    """File, first byte (of a page of memory) and length of what lies side by side, in pieces.

    It is given of each record: the number of its file, its first byte there, and its bytes.
    """
    order = np.lexsort((ptr, files))
    files, begin = files[order], ptr[order].astype(np.int64)
    end = begin + size[order].astype(np.int64)
    apart = (files[1:] != files[:-1]) | (begin[1:] - end[:-1] > GAP)
    first = np.flatnonzero(np.concatenate([[True], apart]))
    last = np.concatenate([first[1:], [len(order)]]) - 1
    begin = begin[first] // mmap.PAGESIZE * mmap.PAGESIZE
    each = zip(files[first].tolist(), begin.tolist(), end[last].tolist(), strict=True)
    for file, start, stop in each:
        for at in range(start, stop, PIECE):
            yield file, at, min(PIECE, stop - at)
