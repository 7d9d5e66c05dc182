"""What an epoch costs whose bytes are not in memory yet, and how well each order mixes class-sorted pictures.

    python -m benchmarks.bench_cold [--root FOLDER | --data FILE.beton] [--out FILE.jsonl or FOLDER] [--quick]

The originals are converted once at short side 256 and quality 90, and their records copied into two files of --mb
megabytes: sorted by class, as a folder is, and shuffled. Before each epoch the file's pages are dropped (posix_fadvise),
which mincore confirms; the epoch runs in a process of its own, whose /proc/self/io tells what the disk was asked for.

`crops`: what a trainer draws, for 30 s. `reading alone`: the same reader, but a checksum of each record in the place of its
crops, so that the disk binds and not the decoder. `memory stood in for`: the same, while the file's pages are dropped
again, oldest first, as soon as more than a third of the file is in memory: a stand-in for a machine with less
memory, since without it a file that fits is read once, whatever the order. Two epochs, each broken off after 25 s; figures of the second.

FFCV's QUASI_RANDOM (os_cache=False) keeps 2 x batch pages of 8 MB in memory of its own, RANDOM maps the file.
`mixing` is arithmetic: labels per batch of 1,000 sorted classes of ImageNet's size, without a picture.
"""

import argparse
import contextlib
import ctypes
import itertools
import math
import mmap
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import measure
from benchmarks.bench_loaders import fresh
from benchmarks.contestants import Formats, installed, originals
from fastrot import entry
from fastrot.assemble import open_loader
from fastrot.config import BLOCKS, RandomResized, UsageError
from fastrot.core import CropRequest, View
from fastrot.data import sampler
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import Packer
from fastrot.disk import write_atomically
from fastrot.entry import cores

BATCH, SIZE, MB = 64, 224, 2**20
SMALL = (BLOCKS[0], BLOCKS[1] // 4)
DATA_ORDER, FULL = "data order", "full permutation"
UNADVISED = "full permutation, no read-ahead"
QUASI, RANDOM = "FFCV QUASI_RANDOM", "FFCV RANDOM"
CROPS, READING, LESS = "crops", "reading alone", "reading alone, memory stood in for"
IMAGENET = (1_281_167, 1000)  # pictures, classes


def blocks_name(blocks: tuple[int, int], shuffled: bool = False) -> str:
    return f"blocks of {blocks[0]}, {blocks[1]} a window" + ", shuffled file" * shuffled


ORDERS = {  # of our reader: blocks, whether the file is the shuffled one
    DATA_ORDER: (None, False),
    FULL: (None, False),
    UNADVISED: (None, False),
    blocks_name(BLOCKS): (BLOCKS, False),
    blocks_name(SMALL): (SMALL, False),
    blocks_name(BLOCKS, True): (BLOCKS, True),
}
IN_CROPS = [FULL, blocks_name(BLOCKS)]
# seconds of an epoch: memory stood in for has some read a file many times over; decoding binds crops
LONGEST = {READING: math.inf, LESS: 25.0, CROPS: 30.0}
IN_LESS = [DATA_ORDER, FULL, UNADVISED, blocks_name(SMALL)]


class Epoch(NamedTuple):
    """What an epoch cost."""

    images: int
    seconds: float
    first: float  # seconds to the first batch
    cpu: float
    read: float  # MB that this process had the disk read
    requests: int  # that the disk answered, for whatever process
    resident: float  # MB of the file in memory at its end
    bits: float  # entropy of the labels of a batch, in the mean
    most: float = 0.0  # MB of the file seen in memory, where that is held down


# ---- the file ----


def repeated(source: Beton, out: Path, megabytes: int, *, seed: int | None = None) -> Path:
    """The records of `source` again and again, sorted by label, or shuffled by `seed`; made where it is missing."""
    if out.exists():
        return out
    rows = np.argsort(source.labels, kind="stable")
    records = [source.record(row).tobytes() for row in range(source.rows)]
    copies = -(-megabytes * MB // sum(map(len, records)))
    rows = np.repeat(rows, copies)
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)

    def write(file: Any) -> None:
        with contextlib.closing(Packer(file, len(rows))) as packer:
            for row in rows.tolist():
                height, width = source.sizes(np.array([row]))[0].tolist()
                shape = {"mode": 0, "height": height, "width": width}
                packer.add(records[row], **shape, label=int(source.labels[row]))
            packer.finish()

    write_atomically(out, write)
    return out


class Pages:
    """The pages of a file that are in memory."""

    def __init__(self, path: Path):
        self.path, self.bytes = path, path.stat().st_size
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = np.frombuffer(self.map, np.uint8).ctypes.data
        self.library = ctypes.CDLL(None, use_errno=True)

    def resident(self) -> np.ndarray:
        """bool, one a page."""
        pages = np.zeros(-(-self.bytes // mmap.PAGESIZE), np.uint8)
        arguments = (ctypes.c_void_p(self.at), ctypes.c_size_t(self.bytes))
        if self.library.mincore(*arguments, pages.ctypes.data_as(ctypes.c_void_p)):
            raise OSError(ctypes.get_errno(), "mincore")
        return (pages & 1).astype(bool)

    def megabytes(self) -> float:
        return float(self.resident().sum()) * mmap.PAGESIZE / MB

    def drop(self, maps: list[mmap.mmap], start: int = 0, length: int = 0) -> None:
        """A page that some map of this process refers to would stay: `maps` let go of them."""
        for each in maps:
            each.madvise(mmap.MADV_DONTNEED, start, length or self.bytes)
        with open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def made_cold(pages: Pages, maps: list[mmap.mmap]) -> None:
    """Drop a file's pages. Raises UsageError where another process keeps them."""
    for _ in range(20):
        pages.drop(maps)
        if (left := pages.megabytes()) < pages.bytes / MB / 100:
            return
        time.sleep(0.1)
    raise UsageError(f"{left:.0f} MB of {pages.path} stay in memory: end what else reads it")


class LessMemory(threading.Thread):
    """Drops what of a file has been in memory longest, as soon as more than `limit` MB are."""

    PIECE = 16  # pages that come and go together

    def __init__(self, pages: Pages, maps: list[mmap.mmap], limit: float):
        super().__init__(daemon=True)
        self.pages, self.maps, self.limit = pages, maps, limit
        self.done, self.most = threading.Event(), 0.0

    def run(self) -> None:
        since = np.zeros(0)  # when each piece was first seen in memory; infinity: it is not
        while not self.done.wait(0.02):
            resident = self.pages.resident()
            starts = np.arange(0, len(resident), self.PIECE)
            held = np.add.reduceat(resident.astype(np.int64), starts) * (mmap.PAGESIZE / MB)
            since = np.full(len(held), np.inf) if not len(since) else since
            since = np.where(held > 0, np.minimum(since, time.monotonic()), np.inf)
            self.most = max(self.most, float(held.sum()))
            if held.sum() > self.limit:
                oldest = np.argsort(since, kind="stable")
                left = held.sum() - np.cumsum(held[oldest])
                self._drop(np.sort(oldest[: np.argmax(left <= self.limit) + 1]))

    def _drop(self, pieces: np.ndarray) -> None:
        size = self.PIECE * mmap.PAGESIZE
        for run in np.split(pieces, np.flatnonzero(np.diff(pieces) > 1) + 1):
            start = int(run[0]) * size
            self.pages.drop(self.maps, start, min(len(run) * size, self.pages.bytes - start))

    def close(self) -> float:
        """Ends it; the most MB that it saw."""
        self.done.set()
        self.join()
        return self.most


# ---- epochs, each in a fresh process ----


class Reading(Beton):
    """The reader, with a checksum of each record in the place of its crops."""

    def fill(self, request: CropRequest, out: Any, places: Iterable[int]) -> list:
        for place in places:
            zlib.crc32(self.record(int(request.rows[0][place, 0])))
        return []


def of_ours(name: str, path: str, workers: int, mode: str, epochs: int) -> list[Epoch]:
    """Epochs of our reader; for a fresh process."""
    data = Reading(path) if mode != CROPS else Beton(path)
    data.native = data.native and mode == CROPS
    if name == UNADVISED:
        data._announce = lambda request: []
    view = View(
        crops=(RandomResized(size=SIZE if mode == CROPS else 1),),
        shuffled=name != DATA_ORDER,
        blocks=ORDERS[name][0],
    )
    loader = open_loader(data, view, batch=BATCH, workers=workers, enlarge=True)
    maps = [file.map for file in data._files]

    def labels(number: int) -> Iterator[np.ndarray]:
        return (batch.label.numpy() for batch in loader.epoch(number))

    return _epochs(Path(path), maps, labels, epochs, mode)


def of_ffcvs(name: str, path: str, workers: int, mode: str, epochs: int) -> list[Epoch]:
    """Epochs of FFCV's own pipeline, compiled before the first; for a fresh process."""
    threads = torch.get_num_threads()
    import numba
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
    loader = Loader(
        path,
        batch_size=BATCH,
        num_workers=max(1, min(workers, numba.config.NUMBA_NUM_THREADS)),
        os_cache=name == RANDOM,
        order=OrderOption.RANDOM if name == RANDOM else OrderOption.QUASI_RANDOM,
        seed=0,
        drop_last=True,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
            "index": None,
        },
    )
    torch.set_num_threads(threads)
    first = iter(loader)
    next(first)  # compiles
    first.close()
    while first.is_alive():  # it may wait for room for batches that nobody takes
        with contextlib.suppress(Exception):
            first.output_queue.get(timeout=0.1)
    maps = []
    if name == RANDOM:
        maps = [loader.memory_manager.context.mmap._mmap]

    def labels(number: int) -> Iterator[np.ndarray]:
        drawn = iter(loader)
        try:
            for _, label in drawn:
                yield label.numpy().reshape(-1)
        finally:
            drawn.close()  # its thread would keep the process of an epoch that is broken off

    return _epochs(Path(path), maps, labels, epochs, mode)


def _epochs(
    path: Path,
    maps: list[mmap.mmap],
    labels: Callable[[int], Iterator[np.ndarray]],
    epochs: int,
    mode: str,
) -> list[Epoch]:
    pages = Pages(path)
    made_cold(pages, maps)
    limited = LessMemory(pages, maps, pages.bytes / MB / 3) if mode == LESS else None
    if limited is not None:
        limited.start()
    found = [_epoch(labels(number), pages, LONGEST[mode]) for number in range(epochs)]
    most = 0.0 if limited is None else limited.close()
    return [each._replace(most=most) for each in found]


def _epoch(batches: Iterator[np.ndarray], pages: Pages, longest: float = math.inf) -> Epoch:
    read, requests = _read_bytes(), _requests(pages.path)
    wall, cpu = time.perf_counter(), measure.cpu_seconds()
    drawn = [next(batches).copy()]
    first = time.perf_counter() - wall
    for batch in batches:
        drawn.append(batch.copy())
        if time.perf_counter() - wall > longest:
            break
    wall, cpu = time.perf_counter() - wall, measure.cpu_seconds() - cpu
    read, requests = _read_bytes() - read, _requests(pages.path) - requests
    return Epoch(
        sum(map(len, drawn)),
        wall,
        first,
        cpu,
        read / MB,
        requests,
        pages.megabytes(),
        float(np.mean([bits(each) for each in drawn if len(each) == BATCH])),
    )


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _requests(path: Path) -> int:
    """Reads that the disk below a file has finished; 0 where the system does not tell."""
    device = path.stat().st_dev
    told = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(told.read_text().split()[0]) if told.exists() else 0


# ---- mixing ----


def bits(labels: np.ndarray) -> float:
    """Entropy of a batch's labels."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def mixing_rows(batch: int = 256, ranks: int = 8, samples: int = 400) -> Iterator[dict[str, Any]]:
    """Entropy of labels per batch, of the global one and of a rank's own, on sorted classes of ImageNet's size."""
    images, classes = IMAGENET
    labels = np.arange(images) * classes // images
    orders: dict[str, Any] = {FULL: sampler.ShuffledSampler(images, seed=0, epoch=0)}
    for block, window in (BLOCKS, SMALL, (4 * BLOCKS[0], BLOCKS[1] // 4)):
        one = sampler.BlockSampler(images, seed=0, epoch=0, block=block, window=window)
        orders[blocks_name((block, window))] = one
    for name, rows in orders.items():
        for what, rank, world in (("a batch", 0, 1), (f"a rank of {ranks}", 3, ranks)):
            at = {"batch": batch, "rank": rank, "world": world, "ragged": False}
            count = sampler.batches(images, **at)
            steps = np.unique(np.linspace(0, count - 1, samples).astype(int)).tolist()
            found = [bits(labels[rows[sampler.places(images, number=k, **at)]]) for k in steps]
            yield row(
                "mixing",
                name,
                mode=f"labels of {what}, {images:,} pictures sorted by {classes:,} classes",
                shape={"batch": batch},
                **measure.middle(found, "bits"),
                most_bits=float(np.log2(min(batch, classes))),
            )


# ---- rows ----


def cold_rows(
    sorted_file: Path, shuffled: Path, *, workers: int, reps: int, only: str | None = None
) -> Iterator[dict[str, Any]]:
    """Each order in turns, `reps` times."""
    tasks = {
        READING: [(name, of_ours, 1) for name in ORDERS],
        LESS: [(name, of_ours, 2) for name in IN_LESS],
        CROPS: [(name, of_ours, 1) for name in IN_CROPS],
    }
    if installed("ffcv"):
        tasks[CROPS] += [(name, of_ffcvs, 1) for name in (QUASI, RANDOM)]
    megabytes = sorted_file.stat().st_size / MB
    for mode, each in tasks.items() if only is None else [(only, tasks[only])]:
        found: dict[str, list[Epoch]] = {}
        for _, (name, task, epochs) in itertools.product(range(reps), each):
            path = shuffled if ORDERS.get(name, (None, False))[1] else sorted_file
            cost = fresh(task, name, str(path), workers, mode, epochs)
            found.setdefault(name, []).extend(cost[1:] or cost)
        for name, costs in found.items():
            yield _row_of(name, mode, costs, megabytes, workers)


def _row_of(
    name: str, mode: str, each: list[Epoch], megabytes: float, workers: int
) -> dict[str, Any]:
    def middle(values: list[float]) -> float:
        return measure.middle(values, "")["p50"]

    return row(
        "cold epoch",
        name,
        mode=mode,
        shape={"batch": BATCH, "workers": workers, "MB": round(megabytes)},
        **measure.middle([e.images / e.seconds for e in each], "images/s"),
        images_per_core=middle([e.images / e.cpu for e in each]),
        read_mb=middle([e.read for e in each]),
        kb_per_image=middle([1024 * e.read / e.images for e in each]),
        kb_per_request=middle([1024 * e.read / max(e.requests, 1) for e in each]),
        resident_mb=middle([e.most or e.resident for e in each]),
        first_batch_s=middle([e.first for e in each]),
        label_bits=middle([e.bits for e in each]),
        most_bits=float(np.log2(BATCH)),
        memory_mb=memory_limit(),
    )


def memory_limit() -> float:
    """MB that this process may use: the machine's, or its control group's where that allows less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    least = int(lines[0].split()[1]) / 1024
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, group = line.split(":", 2)
        file = f"memory{group}/memory.limit_in_bytes" if kind == "memory" else f"{group}/memory.max"
        told = Path("/sys/fs/cgroup") / file.lstrip("/")
        if told.exists() and (text := told.read_text().strip()).isdigit():
            least = min(least, int(text) / MB)
    return least


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="cold", variant=variant, **fields)


def main() -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="class folders of original pictures")
    parser.add_argument("--data", type=Path, help="FILE.beton to copy pictures from, instead")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--mb", type=int, default=1000, help="size of the files that are read")
    parser.add_argument("--reps", type=int, default=2, help="turns; 1 with --quick")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--only", choices=(READING, LESS, CROPS), help="this alone")
    parser.add_argument("--quick", action="store_true", help="a short look; kept only with --out")
    asked = parser.parse_args()
    if not hasattr(os, "posix_fadvise") or not Path("/proc/self/io").exists():
        raise UsageError("pages can be dropped and reads be counted on Linux alone: run it there")
    megabytes, workers = 60 if asked.quick else asked.mb, cores()
    source = Beton(asked.data or Formats(originals(asked.root), asked.work, workers).beton())
    asked.work.mkdir(parents=True, exist_ok=True)
    files = [
        repeated(
            source,
            asked.work / f"{source.path.stem}-{megabytes}mb-{name}.beton",
            megabytes,
            seed=seed,
        )
        for name, seed in (("sorted", None), ("shuffled", 0))
    ]
    out = measure.results("cpu", asked.out) if asked.out or not asked.quick else None
    reps = 1 if asked.quick else asked.reps
    mixing = () if asked.only else mixing_rows()
    cold = cold_rows(*files, workers=workers, reps=reps, only=asked.only)
    for each in itertools.chain(mixing, cold):
        if out is not None:
            measure.append(out, each)
        more = f", {each['read_mb']:,.0f} MB read" if "read_mb" in each else ""
        measure.say(each, more)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
