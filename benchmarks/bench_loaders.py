"""What loaders cost on the same pictures: rates, waits beside a training step, first batch, memory, bytes; cold epochs.

    python -m benchmarks.bench_loaders [--root FOLDER] [--out FILE.jsonl or FOLDER] [--only NAME] [--quick]
    python -m benchmarks.bench_loaders --max-side 400        the same of larger pictures, their rates alone
    python -m benchmarks.bench_loaders --cold                epochs whose bytes are not in memory yet
    python -m benchmarks.bench_loaders --against CHECKOUT    this checkout's loaders beside another's, in turns; nothing is kept

The originals are prepared once in each format (contestants.py), at short side 256 and quality 90, into --work. All
loaders then make 224-pixel random-resized, mirrored crops with as many workers as there are cores, in turns (A B C A B
C ...), each as one long epoch over the same pictures again and again, so that starting workers is not what is measured.
Rates are per CPU-second of the process and its workers: busy neighbours change them little. Pictures lie in the page cache.

Beside a training step: after each batch a stand-in for the step keeps the device busy, a matrix product on one core
(on a GPU as many operations as AlexNet's step takes). What it costs by itself is subtracted from nothing: images/s
are those of both together, and the share of the time in which the step waited for its batch is told.

Cold: the .beton's records are copied into two files of --mb megabytes, sorted by class, as a folder is, and shuffled. Before
each epoch the file's pages are dropped (posix_fadvise), which mincore confirms; the epoch runs in a process of its own and
makes a checksum of each record in the place of its crops, so that the disk binds and not the decoder. `mixing` is
arithmetic: labels per batch of sorted classes of ImageNet's size, without a picture.
"""

import ctypes
import itertools
import json
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastrot.assemble
from benchmarks import contestants, measure, runs
from benchmarks.contestants import (
    DALI,
    FFCV,
    FLOAT,
    NATIVE,
    OURS,
    SIZE,
    THROUGH_DALI,
    THROUGH_FFCV,
    UINT8,
    Contestant,
    Formats,
    Run,
    originals,
    row,
)
from fastrot import entry
from fastrot.config import BLOCKS, RandomResized, RunError, UsageError
from fastrot.core import CropRequest, View
from fastrot.data import sampler
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import Packer
from fastrot.disk import write_atomically
from fastrot.entry import cores

BATCH = 64
FIRST_BATCH = 192  # the trainer's own batch: its first one is what people wait for
EPOCHS = 20  # over which the memory may not grow
TARGETS = {  # times, per core
    (OURS, UINT8): 4.0,
    (OURS, FLOAT): 5.0,
    (OURS, FFCV): 1.1,
    (THROUGH_FFCV, FFCV): 0.95,
    (THROUGH_DALI, DALI): 1.0,
    (NATIVE, FFCV): 1.7,
    (NATIVE, UINT8): 7.0,
}
STEP_S = 0.02  # what the stand-in for a step takes on a CPU: so much computing a batch of 64
STEP_FLOP = (
    16.6e9  # an image, on a GPU: four views of 224 pixels through AlexNet, forward and backward
)
MB = 2**20


# ---- rates ----


class Rate(NamedTuple):
    """How fast a run went."""

    per_s: float  # images
    per_core: float  # images a second of the processor, all processes together
    waited: float  # share of the time in which the step waited for its batch


def rates(
    opened_runs: dict[str, Run],
    step: Callable[[], Any] = lambda: None,
    *,
    seconds: float,
    reps: int,
    warm: int,
) -> dict[str, list[Rate]]:
    """The rate of each loader, `reps` times in turns of about `seconds`, with a step after each batch."""
    images = {}
    for name, run in opened_runs.items():
        _rate(run, step, warm)  # files into the page cache, code into memory
        images[name] = max(warm, round(seconds * _rate(run, step, warm).per_s))
    found = {name: [] for name in opened_runs}
    for _ in range(reps):
        for name, run in opened_runs.items():
            found[name].append(_rate(run, step, images[name]))
    return found


def _rate(run: Run, step: Callable[[], Any], images: int) -> Rate:
    drawn, waited = 0, 0.0
    begun, used = time.perf_counter(), measure.cpu_seconds()
    batches = run(images)
    while True:
        asked = time.perf_counter()
        count = next(batches, None)
        waited += time.perf_counter() - asked
        if count is None:
            break
        step()
        drawn += count
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    return Rate(drawn / wall, drawn / (measure.cpu_seconds() - used), waited / wall)


class StandIn:
    """A matrix product that keeps the device as busy as a training step would."""

    def __init__(self, device: str, batch: int):
        self.device, side = device, 4096 if device == "cuda" else 512
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.left, self.right = torch.randn(2, side, side, device=device, dtype=dtype)
        self.products = max(1, round(STEP_FLOP * batch / (2 * side**3)))
        if device != "cuda":
            self.products = 1  # it goes on until its time is over

    def __call__(self) -> None:
        end = time.perf_counter() + STEP_S
        for _ in range(self.products):
            self.left @ self.right
        while self.device != "cuda" and time.perf_counter() < end:
            self.left @ self.right


def loader_rows(
    formats: Formats,
    chosen: dict[str, Contestant],
    *,
    device: str,
    seconds: float,
    reps: int,
    batch: int = BATCH,
) -> Iterator[dict[str, Any]]:
    """A row for each loader, alone and beside a step, and for the ratios that have a target."""
    workers, opened = formats.workers, {name: formats.of(c.format) for name, c in chosen.items()}
    images = fastrot.assemble.open_data(formats.beton()).rows
    opened_runs = {name: c.open(opened[name], batch, workers) for name, c in chosen.items()}
    alone = rates(opened_runs, seconds=seconds, reps=reps, warm=2 * batch)
    shape = {"size": SIZE, "batch": batch, "workers": workers}
    large = f", long side {formats.max_side}" if formats.max_side else ""
    for name, found in alone.items():
        yield row(
            "reader" if large else "loader",
            f"{name}{large}",
            mode=chosen[name].mode,
            shape=shape,
            dtype=chosen[name].dtype,
            **measure.middle([each.per_core for each in found], "images/s and core"),
            **_wall(found),
            format=chosen[name].format,
            bytes_per_image=contestants.bytes_of(opened[name]) / images,
        )
    for (one, other), target in TARGETS.items():
        if one in alone and other in alone:
            pairs = zip(alone[one], alone[other], strict=True)
            yield row(
                "ratio",
                f"{one} / {other}{large}",
                mode="per core",
                shape=shape,
                dtype=chosen[other].dtype,
                **measure.middle([a.per_core / b.per_core for a, b in pairs], "times"),
                **({} if large else {"target": target, "better": "higher"}),
            )
    if not large:
        yield from _busy_rows(opened_runs, chosen, shape, device, seconds, reps)


def _busy_rows(
    opened_runs: dict[str, Run],
    chosen: dict[str, Contestant],
    shape: dict[str, int],
    device: str,
    seconds: float,
    reps: int,
) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the step; the loaders have threads of their own
    batch, step = shape["batch"], StandIn(device, shape["batch"])
    ceiling = {"none": lambda images: iter([batch] * (images // batch))}
    crops = {name: run for name, run in opened_runs.items() if chosen[name].mode == "crops"}
    found = rates(ceiling | crops, step, seconds=seconds, reps=reps, warm=2 * batch)
    torch.set_num_threads(threads)
    for name, each in found.items():
        yield row(
            "loader",
            "none: the step alone" if name == "none" else name,
            mode="crops, beside a stand-in for the step",
            shape=shape,
            dtype=chosen[name].dtype if name in chosen else "uint8",
            **measure.middle([rate.per_s for rate in each], "images/s"),
            waited=measure.middle([rate.waited for rate in each], "share")["p50"],
        )


def _wall(found: list[Rate]) -> dict[str, float]:
    wall = measure.middle([each.per_s for each in found], "images/s")
    names = {"": "p50", "_p20": "p20", "_p80": "p80"}
    return {f"images_per_s{end}": wall[name] for end, name in names.items()}


# ---- first batch, memory ----


def first_batch(name: str, formats: Formats, batch: int) -> float:
    """Seconds from the loader's construction, its file included, to the first batch."""
    contestant = contestants.CONTESTANTS[name]
    path = formats.of(contestant.format)
    begun = time.perf_counter()
    batches = contestant.open(path, batch, formats.workers)(batch)
    next(batches)
    seconds = time.perf_counter() - begun
    batches.close()  # type: ignore[attr-defined]
    return seconds


def memory_of(name: str, formats: Formats, batch: int, images: int) -> float:
    """MB that loader and workers hold at most, over what the process held before (RssAnon)."""
    contestant, peak, over = contestants.CONTESTANTS[name], 0.0, threading.Event()
    path, before = formats.of(contestant.format), own_memory("self")

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, own_memory("self") + sum(map(own_memory, children("self"))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in contestant.open(path, batch, formats.workers)(images):
            pass
    finally:
        over.set()
        watcher.join()
    return peak - before


def memory_of_epochs(path: str, batch: int, workers: int, epochs: int) -> list[float]:
    """MB of memory that is the process's own (RssAnon): before the loader is made, and after each epoch."""
    held = [own_memory("self")]
    loader = contestants.open_loader(fastrot.assemble.open_data(path), batch, workers)
    for epoch in range(epochs):
        for _ in loader.epoch(epoch):
            pass
        held.append(own_memory("self"))
    return held


def process_rows(
    formats: Formats,
    chosen: dict[str, Contestant],
    *,
    reps: int,
    images: int,
    epochs: int = EPOCHS,
) -> Iterator[dict[str, Any]]:
    """First batch and memory, each in processes of their own."""
    workers, first = formats.workers, min(FIRST_BATCH, images // 2)
    for name in (name for name, each in chosen.items() if each.mode == "crops"):
        waits = [fresh(first_batch, name, formats, first) for _ in range(reps)]
        yield row(
            "first batch",
            name,
            mode="fresh process, from the loader's construction",
            shape={"size": SIZE, "batch": first, "workers": workers},
            **measure.middle(waits, "s"),
            **({"target": 0.5, "better": "lower"} if name in (OURS, NATIVE) else {}),
        )
        batch = min(BATCH, images // 2)
        held = fresh(memory_of, name, formats, batch, 4 * images)
        yield row(
            "memory",
            name,
            mode="most that loader and workers hold, in a fresh process",
            shape={"size": SIZE, "batch": batch, "workers": workers},
            **measure.middle([held], "MB"),
        )
    yield from _growth_rows(formats, min(BATCH, images // 2), epochs)


def _growth_rows(formats: Formats, batch: int, epochs: int) -> Iterator[dict[str, Any]]:
    held = fresh(memory_of_epochs, str(formats.beton()), batch, formats.workers, epochs)
    last = held[-epochs // 2 :]
    shape = {"size": SIZE, "batch": batch, "workers": formats.workers, "epochs": epochs}
    yield row(
        "memory growth",
        OURS,
        mode="most of all epochs over before the loader, its ring of buffers included",
        shape=shape,
        **measure.middle([max(held) - held[0]], "MB"),
        held_mb=[round(each, 2) for each in held],
        target=100.0,
        better="lower",
    )
    yield row(
        "memory slope",
        OURS,
        mode=f"over the last {len(last)} epochs",
        shape=shape,
        **measure.middle([float(np.polyfit(range(len(last)), last, 1)[0])], "MB an epoch"),
        target=0.5,
        better="lower",
    )


def fresh(task: Callable, *args: Any) -> Any:
    """The task's result, from a process that has done nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *args).result()


def own_memory(process: str | int) -> float:
    """MB in memory that are no file's; 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / MB
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0.0


def children(process: str | int) -> list[int]:
    """Process numbers of those that a process has started, whichever of its threads did."""
    try:
        tasks = Path(f"/proc/{process}/task").iterdir()
        return [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# ---- cold ----


def blocks_name(blocks: tuple[int, int], shuffled: bool = False) -> str:
    return f"blocks of {blocks[0]}, {blocks[1]} a window" + ", shuffled file" * shuffled


SMALL = (BLOCKS[0], BLOCKS[1] // 4)
DATA_ORDER, FULL = "data order", "full permutation"
ORDERS = {  # blocks, whether the file is the shuffled one
    DATA_ORDER: (None, False),
    FULL: (None, False),
    blocks_name(BLOCKS): (BLOCKS, False),
    blocks_name(SMALL): (SMALL, False),
    blocks_name(BLOCKS, True): (BLOCKS, True),
}


class Epoch(NamedTuple):
    """What an epoch cost."""

    images: int
    seconds: float
    first: float  # seconds to the first batch
    cpu: float
    read: float  # MB that this process had the disk read
    resident: float  # MB of the file in memory at its end
    bits: float  # entropy of the labels of a batch, in the mean


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
        packer = Packer(file, len(rows))
        for number in rows.tolist():
            height, width = source.sizes(np.array([number]))[0].tolist()
            shape = {"mode": 0, "height": height, "width": width}
            packer.add(records[number], **shape, label=int(source.labels[number]))
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

    def drop(self, maps: list[mmap.mmap]) -> None:
        """Raises UsageError where another process keeps them; a page that a map of this one refers to stays: `maps` let go."""
        for _ in range(20):
            for each in maps:
                each.madvise(mmap.MADV_DONTNEED)
            with open(self.path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if (left := self.megabytes()) < self.bytes / MB / 100:
                return
            time.sleep(0.1)
        raise UsageError(f"{left:.0f} MB of {self.path} stay in memory: end what else reads it")


class Reading(Beton):
    """The reader, with a checksum of each record in the place of its crops."""

    def fill(self, request: CropRequest, out: Any, places: Iterable[int]) -> list:
        for place in places:
            zlib.crc32(self.record(int(request.rows[0][place, 0])))
        return []


def cold_epoch(name: str, path: str, workers: int) -> Epoch:
    """An epoch of our reader in one of ORDERS; for a fresh process."""
    data, pages = Reading(path), Pages(Path(path))
    data.native = False
    crops = (RandomResized(size=1),)
    view = View(crops=crops, shuffled=name != DATA_ORDER, blocks=ORDERS[name][0])
    loader = fastrot.assemble.open_loader(data, view, batch=BATCH, workers=workers, enlarge=True)
    pages.drop([pages.map, *(file.map for file in data._files)])
    read, wall, cpu = read_bytes(), time.perf_counter(), measure.cpu_seconds()
    drawn, first = [], 0.0
    for batch in loader.epoch(0):
        first = first or time.perf_counter() - wall
        drawn.append(batch.label.numpy().copy())
    wall, cpu = time.perf_counter() - wall, measure.cpu_seconds() - cpu
    mixed = float(np.mean([bits(each) for each in drawn if len(each) == BATCH]))
    read = (read_bytes() - read) / MB
    return Epoch(sum(map(len, drawn)), wall, first, cpu, read, pages.megabytes(), mixed)


def read_bytes() -> int:
    """What this process had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def bits(labels: np.ndarray) -> float:
    """Entropy of a batch's labels."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def mixing_rows(batch: int = 256, ranks: int = 8, samples: int = 400) -> Iterator[dict[str, Any]]:
    """Entropy of labels per batch, of the global one and of a rank's own, on sorted classes of ImageNet's size."""
    images, classes = contestants.IMAGENET, 1000
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
            yield cold_row(
                "mixing",
                name,
                mode=f"labels of {what}, {images:,} pictures sorted by {classes:,} classes",
                shape={"batch": batch},
                **measure.middle(found, "bits"),
                most_bits=float(np.log2(min(batch, classes))),
            )


def cold_rows(files: list[Path], *, workers: int, reps: int) -> Iterator[dict[str, Any]]:
    """Each order in turns, `reps` times; `files`: the sorted one, the shuffled one."""
    found: dict[str, list[Epoch]] = {name: [] for name in ORDERS}
    for _, name in itertools.product(range(reps), ORDERS):
        found[name].append(fresh(cold_epoch, name, str(files[ORDERS[name][1]]), workers))
    for name, each in found.items():
        yield epoch_row(name, each, workers, files[0].stat().st_size / MB)


def epoch_row(name: str, each: list[Epoch], workers: int, megabytes: float) -> dict[str, Any]:
    def middle(values: Iterable[float]) -> float:
        return measure.middle(list(values), "")["p50"]

    return cold_row(
        "cold epoch",
        name,
        mode="reading alone",
        shape={"batch": BATCH, "workers": workers, "MB": round(megabytes)},
        **measure.middle([e.images / e.seconds for e in each], "images/s"),
        images_per_core=middle(e.images / e.cpu for e in each),
        read_mb=middle(e.read for e in each),
        kb_per_image=middle(1024 * e.read / e.images for e in each),
        resident_mb=middle(e.resident for e in each),
        first_batch_s=middle(e.first for e in each),
        label_bits=middle(e.bits for e in each),
        most_bits=float(np.log2(BATCH)),
    )


def cold_row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="cold", variant=variant, **fields)


def all_cold_rows(formats: Formats, megabytes: int, reps: int) -> Iterator[dict[str, Any]]:
    """Mixing, then epochs. Raises UsageError where pages cannot be dropped."""
    if not hasattr(os, "posix_fadvise") or not Path("/proc/self/io").exists():
        raise UsageError("pages can be dropped and reads be counted on Linux alone: run it there")
    yield from mixing_rows()
    source, files = Beton(formats.beton()), []
    for name, seed in (("sorted", None), ("shuffled", 0)):
        out = formats.work / f"{source.path.stem}-{megabytes}mb-{name}.beton"
        files.append(repeated(source, out, megabytes, seed=seed))
    yield from cold_rows(files, workers=formats.workers, reps=reps)


# ---- two checkouts, side by side ----


def against(other: Path, formats: Formats, *, seconds: float, reps: int) -> Iterator[str]:
    """A line for each format: images/s and core here and there, and their ratio, measured in turns."""
    for name in ("beton", "pack", "root", "shards"):
        path, found = formats.of(name), {measure.ROOT: [], other: []}
        for _, checkout in itertools.product(range(reps), found):
            command = runs.command("benchmarks/rate.py", path.resolve(), formats.workers, seconds)
            env = os.environ | {"PYTHONPATH": str(checkout.resolve())}
            done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=checkout)
            if done.returncode:
                raise RunError(f"{name} of {checkout} could not be measured: {done.stderr[-1000:]}")
            found[checkout].append(json.loads(done.stdout.splitlines()[-1]))
        here, there = found.values()
        told = [name.replace("root", "folder")]
        for field, unit in (("per_core", "images/s and core"), ("images_per_s", "images/s")):
            mine, others = (
                measure.middle([e[field] for e in each], "")["p50"] for each in (here, there)
            )
            ratios = [a[field] / b[field] for a, b in zip(here, there, strict=True)]
            told.append(
                f"{mine:,.0f} here, {others:,.0f} there: {measure.middle(ratios, '')['p50']:.3f} times the {unit}"
            )
        yield f"{'; '.join(told)} (here: {here[0]['native']}; there: {there[0]['native']})"


# ---- the command ----


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work", "device", "quick")
    parser.add_argument("--only", action="append", help="a loader's name; may be given again")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--reps", type=int, default=5, help="turns of each loader")
    parser.add_argument("--max-side", type=int, help="prepare by the long side instead")
    parser.add_argument("--cold", action="store_true", help="epochs from the disk")
    parser.add_argument("--mb", type=int, default=1000, help="size of the files that --cold reads")
    parser.add_argument("--against", type=Path, help="another checkout")
    asked = parser.parse_args(args)
    formats = Formats(originals(asked.root), asked.work, cores(), asked.max_side)
    seconds, reps = (0.5, 2) if asked.quick else (asked.seconds, asked.reps)
    if asked.against:
        for line in against(asked.against, formats, seconds=seconds, reps=reps):
            print(line, flush=True)
        return 0
    if asked.cold:
        reps = 1 if asked.quick else 2
        runs.keep(all_cold_rows(formats, 60 if asked.quick else asked.mb, reps), asked)
        return 0
    only = asked.only
    if asked.quick and asked.device == "cuda" and not only:
        only = [OURS, *contestants.ON_A_GPU]
    chosen = contestants.present(only)
    few = {name: each for name, each in chosen.items() if not asked.quick or name == OURS}
    rows = loader_rows(formats, chosen, device=asked.device, seconds=seconds, reps=reps)
    runs.keep(rows, asked)
    if not asked.max_side:
        images = fastrot.assemble.open_data(formats.beton()).rows
        runs.keep(process_rows(formats, few, reps=reps, images=images), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
