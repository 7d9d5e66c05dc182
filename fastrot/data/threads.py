"""Work on batches, shared out to a pool of threads, some batches ahead of whoever uses them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

TASK = 8  # pictures a thread takes at once: one costs a fifth in hand-offs, a batch delays the first one

Job = TypeVar("Job")


def ahead(
    jobs: Iterable[Job],
    work: Callable[[Job, int, int], None],
    *,
    images: Callable[[Job], int],
    pool: ThreadPoolExecutor | None,
    batches: int,
) -> Iterator[Job]:
    """The jobs in order, each when `work(job, start, stop)` is done for all its pictures.

    `batches` jobs are under way beyond the one that is waited for. No pool: all in the caller's thread, nothing
    ahead. What `work` raises is raised here, at its job.
    """
    if pool is None:
        for job in jobs:
            work(job, 0, images(job))
            yield job
        return
    under_way: deque[tuple[Job, list[Future]]] = deque()
    for job in jobs:
        starts = range(0, images(job), TASK)
        tasks = [pool.submit(work, job, at, min(at + TASK, images(job))) for at in starts]
        under_way.append((job, tasks))
        del job, tasks  # else this frame would keep a buffer from being used again
        if len(under_way) > batches:
            yield _done(*under_way.popleft())
    while under_way:
        yield _done(*under_way.popleft())


def _done(job: Job, tasks: list[Future]) -> Job:
    for task in tasks:
        task.result()
    return job
