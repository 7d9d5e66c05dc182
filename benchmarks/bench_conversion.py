"""What it costs to prepare pictures: to_ffcv.py, its memory, and FFCV's own writer beside it.

    python -m benchmarks.bench_conversion [--root FOLDER] [--out FILE.jsonl or FOLDER] [--quick]

The originals are linked several times over and converted at short side 256 and quality 90. Rates are per CPU-second of
the process and its workers: busy neighbours change them little.
"""

import itertools
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from benchmarks import contestants, measure, runs
from benchmarks.bench_loaders import children, fresh, own_memory
from benchmarks.contestants import SHORT, installed, originals, row
from fastrot import entry
from fastrot.config import UsageError
from fastrot.entry import cores

CONVERSION_TARGET = 1.0  # times: to_ffcv.py over FFCV's plain writer, per core


def conversion_rows(
    root: Path, work: Path, *, workers: int, times: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Cost of to_ffcv.py on the pictures several times over, and how its memory grew with their number."""
    peaks, shape = [], {"short": SHORT, "quality": 90, "workers": workers}
    for over in times:
        with tempfile.TemporaryDirectory(dir=work, prefix="conversion-") as folder:
            count = linked(root, Path(folder) / "originals", over)
            wall, used = time.perf_counter(), measure.cpu_seconds()
            out = Path(folder) / "made.beton"
            parent, worker = convert(Path(folder) / "originals", out, workers)
            wall, used = time.perf_counter() - wall, measure.cpu_seconds() - used
        peaks.append(parent + workers * worker)
        yield row(
            "conversion",
            f"{count:,} pictures",
            mode="start of the processes included",
            shape=shape,
            **measure.middle([count / used], "images/s and core"),
            images_per_s=count / wall,
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


class Shrunk(Dataset):
    """What people feed FFCV's writer: Pillow's pictures, upright, in RGB, short side 256; and their labels."""

    def __init__(self, root: Path):
        self.files = sorted(path for path in root.rglob("*") if path.is_file())
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(self.files[i]) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        if (short := min(picture.size)) > SHORT:
            width, height = (int(SHORT * side / short) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return picture, self.classes.index(self.files[i].parent.name)


def ffcvs_writer(root: str, out: str, workers: int) -> tuple[int, float]:
    """Pictures that FFCV's DatasetWriter wrote, and the CPU-seconds of its call; for a fresh process."""
    from fastrot.data.beton import ffcv  # noqa: F401 (FFCV without its typed dict: 3 s less)

    # isort: split
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    pictures = Shrunk(Path(root))
    image = RGBImageField(write_mode="jpg", max_resolution=None, jpeg_quality=90)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that people start
    writer = DatasetWriter(out, {"image": image, "label": IntField()}, num_workers=workers)
    used = measure.cpu_seconds()
    writer.from_indexed_dataset(pictures, chunksize=16)
    for child in multiprocessing.active_children():  # it does not wait for them to end
        child.join()
    return len(pictures), measure.cpu_seconds() - used


def conversion_ratio_rows(
    root: Path, work: Path, *, workers: int, reps: int, over: int
) -> Iterator[dict[str, Any]]:
    """FFCV's plain writer, and ours beside it, on the same pictures in turns."""
    if not installed("ffcv"):
        return
    rates, ratios = [], []
    for _ in range(reps):
        with tempfile.TemporaryDirectory(dir=work, prefix="conversion-") as folder:
            source, theirs = Path(folder) / "originals", Path(folder) / "theirs.beton"
            count = linked(root, source, over)
            used = _cost(convert, source, Path(folder) / "ours.beton", workers)
            used -= _cost(convert, source, Path(folder) / "one.beton", workers, "--limit", "1")
            count, seconds = fresh(ffcvs_writer, str(source), str(theirs), max(workers, 1))
        rates.append(count / seconds)
        ratios.append(seconds / used)
    shape = {"short": SHORT, "quality": 90, "workers": workers}
    yield row(
        "conversion",
        "FFCV's plain writer, Pillow's pictures",
        mode=f"{count:,} pictures, without the start of the process",
        shape=shape,
        **measure.middle(rates, "images/s and core"),
    )
    yield row(
        "ratio",
        "to_ffcv.py / FFCV's plain writer",
        mode="conversion per core, without the start of the processes",
        shape=shape,
        **measure.middle(ratios, "times"),
        target=CONVERSION_TARGET,
        better="higher",
    )


def _cost(task: Callable, *args: Any) -> float:
    """CPU-seconds of a call and of the processes that it starts."""
    before = measure.cpu_seconds()
    task(*args)
    return measure.cpu_seconds() - before


def linked(root: Path, source: Path, over: int) -> int:
    """The pictures of `root` several times over, as links; how many these are."""
    pictures = [path for path in root.rglob("*") if path.is_file() and path.parent != root]
    for path, k in itertools.product(pictures, range(over)):
        link = source / path.parent.name / f"{k}-{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return len(pictures) * over


def convert(root: Path, out: Path, workers: int, *more: str) -> tuple[float, float]:
    """Run to_ffcv.py, with `more` knobs; the most MB of its own that the parent held, and the most that any worker did."""
    knobs = contestants.conversion(root, workers, "--quality", "90", *more)
    command = runs.command("dataprep/to_ffcv.py", *knobs, "--out", out)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks = [0.0, 0.0]

    def watch() -> None:
        while running.poll() is None:
            peaks[0] = max(peaks[0], own_memory(running.pid))
            peaks[1] = max([peaks[1], *map(own_memory, children(running.pid))])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    running.wait()
    watcher.join()
    if running.returncode:
        raise UsageError(f"{root} could not be converted: run  {' '.join(command)}  to see why")
    return peaks[0], peaks[1]


# ---- the command ----


def main() -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work", "quick")
    asked = parser.parse_args()
    root, work, workers = originals(asked.root), asked.work, cores()
    work.mkdir(parents=True, exist_ok=True)
    times, reps, over = ((1, 2), 2, 1) if asked.quick else ((4, 12), 3, 4)
    rows = itertools.chain(
        conversion_rows(root, work, workers=workers, times=times),
        conversion_ratio_rows(root, work, workers=workers, reps=reps, over=over),
    )
    runs.keep(rows, asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
