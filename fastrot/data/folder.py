"""Folder: pictures straight from their files, for a first look and as the yardstick of the prepared formats.

Suffixes are trusted. Heights and widths stand in the headers: reading those costs 84 us a file, so they are
kept in a cache, with each file's length and time of change, by which a changed file is found.
"""

import hashlib
import io
import logging
import math
import mmap
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import reduction, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastrot import dist, entry
from fastrot.arrays import Bytes, Picture, RowSizes
from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Data, Decoded, Pending, Reader
from fastrot.data import pictures
from fastrot.data.files import BadPicture, picture_file, some
from fastrot.data.keys import order_fingerprint, path_keys
from fastrot.data.prepare.report import classes_without, left_out_words
from fastrot.data.reader import fill_decoded
from fastrot.data.sources.open import open_source
from fastrot.data.sources.records import Source
from fastrot.data.sources.tree import OPENED_AT_ONCE
from fastrot.disk import write_atomically

_CACHED = np.dtype(
    [("key", "<u8"), ("bytes", "<i8"), ("changed", "<i8"), ("height", "<i4"), ("width", "<i4")]
)
_STAMP = ["key", "bytes", "changed"]  # what tells that a file is the same
_TASK = 256  # files


class Folder(Data):
    """An image folder as `core.Data`."""

    format = "folder"

    def __init__(self, root: str | Path, *, labelled: bool = False):
        """`labelled`: pictures that lie beside class folders are left out; else their label is -1."""
        source = open_source("imagefolder", root, by_name=True, loose=not labelled)
        keys = path_keys(record.path for record in source.records)
        measured, reasons = _measured(source, keys)
        kept = np.flatnonzero(measured["height"])
        self.root, self.classes = source.root, source.classes
        self.rejected = source.rejected + reasons
        if not len(kept):
            path, reason = self.rejected[0]
            raise UsageError(f"{root} holds no picture that can be read; {path}: {reason}")
        seen = source.seen
        if len(kept) < len(keys):
            source, keys, measured = source.taken(kept), keys[kept], measured[kept]
        self.rows, self.keys, self.numbers = len(kept), keys, source.numbers
        self.labels = np.array([record.label for record in source.records], np.int64)
        self.fingerprint = order_fingerprint(self.keys, self.labels)
        told = list(_told(source.account(self.labels), self.rejected, seen))
        if told and entry.rank() == 0:
            log = logging.getLogger("fastrot")
            log.warning("%s: %s", root, entry.printable("; ".join(told)))
        self._paths = [record.path for record in source.records]
        self._sizes = np.stack([measured["height"], measured["width"]], axis=1)

    def name(self, row: int) -> str:
        return self._paths[row]

    def record(self, row: int) -> Bytes:
        """The bytes of a file. Raises DamagedRecord."""
        with _opened(self.root, self._paths[row], row) as file:
            return np.frombuffer(file.read(), np.uint8)

    def picture(self, row: int) -> Picture:
        return _picture(self.root, self._paths[row], row, self._sizes[row].tolist())

    def open_reader(self, device: torch.device, workers: int) -> "_FolderReader":
        """`workers` processes decode."""
        return _FolderReader(self, device, workers)


def _told(account: dict[str, Any], rejected: list[tuple[str, str]], seen: int) -> Iterator[str]:
    """What is to be said of the listing of a folder."""
    yield from [*account["notes"], *classes_without(account)]
    if account["left_out"]:
        yield left_out_words(account)
    if rejected:
        few = some([f"{path!r}: {reason}" for path, reason in rejected], 3)
        yield f"{len(rejected):,} of {seen:,} files cannot be used ({few})"


# What workers get for a batch, so that they hold no listing: the paths and listed sizes of its pictures.
_Job = tuple[CropRequest, list[str], RowSizes]


class _Jobs(deque[_Job]):
    """Jobs that the DataLoader has not drawn: a sampler that goes on where it has ended."""

    def __iter__(self) -> Iterator[_Job]:
        return self

    def __next__(self) -> _Job:
        if not self:
            raise StopIteration
        return self.popleft()


class _FolderReader(Reader):
    """Torch's DataLoader: it sends jobs to its workers when it is asked for a batch, two a worker ahead."""

    def __init__(self, folder: Folder, device: torch.device, workers: int):
        self._folder, self._workers = folder, workers
        self._jobs = _Jobs()
        self._loader = DataLoader(
            _Worker(str(folder.root)),  # type: ignore[arg-type]  # a map from jobs, not from numbers
            sampler=self._jobs,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_begin_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else its seed is drawn from torch's global state
        )
        self._done: Iterator[_Cropped] | None = None

    def begin(self, request: CropRequest) -> Pending:
        index = request.rows[0][:, 0]
        paths = [self._folder.name(row) for row in index.tolist()]
        self._jobs.append((request, paths, self._folder.sizes(index)))
        return Pending(self._next)

    def ahead(self, images: int) -> int:
        return 2 * self._workers

    def _next(self) -> Decoded:
        if self._done is None:
            if self._workers:
                entry.check_locks(self._workers)
            # workers inherit it: one that died of a warning would end the run
            with entry.warnings_held_back():
                self._done = iter(self._loader)
        done = next(self._done)
        return Decoded(tuple(torch.as_tensor(crop) for crop in done.crops), done.errors)

    def close(self) -> None:
        self._done = None  # ends the workers


@dataclass
class _Cropped:
    """What a worker sends: crops as arrays, and what cannot be read."""

    crops: tuple[np.ndarray | Tensor, ...]
    errors: list[tuple[int, str]]

    def pin_memory(self) -> "_Cropped":
        """Called by the DataLoader's own thread where there is a GPU, which copies from pinned tensors alone."""
        pinned = tuple(torch.as_tensor(crop).pin_memory() for crop in self.crops)
        return _Cropped(pinned, self.errors)


_sharing = True  # until it fails in this process


class _Shared(np.ndarray):
    """An array whose memory another process may map, without a name in /dev/shm: a container has 64 MB there."""

    duplicate: Any = None  # of its file, for the one who asks for it

    def __reduce__(self):
        return _mapped, (self.duplicate, self.shape)


def _mapped(duplicate: Any, shape: tuple[int, ...]) -> np.ndarray:
    fd = duplicate.detach()
    try:
        return np.ndarray(shape, np.uint8, mmap.mmap(fd, math.prod(shape)))
    finally:
        os.close(fd)


def _crops(shape: tuple[int, ...]) -> np.ndarray:
    """Room for crops; what cannot be shared (macOS, no memory, a TMPDIR that holds no socket) goes through a pipe,
    which costs a fifth of the speed.
    """
    global _sharing
    if _sharing and math.prod(shape) and multiprocessing.parent_process() is not None:
        try:
            fd = os.memfd_create("crops")
            try:
                os.ftruncate(fd, math.prod(shape))
                made = _Shared(shape, np.uint8, mmap.mmap(fd, math.prod(shape)))
                made.duplicate = reduction.DupFd(fd)
                return made
            finally:
                os.close(fd)
        except (AttributeError, OSError):
            _sharing = False  # a DupFd that fails leaves a descriptor open
    return np.empty(shape, np.uint8)


class _Worker:
    """Lives in the worker processes: a job in; crops out, with what of them cannot be read."""

    def __init__(self, root: str):
        self.root, self.at = root, ""

    def __getitem__(self, job: _Job) -> _Cropped:
        request, paths, sizes = job
        rows = request.rows[0][:, 0]

        def decode(place: int) -> np.ndarray:
            row, path = int(rows[place]), paths[place]
            self.at = f"row {row}, {path!r}"
            return _picture(self.root, path, row, sizes[place].tolist())

        shapes = ((len(paths), size, size, 3) for size in request.sizes)
        out = tuple(map(_crops, shapes))
        try:
            errors = fill_decoded(
                decode, request, tuple(map(torch.from_numpy, out)), range(len(paths))
            )
            return _Cropped(out, errors)
        except Exception as error:
            raise RuntimeError(f"{self.at}, cannot be cropped: {error}") from error


@contextmanager
def _opened(root: str | Path, path: str, row: int) -> Iterator[io.BufferedReader]:
    """A picture's file; what cannot be read in here is a DamagedRecord, in one sentence."""
    try:
        with picture_file(os.path.join(root, path)) as file:
            yield file
    except (BadPicture, OSError) as e:
        why = getattr(e, "strerror", None) or e
        raise DamagedRecord(
            f"row {row}, {path!r}, cannot be read: {why}; take it out of the folder"
        ) from None


def _picture(root: str | Path, path: str, row: int, size: list[int]) -> np.ndarray:
    """A picture's pixels. Raises DamagedRecord."""
    with _opened(root, path, row) as file:
        picture = pictures.decode(file.read())
        if list(picture.shape[:2]) != size:
            was, now = "{} x {}".format(*size), "{} x {}".format(*picture.shape[:2])
            raise BadPicture(f"it was listed as {was} and is {now}, so it has changed")
        return picture


def _begin_worker(_: int) -> None:
    """A cluster warns every process of a job, and a worker that died of it would end the run before its last
    save: workers heed the parent's SIGTERM alone.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=entry.end_with_parent, daemon=True).start()
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where no cluster warns
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def heed() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=heed, daemon=True).start()


def _context() -> str:
    """How workers are started: beside other ranks from a server without threads, never by a plain fork.

    DDP's and gloo's threads call Python; one that does so while this process forks can leave its child
    waiting for ever for the interpreter's lock (seen once in Python 3.11, three gloo ranks). The thread of
    PreemptionSignal, which an old worker's end may wake, was made by Python: the child makes the locks anew that
    such a thread may hold without the interpreter's (none hung in 6,000 forks beside one that woke).
    """
    if dist.world() == 1:
        return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # now, since it lets SIGTERM through again where it was held back
    return "forkserver"


# ---- heights and widths ----


def _measured(source: Source, keys: np.ndarray) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A _CACHED for each record, height 0 where its header cannot be read; (path, reason) of these."""
    cache = _cache_file(source.root)
    known, measured = _read_cache(cache), np.zeros(len(keys), _CACHED)
    measured["key"] = keys

    def look(start: int) -> tuple[bool, list[tuple[str, str]]]:
        """Measure some; whether a header was read, and which could not be."""
        part, records = measured[start : start + _TASK], source.records[start : start + _TASK]
        files = [os.path.join(source.root, record.path) for record in records]
        for i, file in enumerate(files):
            with suppress(OSError):  # what is gone has no header either: see below
                stat = os.stat(file)
                part["bytes"][i], part["changed"][i] = stat.st_size, stat.st_mtime_ns
        entry = known[np.searchsorted(known["key"], part["key"]).clip(max=len(known) - 1)]
        same = (entry[_STAMP] == part[_STAMP]) & (entry["height"] > 0)
        part[same] = entry[same]
        reasons = []
        for i in np.flatnonzero(~same):
            try:
                part["height"][i], part["width"][i] = pictures.size_of(files[i])
            except (BadPicture, OSError) as e:
                why = f"it cannot be read ({e.strerror})" if isinstance(e, OSError) else str(e)
                reasons.append((records[i].path, why))
        return not same.all(), reasons

    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = list(pool.map(look, range(0, len(keys), _TASK)))
    if any(news for news, _ in looked):
        _write_cache(cache, measured[measured["height"] > 0])
    return measured, [each for _, reasons in looked for each in reasons]


def _cache_file(root: Path) -> Path:
    """Where the sizes of this folder are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("FASTROT_CACHE_DIR") or os.path.join(home, "fastrot")
    whole = os.fsencode(os.path.realpath(root))
    return Path(folder) / f"sizes-{hashlib.blake2b(whole, digest_size=8).hexdigest()}.npy"


def _read_cache(file: Path) -> np.ndarray:
    with suppress(OSError, ValueError, EOFError):  # it is damaged: read the headers anew
        known = np.load(file, allow_pickle=False)
        if known.dtype == _CACHED and known.ndim == 1:
            return known
    return np.zeros(1, _CACHED)  # nothing that could be found


def _write_cache(file: Path, measured: np.ndarray) -> None:
    """A folder that cannot be written costs time, and is no error."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda out: np.save(out, np.sort(measured, order="key")))
