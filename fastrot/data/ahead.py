"""Batches begun before they are asked for, and handed out in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

TASK = 8  # pictures a thread takes at once: one costs a fifth in hand-offs, a batch delays the first one
AHEAD = 3  # batches read ahead; more where they are too small to give each thread two tasks


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
