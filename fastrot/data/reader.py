"""Crops made by threads of this process: how batches are shared out to them, and what a thread does with a picture."""

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fastrot import native
from fastrot.core import CropRequest, DamagedRecord, Decoded, Pending, Reader
from fastrot.ops.resample import resample

TASK = 8  # pictures a thread takes at once: one costs a fifth in hand-offs, a batch delays the first one
AHEAD = 3  # batches read ahead; more where they are too small to give each thread two tasks
KEPT = 8  # free buffers of one size; what is beyond goes back to the system

Errors = list[tuple[int, str]]  # place in the batch, one sentence
Fill = Callable[[CropRequest, tuple[Tensor, ...], Iterable[int]], Errors]
InC = Callable[[native.Pool, CropRequest, list[np.ndarray]], Sequence[native.Work]]


class PooledReader(Reader):
    """A Reader with a pool of Python's threads. 0 workers: nothing is read ahead."""

    def __init__(self, workers: int):
        self.workers = workers  # a thread begins with its first task
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="reader") if workers else None

    def ahead(self, images: int) -> int:
        return max(AHEAD, 2 * self.workers // -(-images // TASK)) if self.workers else 0

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class ThreadedReader(PooledReader):
    """Fills the buffers of batches.

    fill    makes the crops of some places of a batch, in Python
    in_c    begins a batch on threads of the C++ extension; what these leave alone goes to `fill`. None: Python's threads
    advise  hears of each request before it is begun; what it says of its pictures goes to the errors
    """

    def __init__(
        self,
        fill: Fill,
        device: torch.device,
        workers: int,
        *,
        advise: Callable[[CropRequest], Errors] = lambda _: [],
        in_c: InC | None = None,
    ):
        super().__init__(workers)
        self._pinned = device.type == "cuda"
        self._fill, self._advise, self._in_c = fill, advise, in_c
        self._native = None if in_c is None else native.Pool(workers)

    def begin(self, request: CropRequest) -> Pending:
        damaged = self._advise(request)
        out = buffers(request, pinned=self._pinned)
        fill = partial(self._fill, request, out)
        if self._native is None or self._in_c is None:
            waits = in_tasks(self.pool, len(request.rows[0]), fill)
        else:
            works = self._in_c(self._native, request, [crop.numpy() for crop in out])
            waits = [partial(_fill_left, fill, works)]
        return Pending(lambda: Decoded(out, [*damaged, *(e for wait in waits for e in wait())]))

    def close(self) -> None:
        super().close()
        if self._native is not None:
            self._native.close()


def in_tasks(
    pool: ThreadPoolExecutor | None, images: int, work: Callable[[Iterable[int]], Any]
) -> list[Callable[[], Any]]:
    """`work(places)` of the pictures of a batch, by the pool: what waits for each task, and raises what it raised.

    None: the work is done by whoever waits.
    """
    places = range(images)
    if pool is None:
        return [partial(work, places)]
    return [pool.submit(work, places[at : at + TASK]).result for at in range(0, images, TASK)]


def _fill_left(fill: Callable[[Iterable[int]], Errors], works: Sequence[native.Work]) -> Errors:
    """Fill the places that the extension has left alone in any of a batch's crops."""
    states = [work.wait() != native.FINE for work in works]
    left = np.flatnonzero(np.any(states, axis=0)).tolist()
    return fill(left) if left else []


def fill_decoded(
    decode: Callable[[int], np.ndarray],
    request: CropRequest,
    out: tuple[Tensor, ...],
    places: Iterable[int],
    resample: Callable[[np.ndarray, np.ndarray, np.ndarray], None] = resample,
) -> Errors:
    """Decode the pictures at some places of a batch once each, resample them for each crop; those that cannot be."""
    errors, into = [], [crop.numpy() for crop in out]
    for place in places:
        try:
            picture = decode(place)
        except DamagedRecord as error:
            errors.append((place, str(error)))
            continue
        for rows, pixels in zip(request.rows, into, strict=True):
            resample(picture, rows[place], pixels[place])
    return errors


# ---- buffers, used again as soon as nobody can see them: saves the page faults of fresh memory ----

_free: dict[int, deque[np.ndarray]] = {}  # by size in bytes


def buffers(request: CropRequest, *, pinned: bool = False) -> tuple[Tensor, ...]:
    """A buffer of any content for each crop of a batch, in host memory."""
    images = len(request.rows[0])
    return tuple(_buffer(images, size, pinned) for size in request.sizes)


def _buffer(images: int, size: int, pinned: bool = False) -> UInt8[Tensor, "b s s 3"]:
    """It shares memory with a numpy view made for it alone, which torch holds for as long as any tensor shares its storage.

    When that dies the buffer under it can be handed out again, and not before: whoever keeps a Batch keeps its pixels.
    Pinned memory is recycled by torch itself, which also waits for copies under way.
    """
    shape = (images, size, size, 3)
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    free = _free.setdefault(math.prod(shape), deque(maxlen=KEPT))
    try:
        buffer = free.pop()
    except IndexError:
        buffer = np.empty(math.prod(shape), np.uint8)
    view = buffer.reshape(shape)
    weakref.finalize(view, free.append, buffer).atexit = False
    return torch.from_numpy(view)
