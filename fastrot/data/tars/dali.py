"""Any data of encoded pictures, decoded by DALI: `--loader dali` over tar shards, an image folder, a `.beton`.

Bytes enter through `external_source`, batch by batch, straight from the memory map (a folder's are read by threads);
boxes travel with them. DALI's own readers are not used: they shuffle in a buffer, and cannot start in the middle of
an epoch of ours.

DALI decodes, and no more: with one crop a picture nothing but its box; with several, or where a box reaches over the
border, the whole picture, once. Crops are made as everywhere: on a CPU by `crops.resample`, equal to those of our
readers to the bit; on a GPU by the kernel that cuts a raw pack's, where they differ by the decoder alone.

DALI is given upright JPEGs in colour or grey, whose header agrees with what is known of them. Every other picture
(PNG, CMYK, one that EXIF turns, ...) is decoded by `pictures.decode`, and takes its place in the batch.

    what DALI does                                         what is done about it
    one picture that it cannot decode ends the pipeline    it is found, one by one; a new one goes on
    another batch or thread count: another pipeline        each is kept, and used again
    a box outside the picture ends the pipeline            that batch is decoded whole, then cropped

Needs nvidia-dali (`make dali`), so nothing imports this file but `assemble.open_data`, when asked.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali
import simplejpeg
import torch
from jaxtyping import Int32, Int64, UInt8
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Data, Decoded, Pending
from fastrot.data import crops, pictures
from fastrot.data.reader import Errors, PooledReader, fill_decoded, in_tasks
from fastrot.data.ring import Ring
from fastrot.ops.blocks import PackTensors, unpack_crops

IN_DALI = 3  # batches that DALI is given at a time
READ_AHEAD = 2  # batches whose bytes are read before DALI asks for them
STAND_IN = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)


class ThroughDali(Data):
    """`core.Data` of what `data` holds."""

    decoder = f"DALI {nvidia.dali.__version__}"

    def __init__(self, data: Data):
        self.data, self.format, self.rejected = data, data.format, data.rejected
        self.rows, self.labels, self.classes = data.rows, data.labels, data.classes
        self.keys, self.fingerprint = data.keys, data.fingerprint
        self.mean, self.std, self.numbers = data.mean, data.std, data.numbers
        self.ring = Ring()
        self.idle: list[_Pipe] = []
        self._odd: set[int] = set()  # rows that DALI could not decode

    def describe(self) -> list[str]:
        return [f"pictures are decoded by {self.decoder}, in our order"]

    def sizes(self, rows: Int64[np.ndarray, " b"]) -> Int32[np.ndarray, "b 2"]:
        return self.data.sizes(rows)

    def name(self, row: int) -> str:
        return self.data.name(row)

    def record(self, row: int) -> UInt8[np.ndarray, " n"]:
        return self.data.record(row)

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
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

    def find_odd(self, job: "_Job", pipe: "_Pipe", reason: str) -> None:
        """Which pictures of a batch DALI cannot decode: these are ours from now on, or damaged.

        All of the batch, where it decodes each of them alone.
        """
        odd = []
        asked = [place for place, record in enumerate(job.records) if record is not STAND_IN]
        if not asked:
            raise RuntimeError(f"DALI cannot decode its stand-in: {reason}")
        probe = _Pipe(pipe.gpu, 1, 1, pipe.whole)
        for place in asked:
            probe.feed(job, slice(place, place + 1))
            try:
                probe.take()
            except _Broken:
                odd.append(place)
                probe = _Pipe(pipe.gpu, 1, 1, pipe.whole)
        for place in odd or asked:
            row = int(job.rows[place])
            logging.getLogger("fastrot").warning(
                "row %d is decoded without DALI, which says: %s", row, reason
            )
            self._odd.add(row)
            job.records[place] = STAND_IN
            self.decode(job, place)


class _Reader(PooledReader):
    """Batches on their way: their bytes are read, DALI decodes them, they are cropped."""

    def __init__(self, data: ThroughDali, device: torch.device, threads: int):
        super().__init__(threads)
        self._data, self._device = data, device
        self._gpu = device.index if device.type == "cuda" else None
        self._read = deque[_Job]()  # not given to DALI
        self._pipe: _Pipe | None = None

    def begin(self, request: CropRequest) -> Pending:
        job = _Job(request, self._data.sizes(request.rows[0][:, 0]))
        job.waits = in_tasks(self.pool, len(job.rows), partial(self._data.read, job))
        self._read.append(job)
        return Pending(partial(self._result, job))

    def ahead(self, images: int) -> int:
        return READ_AHEAD + IN_DALI + 1

    def close(self) -> None:
        super().close()
        self._give_back()

    def _result(self, job: "_Job") -> Decoded:
        self._decode(job)
        if self._pipe is not None and self._pipe.jobs:
            self._decode(self._pipe.jobs[0][0])  # cropped while the one before is used
        job.wait()
        return Decoded(job.out, job.errors)

    def _decode(self, wanted: "_Job") -> None:
        """Take batches out of DALI, up to this one; the crops of its pictures are begun."""
        while not wanted.out:
            pipe = self._feed()
            try:
                job, job.pixels = pipe.take()
            except _Broken as broken:  # all that was in it waits again, for a new pipeline
                self._read.extendleft(reversed([job for job, _ in pipe.jobs]))
                self._pipe = None
                self._data.find_odd(self._read[0], pipe, str(broken))
            else:
                self._crop(job)

    def _feed(self) -> "_Pipe":
        """Give DALI as many batches as it holds at a time, of those that one pipeline serves; the pipeline."""
        while self._read and (self._pipe is None or len(self._pipe.jobs) < IN_DALI):
            job = self._read[0]
            job.wait()
            wanted = self._gpu, self.workers, len(job.rows), job.whole
            if self._pipe is not None and not self._pipe.serves(*wanted):
                if self._pipe.jobs:
                    break
                self._give_back()
            if self._pipe is None:
                idle = [pipe for pipe in self._data.idle if pipe.serves(*wanted)]
                self._pipe = min(idle, key=lambda pipe: pipe.batch) if idle else _Pipe(*wanted)
                self._data.idle = [pipe for pipe in self._data.idle if pipe is not self._pipe]
            self._pipe.feed(self._read.popleft())
        assert self._pipe is not None
        return self._pipe

    def _give_back(self) -> None:
        if self._pipe is not None and self._pipe.drained():
            self._data.idle.append(self._pipe)
        self._pipe = None

    def _crop(self, job: "_Job") -> None:
        if self._gpu is not None:
            job.out, job.waits = _cut_there(job, self._device), []
            torch.cuda.current_stream(self._device).synchronize()  # DALI uses its memory again
            return
        job.out = self._data.ring.buffers(job.request)
        fill = partial(fill_decoded, job.decoded, job.in_decoded(), job.out)
        job.waits = in_tasks(self.pool, len(job.rows), fill)


def _cut_there(job: "_Job", device: torch.device) -> tuple[UInt8[Tensor, "b _s _s 3"], ...]:
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
    return tuple(
        unpack_crops(pack, torch.from_numpy(rows).to(device), size)
        for rows, size in zip(request.rows, request.sizes, strict=True)
    )


@dataclass(slots=True)
class _Job:
    """A batch under way."""

    request: CropRequest
    sizes: Int32[np.ndarray, "b 2"]
    rows: Int64[np.ndarray, " b"] = field(init=False)
    whole: bool = field(init=False)  # pictures are decoded whole; else the box of the one crop
    records: list[np.ndarray] = field(init=False)  # the stand-in where DALI is not given one
    ours: dict[int, np.ndarray] = field(default_factory=dict)  # place -> the picture, by `pictures`
    errors: Errors = field(default_factory=list)
    waits: list[Callable[[], object]] = field(default_factory=list)  # for what threads do with it
    pixels: Any = None  # by DALI
    out: tuple[Tensor, ...] = ()  # once DALI has decoded it

    def __post_init__(self) -> None:
        self.rows, y, x, h, w, _ = self.request.rows[0].T
        self.records = [STAND_IN] * len(self.rows)
        height, width = self.sizes.T
        outside = (y < 0) | (x < 0) | (y + h > height) | (x + w > width)
        self.whole = len(self.request.rows) > 1 or bool(outside.any())

    def wait(self) -> None:
        for wait in self.waits:
            wait()

    def decoded(self, place: int) -> UInt8[np.ndarray, "h w 3"]:
        """A picture, or no more of it than its box."""
        if place not in self.ours:
            return np.asarray(self.pixels[place])
        picture = self.ours[place]
        return picture if self.whole else crops.cut(picture, self.request.rows[0][place])

    def in_decoded(self) -> CropRequest:
        """The boxes inside what `decoded` gives, by place."""
        each = [rows * (1, *2 * [self.whole], 1, 1, 1) for rows in self.request.rows]
        for rows in each:
            rows[:, 0] = np.arange(len(rows))
        return CropRequest(tuple(each), self.request.sizes)


class _Broken(Exception):
    """A pipeline is of no use any more, since it could not decode the oldest batch in it; why, in one line."""


class _Pipe:
    """A pipeline, to be used by one epoch at a time. Raises UsageError where DALI cannot use the GPU.

    gpu    its number; None: the CPU
    batch  pictures, at most
    whole  pictures are decoded whole; else a box of each
    jobs   that are in it, oldest first, with what it was fed: DALI keeps no copy
    """

    def __init__(self, gpu: int | None, threads: int, batch: int, whole: bool):
        self.gpu, self.threads, self.batch, self.whole = gpu, threads, batch, whole
        self.jobs = deque[tuple[_Job, list[Any]]]()
        self._pipeline = Pipeline(
            batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=IN_DALI
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

    def serves(self, gpu: int | None, threads: int, batch: int, whole: bool) -> bool:
        same = (self.gpu, self.threads, self.whole) == (gpu, threads, whole)
        return same and self.batch >= batch

    def feed(self, job: _Job, places: slice = slice(None)) -> None:
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
        self.jobs.append((job, fed))

    def take(self) -> tuple[_Job, Any]:
        """The oldest batch in it, and what DALI has decoded of it. Raises _Broken."""
        try:
            (decoded,) = self._pipeline.share_outputs()
            self._pipeline.release_outputs()  # they stay until nobody holds them
        except RuntimeError as error:
            raise _Broken(_gist(error)) from error
        return self.jobs.popleft()[0], decoded

    def drained(self) -> bool:
        """Whether it can be used again, with nothing left in it."""
        with contextlib.suppress(_Broken):
            while self.jobs:
                self.take()
        return not self.jobs


def _fed(number: int, dtype: Any) -> Any:
    how = {"batch": True, "no_copy": True}
    return fn.external_source(name=f"fed{number}", dtype=dtype, ndim=1, **how)


def _gist(error: RuntimeError) -> str:
    """The line of DALI's report that says what happened."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered") + 1 if "encountered" in lines[:-1] else 0
    return lines[after]
