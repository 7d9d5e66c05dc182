"""What loaders, first batch, memory and conversion cost on a folder of original pictures.

    python -m benchmarks.bench_loaders [--root FOLDER] [--out FILE.jsonl or FOLDER] [--quick]

The originals are converted once, by dataprep/to_ffcv.py at short side 256 and quality 90, into --work. All loaders
then make 224-pixel random-resized, mirrored crops with as many workers as there are cores, in turns (A B C A B C ...),
each as one long epoch over the same pictures again and again, so that starting workers is not what is measured.
Rates are per CPU-second of the process and its workers: busy neighbours change them little. Pictures lie in the page cache.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import itertools
import multiprocessing
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastrot.assemble
from benchmarks import measure
from fastrot import entry
from fastrot.config import RandomResized, Refused
from fastrot.core import Data, Picks, View
from fastrot.entry import cores

SIZE, BATCH = 224, 64
FIRST_BATCH = 192  # the trainer's own batch: its first one is what people wait for
EPOCHS = 20  # over which the memory may not grow
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPARE = ("--short-side", "256", "--quality", "90")
OURS, FOLDER, CEILING = "beton", "folder", "synthetic"
UINT8, FLOAT = "torchvision uint8", "torchvision normalised float"
TARGETS = {UINT8: 4.0, FLOAT: 5.0}  # times: our reader over torchvision's, per core
MB = 2**20


# ---- the loaders: each draws about `images` crops as one epoch, and says how many it drew ----


class Repeated:
    """The same pictures `times` over, as data: an epoch as long as a steady measurement wants."""

    def __init__(self, data: Data, times: int):
        self.data, self.rows = data, data.rows * times
        self.labels, self.keys = np.tile(data.labels, times), np.tile(data.keys, times)
        self.classes, self.mean, self.std = data.classes, data.mean, data.std
        self.fingerprint = f"{data.fingerprint} x {times}"

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return self.data.sizes(rows % self.data.rows)

    def pictures(
        self, plan: Iterable[Picks], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, ...]]:
        return self.data.pictures(map(self._once, plan), device, workers)

    def _once(self, picks: Picks) -> Picks:
        rows = [each.copy() for each in picks.rows]
        for each in rows:
            each[:, 0] %= self.data.rows
        return Picks(tuple(rows), picks.sizes)


def ours(path: str | Path, batch: int, workers: int) -> Callable[[int], int]:
    """Our own loader over anything that it opens."""
    data = fastrot.assemble.open_data(path)

    def run(images: int) -> int:
        again = Repeated(data, max(1, -(-max(images, batch) // data.rows)))
        loader = open_loader(again, batch, workers)
        return sum(len(drawn.index) for drawn in loader.epoch(0))

    return run


def torchvision(root: Path, batch: int, workers: int, *, normalised: bool) -> Callable[[int], int]:
    """What most people use: ImageFolder, Pillow, RandomResizedCrop, DataLoader."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets
    from torchvision import transforms as T

    tail = [T.ToTensor(), T.Normalize(MEAN, STD)] if normalised else [T.PILToTensor()]
    looks = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), *tail])
    pictures = datasets.ImageFolder(str(root), looks)

    def run(images: int) -> int:
        again = RandomSampler(pictures, num_samples=max(images, batch))
        batches = DataLoader(pictures, batch, sampler=again, num_workers=workers, drop_last=True)
        return sum(len(labels) for _, labels in batches)

    return run


def decoding(path: Path) -> Callable[[int], int]:
    """Whole pictures of a .beton, one thread, no crops: what no reader of whole pictures can go below."""
    data: Any = fastrot.assemble.open_data(path)

    def run(images: int) -> int:
        for row in itertools.islice(itertools.cycle(range(data.rows)), images):
            data.picture(row)
        return images

    return run


def open_loader(data: Any, batch: int, workers: int):
    view = View(crops=(RandomResized(size=SIZE),))
    return fastrot.assemble.open_loader(data, view, batch=batch, workers=workers, enlarge=True)


# ---- rates ----


def rates(
    runs: dict[str, Callable[[int], int]], *, seconds: float, reps: int, warm: int
) -> dict[str, list[tuple[float, float]]]:
    """(images/s, images/s and core) of each loader, `reps` times in turns of about `seconds`."""
    images = {}
    for name, run in runs.items():
        run(warm)  # files into the page cache, code into memory
        images[name] = max(warm, round(seconds * _rate(run, warm)[0]))
    found = {name: [] for name in runs}
    for _ in range(reps):
        for name, run in runs.items():
            found[name].append(_rate(run, images[name]))
    return found


def _rate(run: Callable[[int], int], images: int) -> tuple[float, float]:
    wall, used = time.perf_counter(), measure.cpu_seconds()
    drawn = run(images)
    return drawn / (time.perf_counter() - wall), drawn / (measure.cpu_seconds() - used)


def loader_rows(
    root: Path, beton: Path, *, workers: int, seconds: float, reps: int, batch: int = BATCH
) -> Iterator[dict[str, Any]]:
    """A row for each loader, and for our reader's advantage over torchvision's, from neighbouring turns."""
    runs = {
        OURS: ours(beton, batch, workers),
        UINT8: torchvision(root, batch, workers, normalised=False),
        FLOAT: torchvision(root, batch, workers, normalised=True),
        FOLDER: ours(root, batch, workers),
        CEILING: ours(f"{CEILING}:1000", batch, workers),
        "beton, whole pictures decoded": decoding(beton),
    }
    found = rates(runs, seconds=seconds, reps=reps, warm=2 * batch)
    shape = {"size": SIZE, "batch": batch, "workers": workers}
    for name, each in found.items():
        wall = measure.middle([w for w, _ in each], "images/s")
        yield row(
            "loader",
            name,
            mode="decode alone, one thread" if name.endswith("decoded") else "crops",
            shape=shape,
            dtype="float32" if name == FLOAT else "uint8",
            **measure.middle([core for _, core in each], "images/s and core"),
            images_per_s=wall["p50"],
            images_per_s_p20=wall["p20"],
            images_per_s_p80=wall["p80"],
        )
    for name, target in TARGETS.items():
        pairs = zip(found[OURS], found[name], strict=True)
        yield row(
            "ratio",
            f"{OURS} / {name}",
            mode="per core",
            shape=shape,
            dtype="float32" if name == FLOAT else "uint8",
            **measure.middle([a[1] / b[1] for a, b in pairs], "times"),
            target=target,
            better="higher",
        )


# ---- first batch, memory ----


def first_batch(path: str, batch: int, workers: int) -> float:
    """Seconds from the loader's construction, its file included, to the first batch."""
    begun = time.perf_counter()
    batches = open_loader(path, batch, workers).epoch(0)
    next(batches)
    seconds = time.perf_counter() - begun
    batches.close()
    return seconds


def memory_of_epochs(path: str, batch: int, workers: int, epochs: int) -> list[float]:
    """MB of memory that is the process's own (RssAnon): before the loader is made, and after each epoch."""
    held = [_own_memory("self")]
    loader = open_loader(path, batch, workers)
    for epoch in range(epochs):
        for _ in loader.epoch(epoch):
            pass
        held.append(_own_memory("self"))
    return held


def process_rows(
    beton: Path, *, workers: int, reps: int, images: int, epochs: int = EPOCHS
) -> Iterator[dict[str, Any]]:
    """First batch and memory growth, each in processes of their own."""
    batch = min(FIRST_BATCH, images // 2)
    waits = [_fresh(first_batch, str(beton), batch, workers) for _ in range(reps)]
    yield row(
        "first batch",
        OURS,
        mode="fresh process, from the loader's construction",
        shape={"size": SIZE, "batch": batch, "workers": workers},
        **measure.middle(waits, "s"),
        target=0.5,
        better="lower",
    )
    batch = min(BATCH, images // 2)
    held = _fresh(memory_of_epochs, str(beton), batch, workers, epochs)
    last = held[-epochs // 2 :]
    shape = {"size": SIZE, "batch": batch, "workers": workers, "epochs": epochs}
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


def _fresh(task: Callable, *args: Any) -> Any:
    """The task's result, from a process that has done nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *args).result()


def _own_memory(process: str | int) -> float:
    """MB in memory that are no file's; 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / MB
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0.0


# ---- conversion ----


def conversion_rows(
    root: Path, work: Path, *, workers: int, times: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Cost of to_ffcv.py on the pictures several times over, and how its memory grew with their number."""
    peaks, shape = [], {"short": 256, "quality": 90, "workers": workers}
    pictures = [path for path in root.rglob("*") if path.is_file() and path.parent != root]
    for over in times:
        with tempfile.TemporaryDirectory(dir=work, prefix="conversion-") as folder:
            for path, k in itertools.product(pictures, range(over)):
                link = Path(folder) / "originals" / path.parent.name / f"{k}-{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
            wall, used = time.perf_counter(), measure.cpu_seconds()
            out = Path(folder) / "made.beton"
            parent, worker = convert(Path(folder) / "originals", out, workers)
            wall, used = time.perf_counter() - wall, measure.cpu_seconds() - used
        peaks.append(parent + workers * worker)
        yield row(
            "conversion",
            f"{len(pictures) * over:,} pictures",
            mode="start of the processes included",
            shape=shape,
            **measure.middle([len(pictures) * over / used], "images/s and core"),
            images_per_s=len(pictures) * over / wall,
            parent_mb=parent,
            worker_mb=worker,
        )
    yield row(
        "conversion memory",
        f"{times[1] // times[0]} times the pictures",
        mode="peaks of parent and workers together, over those of fewer pictures",
        shape=shape,
        **measure.middle([peaks[1] / peaks[0]], "times"),
        peaks_mb=peaks,
        target=1.1,
        better="lower",
    )


def convert(root: Path, out: Path, workers: int) -> tuple[float, float]:
    """Run to_ffcv.py; the most MB of its own that the parent held, and the most that any worker did."""
    script = measure.ROOT / "dataprep" / "to_ffcv.py"
    knobs = ("--source", "imagefolder", "--root", root, "--out", out, "--workers", workers)
    command = [sys.executable, str(script), *map(str, knobs), *PREPARE, "--allow-rejects"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks = [0.0, 0.0]

    def watch() -> None:
        while running.poll() is None:
            peaks[0] = max(peaks[0], _own_memory(running.pid))
            peaks[1] = max([peaks[1], *map(_own_memory, _children(running.pid))])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    running.wait()
    watcher.join()
    if running.returncode:
        raise Refused(f"{root} could not be converted: run  {' '.join(command)}  to see why")
    return peaks[0], peaks[1]


def _children(process: int) -> list[int]:
    try:
        return [
            int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


# ---- the command ----


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="loaders", variant=variant, **{"warmup": 1, **fields})


def originals(root: Path | None) -> Path:
    """The folder of original pictures, or one sentence on how to name one."""
    chosen = root or measure.shared_data() / "imagenet-sample"
    if not chosen.is_dir():
        raise Refused(
            f"{chosen} is no folder: name a folder of class folders of original pictures with --root DIR"
        )
    return chosen


def prepared(root: Path, work: Path, workers: int) -> Path:
    """The originals as .beton, converted where this has not been done."""
    out = work / f"{root.name}-256-q90.beton"
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        convert(root, out, workers)
    return out


def main() -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="class folders of original pictures")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--quick", action="store_true", help="a short look; kept only with --out")
    asked = parser.parse_args()
    root, workers = originals(asked.root), cores()
    beton = prepared(root, asked.work, workers)
    images = fastrot.assemble.open_data(beton).rows
    out = measure.results("cpu", asked.out) if asked.out or not asked.quick else None
    seconds, reps = (0.5, 2) if asked.quick else (3.0, 7)
    rows = itertools.chain(
        loader_rows(root, beton, workers=workers, seconds=seconds, reps=reps),
        process_rows(beton, workers=workers, reps=2 if asked.quick else 5, images=images),
        conversion_rows(
            root, asked.work, workers=workers, times=(1, 2) if asked.quick else (4, 12)
        ),
    )
    for each in rows:
        if out is not None:
            measure.append(out, each)
        measure.say(each)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
