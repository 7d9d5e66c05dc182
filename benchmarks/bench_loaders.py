"""What loaders, first batch, memory and conversion cost on a folder of original pictures.

    python -m benchmarks.bench_loaders [--root FOLDER] [--out FILE.jsonl or FOLDER] [--quick]

The originals are converted once, by dataprep/to_ffcv.py at short side 256 and quality 90, into --work. All loaders
then make 224-pixel random-resized, mirrored crops with as many workers as there are cores, in turns (A B C A B C ...),
each as one long epoch over the same pictures again and again, so that starting workers is not what is measured.
Rates are per CPU-second of the process and its workers: busy neighbours change them little. Pictures lie in the page cache.

FFCV (its own pipeline, and ours through its Loader) reads the same .beton as our reader. webdataset, torchvision's v2
transforms and a DataLoader over simplejpeg read the very JPEGs of that .beton, from tars and files. What is not installed
is left out with a line that says so: `make ffcv`, `pip install webdataset`.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import dataclasses
import functools
import importlib.util
import io
import itertools
import multiprocessing
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

import fastrot.assemble
from benchmarks import measure
from benchmarks.dali_itself import dali_pipeline
from fastrot import entry
from fastrot.config import RandomResized, Refused
from fastrot.core import Data, Picks, View
from fastrot.entry import cores

SIZE, BATCH = 224, 64
FIRST_BATCH = 192  # the trainer's own batch: its first one is what people wait for
EPOCHS = 20  # over which the memory may not grow
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT = 256  # pixels of a prepared picture's short side
PREPARE = ("--short-side", str(SHORT), "--quality", "90")
OURS, FOLDER, CEILING = "beton", "folder", "synthetic"
UINT8, FLOAT = "torchvision uint8", "torchvision normalised float"
FFCV, THROUGH_FFCV = "FFCV, its own pipeline", "FFCV's Loader, our order and boxes"
WEBDATASET, V2 = "webdataset + PIL, same JPEGs", "torchvision v2 uint8, same JPEGs"
SIMPLEJPEG = "DataLoader + simplejpeg, same JPEGs"
DALI, THROUGH_DALI = "DALI, its own pipeline, same JPEGs", "DALI, our order and boxes"
TARGETS = {  # times, per core
    (OURS, UINT8): 4.0,
    (OURS, FLOAT): 5.0,
    (OURS, FFCV): 1.1,
    (THROUGH_FFCV, FFCV): 0.95,
    (THROUGH_DALI, DALI): 1.0,
}
CONVERSION_TARGET = 1.0  # times: to_ffcv.py over FFCV's plain writer, per core
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
        return dataclasses.replace(picks, rows=tuple(rows))


def ours(path: str | Path, batch: int, workers: int, loader: str = "auto") -> Callable[[int], int]:
    """Our own loader over anything that it opens."""
    data = fastrot.assemble.open_data(path, loader)

    def run(images: int) -> int:
        again = Repeated(data, max(1, -(-max(images, batch) // data.rows)))
        batches = open_loader(again, batch, workers).epoch(0)
        return sum(len(drawn.index) for drawn in batches)

    return run


def torchvision(root: Path, batch: int, workers: int, *, normalised: bool) -> Callable[[int], int]:
    """What most people use: ImageFolder, Pillow, RandomResizedCrop, DataLoader."""
    from torchvision import datasets
    from torchvision import transforms as T

    tail = [T.ToTensor(), T.Normalize(MEAN, STD)] if normalised else [T.PILToTensor()]
    looks = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), *tail])
    return dataloader(datasets.ImageFolder(str(root), looks), batch, workers)


def dataloader(pictures: Dataset, batch: int, workers: int) -> Callable[[int], int]:
    """The DataLoader of torch over pictures that are drawn with replacement."""

    def run(images: int) -> int:
        again = RandomSampler(pictures, num_samples=max(images, batch))
        batches = DataLoader(pictures, batch, sampler=again, num_workers=workers, drop_last=True)
        return sum(len(labels) for _, labels in batches)

    return run


class Jpegs(Dataset):
    """Files and labels, with a function from an encoded picture (uint8 [n]) to its crop."""

    def __init__(self, files: list[Path], look: Callable[[Tensor], Tensor]):
        self.files, self.look = [str(file) for file in files], look
        self.labels = [int(file.parent.name) for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.look(torch.from_numpy(np.fromfile(self.files[i], np.uint8))), self.labels[i]


def with_v2(files: list[Path], batch: int, workers: int) -> Callable[[int], int]:
    """Decoder and v2 transforms of torchvision, on uint8 tensors."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    looks = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])

    def look(encoded: Tensor) -> Tensor:
        return looks(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    return dataloader(Jpegs(files, look), batch, workers)


def with_simplejpeg(files: list[Path], batch: int, workers: int) -> Callable[[int], int]:
    """The decoder and the resampler of our reader, in torch's DataLoader, with torchvision's boxes."""
    from torchvision.transforms import RandomResizedCrop

    def look(encoded: Tensor) -> Tensor:
        picture = simplejpeg.decode_jpeg(encoded.numpy())
        size = torch.empty(3, *picture.shape[:2], device="meta")
        y, x, h, w = RandomResizedCrop.get_params(size, [0.08, 1.0], [3 / 4, 4 / 3])
        crop = cv2.resize(picture[y : y + h, x : x + w], (SIZE, SIZE))
        return torch.from_numpy(cv2.flip(crop, 1) if torch.rand(()) < 0.5 else crop)

    return dataloader(Jpegs(files, look), batch, workers)


def with_webdataset(shards: list[Path], batch: int, workers: int) -> Callable[[int], int]:
    """Tars through webdataset, drawn with replacement, decoded and cropped by Pillow."""
    import webdataset
    from torchvision import transforms as T

    looks = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.PILToTensor()])

    def run(images: int) -> int:
        steps = max(1, round(images / batch / max(workers, 1)))  # of each worker
        pictures = (
            webdataset.WebDataset(
                [str(shard) for shard in shards], resampled=True, shardshuffle=False
            )
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(looks, int)
            .batched(batch)
            .with_epoch(steps)
        )
        batches = webdataset.WebLoader(pictures, batch_size=None, num_workers=workers)
        return sum(len(labels) for _, labels in batches)

    return run


def ffcv_pipeline(path: Path, batch: int, workers: int) -> Callable[[int], int]:
    """FFCV's own Loader, decoder, flip and conversion, as its documentation puts them together."""
    threads, draw = torch.get_num_threads(), np.random.default_rng(0)
    import numba
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=max(1, min(workers, numba.config.NUMBA_NUM_THREADS)),
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
            "index": None,
        },
    )

    def run(images: int) -> int:
        wanted = max(images // batch, 1) * batch
        once = [draw.permutation(loader.indices) for _ in range(-(-wanted // len(loader.indices)))]
        rows = np.concatenate(once)[:wanted]  # as Loader.__iter__, but for an epoch as long as ours
        drawn = sum(len(images) for images, _ in EpochIterator(loader, rows))
        torch.set_num_threads(threads)  # FFCV sets torch's
        return drawn

    torch.set_num_threads(threads)
    return run


@functools.cache  # so that it is told once
def installed(*modules: str) -> bool:
    """Whether all of them are; told in a line where they are not."""
    for name in modules:  # a package before what is in it
        if importlib.util.find_spec(name) is None:
            print(f"left out, not installed: {name}", flush=True)
            return False
    return True


def decoding(path: Path) -> Callable[[int], int]:
    """Whole pictures of a .beton, one thread, no crops: what no reader of whole pictures can go below."""
    data: Any = fastrot.assemble.open_data(path)

    def run(images: int) -> int:
        for row in itertools.islice(itertools.cycle(range(data.rows)), images):
            data.picture(row)
        return images

    return run


def open_loader(data: Any, batch: int, workers: int, loader: str = "auto"):
    view, how = View(crops=(RandomResized(size=SIZE),)), {"loader": loader, "enlarge": True}
    return fastrot.assemble.open_loader(data, view, batch=batch, workers=workers, **how)


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
    files, shards = unpacked(beton, shards=max(workers, 1))
    runs = {OURS: ours(beton, batch, workers)}
    if installed("ffcv"):
        runs |= {
            THROUGH_FFCV: ours(beton, batch, workers, "ffcv"),
            FFCV: ffcv_pipeline(beton, batch, workers),
        }
    if installed("webdataset"):
        runs[WEBDATASET] = with_webdataset(shards, batch, workers)
    if installed("nvidia", "nvidia.dali"):
        runs |= {
            THROUGH_DALI: ours(beton, batch, workers, "dali"),
            DALI: dali_pipeline(files, batch, workers, size=SIZE),
        }
    runs |= {
        V2: with_v2(files, batch, workers),
        SIMPLEJPEG: with_simplejpeg(files, batch, workers),
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
    for (one, other), target in TARGETS.items():
        if other not in found:
            continue
        pairs = zip(found[one], found[other], strict=True)
        yield row(
            "ratio",
            f"{one} / {other}",
            mode="per core",
            shape=shape,
            dtype="float32" if other == FLOAT else "uint8",
            **measure.middle([a[1] / b[1] for a, b in pairs], "times"),
            target=target,
            better="higher",
        )


# ---- first batch, memory ----


def first_batch(path: str, batch: int, workers: int, loader: str = "auto") -> float:
    """Seconds from the loader's construction, its file included, to the first batch."""
    begun = time.perf_counter()
    batches = open_loader(path, batch, workers, loader).epoch(0)
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
    if installed("ffcv"):
        waits = [_fresh(first_batch, str(beton), batch, workers, "ffcv") for _ in range(reps)]
        yield row(
            "first batch",
            THROUGH_FFCV,
            mode="fresh process, from the loader's construction, compiled by an earlier one",
            shape={"size": SIZE, "batch": batch, "workers": workers},
            **measure.middle(waits, "s"),
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
    from fastrot.data.beton import load_ffcv  # noqa: F401 (FFCV without its typed dict: 3 s less)

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
            count, seconds = _fresh(ffcvs_writer, str(source), str(theirs), max(workers, 1))
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
    script = measure.ROOT / "dataprep" / "to_ffcv.py"
    knobs = ("--source", "imagefolder", "--root", root, "--out", out, "--workers", workers)
    command = [sys.executable, str(script), *map(str, knobs), *PREPARE, "--allow-rejects", *more]
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
    others = {
        name: _version(name) for name in ("ffcv", "numba", "webdataset", "nvidia-dali-cuda130")
    }
    return measure.row(what, theme="loaders", variant=variant, **{"warmup": 1, **others, **fields})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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


def unpacked(beton: Path, shards: int) -> tuple[list[Path], list[Path]]:
    """The JPEGs of a .beton as files, LABEL/ROW.jpg, and as tars, made where this has not been done."""
    data: Any = fastrot.assemble.open_data(beton)
    files = beton.with_suffix("") / "jpegs"
    tars = [beton.with_suffix("") / f"{k}-of-{shards}.tar" for k in range(shards)]
    names = [files / str(data.labels[row]) / f"{row:07d}.jpg" for row in range(data.rows)]
    for row, name in enumerate(names):
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(data.record(row).tobytes())
    for k, tar in enumerate(tars):
        if not tar.exists():
            with tarfile.open(tar, "w") as file:
                for row, name in list(enumerate(names))[k::shards]:
                    file.add(name, f"{row:07d}.jpg")
                    label = tarfile.TarInfo(f"{row:07d}.cls")
                    label.size = len(name.parent.name)
                    file.addfile(label, io.BytesIO(name.parent.name.encode()))
    return names, tars


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
        conversion_ratio_rows(
            root,
            asked.work,
            workers=workers,
            reps=2 if asked.quick else 3,
            over=1 if asked.quick else 4,
        ),
    )
    for each in rows:
        if out is not None:
            measure.append(out, each)
        measure.say(each)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
