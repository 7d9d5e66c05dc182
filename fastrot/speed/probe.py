"""What data, machine and net can do, in some seconds: each stage of training timed alone, then all of them together.

    read        the bytes of pictures, by as many threads as there are workers: the first time, and then again
    decode      a Loader alone, over the pictures that were just read
    step        training steps on one batch of random pixels
    train       training steps on the data itself, as a run takes them
    validation  a pass over --val, from some of its batches

A batch is the run's own, or as many pictures of it as fit some times into a stage's seconds: on a CPU, or where data
comes slowly.
"""

import contextlib
import dataclasses
import itertools
import mmap
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64

from fastrot import assemble
from fastrot.config import Config, RunError
from fastrot.core import DTYPES, Batch, DamagedRecord, Data, Pending, View
from fastrot.data.loader import Loader
from fastrot.data.pack import layout
from fastrot.machine import wait_for
from fastrot.speed import bounds
from fastrot.speed.advice import Measurements
from fastrot.speed.bounds import Measured
from fastrot.speed.cost import random_batch, step_cost
from fastrot.speed.timer import StepTimer
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule
from fastrot.training.state import TrainState, build, wrapped

SHARES = {
    "read": 0.1,
    "again": 0.05,
    "decode": 0.2,
    "step": 0.2,
    "train": 0.3,
    "val": 0.1,
}  # of the seconds
SAMPLE = 4096  # pictures that are read, at most
SMALLEST = 2  # pictures of a batch: batch norm wants two
BATCHES = 8  # that a worker, or the training, should have time for
ENOUGH = 16  # pictures of a step, at least: of fewer it would be the optimiser that is timed
STEPS = 4  # on random pixels that there should be time for
SLOWER = 3  # times its floor: so long a step may take, when its batch is chosen
NEXT_TO_NOTHING = 1e-6  # learning rate: weights stay finite on random pixels
NOISE = 0.02  # share of a loader's time below which decoding cannot be told from reading


def measure(
    cfg: Config,
    data: Data,
    device: torch.device,
    *,
    workers: int,
    seconds: float,
    told: Callable[[str], Any] = lambda stage: None,
    val: Data | None = None,
) -> Measurements:
    """Time every stage, for about so many seconds in all; placing the data and compiling the net come on top.

    cfg   resolved, its precision chosen
    told  hears which stage begins
    val   pictures to be judged on; None: there is no validation pass

    Raises UsageError for data that cannot train this config.
    """
    begun, share = time.perf_counter(), {k: part * seconds for k, part in SHARES.items()}
    loaders: list[Loader] = []

    def opened(data: Data, view: View, batch: int) -> Loader:
        how: Any = {"seed": cfg.seed, "workers": workers, "enlarge": cfg.enlarge, "device": device}
        how |= {"on_bad_record": "skip"}  # they are told at the end
        loaders.append(assemble.open_loader(data, view, batch=batch, **how))
        return loaders[-1]

    told("opening")
    view = assemble.training_view(cfg)
    whole = opened(data, view, cfg.batch)  # or it is refused; on a GPU it is placed
    told("reading")
    rows = np.random.default_rng(cfg.seed).permutation(data.rows)[:SAMPLE]
    reading = _read(data, rows, workers, share)
    told(f"decoding, {workers} worker{'s'[: workers != 1]}")
    decode = _decode(whole, rows[: reading.pictures], workers, share["decode"])
    if reading.reread is not None:
        decode = decode_alone(decode, reading.reread)
    told("building the net")
    state = _build(cfg, whole)
    told("steps on random pixels")
    loading = 1 / decode + (1 / reading.read if reading.read else 0)  # seconds a picture
    most = max(SMALLEST, int(share["train"] / BATCHES / loading))
    cfg = dataclasses.replace(cfg, batch=min(cfg.batch, most))
    batch = _batch_in_time(state, view, cfg, share["step"])
    cfg, held = dataclasses.replace(cfg, batch=batch), random_batch(view, batch, device)
    state.net = wrapped(state.method.net, cfg, device)
    if cfg.compile or device.type == "cuda":  # warm
        for _ in range(3):
            train_step(state, held)
        wait_for(device)

    def train(batches: Generator[Batch, None, None], seconds: float) -> StepTimer:
        return _timed(batches, lambda each: train_step(state, each), device, seconds)

    step = train((held for _ in itertools.count()), share["step"])
    told("training on the data")
    together = train(_epochs(opened(data, view, batch)), share["train"])
    val_seconds = None
    if val is not None:
        told("validation")
        loader = opened(val, assemble.evaluation_view(cfg), batch)
        val_seconds = _validation(state, loader, share["val"])
    measured = _measured(together, step, batch, reading.read, decode, device)
    cost = step_cost(state.method, view, cfg, device)
    sizes, short = data.sizes(np.arange(data.rows)), short_side(view)
    return Measurements(
        images=data.rows,
        workers=workers,
        batch=batch,
        bytes=reading.bytes,
        from_disk=reading.from_disk,
        read=reading.read,
        decode=decode,
        step=batch / _of(step, batch).step,
        train=batch / measured.step,
        steps=together.steps,
        val_seconds=val_seconds,
        median_short=int(np.median(sizes.min(axis=1))),
        short=short,
        pack_bytes=pack_bytes(data, sizes, short),
        damaged=tuple(sorted(reading.damaged.union(*(loader.skipped for loader in loaders)))),
        measured=bounds.with_floors(measured, cost, view, cfg, device),
        seconds=time.perf_counter() - begun,
    )


def short_side(view: View) -> int:
    """Pixels of the short side that a prepared picture should have for crops of this size: 256 for 224."""
    return round(max(crop.size for crop in view.crops) * 256 / 224)


def pack_bytes(data: Any, sizes: Int32[np.ndarray, "n 2"], short: int) -> int:
    """Bytes of the data as a .pack (ycc) of that short side; of a .pack what it has."""
    if data.format == "pack":
        return data.file.tiles.nbytes
    least = sizes.min(axis=1, keepdims=True).astype(np.int64)
    shrunk = np.where(least > short, short * sizes // least, sizes)  # as pictures.shrink does it
    return int(layout.lengths(shrunk.astype(np.int32), "ycc").sum()) * layout.WIDTH["ycc"]


# ---- reading and decoding ----


@dataclass(frozen=True)
class _Reading:
    """Images/s and what they are of; None: pictures that are made, or what the system does not tell."""

    pictures: int
    damaged: set[str]
    bytes: float | None = None  # a picture
    from_disk: float | None = None  # share of the bytes
    read: float | None = None
    reread: float | None = None


def _read(
    data: Data, rows: Int64[np.ndarray, " n"], workers: int, share: dict[str, float]
) -> _Reading:
    """Read as many of these rows as time allows, and then the same again."""
    if data.format == "synthetic":
        return _Reading(len(rows), set())
    before, damaged = _bytes_from_disk(), set[str]()
    pictures, seconds, size = _touched(data, rows, workers, share["read"], damaged)
    after = _bytes_from_disk()
    again, less, _ = _touched(data, rows[:pictures], workers, share["again"], damaged)
    from_disk = None
    if before is not None and after is not None:
        from_disk = min(1.0, (after - before) / max(size, 1))
    return _Reading(pictures, damaged, size / pictures, from_disk, pictures / seconds, again / less)


def _touched(
    data: Data, rows: Int64[np.ndarray, " n"], workers: int, seconds: float, damaged: set[str]
) -> tuple[int, float, int]:
    """Read rows until the seconds are over: how many, in how many seconds, how many bytes."""

    def touch(some: Int64[np.ndarray, " s"]) -> int:
        size = 0
        for row in some.tolist():
            try:
                record = data.record(row)
                record[:: mmap.PAGESIZE].max()  # a mapped page is read when it is looked at
                size += record.nbytes
            except DamagedRecord as error:
                damaged.add(str(error))
        return size

    begun = time.perf_counter()
    size, done = touch(rows[:1]), 1
    # a millisecond's work for a thread: hand-offs would cost more than reading what is in memory
    task = min(64, max(1, int(1e-3 / (time.perf_counter() - begun))))
    at_once = task * max(workers, 1) * (4 if task > 1 else 1)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        while done < len(rows) and time.perf_counter() - begun < seconds:
            some = rows[done : done + at_once]
            size += sum(pool.map(touch, (some[at : at + task] for at in range(0, len(some), task))))
            done += len(some)
    return done, time.perf_counter() - begun, size


def _bytes_from_disk() -> int | None:
    """What this process has had fetched from disks and networks so far, read-ahead included; Linux alone tells."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])
    return None


def _decode(loader: Loader, rows: Int64[np.ndarray, " n"], workers: int, seconds: float) -> float:
    """images/s of crops of these rows by so many workers, in batches of which each worker makes some in time."""

    def rate(images: int, workers: int, seconds: float) -> float:
        batches = _batches_of(loader, rows, images, workers)
        timer = _timed(batches, lambda _: None, loader.device, seconds, line=max(1, workers))
        return 1 / _of(timer, 1).step

    one = rate(SMALLEST, 0, 0.0)
    return rate(min(loader.batch, max(SMALLEST, int(one * seconds / BATCHES))), workers, seconds)


def _batches_of(
    loader: Loader, rows: Int64[np.ndarray, " n"], images: int, workers: int
) -> Generator[Batch, None, None]:
    """Batches of these rows again and again, by the same workers all the time."""
    at, pending = np.arange(images), deque[Pending]()
    blank = random_batch(loader.view, images, torch.device("cpu"))
    with contextlib.closing(loader.data.open_reader(loader.device, workers)) as reader:
        while True:
            while len(pending) <= reader.ahead(images):
                pending.append(reader.begin(loader.request(rows[at % len(rows)], 0)))
                at += images
            yield dataclasses.replace(blank, crops=pending.popleft().result().crops)


def decode_alone(loader: float, reread: float) -> float:
    """images/s of decoding, where a Loader over pictures that were just read gives so many, reading them again."""
    return 1 / max(1 / loader - 1 / reread, NOISE / loader)


# ---- steps ----


def _build(cfg: Config, loader: Loader) -> TrainState:
    """All that a run's step needs, its net not yet compiled; it learns next to nothing."""
    cfg = dataclasses.replace(cfg, compile=False, graph=False)
    info = assemble.data_info(cfg, loader, None, loader.device, DTYPES[cfg.precision])
    n, lr = len(loader), NEXT_TO_NOTHING
    schedule = LRSchedule(cfg.schedule, epochs=1, batches=n, steps=n, lr=lr)
    state = build(cfg, info, schedule)
    state.method.set_schedule(1, schedule.begins)
    state.method.net.train()
    return state


def _batch_in_time(state: TrainState, view: View, cfg: Config, seconds: float) -> int:
    """Pictures of a batch: on a CPU as many as fit STEPS times into the seconds where a step takes SLOWER times its floor."""
    if state.device.type == "cuda":
        return cfg.batch
    peak = bounds.ceilings(state.device, state.dtype)

    def floor(images: int) -> float:
        cost = step_cost(state.method, view, dataclasses.replace(cfg, batch=images), state.device)
        return sum(bounds.floors(cost, peak).values())

    fitting = (seconds / STEPS / SLOWER - floor(1)) / (floor(2) - floor(1))
    return min(cfg.batch, max(ENOUGH, int(fitting)))


def _timed(
    batches: Generator[Batch, None, None],
    work: Callable[[Batch], Any],
    device: torch.device,
    seconds: float,
    line: int | None = None,
) -> StepTimer:
    """Do the work on batches until the seconds are over, two log lines at least: the first, a warm-up, does not count.

    line  batches of a log line; None: 1, on a GPU 4, which are issued together as in a run

    Closes the batches.
    """
    timer, line = StepTimer(device), line or (4 if device.type == "cuda" else 1)
    until = time.perf_counter() + seconds
    with contextlib.closing(batches):
        while timer.lines < 2 or time.perf_counter() < until:
            begun, waited, images = time.perf_counter(), 0.0, 0
            for _ in range(line):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                with timer.step():
                    work(batch)
                images += len(batch.index)
            wait_for(device)
            took = time.perf_counter() - begun
            timer.line(images / took, waited / took)
    return timer


def _of(timer: StepTimer, images: int) -> Measured:
    measured = timer.measured(images)
    assert measured is not None  # one line at least was told
    return measured


def _measured(
    together: StepTimer,
    step: StepTimer,
    batch: int,
    read: float | None,
    decode: float,
    device: torch.device,
) -> Measured:
    """A step on the data, and what its stages take by themselves.

    read, decode  images/s; read None: pictures are made, which is a step's own work and no waiting
    """
    m, alone = _of(together, batch), _of(step, batch)
    stages = {} if read is None else {"read": batch / read, "decode": batch / decode}
    load = sum(stages.values(), 0.0)
    # a batch is waited for no longer than it takes; what was prefetched before the first step hides a wait
    hidden = max(0.0, load - m.step)
    whole, wait = m.step + hidden, min(m.wait, load) + hidden
    busy = min(whole, alone.busy or alone.step) if device.type == "cuda" else whole - wait
    return dataclasses.replace(m, step=whole, wait=wait, issue=alone.issue, busy=busy, **stages)


def _epochs(loader: Loader) -> Generator[Batch, None, None]:
    """Epoch after epoch."""
    for number in itertools.count():
        batch = None
        for batch in loader.epoch(number):
            yield batch
        if batch is None:
            raise RunError("no picture to be judged on can be read: give --val others")


def _validation(state: TrainState, loader: Loader, seconds: float) -> float:
    """Seconds of a validation pass, from some of its batches."""
    method = state.method

    @torch.no_grad()
    def score(batch: Batch) -> None:
        with state.autocast():
            method.score(method.net(method.views(batch)), batch)

    method.net.eval()
    timer = _timed(_epochs(loader), score, state.device, seconds)
    method.net.train()
    return _of(timer, loader.images).step
