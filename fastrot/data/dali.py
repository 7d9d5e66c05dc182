"""Any data of encoded pictures, decoded by DALI: `--loader dali` over tar shards, an image folder, a `.beton`.

Bytes enter through `external_source`, batch by batch, straight from the memory map (a folder's are read by threads);
boxes travel with them. DALI's own readers are not used: they shuffle in a buffer, and cannot start in the middle of
an epoch of ours.

With one recipe DALI decodes nothing but the box; with several, or where a box reaches over the border, the whole
picture, once. On a CPU that is all it does: `crops.resample` makes the crops, so that they equal those of all our
readers to the bit, and in less time, since DALI's resize there takes longer than its decoding. On a GPU crops are
resized and mirrored by DALI and stay there; each halving of `crops.resample` is a resize by 2 of its own, so that
they differ by rounding (and by the decoder).

DALI is given upright JPEGs in colour or grey, whose header agrees with what is known of them. Every other picture
(PNG, CMYK, one that EXIF turns, ...) is decoded by `pictures.decode`, and takes its place in the batch.

    what DALI does                                                       what is done about it
    one picture that it cannot decode ends the pipeline                  it is found, one by one; a new one goes on
    another batch, thread count or number of recipes: another pipeline   each is kept, and used again
    a box outside the picture ends the pipeline                          that batch is decoded whole, then cropped

Needs nvidia-dali (`make dali`), so nothing imports this file but `assemble.open_data`, when asked.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import nvidia.dali
import simplejpeg
import torch
from jaxtyping import Int32, Int64, UInt8
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Data
from fastrot.data import crops, pictures
from fastrot.data.ahead import begun, in_order
from fastrot.data.ring import Ring

IN_DALI = 3  # batches that DALI is given at a time
READ_AHEAD = 2  # batches whose bytes are read before DALI asks for them
STAND_IN = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)


class Encoded(Data, Protocol):
    """Data that hands out its pictures' bytes."""

    def record(self, row: int) -> UInt8[np.ndarray, " n"]:
        """The bytes of a picture. Raises DamagedRecord."""
        ...

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """The picture, decoded. Raises DamagedRecord."""
        ...


class ThroughDali:
    """`core.Data` of what `data` holds.

    resizes  DALI also makes the crops on a CPU, as it does on a GPU
    """

    decoder = f"DALI {nvidia.dali.__version__}"

    def __init__(self, data: Encoded, *, resizes: bool = False):
        self.data, self.resizes = data, resizes
        self.rows, self.labels, self.classes = data.rows, data.labels, data.classes
        self.keys, self.fingerprint = data.keys, data.fingerprint
        self.mean, self.std = data.mean, data.std
        self._idle: list[_Pipe] = []
        self._ring = Ring()
        self._odd: set[int] = set()  # rows that DALI could not decode

    def __getattr__(self, name: str) -> Any:
        """`format`, `name`, `numbers`, `path`, ...: those of the data."""
        if name == "data" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.data, name)

    def describe(self) -> list[str]:
        """For the beginning of a run: what decodes."""
        return [f"pictures are decoded by {self.decoder}, in our order"]

    def sizes(self, rows: Int64[np.ndarray, " b"]) -> Int32[np.ndarray, "b 2"]:
        return self.data.sizes(rows)

    def pictures(
        self, plan: Iterable[CropRequest], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """See `core.Data`. `workers` threads of DALI's and as many of ours; 0 is taken for 1."""
        workers = max(workers, 1)
        resizes = self.resizes or device.type == "cuda"
        gpu = _number(device) if device.type == "cuda" else None
        pool = ThreadPoolExecutor(workers, thread_name_prefix="dali")
        read = (begun(pool, job, len(job), self._read) for job in map(_Job, plan))
        jobs = in_order(read, workers, exactly=READ_AHEAD)
        decoded = self._decoded(jobs, gpu, workers, resizes)
        crop = self._place_ours if resizes else _resample
        try:
            cropped = (begun(pool, job, len(job), crop) for job in decoded)
            yield from (job.out for job in in_order(cropped, workers, exactly=1))
        finally:
            decoded.close()
            pool.shutdown(cancel_futures=True)

    def _read(self, job: "_Job", start: int, stop: int) -> None:
        """The bytes of pictures `start` to `stop` of a batch; those that are not for DALI are decoded here."""
        sizes = self.data.sizes(job.request.rows[0][start:stop, 0])
        job.sizes[start:stop] = sizes
        for place, (height, width) in enumerate(sizes.tolist(), start):
            row = job.row(place)
            try:
                record = self.data.record(row)
                if row not in self._odd and pictures.is_upright_jpeg(record, height, width):
                    job.records[place] = record
                else:
                    job.ours[place] = self.data.picture(row)
            except DamagedRecord as error:
                job.spoil(place, str(error))

    def _decoded(
        self, jobs: Iterator["_Job"], gpu: int | None, threads: int, resizes: bool
    ) -> Iterator["_Job"]:
        """The jobs with DALI's pixels: of boxes or pictures; where it resizes, the crops."""
        waiting = _Waiting(jobs)
        while (job := waiting.first()) is not None:
            pipe = self._pipe(job.graph(gpu, threads, resizes))
            try:
                for job, pixels in pipe.through(waiting):
                    yield self._with_pixels(job, pixels, pipe.graph)
            except _Broken as broken:
                self._find_odd(broken, pipe.graph)
                continue  # all that was under way waits again, for a new pipeline
            finally:
                if pipe.drained():
                    self._idle.append(pipe)

    def _pipe(self, graph: "Graph") -> "_Pipe":
        fitting = [pipe for pipe in self._idle if pipe.graph.serves(graph)]
        if not fitting:
            return _Pipe(graph)
        pipe = min(fitting, key=lambda pipe: pipe.graph.batch)
        self._idle.remove(pipe)
        return pipe

    def _with_pixels(self, job: "_Job", pixels: Any, graph: "Graph") -> "_Job":
        if graph.gpu is not None:
            job.out = tuple(_copied(crop.as_tensor(), graph.gpu) for crop in pixels)
            return job
        job.out = tuple(self._ring.take(len(job), size) for size in job.request.sizes)
        if graph.sizes is None:
            (job.pixels,), job.whole = pixels, graph.whole
        else:
            for out, crop in zip(job.out, pixels, strict=True):
                out.numpy()[:] = np.asarray(crop.as_tensor())
        return job

    def _place_ours(self, job: "_Job", start: int, stop: int) -> None:
        """Among crops that DALI made, those of pictures `start` to `stop` that it was not given."""
        for place in job.ours.keys() & {*range(start, stop)}:
            for rows, out in zip(job.request.rows, job.out, strict=True):
                crop = torch.empty(out.shape[1:], dtype=torch.uint8)
                crops.resample(job.ours[place], rows[place], crop.numpy())
                out[place] = crop

    def _find_odd(self, broken: "_Broken", graph: "Graph") -> None:
        """Which pictures of a batch DALI cannot decode: these are ours from now on, or spoilt.

        All of the batch, where it decodes each of them alone.
        """
        job, probe, odd = broken.job, None, []
        asked = [place for place, record in enumerate(job.records) if record is not STAND_IN]
        for place in asked:
            probe = probe or _Pipe(graph._replace(batch=1, threads=1))
            try:
                (_,) = probe.through(_Waiting(iter([job.alone(place)])))
            except _Broken:
                odd.append(place)
            if not probe.drained():
                probe = None
        if not asked:
            raise RuntimeError("DALI cannot decode its stand-in") from broken
        for place in odd or asked:
            row = job.row(place)
            self._odd.add(row)
            job.records[place] = STAND_IN
            try:
                job.ours[place] = self.data.picture(row)
                logging.getLogger("fastrot").warning(
                    "row %d is decoded without DALI, which says: %s", row, broken.reason
                )
            except DamagedRecord as error:
                job.spoil(place, str(error))


def _resample(job: "_Job", start: int, stop: int) -> None:
    """The crops of pictures `start` to `stop` of a batch, out of what was decoded of them."""
    for place in range(start, stop):
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
    records: list[np.ndarray] = field(init=False)
    sizes: np.ndarray = field(init=False)  # int32 [b, 2]
    ours: dict[int, np.ndarray] = field(default_factory=dict)  # place -> the picture, by `pictures`
    pixels: Any = None  # by DALI: boxes or whole pictures
    whole: bool = False
    out: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.records = [STAND_IN] * len(self)
        self.sizes = np.zeros((len(self), 2), np.int32)

    def __len__(self) -> int:
        return len(self.request.rows[0])

    def row(self, place: int) -> int:
        return int(self.request.rows[0][place, 0])

    def spoil(self, place: int, why: str) -> None:
        self.request.errors.append((place, why))

    def alone(self, place: int) -> "_Job":
        """One picture of it, as a batch."""
        one = slice(place, place + 1)
        job = _Job(CropRequest(tuple(rows[one] for rows in self.request.rows), self.request.sizes))
        job.records, job.sizes = self.records[one], self.sizes[one]
        return job

    def graph(self, gpu: int | None, threads: int, resizes: bool) -> "Graph":
        """What it takes to decode it."""
        sizes = self.request.sizes if resizes else None
        taps = self.taps() if resizes else [np.ones(1, int)]
        halvings = max(int(each.max()).bit_length() - 1 for each in taps)
        whole = len(self.request.rows) > 1 or self._over_the_border()
        return Graph(gpu, threads, len(self), whole, sizes, halvings)

    def taps(self) -> list[np.ndarray]:
        """`crops.taps` of each picture, for each recipe."""
        return [
            np.array([crops.taps(h, w, size) for h, w in rows[:, 3:5].tolist()])
            for rows, size in zip(self.request.rows, self.request.sizes, strict=True)
        ]

    def _over_the_border(self) -> bool:
        _, y, x, h, w, _ = self.request.rows[0].T
        height, width = self.sizes.T
        return bool(((y < 0) | (x < 0) | (y + h > height) | (x + w > width)).any())


class _Waiting:
    """Jobs that DALI has not done, oldest first."""

    def __init__(self, jobs: Iterator[_Job]):
        self._jobs, self._drawn = jobs, deque[_Job]()

    def first(self) -> _Job | None:
        if not self._drawn:
            self._drawn.extend([job] if (job := next(self._jobs, None)) else [])
        return self._drawn[0] if self._drawn else None

    def take(self) -> _Job:
        return self._drawn.popleft()

    def put_back(self, jobs: Iterable[_Job]) -> None:
        self._drawn.extendleft(reversed([*jobs]))


# ---- DALI's pipelines ----


class Graph(NamedTuple):
    """What a pipeline does.

    gpu       its number; None: the CPU
    batch     pictures, at most
    whole     pictures are decoded whole, and then cropped; else the box of the one recipe alone
    sizes     pixels a side of the crops of each recipe; None: it only decodes
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

    def built(self, source: Any) -> Pipeline:
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
            fed = fn.external_source(
                source=source,
                num_outputs=len(kinds),
                dtype=[dtype for dtype, _ in kinds],
                ndim=[ndim for _, ndim in kinds],
                batch=True,
                no_copy=True,
            )
            pipeline.set_outputs(*self._outputs(iter(fed)))
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
    """A pipeline is of no use any more; `job` is the batch that it could not decode."""

    def __init__(self, job: _Job, reason: str):
        super().__init__(reason)
        self.job, self.reason = job, reason


class _Pipe:
    """A pipeline, to be used by one epoch at a time."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._under_way = deque[
            tuple[_Job, list[Any]]
        ]()  # with what it was fed: DALI keeps no copy
        self._waiting: _Waiting | None = None
        self._error: BaseException | None = None
        self._broken = False
        self._pipeline = graph.built(self._feed)

    def through(self, waiting: _Waiting) -> Iterator[tuple[_Job, Any]]:
        """Jobs and DALI's outputs of them, up to the first job that wants another pipeline. Raises _Broken."""
        self._waiting = waiting
        while True:
            self._pipeline.schedule_run()
            try:
                outputs = self._pipeline.share_outputs()
                self._pipeline.release_outputs()  # they stay until nobody holds them
            except StopIteration:
                break
            except RuntimeError as error:
                self._broken = True
                jobs = [job for job, _ in self._under_way]
                waiting.put_back(jobs)
                raise _Broken(jobs[0], _gist(error)) from error
            yield self._under_way.popleft()[0], outputs
        if self._error is not None:
            raise self._error

    def _feed(self) -> list[Any]:
        """DALI asks for the next batch. Nothing else is raised here: it would be taken for DALI's own error."""
        try:
            job = None if self._waiting is None else self._waiting.first()
            if job is None or not self._fits(job):
                raise StopIteration
            fed = self.graph.inputs(job)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise StopIteration from None
        assert self._waiting is not None
        self._under_way.append((self._waiting.take(), fed))
        return fed

    def _fits(self, job: _Job) -> bool:
        graph = self.graph
        return graph.serves(job.graph(graph.gpu, graph.threads, graph.sizes is not None))

    def drained(self) -> bool:
        """Whether it can be used again, with nothing left in it."""
        self._waiting = self._error = None
        with contextlib.suppress(RuntimeError):
            while not self._broken and not self._pipeline.empty():
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
            if not self._broken:
                self._pipeline.schedule_run()  # hears that there is nothing more: only then can it be reset
                self._pipeline.reset()
                self._under_way.clear()
                return True
        return False


def _gist(error: RuntimeError) -> str:
    """The line of DALI's report that says what happened."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered") + 1 if "encountered" in lines[:-1] else 0
    return lines[after]


# ---- GPU ----


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


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
