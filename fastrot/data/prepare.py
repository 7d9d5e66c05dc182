"""What the scripts of dataprep/ share: options, pictures spread over processes, whole parts, the summary.

A conversion is cut into parts of 10,000 records. Worker processes read, decode, shrink and encode chunks of
16 pictures; the parent writes each part, with what is to be known of it, under `OUT.parts/`, where it appears
whole or not at all. A run that was killed goes on from its whole parts. A part depends on its own records
only, so parts may be made in any order, by anyone.

Statistics are sums of whole numbers, so they do not depend on order, workers or parts.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from fastrot import entry
from fastrot.config import Refused, Stopped, knob
from fastrot.data.sources import Record, Source, open_source
from fastrot.disk import replace_bytes

PART = 10_000  # records a part
CHUNK = 16  # records a task of a worker
AHEAD = 3  # chunks a worker that may be under way or waiting to be written: bounds the memory
JUDGED = 200  # pictures that --estimate converts

T = TypeVar("T")
Item = TypeVar("Item")


# ---- the command line ----


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where pictures come from, how large they stay, where the prepared file goes."""

    source: Literal["imagefolder", "list", "cifar10"]  # how --root is laid out
    root: Path  # folder (or list) of the pictures
    out: Path  # the prepared file
    split: str | None = None  # train, val, ...: which part of the source
    label_from: Literal["folder", "none"] = "folder"  # none: every label is -1
    short_side: int | None = None  # pixels; shrink pictures whose short side is longer
    max_side: int | None = None  # pixels; shrink pictures whose long side is longer
    limit: int | None = None  # convert the first N records only
    workers: int | None = None  # processes; 0: none but this one; default: the cores at hand
    allow_rejects: bool = False  # exit with status 0 even if pictures were rejected
    overwrite: bool = False  # replace a finished --out, and parts made with other options
    estimate: bool = False  # try 200 pictures in memory: tell bytes, time, PSNR; write nothing

    def check(self) -> None:
        for name, least in {"short_side": 1, "max_side": 1, "limit": 1, "workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise Refused(f"{knob(name)} got {value}: it wants at least {least}")
        if self.short_side is not None and self.max_side is not None:
            raise Refused(
                f"--short-side {self.short_side} and --max-side {self.max_side} both set the size: give one"
            )

    @property
    def processes(self) -> int:
        return entry.cores() if self.workers is None else self.workers


FREE = ("root", "out", "workers", "allow_rejects", "overwrite", "estimate")  # change no byte


def plan_of(options: Options, source: Source) -> dict[str, Any]:
    """What decides the bytes of a conversion: parts and finished files made from another plan are not ours."""
    listing = hashlib.blake2b(digest_size=16)
    for record in source.records[: options.limit]:
        listing.update(os.fsencode(record.path) + b"\0%d\n" % record.label)
    knobs = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
    return {**knobs, "listing": listing.hexdigest()}


def open_source_of(options: Options) -> Source:
    return open_source(
        options.source, options.root, split=options.split, label_from=options.label_from
    )


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first thing in which two plans differ, as words: what theirs has, and ours."""
    names = sorted(ours.keys() | theirs.keys(), key=lambda name: (name == "listing", name))
    for name in names:  # another split lists other pictures: the split is what to tell
        if ours.get(name) != theirs.get(name):
            if name == "listing":
                return "from other pictures or labels than the source lists now"
            return f"with {knob(name)} {theirs.get(name)}, not {ours.get(name)}"
    return None


# ---- one picture, in a worker ----


@runtime_checkable
class Coder(Protocol):
    """Pixels to bytes and back; travels to the workers."""

    def encode(self, picture: np.ndarray) -> bytes: ...

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to every picture."""

    coder: Coder
    short_side: int | None = None
    max_side: int | None = None
    judged: bool = False  # also measure what the coder loses


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture as it comes back from a worker."""

    record: int  # its number in the source
    label: int
    height: int
    width: int
    data: bytes
    crc: int  # crc32 of data
    sums: tuple[int, ...]  # of red, green, blue; exact
    squares: tuple[int, ...]
    loss: int | None  # sum of squared differences to what the coder gives back, where judged
    seconds: float


@dataclass(frozen=True, slots=True)
class Reject:
    """A picture that cannot be used, and why."""

    record: int
    reason: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """The work of one task: some records of the source, which travels with these records alone."""

    source: "Source | Held"
    first: int  # number of its first record in the whole source


@dataclass(frozen=True, slots=True)
class Held:
    """Records of a source that holds its pictures in memory, and these pictures."""

    records: list[Record]
    pictures: list[Any]

    def read(self, i: int) -> Any:
        return self.pictures[i]


def chunk_of(source: Source, first: int, stop: int) -> Chunk:
    """Records first ... stop - 1 of a source: their names where pictures are files, else their pixels."""
    records = source.records[first:stop]
    if type(source).read is Source.read:
        return Chunk(Source(root=source.root, records=records, classes=(), seen=0), first)
    return Chunk(Held(records, [source.read(i) for i in range(first, stop)]), first)


def encode_chunk(recipe: Recipe, chunk: Chunk) -> list[Encoded | Reject]:
    from fastrot.data.pictures import BadPicture

    results: list[Encoded | Reject] = []
    for i, record in enumerate(chunk.source.records):
        if _stop is not None and _stop.is_set():
            break  # nobody waits for the rest
        try:
            results.append(_encode(recipe, chunk.source, i, chunk.first + i))
        except BadPicture as e:
            results.append(Reject(chunk.first + i, str(e)))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as e:
            results.append(Reject(chunk.first + i, f"cannot be read: {e.strerror}"))
        except Exception as e:
            raise RuntimeError(f"converting {record.path!r} failed: {e!r}") from e
    return results


def _encode(recipe: Recipe, source: "Source | Held", i: int, number: int) -> Encoded:
    from fastrot.data.pictures import BadPicture, decode, shrink

    start = time.perf_counter()
    read = source.read(i)
    picture = read if isinstance(read, np.ndarray) else decode(read)
    picture = np.ascontiguousarray(shrink(picture, recipe.short_side, recipe.max_side))
    height, width = picture.shape[:2]
    if max(height, width) > 65_535:
        raise BadPicture(f"{width}x{height} pixels: a side may have 65,535")
    data = recipe.coder.encode(picture)
    sums, squares = _channel_sums(picture)
    loss = None
    if recipe.judged:
        apart = picture.astype(np.int32) - recipe.coder.decode(data, height, width)
        loss = int(np.square(apart).sum(dtype=np.int64))
    return Encoded(
        record=number,
        label=source.records[i].label,
        height=height,
        width=width,
        data=data,
        crc=zlib.crc32(data),
        sums=sums,
        squares=squares,
        loss=loss,
        seconds=time.perf_counter() - start,
    )


def _channel_sums(picture: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sums of red, green, blue and of their squares, exact."""
    import cv2

    channels = cv2.split(picture)
    sums = tuple(int(cv2.sumElems(channel)[0]) for channel in channels)  # float64, below 2**53
    # OpenCV squares a root: off by some 2**-52 of itself, which is far less than a half
    squares = tuple(round(cv2.norm(channel, cv2.NORM_L2SQR)) for channel in channels)
    return sums, squares


# ---- many pictures, over processes ----

_stop: Any = None  # in a worker: set when the parent wants no more


def spread(
    task: Callable[[Item], T], items: Iterable[Item], workers: int
) -> Generator[T, None, None]:
    """`map(task, items)` over processes: in order, a few items ahead. Close it to end the workers early."""
    if workers == 0:
        yield from map(task, items)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    stop = spawn.Event()
    pool = ProcessPoolExecutor(workers, spawn, _begin_worker, (stop,))
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(task, item))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise Stopped(
            "a worker process was killed, perhaps for want of memory: run the same command again to go on, "
            f"with fewer --workers than {workers}"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # one process a core is enough


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent ends nobody


def chunks(source: Source, records: range) -> Iterator[Chunk]:
    for first in range(records.start, records.stop, CHUNK):
        yield chunk_of(source, first, min(first + CHUNK, records.stop))


# ---- parts ----


@dataclass
class Tally:
    """What is to be known of a set of written pictures beside their bytes; grows by addition."""

    crcs: list[int] = field(default_factory=list)  # crc32 of each written picture's bytes
    records: list[int] = field(default_factory=list)  # number of each in the source
    rejects: list[tuple[int, str]] = field(default_factory=list)
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    largest: list[int] = field(default_factory=lambda: [0, 0])  # height, width

    def watch(self, results: Iterable[Encoded | Reject]) -> Iterator[Encoded]:
        """Hand the pictures on, keep the rejects, count both."""
        for result in results:
            if isinstance(result, Reject):
                self.rejects.append((result.record, result.reason))
                continue
            self.crcs.append(result.crc)
            self.records.append(result.record)
            self._grow(
                result.height * result.width,
                result.sums,
                result.squares,
                (result.height, result.width),
            )
            yield result

    def add(self, other: "Tally") -> None:
        """The statistics of both; what is known picture by picture stays with the parts."""
        self._grow(other.pixels, other.sums, other.squares, other.largest)

    def _grow(self, pixels, sums, squares, largest) -> None:
        self.pixels += pixels
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, squares, strict=True)]
        self.largest = [max(a, b) for a, b in zip(self.largest, largest, strict=True)]

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of red, green, blue over all pixels, in 0..1. The only rounding is the last division and root."""
        n = self.pixels
        variance = [n * q - s * s for s, q in zip(self.sums, self.squares, strict=True)]
        return (
            [s / (255 * n) for s in self.sums],
            [(v / (n * n)) ** 0.5 / 255 for v in variance],
        )


@dataclass(frozen=True)
class Part:
    """A run of records, as one file and what is known of it. The `.json` comes last: with it the part is whole."""

    folder: Path
    records: range
    suffix: str  # of the file: the format's

    @property
    def file(self) -> Path:
        return self.folder / f"{self.records.start:010d}{self.suffix}"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.records.start:010d}.json"

    def whole(self) -> bool:
        try:
            facts = json.loads(self.facts.read_bytes())
            return facts["bytes"] == (self.file.stat().st_size if facts["bytes"] else 0)
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def tally(self) -> Tally:
        tally = json.loads(self.facts.read_bytes())["tally"]
        return Tally(**{**tally, "rejects": [(record, why) for record, why in tally["rejects"]]})

    def make(
        self,
        results: Iterable[Encoded | Reject],
        write: Callable[[Path, Iterable[Encoded], int], None],
    ) -> Tally:
        tally = Tally()
        pictures = tally.watch(results)
        first = next(pictures, None)
        if first is not None:  # a part of rejects alone has no file
            write(self.file, itertools.chain([first], pictures), len(self.records))
        facts = {
            "bytes": self.file.stat().st_size if first else 0,
            "tally": dataclasses.asdict(tally),
        }
        replace_bytes(self.facts, json.dumps(facts).encode())
        return tally


def parts_of(folder: Path, records: int, suffix: str, part: int = PART) -> list[Part]:
    return [
        Part(folder, range(first, min(first + part, records)), suffix)
        for first in range(0, records, part)
    ]


def make_parts(
    parts: list[Part],
    source: Source,
    recipe: Recipe,
    write: Callable[[Path, Iterable[Encoded], int], None],
    workers: int,
    tick: Callable[[int], None],
) -> None:
    """Make the parts, one after the other, while workers read ahead over their borders.

    `write(path, pictures, room)` writes a part's file, whole or not at all; `tick(n)` hears of n more records.
    """

    def heard(results: list[Encoded | Reject]) -> list[Encoded | Reject]:
        tick(len(results))
        return results

    work = (chunk for part in parts for chunk in chunks(source, part.records))
    with contextlib.closing(spread(partial(encode_chunk, recipe), work, workers)) as done:
        for part in parts:
            mine = itertools.islice(done, -(-len(part.records) // CHUNK))
            part.make(itertools.chain.from_iterable(map(heard, mine)), write)


@contextlib.contextmanager
def parts_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """The folder of parts, held by this process alone, with nothing in it but whole parts of this plan.

    It is gone when the work under it is done, and stays when that is broken off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"another conversion writes into {folder}: wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        begun = folder / "plan.json"
        differs = begun.exists() and difference(plan, json.loads(begun.read_bytes()))
        if differs and not overwrite:
            raise Refused(
                f"{folder} was begun {differs}: remove that folder, add --overwrite or choose another --out"
            )
        for file in folder.iterdir():
            of_a_killed_run = file.suffix == ".tmp"
            if (differs or of_a_killed_run) and file.name != "lock":
                file.unlink()
        replace_bytes(begun, json.dumps(plan).encode())
        yield
        shutil.rmtree(folder, ignore_errors=True)


# ---- what is told ----


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    out: Path
    written: int
    rejects: list[tuple[str, str]]  # path, reason
    skipped: int
    beyond_limit: int  # records left out by --limit
    seen: int
    bytes: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    converted: int = 0  # records of this run
    resumed: int = 0  # records that stood in whole parts of an earlier run
    already: bool = False  # it was finished before

    def lines(self) -> Iterator[str]:
        if self.already:
            yield f"{self.out} is already there, made with the same options: nothing to do"
        cut = f" + {self.beyond_limit:,} beyond --limit" if self.beyond_limit else ""
        yield (
            f"{self.written:,} written + {len(self.rejects):,} rejected + {self.skipped:,} skipped{cut} "
            f"= {self.seen:,} files seen"
        )
        if self.already:
            return
        yield (
            f"{self.out}: {self.bytes:,} bytes in {self.seconds:.1f} s, "
            f"{self.converted / self.seconds:,.0f} images/s, "
            f"{self.converted / max(self.cpu_seconds, 1e-9):,.0f} images/s and core"
        )
        if self.resumed:
            yield f"{self.resumed:,} of them stood in whole parts of an earlier run"
        for path, reason in self.rejects[:10]:
            yield f"rejected: {entry.printable(path)}: {reason}"
        if len(self.rejects) > 10:
            yield f"and {len(self.rejects) - 10:,} more: see {self.out}.rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a conversion would give and cost."""

    pictures: int
    tried: int
    bytes: int
    minutes: float
    psnr: float | None  # dB over all pixels tried; None: exact

    def lines(self) -> Iterator[str]:
        quality = "exact" if self.psnr is None else f"PSNR {self.psnr:.1f} dB"
        yield (
            f"estimate from {self.tried:,} pictures for {self.pictures:,}: {self.bytes:,} bytes, "
            f"{self.minutes:.2f} minutes, {quality}; nothing was written"
        )


def estimate(
    source: Source, records: int, recipe: Recipe, workers: int, row_bytes: int
) -> Estimate:
    """Convert pictures spread evenly over the records, in memory. `row_bytes`: what a picture takes beside its own."""
    numbers = sorted({i * records // JUDGED for i in range(JUDGED)})
    work = (chunk_of(source, i, i + 1) for i in numbers)
    recipe = dataclasses.replace(recipe, judged=True)
    size = pixels = loss = tried = 0
    seconds = 0.0
    with contextlib.closing(spread(partial(encode_chunk, recipe), work, workers)) as done:
        for result in itertools.chain.from_iterable(done):
            if isinstance(result, Encoded):
                tried += 1
                size += len(result.data) + row_bytes
                pixels += result.height * result.width
                loss += result.loss or 0
                seconds += result.seconds
    if not tried:
        raise Refused(f"none of {len(numbers)} pictures tried could be decoded: check --root")
    return Estimate(
        pictures=records,
        tried=tried,
        bytes=round(size / tried * records),
        minutes=seconds / tried * records / max(workers, 1) / 60,
        psnr=float(10 * np.log10(255**2 * 3 * pixels / loss)) if loss else None,
    )


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextlib.contextmanager
def progress_bar(total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar with images/s and the time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s, left:"),
        Left(),
    )
    start, done = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=before, rate="-")

        def tick(images: int) -> None:
            nonlocal done
            done += images
            bar.update(
                task, advance=images, rate=f"{done / (time.perf_counter() - start + 1e-9):,.0f}"
            )

        yield tick


def run(convert: Callable[[], Summary | Estimate], allow_rejects: bool) -> int:
    """Do it, tell it, and give the exit status: 1 with rejects."""
    told = convert()
    for line in told.lines():
        print(line)
    rejected = isinstance(told, Summary) and told.rejects and not allow_rejects
    if rejected:
        print("status 1, since pictures were rejected: --allow-rejects accepts them")
    return int(bool(rejected))
