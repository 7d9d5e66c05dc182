"""What loaders cost on the same pictures: rates, waits beside a training step, first batch, memory, bytes.

    python -m benchmarks.bench_loaders [--root FOLDER] [--out FILE.jsonl or FOLDER] [--only NAME] [--quick]

The originals are prepared once in each format (contestants.py), at short side 256 and quality 90, into --work. All
loaders then make 224-pixel random-resized, mirrored crops with as many workers as there are cores, in turns (A B C A B
C ...), each as one long epoch over the same pictures again and again, so that starting workers is not what is measured.
LRSchedule are per CPU-second of the process and its workers: busy neighbours change them little. Pictures lie in the page cache.

Beside a training step: after each batch a stand-in for the step keeps the device busy, a matrix product on one core
(on a GPU as many operations as AlexNet's step takes). What it costs by itself is subtracted from nothing: images/s
are those of both together, and the share of the time in which the step waited for its batch is told.
"""

import argparse
import itertools
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastrot.assemble
from benchmarks import contestants, measure
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
    runs: dict[str, Run],
    step: Callable[[], Any] = lambda: None,
    *,
    seconds: float,
    reps: int,
    warm: int,
) -> dict[str, list[Rate]]:
    """The rate of each loader, `reps` times in turns of about `seconds`, with a step after each batch."""
    images = {}
    for name, run in runs.items():
        _rate(run, step, warm)  # files into the page cache, code into memory
        images[name] = max(warm, round(seconds * _rate(run, step, warm).per_s))
    found = {name: [] for name in runs}
    for _ in range(reps):
        for name, run in runs.items():
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
    runs = {name: c.open(opened[name], batch, workers) for name, c in chosen.items()}
    alone = rates(runs, seconds=seconds, reps=reps, warm=2 * batch)
    shape = {"size": SIZE, "batch": batch, "workers": workers}
    for name, found in alone.items():
        yield row(
            "loader",
            name,
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
                f"{one} / {other}",
                mode="per core",
                shape=shape,
                dtype=chosen[other].dtype,
                **measure.middle([a.per_core / b.per_core for a, b in pairs], "times"),
                target=target,
                better="higher",
            )
    yield from _busy_rows(runs, chosen, shape, device, seconds, reps)


def _busy_rows(
    runs: dict[str, Run],
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
    crops = {name: run for name, run in runs.items() if chosen[name].mode == "crops"}
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
    return {
        "images_per_s": wall["p50"],
        "images_per_s_p20": wall["p20"],
        "images_per_s_p80": wall["p80"],
    }


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


# ---- the command ----


def main() -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="class folders of original pictures")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--only", action="append", help="a loader's name; may be given again")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--reps", type=int, default=5, help="turns of each loader")
    parser.add_argument("--quick", action="store_true", help="a short look; kept only with --out")
    asked = parser.parse_args()
    formats = Formats(originals(asked.root), asked.work, cores())
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    only = asked.only
    if asked.quick and device == "cuda" and not only:
        only = [OURS, *contestants.ON_A_GPU]
    chosen = contestants.present(only)
    few = {name: each for name, each in chosen.items() if not asked.quick or name == OURS}
    images = fastrot.assemble.open_data(formats.beton()).rows
    out = measure.results(device, asked.out) if asked.out or not asked.quick else None
    seconds, reps = (0.5, 2) if asked.quick else (asked.seconds, asked.reps)
    rows = itertools.chain(
        loader_rows(formats, chosen, device=device, seconds=seconds, reps=reps),
        process_rows(formats, few, reps=reps, images=images),
    )
    for each in rows:
        if out is not None:
            measure.append(out, each)
        measure.say(each)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
