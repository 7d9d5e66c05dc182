"""Any data of encoded pictures, decoded by DALI: `--loader dali` over tar shards, an image folder, a `.beton`.

README.md says what DALI is given, and what is made of it. Needs nvidia-dali (`make dali`), so nothing imports this
file but `assemble.open_data`, when asked.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali
import simplejpeg
import torch
from jaxtyping import UInt8
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from fastrot.arrays import Bytes, Picture, RowSizes
from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Data, Decoded, Pending
from fastrot.data import pictures
from fastrot.data.reader import Errors, PooledReader, buffers, fill_decoded, in_tasks
from fastrot.ops.blocks import PackTensors, unpack_crops
from fastrot.ops.resample import cut

Crops = tuple[UInt8[Tensor, "b _s _s 3"], ...]
LOG = logging.getLogger("fastrot")
STAND_IN = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)


class ThroughDali(Data):
    """`core.Data` of what `data` holds."""

    decoder = f"DALI {nvidia.dali.__version__}"

    def __init__(self, data: Data):
        for name in {*Data.__annotations__} - {"decoder"}:
            setattr(self, name, getattr(data, name))
        self.data = data
        self._pipes: dict[tuple, _Pipe] = {}  # by GPU, threads and whether pictures are whole
        self._lock = threading.Lock()
        self._odd: set[int] = set()  # rows that DALI could not decode

    def describe(self) -> list[str]:
        return [f"pictures are decoded by {self.decoder}, in our order"]

    def name(self, row: int) -> str:
        return self.data.name(row)

    def record(self, row: int) -> Bytes:
        return self.data.record(row)

    def picture(self, row: int) -> Picture:
        return self.data.picture(row)

    def open_reader(self, device: torch.device, workers: int) -> "_Reader":
        """`workers` threads of DALI's and as many of ours; 0 is taken for 1."""
        return _Reader(self, device, max(workers, 1))

    def read(self, job: "_Job", places: Iterable[int]) -> None:
        """The bytes of some pictures of a batch; those that are not for DALI are decoded here."""
        for place in places:
            row = int(job.rows[place])
            with contextlib.suppress(DamagedRecord):  # `decode` will say so
                if row not in self._odd:
                    record = self.data.record(row)
                    if pictures.is_upright_jpeg(record, *job.sizes[place].tolist()):
                        job.records[place] = record
                        continue
            self.decode(job, place)

    def decode(self, job: "_Job", place: int) -> None:
        """A picture that is not for DALI; black where it is damaged."""
        try:
            job.ours[place] = self.data.picture(int(job.rows[place]))
        except DamagedRecord as error:
            job.errors.append((place, str(error)))
            job.ours[place] = np.zeros((*job.sizes[place], 3), np.uint8)

    def decode_batch(self, job: "_Job", gpu: int | None, threads: int) -> None:
        """DALI decodes what it has of a batch; a picture that it cannot is ours from now on, or damaged."""
        how = gpu, threads, job.whole
        with self._lock:  # two epochs may be under way
            while job.pixels is None:
                pipe = self._pipes.get(how)
                if pipe is None or pipe.batch < len(job.rows):
                    pipe = self._pipes[how] = _Pipe(*how, batch=len(job.rows))
                try:
                    job.pixels = pipe.run(job)
                except RuntimeError as error:
                    del self._pipes[how]  # it is of no use any more
                    self._take_odd(job, gpu, _gist(error))

    def _take_odd(self, job: "_Job", gpu: int | None, reason: str) -> None:
        """The pictures of a batch that DALI cannot decode; all of them, where it decodes each alone."""
        asked = [place for place, record in enumerate(job.records) if record is not STAND_IN]
        if not asked:
            raise RuntimeError(f"DALI cannot decode its stand-in: {reason}")
        odd, probe = [], None
        for place in asked:
            probe = probe or _Pipe(gpu, 1, job.whole, batch=1)
            try:
                probe.run(job, slice(place, place + 1))
            except RuntimeError:
                odd.append(place)
                probe = None
        for place in odd or asked:
            row = int(job.rows[place])
            LOG.warning("row %d is decoded without DALI, which says: %s", row, reason)
            self._odd.add(row)
            job.records[place] = STAND_IN
            self.decode(job, place)


class _Reader(PooledReader):
    """A batch's bytes are read by the pool; a thread has DALI decode one batch after the other; crops are cut."""

    def __init__(self, data: ThroughDali, device: torch.device, threads: int):
        super().__init__(threads)
        self._data, self._device = data, device
        self._dali = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def begin(self, request: CropRequest) -> Pending:
        job = _Job(request, self._data.sizes(request.rows[0][:, 0]))
        reads = in_tasks(self.pool, len(job.rows), partial(self._data.read, job))
        cut = self._dali.submit(self._decode, job, reads)
        return Pending(lambda: Decoded(cut.result()(), job.errors))

    def close(self) -> None:
        self._dali.shutdown(wait=False, cancel_futures=True)
        super().close()
        self._dali.shutdown()

    def _decode(self, job: "_Job", reads: list[Callable[[], None]]) -> Callable[[], Crops]:
        """Decode a batch, and begin its crops, if that is done on the CPU; what waits for them."""
        for wait in reads:
            wait()
        there = self._device.type == "cuda"
        self._data.decode_batch(job, self._device.index if there else None, self.workers)
        return partial(_cut_there, job, self._device) if there else self._cut_here(job)

    def _cut_here(self, job: "_Job") -> Callable[[], Crops]:
        out = buffers(job.request)
        fill = partial(fill_decoded, job.decoded, job.in_decoded(), out)
        waits = in_tasks(self.pool, len(job.rows), fill)

        def wait_for_all() -> Crops:
            for wait in waits:
                wait()
            return out

        return wait_for_all


def _cut_there(job: "_Job", device: torch.device) -> Crops:
    """The crops of a batch, on the device that DALI has decoded it on: what it made is a raw pack's pixels."""
    places = range(len(job.rows))
    decoded = [
        torch.from_numpy(np.ascontiguousarray(job.decoded(i))).to(device)
        if i in job.ours
        else torch.from_dlpack(job.pixels[i])
        for i in places
    ]
    sizes = torch.tensor([picture.shape[:2] for picture in decoded], dtype=torch.int32)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.long().prod(1).cumsum(0)])
    pixels = torch.cat([picture.reshape(-1, 3) for picture in decoded])
    pack, request = PackTensors(pixels, first.to(device), sizes.to(device)), job.in_decoded()
    out = tuple(
        unpack_crops(pack, torch.from_numpy(rows).to(device), size)
        for rows, size in zip(request.rows, request.sizes, strict=True)
    )
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # DALI uses its memory again
    return out


class _Job:
    """A batch under way."""

    def __init__(self, request: CropRequest, sizes: RowSizes):
        self.request, self.sizes = request, sizes
        self.rows, y, x, h, w, _ = request.rows[0].T
        height, width = sizes.T
        outside = (y < 0) | (x < 0) | (y + h > height) | (x + w > width)
        self.whole = len(request.rows) > 1 or bool(outside.any())  # else the box of the one crop
        self.records = [STAND_IN] * len(self.rows)  # what DALI is given, by place
        self.ours: dict[int, Picture] = {}  # what it is not given, by place
        self.errors: Errors = []
        self.pixels: Any = None  # by DALI

    def decoded(self, place: int) -> Picture:
        """A picture, or no more of it than its box."""
        if place not in self.ours:
            return np.asarray(self.pixels[place])
        picture = self.ours[place]
        return picture if self.whole else cut(picture, self.request.rows[0][place])

    def in_decoded(self) -> CropRequest:
        """The boxes inside what `decoded` gives, by place."""
        each = [rows * (1, *2 * [self.whole], 1, 1, 1) for rows in self.request.rows]
        for rows in each:
            rows[:, 0] = np.arange(len(rows))
        return CropRequest(tuple(each), self.request.sizes)


class _Pipe:
    """A pipeline for a `batch` of pictures, at most, or a box of each. Raises UsageError where DALI cannot use the GPU."""

    def __init__(self, gpu: int | None, threads: int, whole: bool, *, batch: int):
        self.whole, self.batch = whole, batch
        self._pipeline = Pipeline(
            batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=1
        )
        how = {"device": "cpu" if gpu is None else "mixed"}
        with self._pipeline:
            records = _fed(0, types.UINT8)
            if whole:
                decoded = fn.decoders.image(records, **how)
            else:
                start, shape = _fed(1, types.INT32), _fed(2, types.INT32)
                decoded = fn.decoders.image_slice(
                    records, start=start, shape=shape, axes=[0, 1], **how
                )
            self._pipeline.set_outputs(decoded)
        try:
            self._pipeline.build()
        except RuntimeError as error:
            if gpu is None:
                raise
            raise UsageError(
                f"--loader dali cannot use the GPU ({_gist(error)}): install the nvidia-dali package of the "
                "machine's CUDA version, or choose another --loader"
            ) from None
        self._pipeline._first_iter = False  # else its first run is several, of batches not fed yet

    def run(self, job: _Job, places: slice = slice(None)) -> Any:
        """What DALI decodes of a batch. Raises RuntimeError where it cannot: then the pipeline is of no use any more."""
        records = job.records[places]
        fed: list[Any] = [records]
        if not self.whole:
            stands_in = np.array([record is STAND_IN for record in records])
            box = job.request.rows[0][places, 1:5]
            box = np.where(stands_in[:, None], (0, 0, 8, 8), box).astype(np.int32)
            fed += [box[:, :2].copy(), box[:, 2:].copy()]
        for number, each in enumerate(fed):
            self._pipeline.feed_input(f"fed{number}", each)
        self._pipeline.schedule_run()
        (decoded,) = self._pipeline.share_outputs()
        self._pipeline.release_outputs()  # they stay until nobody holds them
        return decoded


def _fed(number: int, dtype: Any) -> Any:
    return fn.external_source(name=f"fed{number}", dtype=dtype, ndim=1, batch=True, no_copy=True)


def _gist(error: RuntimeError) -> str:
    """The line of DALI's report that says what happened."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered") + 1 if "encountered" in lines[:-1] else 0
    return lines[after]
