"""Any data of encoded pictures, decoded by DALI: `--loader dali` over tar shards, an image folder, a `.beton`.

Bytes enter through `external_source`, batch by batch, straight from the memory map (a folder's are read by threads);
boxes travel with them. DALI's own readers are not used: they shuffle in a buffer, and cannot start in the middle of
an epoch of ours.

With one crop a picture DALI decodes nothing but the box; with several, or where a box reaches over the border, the whole
picture, once. On a CPU that is all it does: `crops.resample` makes the crops, so that they equal those of all our
readers to the bit, and in less time, since DALI's resize there takes longer than its decoding. On a GPU crops are
resized and mirrored by DALI and stay there; each halving of `crops.resample` is a resize by 2 of its own, so that
they differ by rounding (and by the decoder).

DALI is given upright JPEGs in colour or grey, whose header agrees with what is known of them. Every other picture
(PNG, CMYK, one that EXIF turns, ...) is decoded by `pictures.decode`, and takes its place in the batch.

    what DALI does                                                       what is done about it
    one picture that it cannot decode ends the pipeline                  it is found, one by one; a new one goes on
    another batch, thread count or number of crops: another pipeline     each is kept, and used again
    a box outside the picture ends the pipeline                          that batch is decoded whole, then cropped

Needs nvidia-dali (`make dali`), so nothing imports this file but `assemble.open_data`, when asked.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
from fastrot.data.reader import PooledReader, in_tasks
from fastrot.data.ring import Ring

IN_DALI = 3  # batches that DALI is given at a time
READ_AHEAD = 2  # batches whose bytes are read before DALI asks for them
STAND_IN = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)


class ThroughDali(Data):
    """`core.Data` of what `data` holds.

    resizes  DALI also makes the crops on a CPU, as it does on a GPU
    """

    decoder = f"DALI {nvidia.dali.__version__}"

    def __init__(self, data: Data, *, resizes: bool = False):
        self.data, self.resizes, self.format = data, resizes, data.format
        self.rows, self.labels, self.classes = data.rows, data.labels, data.classes
        self.keys, self.fingerprint = data.keys, data.fingerprint
        self.mean, self.std, self.numbers = data.mean, data.std, data.numbers
        self.rejected = data.rejected
        self.ring = Ring()
        self._idle: list[_Pipe] = []
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
            row = job.row(place)
            height, width = job.sizes[place].tolist()
            try:
                record = self.data.record(row)
                if row not in self._odd and pictures.is_upright_jpeg(record, height, width):
                    job.records[place] = record
                else:
                    job.ours[place] = self.data.picture(row)
            except DamagedRecord as error:
                job.errors.append((place, str(error)))

    def take_pipe(self, graph: "Graph") -> "_Pipe":
        """A pipeline that does this, a new one where none is idle."""
        fitting = [pipe for pipe in self._idle if pipe.graph.serves(graph)]
        if not fitting:
            return _Pipe(graph)
        pipe = min(fitting, key=lambda pipe: pipe.graph.batch)
        self._idle.remove(pipe)
        return pipe

    def give_back(self, pipe: "_Pipe") -> None:
        if pipe.drained():
            self._idle.append(pipe)

    def find_odd(self, job: "_Job", graph: "Graph", reason: str) -> None:
        """Which pictures of a batch DALI cannot decode: these are ours from now on, or damaged.

        All of the batch, where it decodes each of them alone.
        """
        odd = []
        asked = [place for place, record in enumerate(job.records) if record is not STAND_IN]
        if not asked:
            raise RuntimeError(f"DALI cannot decode its stand-in: {reason}")
        alone = graph._replace(batch=1, threads=1)
        probe = _Pipe(alone)
        for place in asked:
            probe.feed(job.alone(place))
            try:
                probe.take()
            except _Broken:
                odd.append(place)
                probe = _Pipe(alone)
        for place in odd or asked:
            row = job.row(place)
            self._odd.add(row)
            job.records[place] = STAND_IN
            try:
                job.ours[place] = self.data.picture(row)
                logging.getLogger("fastrot").warning(
                    "row %d is decoded without DALI, which says: %s", row, reason
                )
            except DamagedRecord as error:
                job.errors.append((place, str(error)))


class _Reader(PooledReader):
    """Batches on their way: their bytes are read, DALI decodes them, they are cropped."""

    def __init__(self, data: ThroughDali, device: torch.device, threads: int):
        super().__init__(threads)
        self._data = data
        self._gpu = device.index if device.type == "cuda" else None
        self._resizes = data.resizes or self._gpu is not None
        self._read = deque[_Job]()  # not given to DALI
        self._pipe: _Pipe | None = None

    def begin(self, request: CropRequest) -> Pending:
        job = _Job(request, self._data.sizes(request.rows[0][:, 0]))
        job.waits = in_tasks(self.pool, len(job), partial(self._data.read, job))
        self._read.append(job)
        return Pending(partial(self._result, job))

    def ahead(self, images: int) -> int:
        return READ_AHEAD + IN_DALI + 1

    def close(self) -> None:
        super().close()
        if self._pipe is not None:
            self._data.give_back(self._pipe)

    def _result(self, job: "_Job") -> Decoded:
        self._decode(job)
        if self._pipe is not None and self._pipe.jobs:
            self._decode(self._pipe.jobs[0][0])  # cropped while the one before is used
        job.wait()
        return Decoded(job.out, job.errors)

    def _decode(self, wanted: "_Job") -> None:
        """Take batches out of DALI, up to this one; what is done to its pictures there is begun."""
        while not wanted.decoded:
            pipe = self._feed()
            try:
                job, pixels = pipe.take()
            except _Broken as broken:  # all that was in it waits again, for a new pipeline
                self._read.extendleft(reversed([job for job, _ in pipe.jobs]))
                self._pipe = None
                self._data.find_odd(self._read[0], pipe.graph, str(broken))
                continue
            self._with_pixels(job, pixels, pipe.graph)
            crop = _place_ours if self._resizes else _resample
            job.waits, job.decoded = in_tasks(self.pool, len(job), partial(crop, job)), True

    def _feed(self) -> "_Pipe":
        """Give DALI as many batches as it holds at a time, of those that one pipeline serves; the pipeline."""
        while self._read and (self._pipe is None or len(self._pipe.jobs) < IN_DALI):
            job = self._read[0]
            job.wait()
            graph = job.graph(self._gpu, self.workers, self._resizes)
            if self._pipe is not None and not self._pipe.graph.serves(graph):
                if self._pipe.jobs:
                    break
                self._data.give_back(self._pipe)
                self._pipe = None
            if self._pipe is None:
                self._pipe = self._data.take_pipe(graph)
            self._pipe.feed(self._read.popleft())
        assert self._pipe is not None
        return self._pipe

    def _with_pixels(self, job: "_Job", pixels: Any, graph: "Graph") -> None:
        if graph.gpu is not None:
            job.out = tuple(_copied(crop.as_tensor(), graph.gpu) for crop in pixels)
            return
        job.out = self._data.ring.buffers(job.request)
        if graph.sizes is None:
            (job.pixels,), job.whole = pixels, graph.whole
        else:
            for out, crop in zip(job.out, pixels, strict=True):
                out.numpy()[:] = np.asarray(crop.as_tensor())


def _place_ours(job: "_Job", places: Iterable[int]) -> None:
    """Among crops that DALI made, those of pictures that it was not given."""
    for place in job.ours.keys() & {*places}:
        for rows, out in zip(job.request.rows, job.out, strict=True):
            crop = torch.empty(out.shape[1:], dtype=torch.uint8)
            crops.resample(job.ours[place], rows[place], crop.numpy())
            out[place] = crop


def _resample(job: "_Job", places: Iterable[int]) -> None:
    """The crops of pictures, out of what was decoded of them."""
    for place in places:
        for rows, out in zip(job.request.rows, job.out, strict=True):
            row, into = rows[place], out[place].numpy()
            if place in job.ours:
                crops.resample(job.ours[place], row, into)
            elif job.records[place] is not STAND_IN:
                if not job.whole:
                    row = row * (1, 0, 0, 1, 1, 1)  # its box is all that was decoded
                crops.resample(np.asarray(job.pixels[place]), row, into)


@dataclass(slots=True)
class _Job:
    """A batch under way. A place without a record of its own has the stand-in's."""

    request: CropRequest
    sizes: np.ndarray  # int32 [b, 2]
    records: list[np.ndarray] = field(init=False)
    ours: dict[int, np.ndarray] = field(default_factory=dict)  # place -> the picture, by `pictures`
    errors: list[tuple[int, str]] = field(default_factory=list)
    waits: list[Callable[[], None]] = field(default_factory=list)  # for what threads do with it
    decoded: bool = False
    pixels: Any = None  # by DALI: boxes or whole pictures
    whole: bool = False
    out: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.records = [STAND_IN] * len(self)

    def __len__(self) -> int:
        return len(self.request.rows[0])

    def row(self, place: int) -> int:
        return int(self.request.rows[0][place, 0])

    def wait(self) -> None:
        for wait in self.waits:
            wait()

    def alone(self, place: int) -> "_Job":
        """One picture of it, as a batch."""
        one = slice(place, place + 1)
        request = CropRequest(tuple(rows[one] for rows in self.request.rows), self.request.sizes)
        job = _Job(request, self.sizes[one])
        job.records = self.records[one]
        return job

    def graph(self, gpu: int | None, threads: int, resizes: bool) -> "Graph":
        """What it takes to decode it."""
        sizes = self.request.sizes if resizes else None
        taps = self.taps() if resizes else [np.ones(1, int)]
        halvings = max(int(each.max()).bit_length() - 1 for each in taps)
        whole = len(self.request.rows) > 1 or self._over_the_border()
        return Graph(gpu, threads, len(self), whole, sizes, halvings)

    def taps(self) -> list[np.ndarray]:
        """`crops.taps` of each picture, for each crop."""
        return [
            np.array([crops.taps(h, w, size) for h, w in rows[:, 3:5].tolist()])
            for rows, size in zip(self.request.rows, self.request.sizes, strict=True)
        ]

    def _over_the_border(self) -> bool:
        _, y, x, h, w, _ = self.request.rows[0].T
        height, width = self.sizes.T
        return bool(((y < 0) | (x < 0) | (y + h > height) | (x + w > width)).any())


class Graph(NamedTuple):
    """What a pipeline does.

    gpu       its number; None: the CPU
    batch     pictures, at most
    whole     pictures are decoded whole, and then cropped; else the box of the one crop alone
    sizes     pixels a side of each crop; None: it only decodes
    halvings  resizes by 2 behind the first, at most; a crop that needs fewer passes through the rest unchanged
    """

    gpu: int | None
    threads: int
    batch: int
    whole: bool
    sizes: tuple[int, ...] | None
    halvings: int

    def serves(self, wanted: "Graph") -> bool:
        enough = self.batch >= wanted.batch and self.halvings >= wanted.halvings
        return enough and self._replace(batch=wanted.batch, halvings=wanted.halvings) == wanted

    def inputs(self, job: _Job) -> list[Any]:
        """What `outputs` is fed for a batch."""
        fed: list[Any] = [job.records]
        stands_in = np.array([record is STAND_IN for record in job.records])
        for rows, taps in zip(job.request.rows, job.taps(), strict=True):
            box = np.where(stands_in[:, None], (0, 0, *2 * [8]), rows[:, 1:5]).astype(np.int32)
            if not self.whole or self.sizes is not None:
                fed += [box[:, :2].copy(), box[:, 2:].copy()]
            if self.sizes is not None:
                fed.append(rows[:, 5].astype(np.int32))
                for k in range(self.halvings + 1):
                    fed.append(np.minimum(taps, 2**k).astype(np.float32))
        return fed

    def built(self) -> Pipeline:
        """Raises UsageError where DALI cannot use the GPU."""
        pipeline = Pipeline(
            batch_size=self.batch,
            num_threads=self.threads,
            device_id=self.gpu,
            prefetch_queue_depth=IN_DALI,
        )
        boxes = [(types.INT32, 1), (types.INT32, 1)]
        crop = [(types.INT32, 0), *[(types.FLOAT, 0)] * (self.halvings + 1)]
        kinds = [(types.UINT8, 1)]
        if self.sizes is not None:
            kinds += (boxes + crop) * len(self.sizes)
        elif not self.whole:
            kinds += boxes
        with pipeline:
            how = {"batch": True, "no_copy": True}
            fed = (
                fn.external_source(name=f"fed{number}", dtype=dtype, ndim=ndim, **how)
                for number, (dtype, ndim) in enumerate(kinds)
            )
            pipeline.set_outputs(*self._outputs(fed))
        try:
            pipeline.build()
        except RuntimeError as error:
            if self.gpu is None:
                raise
            raise UsageError(
                f"--loader dali cannot use the GPU ({_gist(error)}): install the nvidia-dali package of the "
                "machine's CUDA version, or choose another --loader"
            ) from None
        return pipeline

    def _outputs(self, fed: Iterator[Any]) -> Iterator[Any]:
        """DALI's operators."""
        device = "cpu" if self.gpu is None else "mixed"
        records = next(fed)
        picture = fn.decoders.image(records, device=device) if self.whole else None
        if picture is not None and self.sizes is None:
            yield picture
            return
        for size in self.sizes or (0,):
            box = {"start": next(fed), "shape": next(fed), "axes": [0, 1]}
            if picture is None:
                crop = fn.decoders.image_slice(records, device=device, **box)
            else:
                crop = fn.slice(picture, **box, out_of_bounds_policy="pad", fill_values=0)
            if size:
                flip, *times = next(fed), *(next(fed) for _ in range(self.halvings + 1))
                for n in reversed(times):  # the last is 1
                    crop = fn.resize(
                        crop,
                        size=fn.stack(n * size, n * size),
                        interp_type=types.INTERP_LINEAR,
                        antialias=False,
                    )
                crop = fn.flip(crop, horizontal=flip)
            yield crop


class _Broken(Exception):
    """A pipeline is of no use any more, since it could not decode the oldest batch in it; why, in one line."""


class _Pipe:
    """A pipeline, to be used by one epoch at a time.

    jobs  that are in it, oldest first, with what it was fed: DALI keeps no copy
    """

    def __init__(self, graph: Graph):
        self.graph, self.jobs = graph, deque[tuple[_Job, list[Any]]]()
        self._pipeline = graph.built()
        self._pipeline._first_iter = False  # else its first run is several, of batches not fed yet

    def feed(self, job: _Job) -> None:
        fed = self.graph.inputs(job)
        for number, each in enumerate(fed):
            self._pipeline.feed_input(f"fed{number}", each)
        self._pipeline.schedule_run()
        self.jobs.append((job, fed))

    def take(self) -> tuple[_Job, Any]:
        """The oldest batch in it, and DALI's outputs of it. Raises _Broken."""
        try:
            outputs = self._pipeline.share_outputs()
            self._pipeline.release_outputs()  # they stay until nobody holds them
        except RuntimeError as error:
            raise _Broken(_gist(error)) from error
        return self.jobs.popleft()[0], outputs

    def drained(self) -> bool:
        """Whether it can be used again, with nothing left in it."""
        with contextlib.suppress(_Broken):
            while self.jobs:
                self.take()
        return not self.jobs


def _gist(error: RuntimeError) -> str:
    """The line of DALI's report that says what happened."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered") + 1 if "encountered" in lines[:-1] else 0
    return lines[after]


# ---- GPU ----


def _copied(crops: Any, gpu: int) -> UInt8[Tensor, "b s s 3"]:
    """Crops in memory of torch's own: DALI uses its own again as soon as the tensor that wraps it is gone."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    stream = _stream(gpu)
    with torch.cuda.stream(stream):
        out = torch.empty(crops.shape(), dtype=torch.uint8, device=f"cuda:{gpu}")
        feed_ndarray(crops, out, cuda_stream=stream)
    stream.synchronize()  # a stream of its own: waits for this copy, and for nothing of the training
    return out


@functools.lru_cache
def _stream(gpu: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(gpu)
