"""Batches begun before they are asked for, shared out to threads, and handed out in order."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastrot.core import Picks
from fastrot.data.ring import Ring

TASK = 8  # pictures a thread takes at once: one costs a fifth in hand-offs, a batch delays the first one
AHEAD = 3  # batches read ahead; more where they are too small to give each thread two tasks

Job = TypeVar("Job")


class Begun(NamedTuple):
    """A batch under way."""

    images: int
    done: Callable[[], tuple[Tensor, ...]]  # waits for it


def in_order(batches: Iterable[Begun], workers: int) -> Iterator[tuple[Tensor, ...]]:
    """What they become; drawing the next of `batches` begins it. 0 workers: nothing is begun ahead."""
    ahead: deque[Begun] = deque()
    tasks = 0
    for batch in batches:
        ahead.append(batch)
        tasks += -(-batch.images // TASK)
        del batch  # else this frame would keep its buffers from being used again
        while ahead and (not workers or (len(ahead) > AHEAD and tasks > 2 * workers)):
            tasks -= -(-ahead[0].images // TASK)
            yield ahead.popleft().done()
    while ahead:
        yield ahead.popleft().done()


def jobs_in_order(
    jobs: Iterable[Job],
    work: Callable[[Job, int, int], None],
    *,
    images: Callable[[Job], int],
    pool: ThreadPoolExecutor | None,
    batches: int,
) -> Iterator[Job]:
    """The jobs, each when `work(job, start, stop)` is done for all its pictures; `batches` more are under way.

    What `work` raises is raised here, at its job.
    """
    under_way: deque[tuple[Job, list[Future]]] = deque()
    for job in jobs:
        tasks = in_tasks(pool, images(job), lambda start, stop, job=job: work(job, start, stop))
        under_way.append((job, tasks))
        del job, tasks  # else this frame would keep a buffer from being used again
        while under_way and (pool is None or len(under_way) > batches):
            yield finished(*under_way.popleft())
    while under_way:
        yield finished(*under_way.popleft())


def in_tasks(
    pool: ThreadPoolExecutor | None, images: int, work: Callable[[int, int], None]
) -> list[Future]:
    """`work(start, stop)` of the pictures of a batch, by the pool; None: done here and now."""
    if pool is None:
        work(0, images)
        return []
    return [pool.submit(work, at, min(at + TASK, images)) for at in range(0, images, TASK)]


def finished(out: Job, tasks: list[Future]) -> Job:
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


def buffers(ring: Ring, picks: Picks) -> tuple[Tensor, ...]:
    """Memory for the crops of a batch."""
    each = zip(picks.rows, picks.sizes, strict=True)
    return tuple(ring.take(len(rows), size) for rows, size in each)
