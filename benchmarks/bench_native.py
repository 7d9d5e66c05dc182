"""What the C++ extension gains: crops of .beton records against FFCV, torchvision and our own Python form; crops of packs.

    python -m benchmarks.bench_native [--root FOLDER] [--work FOLDER] [--out FILE.jsonl or FOLDER] [--quick]

The originals are converted twice, at short side 256 and at long side 400, quality 90, into --work. All readers make
224-pixel random-resized, mirrored crops with as many workers as there are cores, in turns (A B C A B C ...), each as
one long epoch: FFCV allocates its buffers anew for each, which would weigh in a short one. LRSchedule are per
CPU-second of the process and its workers. Pictures lie in the page cache.

A pack's crops are made of random tiles and pixels, of the sizes that the pictures have at short side 256: what their
decoding takes does not depend on what they show.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastrot.assemble
from benchmarks import contestants, measure
from benchmarks.contestants import Run
from fastrot import entry, native
from fastrot.config import RandomResized, UsageError
from fastrot.data import crops
from fastrot.data.beton.write import BetonOptions, convert
from fastrot.entry import cores

SIZE, BATCH = 224, 64
FILES = {"short side 256": {"short_side": 256}, "long side 400": {"max_side": 400}}
QUICK, PLAIN, FFCV = "beton, C++ decoder", "beton, Python", "FFCV, its own pipeline"
TORCHVISION = "torchvision uint8"
TARGETS = {  # times, per core
    ("short side 256", FFCV): 1.7,
    ("short side 256", TORCHVISION): 7.0,
    ("long side 400", FFCV): 2.0,
}
PACK_TARGET = 5000.0  # crops a second and core


def prepared(root: Path, work: Path, workers: int) -> dict[str, Path]:
    """The originals as .beton in each of FILES, converted where this has not been done."""
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, how in FILES.items():
        found[name] = work / f"{root.name}-{name.replace(' ', '-')}-q90.beton"
        if not found[name].exists():
            options = {"source": "imagefolder", "root": root, "out": found[name], **how}
            convert(BetonOptions(quality=90, workers=workers, allow_rejects=True, **options))
    return found


# ---- records ----


def reader(path: Path, workers: int, *, quick: bool) -> Run:
    """Our reader in one of its forms."""
    data: Any = fastrot.assemble.open_data(path)
    data.native = quick

    def run(images: int) -> Iterator[int]:
        again = contestants.Repeated(data, -(-max(images, BATCH) // data.rows))
        batches = contestants.open_loader(again, BATCH, workers).epoch(0)
        yield from (len(drawn.index) for drawn in batches)

    return run


def reader_rows(
    root: Path, files: dict[str, Path], *, workers: int, seconds: float, reps: int
) -> Iterator[dict[str, Any]]:
    """A row for each reader of each file, and for the extension's advantage, from neighbouring turns."""
    for name, path in files.items():
        runs = {quick: reader(path, workers, quick=quick == QUICK) for quick in (QUICK, PLAIN)}
        if contestants.installed("ffcv"):
            runs[FFCV] = contestants.ffcv_pipeline(path, BATCH, workers)
        if (name, TORCHVISION) in TARGETS:
            runs[TORCHVISION] = contestants.torchvision(root, BATCH, workers, normalised=False)
        found = in_turns(runs, seconds=seconds, reps=reps)
        shape = {"size": SIZE, "batch": BATCH, "workers": workers}
        for variant, each in found.items():
            rate = measure.middle(each, "images/s and core")
            yield row("reader", f"{variant}, {name}", mode="crops", shape=shape, **rate)
        for other in runs:
            if other == QUICK:
                continue
            times = [a / b for a, b in zip(found[QUICK], found[other], strict=True)]
            target = TARGETS.get((name, other))
            yield row(
                "ratio",
                f"{QUICK} / {other}, {name}",
                mode="per core",
                shape=shape,
                **measure.middle(times, "times"),
                **({} if target is None else {"target": target, "better": "higher"}),
            )


def in_turns(runs: dict[str, Run], *, seconds: float, reps: int) -> dict[str, list[float]]:
    """Crops a second and core of each, `reps` times in turns of about `seconds` of the processor."""
    images = {}
    for name, run in runs.items():
        _rate(run, 2 * BATCH)  # files into the page cache, code into memory
        images[name] = max(2 * BATCH, round(seconds * _rate(run, 4 * BATCH)))
    found = {name: [] for name in runs}
    for _ in range(reps):
        for name, run in runs.items():
            found[name].append(_rate(run, images[name]))
    return found


def _rate(run: Run, images: int) -> float:
    used = measure.cpu_seconds()
    return sum(run(images)) / (measure.cpu_seconds() - used)


# ---- packs, checksums ----


def pack_rows(path: Path, *, seconds: float, reps: int) -> Iterator[dict[str, Any]]:
    """A row for each encoding of a pack: crops a second and core, one thread."""
    data, draw = fastrot.assemble.open_data(path), np.random.default_rng(0)
    rows = np.arange(min(data.rows, 256), dtype=np.int64)
    sizes = data.sizes(rows)
    runs = {}
    for encoding, side, unit in (("ycc", 8, native.TILE), ("raw", 1, 3)):
        across = -(-sizes.astype(np.int64) // side)
        first = np.concatenate([[0], np.cumsum(across.prod(axis=1))])
        pixels = draw.integers(0, 256, (int(first[-1]), unit), dtype=np.uint8)
        runs[encoding] = packed(pixels, first, sizes, encoding)
    for encoding, each in in_turns(runs, seconds=seconds, reps=reps).items():
        yield row(
            "pack crops",
            encoding,
            mode="C++, one thread",
            shape={"size": SIZE, "pictures": len(rows)},
            **measure.middle(each, "crops/s and core"),
            **({"target": PACK_TARGET, "better": "higher"} if encoding == "ycc" else {}),
        )


def packed(pixels: np.ndarray, first: np.ndarray, sizes: np.ndarray, encoding: Any) -> Run:
    """Crops of all pictures of a pack, epoch after epoch, with the boxes of training."""
    rows, numbers = np.arange(len(sizes), dtype=np.int64), itertools.count()
    out = np.empty((len(sizes), SIZE, SIZE, 3), np.uint8)

    def run(images: int) -> Iterator[int]:
        for _ in range(-(-images // len(sizes))):
            how = {"seed": 0, "epoch": next(numbers), "index": rows}
            box, flip = crops.boxes(RandomResized(size=SIZE), sizes[:, 0], sizes[:, 1], **how)
            order = np.concatenate([rows[:, None], box, flip[:, None]], axis=1, dtype=np.int64)
            native.pack_crops(pixels, first, sizes, encoding, order, SIZE, out)
            yield len(sizes)

    return run


def checksum_rows(path: Path, *, reps: int) -> Iterator[dict[str, Any]]:
    """What looking at a record's checksum takes."""
    data, library = fastrot.assemble.open_data(path), native.load()
    assert library is not None
    records = [data.record(row) for row in range(min(data.rows, 200))]  # type: ignore[attr-defined]
    places = [(record.ctypes.data, len(record)) for record in records]
    took = []
    for _ in range(reps):
        begun = time.process_time()
        for at, size in places:
            library.fastrot_crc32(at, size)
        took.append((time.process_time() - begun) / len(places) * 1e6)
    size = round(sum(map(len, records)) / len(records))
    yield row("checksum", "crc32", mode="C++", shape={"bytes": size}, **measure.middle(took, "us"))


# ---- the command ----


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(
        what,
        theme="loaders",
        variant=variant,
        dtype="uint8",
        warmup=1,
        native=native.why(),
        **fields,
    )


def main() -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="class folders of original pictures")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--quick", action="store_true", help="a short look; kept only with --out")
    asked = parser.parse_args()
    if native.load() is None:
        raise UsageError(f"the C++ extension is not there: {native.why()}")
    root, workers = contestants.originals(asked.root), cores()
    files = prepared(root, asked.work, workers)
    out = measure.results("cpu", asked.out) if asked.out or not asked.quick else None
    how: dict[str, Any] = (
        {"seconds": 0.5, "reps": 2} if asked.quick else {"seconds": 8.0, "reps": 5}
    )
    small = files["short side 256"]
    for each in itertools.chain(
        reader_rows(root, files, workers=workers, **how),
        pack_rows(small, **how),
        checksum_rows(small, reps=how["reps"]),
    ):
        if out is not None:
            measure.append(out, each)
        measure.say(each)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
