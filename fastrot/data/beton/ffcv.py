"""`.beton` through FFCV's own Loader, with our order and boxes: `--loader ffcv`.

README.md tells which of FFCV's faults each piece keeps from a run. Needs ffcv and numba (`make ffcv`), so nothing
imports this file but `assemble.open_data`, when asked.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import cv2
import numba
import numba.typed
import numpy as np
import simplejpeg
import torch
from torch import Tensor

from fastrot.config import UsageError
from fastrot.core import CropRequest, Decoded, Pending
from fastrot.data.beton.layout import IMAGE
from fastrot.data.beton.read import Beton
from fastrot.data.reader import AHEAD, PooledReader, buffers, fill_decoded, in_tasks
from fastrot.ops.resample import cut


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
    import ffcv.loader.loader
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline import PipelineSpec
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation


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
            raise UsageError(f"FFCV takes other bytes of {path} as pictures: choose --loader beton")

    def describe(self) -> list[str]:
        return [f"crops are decoded by {self.decoder}, in our order"]

    def open_reader(self, device: torch.device, workers: int) -> "_Reader":
        """`workers` threads decode, fed by FFCV's own; 0 is taken for 1."""
        return _Reader(self, device, max(workers, 1))

    def _decode_batch(self, work: "_Work", metadata: Any, storage: Any) -> Decoded:
        """The decoder of FFCV's pipeline: fills a batch's buffers from what FFCV has read of the file."""
        rows, (file, ptrs, sizes) = work.request.rows[0][:, 0], storage

        def decode(place: int) -> np.ndarray:
            row = int(rows[place])
            raw, width, height, start = metadata[row].tolist()
            data = file[start : start + int(sizes[np.searchsorted(ptrs, start)])]
            self._check(row, height, width)
            if raw:
                return data.reshape(height, width, 3)
            out = self._scratch.take(3 * height * width)
            if imdecode(data, out, height, width, height, width):
                raise self._damaged(row, "libjpeg-turbo cannot decode all of it")
            return out.reshape(height, width, 3)

        fill = partial(fill_decoded, decode, work.request, work.out, resample=_resample)
        waits = in_tasks(work.pool, len(rows), fill)
        return Decoded(work.out, [error for wait in waits for error in wait()])

    def _check(self, row: int, height: int, width: int) -> None:
        """Raises DamagedRecord where the checksum, or for want of one the JPEG's own size, does not agree."""
        data = self.record(row)
        if self._crc is not None or self._raw[row]:
            return
        try:
            found = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise self._damaged(row, str(error)) from None
        if found != (height, width):
            why = f"it is {found[0]} x {found[1]} pixels, its row says {height} x {width}"
            raise self._damaged(row, why)


def _resample(picture: np.ndarray, row: np.ndarray, out: np.ndarray) -> None:
    """As `resample`, with FFCV's resampler."""
    box = cut(picture, row)
    _, y, x, h, w, flip = row.tolist()
    if box.flags.owndata:  # it reaches over the border
        picture, y, x = box, 0, 0
    resize_crop(picture, y, y + h, x, x + w, out)
    if flip:
        cv2.flip(out, 1, dst=out)


class _Work(NamedTuple):
    """A batch, as FFCV carries it to its decoder in the place of row numbers."""

    request: CropRequest
    out: tuple[Tensor, ...]
    pool: ThreadPoolExecutor  # decodes it
    future: Future[Decoded]


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
    """FFCV's memory map of the file, and where its records lie; without its dicts of every row and its reader."""

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


class _Reader(PooledReader):
    def __init__(self, data: FfcvBeton, device: torch.device, threads: int):
        super().__init__(threads)
        self._data, self._pinned = data, device.type == "cuda"
        self._epoch = _Epoch(data.loader)

    def begin(self, request: CropRequest) -> Pending:
        self._data._announce(request)
        out = buffers(request, pinned=self._pinned)
        work = _Work(request, out, self.pool, Future())
        self._epoch.feed.put(work)
        return Pending(work.future.result)

    def ahead(self, images: int) -> int:
        return AHEAD

    def close(self) -> None:
        self._epoch.close()
        super().close()


class _Epoch(EpochIterator):
    """FFCV's thread, fed batch by batch: it hands errors on, and ends when it is told to."""

    def __init__(self, loader: Any):
        self.feed: SimpleQueue[_Work | None] = SimpleQueue()
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

    def close(self) -> None:
        super().close()
        self.feed.put(None)
        if self.is_alive():
            self.join()
