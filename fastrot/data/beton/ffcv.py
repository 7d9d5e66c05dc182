"""`.beton` through FFCV's own Loader, with our order and boxes: `--loader ffcv`.

FFCV's Reader, its pipeline, its thread that works ahead and its C code (libjpeg-turbo's fast DCT, OpenCV's INTER_AREA)
are used as they are; rows and boxes go in with each batch. What FFCV 1.0.2 gets wrong stays inside this file:

    an operation that raises                  the consumer waits for ever     -> `_Epoch` hands the error on
    an epoch broken off                       its thread and memory stay      -> `_Epoch.close` ends it
    a damaged record                          zeros, without a word           -> checksum, else size and return code
    its import, Loader and iterator           set torch's number of threads   -> `_aside`, `_Epoch.run`
    every process                             compiles for 7 to 9 s           -> `_aside`; two functions, kept on disk
    each epoch                                a picture of memory a batch place and slot -> a few a thread
    each Loader                               dicts of all rows, numba's types changed   -> `_Records`

Needs ffcv and numba (`make ffcv`), so nothing imports this file but `assemble.open_data`, when asked.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, no_type_check

import cv2
import llvmlite.binding
import numba
import numba.typed
import numpy as np
import simplejpeg
import torch
from numba.types import ExternalFunction, int32, int64, uint8, uint32, uint64, uintp, void
from torch import Tensor

from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Decoded, Pending, Reader
from fastrot.data.beton.layout import IMAGE
from fastrot.data.beton.read import Beton
from fastrot.data.reader import AHEAD


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Meanwhile FFCV sets nobody's threads, and does without the typed dict whose compilation takes 2.6 s."""
    threads = numba.get_num_threads()
    kept = torch.set_num_threads, numba.typed.Dict
    torch.set_num_threads, numba.typed.Dict = lambda _: None, dict
    try:
        yield
    finally:
        torch.set_num_threads, numba.typed.Dict = kept
        numba.set_num_threads(threads)


with _aside():
    import ffcv._libffcv
    import ffcv.loader.loader
    from ffcv.loader import OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline import PipelineSpec
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation

TASK = 4  # pictures a thread decodes at once, so that they are still in its cache when they are cropped
ADDRESS, SIZE, HEIGHT, WIDTH, RAW, PIXELS, FAILED = range(7)  # columns of `jobs`, a row a picture


class FfcvBeton(Beton):
    """`core.Data` of a `.beton` file, read by FFCV's Loader. Pixels differ a little from those of `Beton`."""

    decoder = f"FFCV {version('ffcv')}"

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.loader = _loader_of(self, self._decode_batch)
        manager = self.loader.memory_manager
        at = np.searchsorted(manager.ptrs, self._start).clip(max=len(manager.ptrs) - 1)
        found = manager.ptrs[at], manager.sizes[at]
        if not all(map(np.array_equal, found, (self._start, self._bytes))):
            raise UsageError(
                f"FFCV would take other bytes of {path} for its pictures: choose --loader beton"
            )

    def describe(self) -> list[str]:
        return [f"crops are decoded by {self.decoder}, in our order"]

    def open_reader(self, device: torch.device, workers: int) -> "_Reader":
        """`workers` threads decode, FFCV's own among them; 0 is taken for 1."""
        return _Reader(self, device, max(workers, 1))

    def begun(self, request: CropRequest, *, pinned: bool) -> tuple[Tensor, ...]:
        """The buffers of a batch whose bytes are announced."""
        self._announce(request)
        return self._ring.buffers(request, pinned=pinned)

    def _decode_batch(self, work: "_Work", metadata: Any, storage: Any) -> Decoded:
        """The decoder of FFCV's pipeline: fills a batch's buffers from what FFCV has read of the file."""
        jobs = _jobs(metadata[work.request.rows[0][:, 0]], *storage)
        spare = max(_spare(boxes, jobs) for boxes in work.request.rows)
        into = [crop.numpy() for crop in work.out]
        starts, errors = iter(range(0, len(jobs), TASK)), []

        def share() -> None:
            for start in starts:  # all threads draw from the same
                part = slice(start, start + TASK)
                errors.extend(self._decode_part(work.request, jobs, into, part, spare))

        work.together(share)
        return Decoded(work.out, errors)

    def _decode_part(
        self,
        request: CropRequest,
        jobs: np.ndarray,
        into: list[np.ndarray],
        part: slice,
        spare: int,
    ) -> list[tuple[int, str]]:
        """Whole pictures into this thread's own memory, then from there the boxes of each crop; what is damaged."""
        rows, jobs, errors = request.rows[0][part, 0].tolist(), jobs[part], []
        for place, (row, job) in enumerate(zip(rows, jobs, strict=True), part.start):
            try:
                self._check(row, job)
            except DamagedRecord as error:
                job[SIZE] = 0  # passed over below
                errors.append((place, str(error)))
        memory = self._scratch.take(spare + 3 * int(jobs[:, HEIGHT] @ jobs[:, WIDTH]))
        _decode(jobs, memory.ctypes.data + spare)
        for place in np.flatnonzero(jobs[:, FAILED]).tolist():
            damaged = self._damaged(rows[place], "libjpeg-turbo cannot decode all of it")
            errors.append((part.start + place, str(damaged)))
        for boxes, pixels in zip(request.rows, into, strict=True):
            _crop(jobs, boxes[part], pixels[part], memory[None, :spare])
            for place in np.flatnonzero(boxes[part, 5]).tolist():
                cv2.flip(pixels[part][place], 1, dst=pixels[part][place])
        return errors

    def _check(self, row: int, job: np.ndarray) -> None:
        """Raises DamagedRecord where the checksum, or for want of one the JPEG's own size, does not agree."""
        data = self.record(row)
        if self._crc is not None or job[RAW]:
            return
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise self._damaged(row, str(error)) from None
        if (height, width) != (job[HEIGHT], job[WIDTH]):
            found, said = f"{height} x {width}", f"{job[HEIGHT]} x {job[WIDTH]}"
            raise self._damaged(row, f"it is {found} pixels, its row says {said}")


class _Work(NamedTuple):
    """A batch, as FFCV carries it to its decoder in the place of row numbers."""

    request: CropRequest
    out: tuple[Tensor, ...]
    together: Callable[[Callable[[], None]], None]  # runs a function on all threads of the epoch
    future: Future[Decoded]


def _jobs(found: np.ndarray, file: np.ndarray, ptrs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What FFCV knows of the pictures of a batch: int64 [b, 7]."""
    jobs = np.zeros((len(found), 7), np.int64)
    jobs[:, ADDRESS] = found["data_ptr"] + np.uint64(file.ctypes.data)
    jobs[:, SIZE] = sizes[np.searchsorted(ptrs, found["data_ptr"])]
    jobs[:, HEIGHT], jobs[:, WIDTH], jobs[:, RAW] = (found[k] for k in ("height", "width", "mode"))
    return jobs


def _spare(boxes: np.ndarray, jobs: np.ndarray) -> int:
    """Bytes for the largest of the boxes that reach over a border: they are laid out before they are resampled."""
    _, y, x, h, w, _ = boxes.T
    over = (y < 0) | (x < 0) | (y + h > jobs[:, HEIGHT]) | (x + w > jobs[:, WIDTH])
    return int((3 * h * w)[over].max(initial=0))


# ---- FFCV's Loader ----


class _Decoder(Operation):
    """The one operation of FFCV's pipeline."""

    def __init__(self, decode: Callable[..., Decoded]):
        super().__init__()
        self.decode = decode

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return dataclasses.replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable[..., Decoded]:
        return lambda work, memory, metadata, storage: self.decode(work, metadata, storage)


class _Records(OSCacheManager):
    """FFCV's memory map of the file, and where its records lie.

    Without the dicts of every row (of 1.28 million: 4 s, and 0.7 GB for as long), and without its reader, whose
    signature would make numba's type of flat uint8 arrays read-only for the whole process: nothing here asks for them.
    """

    def __init__(self, reader: Any):
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"], kind="stable")]
        self.reader, self.ptrs, self.sizes = reader, table["ptr"].copy(), table["size"].copy()
        self.context = OSCacheContext(self)

    def compile_reader(self) -> None:
        pass


def _loader_of(beton: Beton, decode: Callable[..., Decoded]) -> Any:
    """FFCV's Loader of the file, compiled by nobody, its labels off: it carries batches of ours to `decode`."""
    names = [name for name, _ in beton.contents.fields]
    image = next(name for name, kind in beton.contents.fields if kind == IMAGE)
    ahead = AHEAD + 1  # all that `_Reader` ever has under way: FFCV's thread never waits for room
    module, kept = ffcv.loader.loader, (Compiler.is_enabled, OSCacheManager)
    Compiler.is_enabled, module.OSCacheManager = False, _Records
    try:
        with _aside():
            return module.Loader(
                str(beton.path),
                batch_size=1,  # of the buffers that FFCV allocates: there are none
                num_workers=1,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                pipelines={**dict.fromkeys(names), image: PipelineSpec(image, _Decoder(decode))},
                drop_last=False,
                batches_ahead=ahead,
            )
    finally:
        Compiler.is_enabled, module.OSCacheManager = kept


class _Reader(Reader):
    def __init__(self, data: FfcvBeton, device: torch.device, threads: int):
        self._data, self._pinned = data, device.type == "cuda"
        self._epoch = _Epoch(data.loader, threads)

    def begin(self, request: CropRequest) -> Pending:
        out = self._data.begun(request, pinned=self._pinned)
        work = _Work(request, out, self._epoch.together, Future())
        self._epoch.feed.put(work)
        return Pending(work.future.result)

    def ahead(self, images: int) -> int:
        return AHEAD

    def close(self) -> None:
        self._epoch.close()


class _Epoch(EpochIterator):
    """FFCV's thread, fed batch by batch: it hands errors on, and ends when it is told to."""

    def __init__(self, loader: Any, threads: int):
        self.feed: SimpleQueue[_Work | None] = SimpleQueue()
        self.threads = threads
        self.pool = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="ffcv")
        super().__init__(loader, ())  # starts the thread

    def run(self) -> None:
        for number, work in enumerate(iter(self.feed.get, None)):
            if self.terminate_event.is_set():
                continue
            try:
                work.future.set_result(self.run_pipeline(number, work, 0, None)[0])
            except BaseException as error:
                work.future.set_exception(error)
            del work  # else this frame would keep the buffers from being used again

    def together(self, work: Callable[[], None]) -> None:
        """Run it on all threads of the epoch, to the end."""
        others = [self.pool.submit(work) for _ in range(self.threads - 1)]
        work()
        for other in others:
            other.result()

    def close(self) -> None:
        super().close()
        self.feed.put(None)
        if self.is_alive():
            self.join()
        self.pool.shutdown()


# ---- FFCV's C code, called for several pictures at once without the interpreter's lock ----

_LIBRARY = ctypes.CDLL(ffcv._libffcv.__file__)
for _name in ("imdecode", "resize", "my_memcpy"):  # names of our own: others also have a `resize`
    _address = ctypes.cast(getattr(_LIBRARY, _name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"fastrot_ffcv_{_name}", _address)

_of_picture = (uintp, uint64, uint32, uint32, uintp, uint32, uint32)  # data, size, h, w, out, h, w
_plain = (uint32,) * 4 + (int32, int32)  # offset, scale, no crop, no flip
_imdecode = ExternalFunction("fastrot_ffcv_imdecode", int32(*_of_picture, *_plain))
_resize = ExternalFunction("fastrot_ffcv_resize", void(*(int64,) * 11))
_memcpy = ExternalFunction("fastrot_ffcv_my_memcpy", void(uintp, uintp, uint64))


def _compiled(signature: Any) -> Callable[[Any], Any]:
    """Compiled once for this machine: numba keeps it beside this file, else in the user's cache, if it can."""

    def compiled(function: Any) -> Any:
        how = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **how)(function)
        except (RuntimeError, OSError):  # no folder that can be written to: compiled anew, in 0.5 s
            return numba.njit(signature, **how)(function)

    return compiled


@_compiled(void(int64[:, ::1], int64))
@no_type_check
def _decode(jobs, at):
    """Pixels of each picture, one behind the other from address `at` on; those of a raw one stay where they lie."""
    for i in range(len(jobs)):
        address, size = jobs[i, ADDRESS], jobs[i, SIZE]
        height, width = jobs[i, HEIGHT], jobs[i, WIDTH]
        if size == 0:
            continue
        if jobs[i, RAW]:
            jobs[i, PIXELS] = address
            continue
        status = _imdecode(address, size, height, width, at, height, width, 0, 0, 1, 1, 0, 0)
        jobs[i, FAILED] = status
        jobs[i, PIXELS] = at
        at += 3 * height * width


@_compiled(void(int64[:, ::1], int64[:, ::1], uint8[:, :, :, ::1], uint8[:, ::1]))
@no_type_check
def _crop(jobs, boxes, out, spare):
    """The box of each picture, resampled; outside of a picture is 0.

    `spare` [1, bytes]: a Loader of FFCV's that is not ours makes numba's type of flat uint8 arrays read-only.
    """
    side = out.shape[1]
    laid_out = np.int64(spare.ctypes.data)  # numba adds unsigned to signed as floats
    for i in range(len(jobs)):
        pixels, height, width = jobs[i, PIXELS], jobs[i, HEIGHT], jobs[i, WIDTH]
        y, x, h, w = boxes[i, 1], boxes[i, 2], boxes[i, 3], boxes[i, 4]
        if pixels == 0:
            continue
        if y < 0 or x < 0 or y + h > height or x + w > width:
            spare[0, : 3 * h * w] = 0
            left, right = max(x, 0), min(x + w, width)
            for line in range(max(y, 0), min(y + h, height)):
                if left < right:
                    _memcpy(
                        pixels + 3 * (line * width + left),
                        laid_out + 3 * ((line - y) * w + left - x),
                        3 * (right - left),
                    )
            pixels, height, width, y, x = laid_out, h, w, 0, 0
        _resize(0, pixels, height, width, y, y + h, x, x + w, out[i].ctypes.data, side, side)
