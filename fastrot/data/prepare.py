"""What the scripts of dataprep/ share: options, pictures spread over processes, whole parts, the summary.

A conversion is cut into parts of 10,000 records. Worker processes read, decode, shrink and encode chunks of
16 pictures; their parent writes each part, with what is to be known of it, under `OUT.parts/`, where it
appears whole or not at all. A run that was killed goes on from its whole parts. A part depends on its own
records only, so parts may be made in any order, by anyone.

Under torchrun or srun the missing parts are dealt out to the ranks (ranks.py), each with workers of its own;
rank 0 alone decides what is missing, puts the parts together, and speaks. A rank that dies leaves its part
missing, for the next start to make.

Statistics are sums of whole numbers, so they do not depend on order, workers, parts or ranks.
"""

import contextlib
import dataclasses
import errno
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
from fastrot.config import RunError, UsageError, knob
from fastrot.data.files import BadPicture, shown
from fastrot.data.ranks import ALONE, SIGN, Ranks, Sign, joined_ranks
from fastrot.data.sources.open import Layout, open_source
from fastrot.data.sources.records import Record, Source
from fastrot.disk import locked, replace_bytes

PART = 10_000  # records a part
CHUNK = 16  # records a task of a worker
AHEAD = 3  # chunks a worker that may be under way or waiting to be written: bounds the memory
GONE = {  # what a file says that is not there, or not for us
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ESTALE),
}
BAND = 2**18  # pixels that are split into channels at once: these stay in the cache
JUDGED = 200  # pictures that --estimate converts

T = TypeVar("T")
Item = TypeVar("Item")


# ---- the command line ----


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where pictures come from, how large they stay, where the prepared file goes."""

    source: Layout  # how --root is laid out
    root: Path  # folder (or list, archive, prepared file) of the pictures
    out: Path  # the prepared file, or folder
    split: str | None = None  # train, val, ...: which part of the source
    label_from: Literal["folder", "none"] = "folder"  # none: every label is -1
    short_side: int | None = None  # pixels; shrink pictures whose short side is longer
    max_side: int | None = None  # pixels; shrink pictures whose long side is longer
    limit: int | None = None  # convert the first N records only
    shuffle: int | None = None  # a seed: write the pictures in random order, for --order blocks
    workers: int | None = None  # processes of a rank; 0: only itself; default: the cores at hand
    allow_rejects: bool = False  # exit with status 0 even if pictures were rejected
    overwrite: bool = False  # replace a finished --out, and parts made with other options
    estimate: bool = False  # try 200 pictures in memory: tell bytes, time, PSNR; write nothing

    def check(self) -> None:
        for name, least in {"short_side": 1, "max_side": 1, "limit": 1, "workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{knob(name)} got {value}: it wants at least {least}")
        if self.short_side is not None and self.max_side is not None:
            raise UsageError(
                f"--short-side {self.short_side} and --max-side {self.max_side} both set the size: give one"
            )


# these change no byte
FREE = ("root", "out", "workers", "allow_rejects", "overwrite", "estimate", "keep_parts")


def plan_of(options: Options, source: Source) -> dict[str, Any]:
    """What decides the bytes of a conversion: parts and finished files made from another plan are not ours."""
    listing = hashlib.blake2b(digest_size=16)
    for record in source.records[: options.limit]:
        listing.update(os.fsencode(record.path) + b"\0%d\n" % record.label)
    knobs = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
    return {**knobs, "listing": listing.hexdigest()}


def hash_of(plan: dict[str, Any]) -> str:
    """The same for plans without a `difference`: an option that is not in use is one that is not there."""
    used = {name: value for name, value in plan.items() if value is not None}
    return hashlib.blake2b(json.dumps(used, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_source_of(options: Options) -> Source:
    """The source, in the order in which it is to be written."""
    source = open_source(
        options.source, options.root, split=options.split, label_from=options.label_from
    )
    return source if options.shuffle is None else source.shuffled(options.shuffle)


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
    square: bool = False  # keep the centre square, after shrinking
    original: bool = False  # a file's bytes stay as they are; only pixels are coded


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
    """Records first ... stop - 1 of a source: where they are for a worker to read, else their pixels."""
    part = source.part(first, stop)
    if part is None:
        pictures = [source.read(i) for i in range(first, stop)]
        part = Held(source.records[first:stop], pictures)
    return Chunk(part, first)


def encode_chunk(recipe: Recipe, chunk: Chunk) -> list[Encoded | Reject]:
    results: list[Encoded | Reject] = []
    for i, record in enumerate(chunk.source.records):
        if _stop is not None and _stop.is_set():
            break  # nobody waits for the rest
        try:
            results.append(_encode(recipe, chunk.source, i, chunk.first + i))
        except BadPicture as e:
            results.append(Reject(chunk.first + i, str(e)))
        except OSError as e:
            if e.errno not in GONE:  # else a failing disk would reject thousands of good pictures
                raise RunError(
                    f"{entry.printable(shown(record.path))} cannot be read ({e.strerror}): see to the "
                    "disk, and run the same command again to go on"
                ) from None
            results.append(Reject(chunk.first + i, f"cannot be read: {e.strerror}"))
        except MemoryError:
            raise RunError(
                f"{entry.printable(shown(record.path))} took more memory than there is: run the same "
                "command again with fewer --workers"
            ) from None
        except Exception as e:
            raise RuntimeError(f"converting {record.path!r} failed: {e!r}") from e
    return results


def _encode(recipe: Recipe, source: "Source | Held", i: int, number: int) -> Encoded:
    from fastrot.data.pictures import centre_square, decode, shrink

    start = time.perf_counter()
    read = source.read(i)
    picture = read if isinstance(read, np.ndarray) else decode(read)
    picture = shrink(picture, recipe.short_side, recipe.max_side)
    picture = np.ascontiguousarray(centre_square(picture) if recipe.square else picture)
    height, width = picture.shape[:2]
    if max(height, width) > 65_535:
        raise BadPicture(f"{width}x{height} pixels: a side may have 65,535")
    data = read if recipe.original and isinstance(read, bytes) else recipe.coder.encode(picture)
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


_kept = threading.local()  # planes: the page faults of fresh ones would cost more than the sums


def _channel_sums(picture: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sums of red, green, blue and of their squares, exact."""
    import cv2

    sums, squares = [0, 0, 0], [0, 0, 0]
    if not hasattr(
        _kept, "planes"
    ):  # the odd length: planes a power of two apart meet in the cache
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
        raise RunError(
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

PLAN, LOCK = "plan.json", "lock"
NEW = "new"  # so begin names of files in a folder of parts that are on their way to another place


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
    plan: str  # `hash_of` what decides its bytes: a rank of an earlier start may still write here

    @property
    def file(self) -> Path:
        return self.folder / f"{self.records.start:010d}{self.suffix}"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.records.start:010d}.json"

    def whole(self) -> bool:
        try:
            facts = json.loads(self.facts.read_bytes())
            size = self.file.stat().st_size if facts["bytes"] else 0
            return (facts["bytes"], facts["plan"]) == (size, self.plan)
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
            "plan": self.plan,
            "bytes": self.file.stat().st_size if first else 0,
            "tally": dataclasses.asdict(tally),
        }
        replace_bytes(self.facts, json.dumps(facts).encode())
        return tally


def parts_of(
    folder: Path, records: int, suffix: str, plan: dict[str, Any], part: int = PART
) -> list[Part]:
    plan_hash = hash_of({**plan, "part": part})
    return [
        Part(folder, range(first, min(first + part, records)), suffix, plan_hash)
        for first in range(0, records, part)
    ]


def make_parts(
    parts: list[Part],
    source: Source,
    recipe: Recipe,
    write: Callable[[Path, Iterable[Encoded], int], None],
    workers: int,
    tick: Callable[[int], None],
    sign: Sign | None = None,
) -> None:
    """Make the parts, one after the other, while workers read ahead over their borders.

    `write(path, pictures, room)` writes a part's file, whole or not at all; `tick(n)` hears of n more
    records. With a `sign`, each part appears only where that still stands.
    """

    def heard(results: list[Encoded | Reject]) -> list[Encoded | Reject]:
        tick(len(results))
        return results

    def while_ours(results: Iterable[Encoded | Reject]) -> Iterator[Encoded | Reject]:
        yield from results
        if sign is not None:
            sign.check()

    work = (chunk for part in parts for chunk in chunks(source, part.records))
    with contextlib.closing(spread(partial(encode_chunk, recipe), work, workers)) as done:
        for part in parts:
            mine = itertools.islice(done, -(-len(part.records) // CHUNK))
            part.make(while_ours(itertools.chain.from_iterable(map(heard, mine))), write)


@contextlib.contextmanager
def parts_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """The folder of parts, held by this process alone, with nothing in it but whole parts of this plan.

    It stays, for the next start, until it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another conversion writes into {folder}: wait for it, or choose another --out"
    with locked(folder, refusal):
        begun = begun_with(folder)
        differs = begun and difference(plan, begun)
        if differs and not overwrite:
            raise UsageError(
                f"{folder} was begun {differs}: remove that folder, add --overwrite or choose another --out"
            )
        for file in folder.iterdir():
            # parts without a plan are rests of a removal, and may be of any options
            of_others = (differs or not begun) and _lasting(file)
            if of_others or _passing(file):
                _discard(file)
        replace_bytes(folder / PLAN, json.dumps(plan).encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # on a full disk they would be in the way
                for file in folder.iterdir():
                    if file.name.startswith((NEW, SIGN)):
                        _discard(file)


def _discard(file: Path) -> None:
    """Remove a file, or the folder of a format that is one."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def _passing(file: Path) -> bool:
    """Whether it is of use to the start that wrote it alone."""
    return file.suffix == ".tmp" or file.name.startswith((NEW, SIGN))


def _lasting(file: Path) -> bool:
    """Whether it is a part, or what makes parts a set."""
    return file.stem.isdigit() or file.name.startswith("set.")


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The plan of the parts in a folder; None where it holds none of ours."""
    try:
        return json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return None


def remove(folder: Path) -> None:
    """Remove a folder of parts, its plan last: what is left of it if that is broken off tells whose it is."""
    if begun_with(folder) is None:
        return
    (folder / "set.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if _lasting(file) or _passing(file) or file.name == LOCK:
            _discard(file)
    (folder / PLAN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are files in it that are not ours
        folder.rmdir()


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
    parts: bool = False  # --out is a folder of parts
    rejected_at: Path  # the file that names all rejects

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
        if self.parts:
            yield f"{self.out} is a folder of parts that is read as one file: --data {self.out}"
        for path, reason in self.rejects[:10]:
            yield f"rejected: {entry.printable(shown(path))}: {reason}"
        if len(self.rejects) > 10:
            yield f"and {len(self.rejects) - 10:,} more: see {self.rejected_at}"


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
    source: Source, records: int, recipe: Recipe, workers: int, row_bytes: int, ranks: int = 1
) -> Estimate:
    """Convert pictures spread evenly over the records, in memory.

    `row_bytes`: what a picture takes beside its own; `ranks`: how many would share the work.
    """
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
        raise UsageError(f"none of {len(numbers)} pictures tried could be decoded: check --root")
    return Estimate(
        pictures=records,
        tried=tried,
        bytes=round(size / tried * records),
        minutes=seconds / tried * records / max(workers, 1) / ranks / 60,
        psnr=float(10 * np.log10(255**2 * 3 * pixels / loss)) if loss else None,
    )


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextlib.contextmanager
def progress_bar(share: int, before: int, ranks: Ranks = ALONE) -> Iterator[Callable[[int], None]]:
    """A bar with images/s and the time left, on standard error: of rank 0's share, where there are ranks."""
    if ranks.rank:
        yield lambda images: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s, left:"),
        Remaining(),
    )
    start, done = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        before = before if ranks.world == 1 else 0
        task = bar.add_task("", total=before + share, completed=before, rate="-")

        def tick(images: int) -> None:
            nonlocal done
            done += images
            bar.update(
                task, advance=images, rate=f"{done / (time.perf_counter() - start + 1e-9):,.0f}"
            )

        yield tick


def run(convert: Callable[[Ranks], Summary | Estimate], allow_rejects: bool) -> int:
    """Do it, tell it, and give the exit status, the same on all ranks: 1 with rejects."""
    with joined_ranks() as ranks:
        told = convert(ranks)
    lines = [*told.lines()] if ranks.rank == 0 else []
    rejected = isinstance(told, Summary) and told.rejects and not allow_rejects
    if rejected and lines:
        lines.append("status 1, since pictures were rejected: --allow-rejects accepts them")
    print("".join(f"{line}\n" for line in lines), end="")
    return int(bool(rejected))
