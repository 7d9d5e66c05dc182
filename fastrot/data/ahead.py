"""Batches begun before they are asked for, shared out to threads, and handed out in order."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from fastrot.core import CropRequest
from fastrot.data.ring import Ring

TASK = 8  # pictures a thread takes at once: one costs a fifth in hand-offs, a batch delays the first one
AHEAD = 3  # batches read ahead; more where they are too small to give each thread two tasks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Begun(Generic[T]):
    """A batch under way."""

    images: int
    done: Callable[[], T]  # waits for it


def in_order(
    batches: Iterable[Begun[T]], workers: int, *, exactly: int | None = None
) -> Iterator[T]:
    """What they become; drawing the next of `batches` begins it.

    workers  threads that do the work; 0: nothing is begun ahead
    exactly  so many batches are under way beyond the one that is waited for, small or not
    """
    ahead: deque[Begun[T]] = deque()
    tasks, most, least = 0, AHEAD if exactly is None else exactly, 2 * workers
    for batch in batches:
        ahead.append(batch)
        tasks += -(-batch.images // TASK)
        del batch  # else this frame would keep its buffers from being used again
        enough = exactly is not None or tasks > least
        while ahead and (not workers or (len(ahead) > most and enough)):
            tasks -= -(-ahead[0].images // TASK)
            yield ahead.popleft().done()
            enough = exactly is not None or tasks > least
    while ahead:
        yield ahead.popleft().done()


def begun(
    pool: ThreadPoolExecutor | None, job: T, images: int, work: Callable[[T, int, int], None]
) -> Begun[T]:
    """A job whose pictures are shared out: `work(job, start, stop)`. What it raises is raised at its job."""
    return Begun(images, partial(finished, job, in_tasks(pool, images, partial(work, job))))


def in_tasks(
    pool: ThreadPoolExecutor | None, images: int, work: Callable[[int, int], None]
) -> list[Future]:
    """`work(start, stop)` of the pictures of a batch, by the pool; None: done here and now."""
    if pool is None:
        work(0, images)
        return []
    return [pool.submit(work, at, min(at + TASK, images)) for at in range(0, images, TASK)]


def finished(out: T, tasks: list[Future]) -> T:
    """`out`, when all tasks are done; what one of them raised is raised here."""
    for task in tasks:
        task.result()
    return out


@contextlib.contextmanager
def threads(workers: int, name: str) -> Iterator[ThreadPoolExecutor | None]:
    """A pool that ends early, with what is under way; 0 workers: none."""
    if not workers:
        yield None
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def buffers(ring: Ring, request: CropRequest) -> tuple[Tensor, ...]:
    """Memory for the crops of a batch."""
    each = zip(request.rows, request.sizes, strict=True)
    return tuple(ring.take(len(rows), size) for rows, size in each)


class Crew:
    """Python threads that fill the buffers of batches: `fill(request, out, start, stop)` for some of the pictures."""

    def __init__(
        self,
        fill: Callable[[CropRequest, tuple[Tensor, ...], int, int], None],
        workers: int,
        name: str,
    ):
        self._fill, self._held = fill, contextlib.ExitStack()
        self._pool = self._held.enter_context(threads(workers, name))

    def begin(self, request: CropRequest, out: tuple[Tensor, ...]) -> Begun[tuple[Tensor, ...]]:
        images = len(request.rows[0])
        tasks = in_tasks(self._pool, images, partial(self._fill, request, out))
        return Begun(images, partial(finished, out, tasks))

    def close(self) -> None:
        self._held.close()
