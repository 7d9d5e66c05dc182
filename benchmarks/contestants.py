"""The loaders that are measured beside each other, ours and others', over the same pictures in each format.

A contestant opens what it reads and gives a run: `run(images)` yields how many crops each batch held, for about so
many crops as one epoch, so that starting workers is not what is measured. What is not installed is left out with a
line that says so.
"""

import dataclasses
import functools
import importlib.util
import io
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

import fastrot.assemble
from benchmarks import measure, runs
from benchmarks.measure import IMAGENET
from fastrot import native
from fastrot.config import Placement, RandomResized, UsageError
from fastrot.core import CropRequest, Data, Decoded, Pending, Reader, View
from fastrot.data.pack.layout import WIDTH, firsts
from fastrot.data.pack.read import Pack
from fastrot.ops.blocks import PackTensors, unpack_crops

SIZE = 224  # pixels a side of a crop
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT = 256  # pixels of a prepared picture's short side
SYNTHETIC = 1000  # pictures

Run = Callable[[int], Iterator[int]]


# ---- the pictures, in each format ----


def originals(root: Path | None) -> Path:
    """The folder of original pictures, or one sentence on how to name one."""
    chosen = root or measure.shared_data() / "imagenet-sample"
    if not chosen.is_dir():
        raise UsageError(
            f"{chosen} is no folder: name a folder of class folders of original pictures with --root DIR"
        )
    return chosen


@dataclass(frozen=True)
class Formats:
    """The originals in each format, made under `work` where this has not been done."""

    root: Path  # class folders of original pictures
    work: Path
    workers: int
    max_side: int | None = None  # of a prepared picture; None: its short side is SHORT

    def of(self, name: str) -> Path:
        """Where a format lies: a method of this class by its name, `root`, or `synthetic`."""
        found = getattr(self, name, None)
        return Path(name) if found is None else found if isinstance(found, Path) else found()

    def beton(self) -> Path:
        return self._made("to_ffcv.py", "{}-256-q90.beton", "--quality", "90")

    def raw(self) -> Path:
        return self._made("to_ffcv.py", "{}-256-raw.beton", "--encoding", "raw")

    def pack(self) -> Path:
        return self._made("to_pack.py", "{}-256.pack")

    def shards(self) -> Path:
        return self._made("to_dali.py", "{}-256-q90.shards", "--quality", "90")

    def jpegs(self) -> Path:
        """The JPEGs of the .beton as files, LABEL/ROW.jpg."""
        data: Any = fastrot.assemble.open_data(self.beton())
        folder = self.beton().with_suffix("") / "jpegs"
        for row in range(data.rows):
            file = folder / str(data.labels[row]) / f"{row:07d}.jpg"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data.record(row).tobytes())
        return folder

    def tars(self) -> Path:
        """The JPEGs of the .beton as webdataset's tars, one a worker."""
        folder, files = self.beton().with_suffix("") / "tars", files_of(self.jpegs())
        folder.mkdir(exist_ok=True)
        shards = max(self.workers, 1)
        for k in range(shards):
            tar = folder / f"{k}-of-{shards}.tar"
            if not tar.exists():
                with tarfile.open(tar, "w") as file:
                    for name in files[k::shards]:
                        file.add(name, f"{name.stem}.jpg")
                        label = tarfile.TarInfo(f"{name.stem}.cls")
                        label.size = len(name.parent.name)
                        file.addfile(label, io.BytesIO(name.parent.name.encode()))
        return folder

    def _made(self, script: str, name: str, *knobs: str) -> Path:
        size = () if self.max_side is None else ("--max-side", self.max_side)
        out = self.work / name.format(self.root.name)
        if size:
            out = out.with_name(out.name.replace("-256", f"-long{self.max_side}"))
        return runs.convert(script, out, *conversion(self.root, self.workers, *knobs, size=size))


def conversion(root: Path, workers: int, *knobs: Any, size: tuple = ()) -> tuple:
    """The words by which a script of dataprep/ prepares a folder of pictures, but for where to."""
    return (
        *("--source", "imagefolder", "--root", root, "--workers", workers, "--allow-rejects"),
        *(size or ("--short-side", SHORT)),
        *knobs,
    )


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 for what is on no disk."""
    files = files_of(path) if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


# ---- ours ----


class Repeated(Data):
    """The same pictures `times` over, as data: an epoch as long as a steady measurement wants."""

    def __init__(self, data: Data, times: int):
        self.data, self.rows, self.format = data, data.rows * times, data.format
        self.labels, self.keys = np.tile(data.labels, times), np.tile(data.keys, times)
        self.classes, self.mean, self.std = data.classes, data.mean, data.std
        self.fingerprint = f"{data.fingerprint} x {times}"

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return self.data.sizes(rows % self.data.rows)

    def name(self, row: int) -> str:
        return self.data.name(row % self.data.rows)

    def record(self, row: int) -> np.ndarray:
        return self.data.record(row % self.data.rows)

    def picture(self, row: int) -> np.ndarray:
        return self.data.picture(row % self.data.rows)

    def place(self, rows: np.ndarray | None, device: torch.device) -> None:
        self.data.place(None, device)

    def open_reader(self, device: torch.device, workers: int) -> Reader:
        reader = self.data.open_reader(device, workers)
        begin = reader.begin
        reader.begin = lambda request: begin(self._once(request))  # type: ignore[method-assign]
        return reader

    def _once(self, request: CropRequest) -> CropRequest:
        rows = [each.copy() for each in request.rows]
        for each in rows:
            each[:, 0] %= self.data.rows
        return dataclasses.replace(request, rows=tuple(rows))


def open_loader(data: Any, batch: int, workers: int, device: str = "cpu"):
    view, how = View(crops=(RandomResized(size=SIZE),)), {"device": device, "enlarge": True}
    return fastrot.assemble.open_loader(data, view, batch=batch, workers=workers, **how)


def ours(
    path: str | Path,
    batch: int,
    workers: int,
    loader: str = "auto",
    device: str = "cpu",
    placement: Placement = "auto",
) -> Run:
    """Our own loader over anything that it opens."""
    data = fastrot.assemble.open_data(path, loader, placement=placement)

    def run(images: int) -> Iterator[int]:
        again = Repeated(data, math.ceil(max(images, batch) / data.rows))
        batches = open_loader(again, batch, workers, device).epoch(0)
        yield from (len(drawn.index) for drawn in batches)

    return run


def without_native(path: Path, batch: int, workers: int) -> Run:
    """Our reader as it is where no compiler was: simplejpeg and OpenCV, in threads."""
    before = os.environ.get("FASTROT_NATIVE")
    os.environ["FASTROT_NATIVE"] = "0"
    try:
        return ours(path, batch, workers)
    finally:
        os.environ.pop("FASTROT_NATIVE")
        os.environ.update({} if before is None else {"FASTROT_NATIVE": before})


class FullPack(Data):
    """A pack of any number of pictures in the device's memory: those of a small one, copied there again and again.

    `core.Data`, for a Loader. Each row has tiles of its own at a place of its own: nothing wraps round as it is read,
    and nothing is read twice. The last copy is cut off.
    """

    format = "pack"

    def __init__(self, path: Path, pictures: int = IMAGENET):
        self.few = Pack(path)
        self.rows, self.classes = pictures, self.few.classes
        self.labels, self.keys = (
            np.resize(each, pictures) for each in (self.few.labels, self.few.keys)
        )
        self.mean, self.std = self.few.mean, self.few.std
        self.fingerprint = f"{self.few.fingerprint} to {pictures}"
        self._sizes = np.resize(self.few.sizes(np.arange(self.few.rows)), (pictures, 2))
        self._first = firsts(self._sizes, self.few.encoding)
        self.pack: PackTensors | None = None

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return self._sizes[rows]

    def name(self, row: int) -> str:
        return self.few.name(row % self.few.rows)

    def record(self, row: int) -> np.ndarray:
        return self.few.rows_of(row % self.few.rows).reshape(-1)

    def picture(self, row: int) -> np.ndarray:
        return self.few.picture(row % self.few.rows)

    def place(self, rows: np.ndarray | None, device: torch.device) -> None:
        """Copy, once: the small pack to the device, and there piece by piece behind itself."""
        if self.pack is not None:
            return
        self.few.check()
        few = torch.from_numpy(np.array(self.few.tiles)).to(device)
        tiles = torch.empty(int(self._first[-1]), few.shape[1], dtype=torch.uint8, device=device)
        for piece in tiles.split(len(few)):
            piece.copy_(few[: len(piece)])
        small = (torch.from_numpy(each).to(device) for each in (self._first, self._sizes))
        self.pack = PackTensors(tiles, *small)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: another stream will read it

    @property
    def nbytes(self) -> int:
        return int(self._first[-1]) * WIDTH[self.few.encoding]

    def describe(self) -> list[str]:
        return [
            f"{self.rows:,} pictures, {self.few.rows:,} different ones, each a copy of its own: "
            f"{self.nbytes / 1e9:.1f} GB in the device's memory"
        ]

    def open_reader(self, device: torch.device, workers: int) -> Reader:
        self.place(None, device)
        assert self.pack is not None
        return OnDevice(self.pack, device)


class OnDevice(Reader):
    """As a resident pack gives them: boxes are sent, crops are made on the device."""

    def __init__(self, pack: PackTensors, device: torch.device):
        self.pack, self.device = pack, device

    def begin(self, request: CropRequest) -> Pending:
        return Pending(lambda: Decoded(tuple(map(self._made, request.rows, request.sizes)), []))

    def _made(self, rows: np.ndarray, size: int) -> Tensor:
        boxes = torch.from_numpy(rows)
        if self.device.type == "cuda":
            boxes = boxes.pin_memory().to(self.device, non_blocking=True)
        return unpack_crops(self.pack, boxes, size)


# ---- others' ----


def torchvision(root: Path, batch: int, workers: int, *, normalised: bool) -> Run:
    """What most people use: ImageFolder, Pillow, RandomResizedCrop, DataLoader."""
    from torchvision import datasets
    from torchvision import transforms as T

    tail = [T.ToTensor(), T.Normalize(MEAN, STD)] if normalised else [T.PILToTensor()]
    looks = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), *tail])
    return dataloader(datasets.ImageFolder(str(root), looks), batch, workers)


def dataloader(pictures: Dataset, batch: int, workers: int) -> Run:
    """The DataLoader of torch over pictures that are drawn with replacement."""
    how = (
        {"multiprocessing_context": "fork"} if workers else {}
    )  # also in a process that was spawned

    def run(images: int) -> Iterator[int]:
        again = RandomSampler(pictures, num_samples=max(images, batch))
        batches = DataLoader(
            pictures, batch, sampler=again, num_workers=workers, drop_last=True, **how
        )
        yield from (len(labels) for _, labels in batches)

    return run


class Jpegs(Dataset):
    """Files LABEL/NAME, with a function from an encoded picture (uint8 [n]) to its crop."""

    def __init__(self, folder: Path, look: Callable[[Tensor], Tensor]):
        files = files_of(folder)
        self.files, self.look = [str(file) for file in files], look
        self.labels = [int(file.parent.name) for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.look(torch.from_numpy(np.fromfile(self.files[i], np.uint8))), self.labels[i]


def with_v2(folder: Path, batch: int, workers: int) -> Run:
    """Decoder and v2 transforms of torchvision, on uint8 tensors."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    looks = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])

    def look(encoded: Tensor) -> Tensor:
        return looks(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    return dataloader(Jpegs(folder, look), batch, workers)


def with_simplejpeg(folder: Path, batch: int, workers: int) -> Run:
    """The decoder and the resampler of our reader, in torch's DataLoader, with torchvision's boxes."""
    from torchvision.transforms import RandomResizedCrop

    def look(encoded: Tensor) -> Tensor:
        picture = simplejpeg.decode_jpeg(encoded.numpy())
        size = torch.empty(3, *picture.shape[:2], device="meta")
        y, x, h, w = RandomResizedCrop.get_params(size, [0.08, 1.0], [3 / 4, 4 / 3])
        crop = cv2.resize(picture[y : y + h, x : x + w], (SIZE, SIZE))
        return torch.from_numpy(cv2.flip(crop, 1) if torch.rand(()) < 0.5 else crop)

    return dataloader(Jpegs(folder, look), batch, workers)


def with_webdataset(folder: Path, batch: int, workers: int) -> Run:
    """Tars through webdataset, drawn with replacement, decoded and cropped by Pillow."""
    import webdataset
    from torchvision import transforms as T

    looks = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.PILToTensor()])
    shards = [str(shard) for shard in files_of(folder)]

    def run(images: int) -> Iterator[int]:
        steps = max(1, round(images / batch / max(workers, 1)))  # of each worker
        pictures = (
            webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(looks, int)
            .batched(batch)
            .with_epoch(steps)
        )
        batches = webdataset.WebLoader(pictures, batch_size=None, num_workers=workers)
        yield from (len(labels) for _, labels in batches)

    return run


def ffcv_pipeline(path: Path, batch: int, workers: int) -> Run:
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

    def run(images: int) -> Iterator[int]:
        wanted = max(images // batch, 1) * batch
        once = [draw.permutation(loader.indices) for _ in range(-(-wanted // len(loader.indices)))]
        rows = np.concatenate(once)[:wanted]  # as Loader.__iter__, but for an epoch as long as ours
        yield from (len(images) for images, _ in EpochIterator(loader, rows))
        torch.set_num_threads(threads)  # FFCV sets torch's

    torch.set_num_threads(threads)
    return run


def dali_pipeline(folder: Path, batch: int, workers: int) -> Run:
    """DALI's own reader, random crop, resize and flip over LABEL/NAME.jpg, as its documentation puts them together.

    Linear without a filter is its quickest resize. Batches are counted, and not copied out of its memory.
    """
    from nvidia.dali import fn, pipeline_def, types

    files = files_of(folder)

    @pipeline_def(batch_size=batch, num_threads=max(workers, 1), device_id=None)
    def crops():  # the decorator rewrites what it decorates: no annotations
        encoded, labels = fn.readers.file(
            files=[str(file) for file in files],
            labels=[int(file.parent.name) for file in files],
            random_shuffle=True,
        )
        crop = fn.decoders.image_random_crop(
            encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        crop = fn.resize(crop, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False)
        return fn.flip(crop, horizontal=fn.random.coin_flip()), labels

    pipe = crops()

    def run(images: int) -> Iterator[int]:
        yield from (len(pipe.run()[0]) for _ in range(max(1, images // batch)))

    return run


def decoding(path: Path, *_: int) -> Run:
    """Whole pictures of a .beton, one thread, no crops: what no reader of whole pictures can go below."""
    data: Any = fastrot.assemble.open_data(path)

    def run(images: int) -> Iterator[int]:
        for k in range(images):
            data.picture(k % data.rows)
            yield 1

    return run


# ---- the table ----

OURS, NATIVE, FOLDER, CEILING = "beton", "beton, C++ decoder", "folder", "synthetic"
PACK, PACK_NATIVE = "pack", "pack, C++ decoder"
SHARDS, DALI, THROUGH_DALI = (
    "tar shards",
    "DALI, its own pipeline, same JPEGs",
    "DALI, our order and boxes",
)
UINT8, FLOAT = "torchvision uint8", "torchvision normalised float"
FFCV, THROUGH_FFCV = "FFCV, its own pipeline", "FFCV's Loader, our order and boxes"
WHOLE = "beton, whole pictures decoded"


class Contestant(NamedTuple):
    """How a loader is opened, and over what."""

    format: str  # see Formats.of
    open: Callable[[Path, int, int], Run]  # of its path, batch and workers
    needs: tuple[str, ...] = ()  # modules
    dtype: str = "uint8"
    mode: str = "crops"


DALIS, FFCVS, OWN = ("nvidia", "nvidia.dali"), ("ffcv",), ("the C++ extension",)
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant("beton", without_native),
    NATIVE: Contestant("beton", ours, OWN),
    "beton, raw, C++ resampler": Contestant("raw", ours, OWN),
    THROUGH_FFCV: Contestant("beton", functools.partial(ours, loader="ffcv"), FFCVS),
    FFCV: Contestant("beton", ffcv_pipeline, FFCVS),
    "FFCV, its own pipeline, raw": Contestant("raw", ffcv_pipeline, FFCVS),
    PACK: Contestant("pack", without_native),
    PACK_NATIVE: Contestant("pack", ours, OWN),
    SHARDS: Contestant("shards", ours),
    THROUGH_DALI: Contestant("shards", functools.partial(ours, loader="dali"), DALIS),
    DALI: Contestant("jpegs", dali_pipeline, DALIS),
    "webdataset + PIL, same JPEGs": Contestant("tars", with_webdataset, ("webdataset",)),
    "torchvision v2 uint8, same JPEGs": Contestant("jpegs", with_v2),
    "DataLoader + simplejpeg, same JPEGs": Contestant("jpegs", with_simplejpeg),
    UINT8: Contestant("root", functools.partial(torchvision, normalised=False)),
    FLOAT: Contestant("root", functools.partial(torchvision, normalised=True), dtype="float32"),
    FOLDER: Contestant("root", ours),
    CEILING: Contestant(f"{CEILING}:{SYNTHETIC}", ours),
    WHOLE: Contestant("beton", decoding, mode="decode alone, one thread"),
}
on_gpu = functools.partial(functools.partial, ours, device="cuda")
ON_A_GPU: dict[str, Contestant] = {  # besides, where there is one: crops end in its memory
    "beton, copied to the GPU": Contestant("beton", on_gpu()),
    "tar shards, DALI's decoder on the GPU": Contestant("shards", on_gpu(loader="dali"), DALIS),
    "pack, resident": Contestant("pack", on_gpu(placement="resident")),
    "pack, pinned": Contestant("pack", on_gpu(placement="pinned")),
    "folder, copied to the GPU": Contestant("root", on_gpu()),
}
if torch.cuda.is_available():
    CONTESTANTS |= ON_A_GPU


@functools.cache  # so that it is told once
def installed(*modules: str) -> bool:
    """Whether all of them are; told in a line where they are not."""
    for name in modules:  # a package before what is in it
        there = native.load() if name in OWN else importlib.util.find_spec(name)
        if there is None:
            print(f"left out, not installed: {name}", flush=True)
            return False
    return True


def present(only: list[str] | None = None) -> dict[str, Contestant]:
    """Those that can be measured here. Raises UsageError for a name of `only` that is none."""
    if unknown := [name for name in only or () if name not in CONTESTANTS]:
        raise UsageError(f"--only got {unknown[0]!r}: it wants one of {', '.join(CONTESTANTS)}")
    return {
        name: each
        for name, each in CONTESTANTS.items()
        if (not only or name in only) and installed(*each.needs)
    }


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    """A row of the theme `loaders`, with the versions of others' packages."""
    names = ("ffcv", "numba", "webdataset", "nvidia-dali-cuda130")
    others = {name: measure.version(name) for name in names}
    return measure.row(what, theme="loaders", variant=variant, **{"warmup": 1, **others, **fields})
