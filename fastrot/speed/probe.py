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
import functools
import itertools
import mmap
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrot import assemble
from fastrot.arrays import Rows, Sizes
from fastrot.config import Config, RunError
from fastrot.core import DTYPES, Batch, DamagedRecord, Data, Pending, View
from fastrot.data.loader import Loader
from fastrot.data.pack import layout
from fastrot.machine import wait_for
from fastrot.speed import bounds
from fastrot.speed.advice import Loading, Measurements
from fastrot.speed.bounds import Measured
from fastrot.speed.cost import random_batch, step_cost
from fastrot.speed.timer import StepTimer
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule
from fastrot.training.state import TrainState, build

Told = Callable[[str], Any]  # hears which stage begins
# of the seconds
SHARES = {"read": 0.1, "again": 0.05, "decode": 0.2, "step": 0.2, "train": 0.3, "val": 0.1}
SAMPLE = 4096  # pictures that are read, at most
SMALLEST = 2  # pictures of a batch: batch norm wants two
BATCHES = 8  # that a worker, or the training, should have time for
ENOUGH = 16  # pictures of a step, at least: of fewer it would be the optimiser that is timed
STEPS = 4  # on random pixels that there should be time for
SLOWER = 3  # times its floor: so long a step may take, when its batch is chosen
NEXT_TO_NOTHING = 1e-6  # learning rate: weights stay finite on random pixels
NOISE = 0.02  # share of a loader's time below which decoding cannot be told from reading


def measure(
    cfg: Config, data: Data, val: Data | None, device: torch.device, seconds: float, told: Told
) -> Measurements:
    """Time every stage, for about so many seconds in all; placing the data and compiling the net come on top.

    cfg  resolved, its precision chosen
    val  pictures to be judged on; None: there is no validation pass

    Raises UsageError for data that cannot train this config.
    """
    begun, view = time.perf_counter(), assemble.training_view(cfg)
    how: Any = {"seed": cfg.seed, "workers": cfg.workers, "enlarge": cfg.enlarge, "device": device}
    opened = functools.partial(assemble.open_loader, **how, on_bad_record="skip")
    loader = opened(data, view, batch=cfg.batch)  # or it is refused; on a GPU it is placed
    loading = _loading(loader, seconds, told)
    told("building the net")
    state = _build(cfg, loader)
    told("steps on random pixels")
    batch = _batch_in_time(state, view, cfg, loading, seconds)
    cfg = dataclasses.replace(cfg, batch=batch)
    alone = _on_random_pixels(state, view, cfg, SHARES["step"] * seconds)
    told("training on the data")
    train_loader = opened(data, view, batch=batch)
    together = _train(state, _epochs(train_loader), SHARES["train"] * seconds)
    val_seconds, damaged = None, loader.skipped | train_loader.skipped
    if val is not None:
        told("validation")
        val_loader = opened(val, assemble.evaluation_view(cfg), batch=batch)
        val_seconds = _validation(state, val_loader, SHARES["val"] * seconds)
        damaged |= val_loader.skipped
    measured = _measured(together.measured(batch), alone, loading, batch, device)
    cost, subject = step_cost(state.method, view, cfg, device), bounds.subject_of(cfg, data, device)
    return Measurements(
        **vars(loading),
        **_about(data, view),
        workers=loader.workers,
        batch=batch,
        step=batch / alone.step,
        train=batch / measured.step,
        steps=together.steps,
        val_seconds=val_seconds,
        damaged=tuple(sorted(damaged)),
        measured=bounds.with_floors(measured, cost, view, subject),
        seconds=time.perf_counter() - begun,
    )


def _about(data: Data, view: View) -> dict[str, int]:
    """What Measurements say of the data that takes no timing."""
    sizes = data.sizes(np.arange(data.rows))
    short = round(max(crop.size for crop in view.crops) * 256 / 224)  # as is usual: 256 for 224
    median = int(np.median(sizes.min(axis=1)))
    packed = pack_bytes(data, sizes, short)
    return {"images": data.rows, "median_short": median, "short": short, "pack_bytes": packed}


def pack_bytes(data: Any, sizes: Sizes, short: int) -> int:
    """Bytes of the data as a .pack (ycc) of that short side; of a .pack what it has."""
    if data.format == "pack":
        return data.tiles.nbytes
    least = sizes.min(axis=1, keepdims=True).astype(np.int64)
    shrunk = np.where(least > short, short * sizes // least, sizes)  # as pictures.shrink does it
    return int(layout.lengths(shrunk.astype(np.int32), "ycc").sum()) * layout.WIDTH["ycc"]


# ---- reading and decoding ----


def _loading(loader: Loader, seconds: float, told: Told) -> Loading:
    """Read as many pictures as there is time for, then the same again, and decode them."""
    rows = np.random.default_rng(loader.seed).permutation(loader.data.rows)[:SAMPLE]
    if loader.data.format == "synthetic":
        told("decoding")
        made = _decode(loader, rows, SHARES["decode"] * seconds)
        return Loading(bytes=None, from_disk=None, read=None, decode=made)
    told("reading")
    before = _bytes_from_disk()
    pictures, took, size = _read(loader, rows, SHARES["read"] * seconds)
    after, rows = _bytes_from_disk(), rows[:pictures]
    again, took_again, _ = _read(loader, rows, SHARES["again"] * seconds)
    told("decoding")
    both = _decode(loader, rows, SHARES["decode"] * seconds)
    fetched = None if before is None or after is None else min(size, after - before)
    return Loading(
        bytes=size / pictures,
        from_disk=None if fetched is None else fetched / max(size, 1),
        read=pictures / took,
        decode=decode_alone(both, again / took_again),
    )


def _read(loader: Loader, rows: Rows, seconds: float) -> tuple[int, float, int]:
    """Read rows until the seconds are over: how many, in how many seconds, how many bytes."""
    begun, left, workers = time.perf_counter(), iter(rows.tolist()), max(1, loader.workers)

    def sizes(_: int) -> list[int]:
        """One worker's share: it takes the next row as often as there is time."""
        found = []
        for row in left:
            try:
                record = loader.data.record(row)
                record[:: mmap.PAGESIZE].max()  # a mapped page is read when it is looked at
                found.append(record.nbytes)
            except DamagedRecord as error:
                loader.skipped.add(str(error))
                found.append(0)
            if time.perf_counter() - begun >= seconds:
                break
        return found

    with ThreadPoolExecutor(workers) as pool:
        read = list(itertools.chain.from_iterable(pool.map(sizes, range(workers))))
    return len(read), time.perf_counter() - begun, sum(read)


def _bytes_from_disk() -> int | None:
    """What this process has had fetched from disks and networks so far, read-ahead included; Linux alone tells."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])
    return None


def _decode(loader: Loader, rows: Rows, seconds: float) -> float:
    """images/s of crops of these rows, read too, in batches of which each worker makes some in time."""

    def rate(images: int, workers: int, seconds: float) -> float:
        batches = _batches_of(loader, rows, images, workers)
        timer = _timed(batches, lambda _: None, loader.device, seconds, line=max(1, workers))
        return 1 / timer.measured(1).step

    one = rate(SMALLEST, 0, 0.0)
    images = min(loader.batch, max(SMALLEST, int(one * seconds / BATCHES)))
    return rate(images, loader.workers, seconds)


def _batches_of(
    loader: Loader, rows: Rows, images: int, workers: int
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
    """All that a run's step needs, never as a graph; it learns next to nothing."""
    cfg = dataclasses.replace(cfg, graph=False)
    info = assemble.data_info(cfg, loader, None, loader.device, DTYPES[cfg.precision])
    n, lr = len(loader), NEXT_TO_NOTHING
    schedule = LRSchedule(cfg.schedule, epochs=1, batches=n, steps=n, lr=lr)
    state = build(cfg, info, schedule)
    state.method.set_schedule(1, schedule.begins)
    state.method.net.train()
    return state


def _batch_in_time(
    state: TrainState, view: View, cfg: Config, loading: Loading, seconds: float
) -> int:
    """Pictures of a batch: the run's, or as many as there is time for, BATCHES times to load and, on a CPU, STEPS times to
    train on where a step takes SLOWER times its floor.
    """
    most = min(cfg.batch, max(SMALLEST, int(SHARES["train"] * seconds / BATCHES * loading.load)))
    if state.device.type == "cuda":
        return most
    peak = bounds.ceilings(state.device, state.dtype)

    def floor(images: int) -> float:
        cost = step_cost(state.method, view, dataclasses.replace(cfg, batch=images), state.device)
        return sum(bounds.floors(cost, peak).values())

    once = SHARES["step"] * seconds / STEPS / SLOWER
    return min(most, max(ENOUGH, int((once - floor(1)) / (floor(2) - floor(1)))))


def _on_random_pixels(state: TrainState, view: View, cfg: Config, seconds: float) -> Measured:
    """A step on one batch, again and again."""
    batch = random_batch(view, cfg.batch, state.device)
    if cfg.compile or state.device.type == "cuda":  # warm
        for _ in range(3):
            train_step(state, batch)
        wait_for(state.device)
    timer = _train(state, (batch for _ in itertools.count()), seconds)
    return timer.measured(cfg.batch)


def _train(state: TrainState, batches: Generator[Batch, None, None], seconds: float) -> StepTimer:
    return _timed(batches, lambda batch: train_step(state, batch), state.device, seconds)


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
            timer.line()
            timer.rate(images / took, waited / took)
    return timer


def _measured(
    together: Measured, alone: Measured, loading: Loading, batch: int, device: torch.device
) -> Measured:
    """A step on the data, and what its stages take by themselves: pictures that are made are its own work, no waiting.

    together, alone  a step of `batch` pictures on the data, and on random pixels
    """
    stages: dict[str, float] = {}
    if loading.read is not None:
        stages = {"read": batch / loading.read, "decode": batch / loading.decode}
    load = sum(stages.values())
    # a batch is waited for no longer than it takes; what was prefetched before the first step hides a wait
    hidden = max(0.0, load - together.step)
    step, wait = together.step + hidden, min(together.wait, load) + hidden
    busy = min(step, alone.work) if device.type == "cuda" else step - wait
    return dataclasses.replace(
        together, step=step, wait=wait, issue=alone.issue, busy=busy, **stages
    )


def _epochs(loader: Loader) -> Generator[Batch, None, None]:
    """Epoch after epoch."""
    for number in itertools.count():
        batch = None
        for batch in loader.epoch(number):
            yield batch
        if batch is None:
            raise RunError("no picture to be judged on can be read: give --val others")


def _validation(state: TrainState, loader: Loader, seconds: float) -> float:
    """Seconds of a validation pass, from some of its batches; leaves the net in eval mode."""
    state.method.net.eval()
    scores = functools.partial(state.scores, images=loader.batch)
    timer = _timed(_epochs(loader), scores, state.device, seconds)
    return timer.measured(loader.images).step
