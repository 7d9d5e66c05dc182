"""One picture, from its source to encoded bytes, in worker processes.

Statistics are sums of whole numbers, so they do not depend on order, workers, parts or ranks.
"""

import errno
import multiprocessing
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fastrot import entry
from fastrot.config import RunError
from fastrot.data.files import BadPicture, CutShort, shown
from fastrot.data.sources.records import Source

AHEAD = 3  # chunks a worker that may be under way or waiting to be written: bounds the memory
GONE = {  # what a file says that is not there, or not for us
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ESTALE),
}
BAND = 2**18  # pixels that are split into channels at once: these stay in the cache


@runtime_checkable
class Coder(Protocol):
    """Pixels to bytes and back; travels to the workers."""

    def encode(self, picture: np.ndarray) -> bytes: ...

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class EncodeSpec:
    """What is done to every picture."""

    coder: Coder
    short_side: int | None = None
    max_side: int | None = None
    allow_truncated: bool = False  # what lacks pixels is taken with what is there
    center_crop: bool = False  # keep the centre square, after shrinking
    keep_bytes: bool = False  # a file's bytes stay as they are; only pixels are coded
    measure_loss: bool = False  # also measure what the coder loses


class EncodedPicture(NamedTuple):
    """A picture as it comes back from a worker."""

    record: int  # its number in the source
    label: int
    height: int
    width: int
    data: bytes
    crc: int  # crc32 of data
    sums: tuple[int, ...]  # of red, green, blue; exact
    squares: tuple[int, ...]
    loss: int | None  # sum of squared differences to what the coder gives back, where measured
    seconds: float
    truncated: bool  # it lacked pixels, and was taken all the same


class Reject(NamedTuple):
    """A picture that cannot be used, and why."""

    record: int
    reason: str


Result = EncodedPicture | Reject  # of a record


class Chunk(NamedTuple):
    """What a worker is given: some records, and what reads them."""

    first: int  # number of its first record in the whole source
    source: Source  # of these records alone


def encode_chunk(spec: EncodeSpec, chunk: Chunk) -> list[Result]:
    """A result for each record. Raises RunError where the disk or the memory fails, not a picture."""
    results: list[Result] = []
    for i, record in enumerate(chunk.source.records):
        if _stop is not None and _stop.is_set():
            break  # nobody waits for the rest
        number, named = chunk.first + i, entry.printable(shown(record.path))
        try:
            results.append(_encode(spec, chunk, i))
        except BadPicture as e:
            results.append(Reject(number, str(e)))
        except OSError as e:
            reason = f"cannot be read: {e.strerror}"
            if e.errno not in GONE:  # else a failing disk would reject thousands of good pictures
                raise RunError(f"{named} {reason}; see to that, then run again to go on") from None
            results.append(Reject(number, reason))
        except MemoryError:
            raise RunError(f"{named} took more memory than there is: use fewer --workers") from None
        except ImportError:
            raise
        except Exception as e:
            raise RuntimeError(f"converting {record.path!r} failed: {e!r}") from e
    return results


def _encode(spec: EncodeSpec, chunk: Chunk, i: int) -> EncodedPicture:
    """Record i of a chunk. Raises BadPicture."""
    from fastrot.data.pictures import centre_square, shrink

    start = time.perf_counter()
    read = chunk.source.read(i)  # a file's bytes, or pixels
    picture, truncated = _pixels(spec, read)
    picture = shrink(picture, spec.short_side, spec.max_side)
    picture = np.ascontiguousarray(centre_square(picture) if spec.center_crop else picture)
    height, width = picture.shape[:2]
    if max(height, width) > 65_535:
        raise BadPicture(f"{width}x{height} pixels: a side may have 65,535")
    keep = spec.keep_bytes and not truncated
    data = read if keep and isinstance(read, bytes) else spec.coder.encode(picture)
    loss = None
    if spec.measure_loss:
        apart = picture.astype(np.int32) - spec.coder.decode(data, height, width)
        loss = int(np.square(apart).sum(dtype=np.int64))
    sums, squares = _channel_sums(picture)
    number, label, crc = chunk.first + i, chunk.source.records[i].label, zlib.crc32(data)
    seconds = time.perf_counter() - start
    return EncodedPicture(
        number, label, height, width, data, crc, sums, squares, loss, seconds, truncated
    )


def _pixels(spec: EncodeSpec, read: bytes | np.ndarray) -> tuple[np.ndarray, bool]:
    """A picture's pixels, and whether some are lacking. Raises BadPicture."""
    from fastrot.data.pictures import decode, decode_truncated

    if not isinstance(read, bytes):
        return read, False
    try:
        return decode(read), False
    except CutShort as e:
        if not spec.allow_truncated:
            raise BadPicture(f"{e} (--allow-truncated takes it)") from None
        return decode_truncated(read), True


_kept = threading.local()  # planes: the page faults of fresh ones would cost more than the sums


def _channel_sums(picture: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sums of red, green, blue and of their squares, exact."""
    import cv2

    sums, squares = [0, 0, 0], [0, 0, 0]
    if not hasattr(_kept, "planes"):
        # the odd length: planes a power of two apart meet in the cache
        _kept.planes = np.empty((3, BAND + 1088), np.uint8)
    rows = BAND // picture.shape[1]  # a side has at most 65,535 pixels
    for top in range(0, len(picture), rows):
        band = picture[top : top + rows]
        planes = [plane[: band.size // 3].reshape(band.shape[:2]) for plane in _kept.planes]
        for i, channel in enumerate(cv2.split(band, planes)):
            sums[i] += int(cv2.sumElems(channel)[0])  # float64, below 2**53
            # OpenCV squares a root: off by some 2**-52 of itself, which is far less than a half
            squares[i] += round(cv2.norm(channel, cv2.NORM_L2SQR))
    return tuple(sums), tuple(squares)


# ---- many chunks, over processes ----

_stop: Any = None  # in a worker: set when the parent wants no more


def encode_all(
    spec: EncodeSpec, chunks: Iterable[Chunk], workers: int
) -> Generator[list[Result], None, None]:
    """What `encode_chunk` gives for each chunk, in order."""
    return spread(partial(encode_chunk, spec), chunks, workers)


def spread(task: Callable, items: Iterable, workers: int) -> Generator[Any, None, None]:
    """`map(task, items)` over processes, a few items ahead; 0: in this one. Close it to end the workers early."""
    if workers == 0:
        yield from map(task, items)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    entry.check_locks(workers)
    stop, waiting = spawn.Event(), deque()
    pool = ProcessPoolExecutor(workers, spawn, _begin_worker, (stop,))
    try:
        for item in items:
            with entry.warnings_held_back():  # Ctrl-C would end a worker that begins
                waiting.append(pool.submit(task, item))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            f"a worker was killed, maybe for its memory: run again with fewer --workers than {workers}"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.pthread_sigmask(signal.SIG_UNBLOCK, entry.WARNINGS)
    threading.Thread(target=entry.end_with_parent, daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # one process a core is enough
