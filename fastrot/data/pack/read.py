"""Reads a pack: on a GPU its pictures are decoded there, by the kernel that cuts the crops; on a CPU in threads.

Placement of the pictures for a GPU:

    resident  in its memory, those of a view's rows; a batch crosses the bus as boxes, 48 bytes a crop
    pinned    in host memory, which the system keeps the mapped file in; threads gather the tile rows under a
              batch's boxes into pinned memory, which is copied to the GPU and decoded there
    auto      resident where that leaves a third of the GPU's memory to the training, else pinned

Not tried: a kernel that reads the tiles over the bus.

Kernels and copies go to the stream that is current when a batch is drawn: the Loader's side stream.

For a GPU all checksums are compared before the first batch; on a CPU each 64 MB when first asked for.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from fastrot import native
from fastrot.config import Placement, UsageError
from fastrot.core import CropRequest, Data, Decoded, Pending
from fastrot.data.pack import layout
from fastrot.data.pack.file import PackFile
from fastrot.data.pack.layout import BLOCK, WIDTH
from fastrot.data.reader import Errors, PooledReader, ThreadedReader, in_tasks
from fastrot.data.ring import Ring
from fastrot.ops.blocks import PackTensors, unpack_crop, unpack_crops

KEPT_FOR_TRAINING = 1 / 3  # of a GPU's memory, by auto
GB = 1e9


class Pack(Data):
    """`core.Data` of a pack.

    file       what was opened
    placement  as asked for; `place` chooses
    """

    format = "pack"

    def __init__(self, path: str | Path, placement: Placement = "auto"):
        self.file = PackFile(path)
        self.path: Path = self.file.path
        self.placement: Placement = placement
        self.rows, self.labels, self.keys = self.file.rows, self.file.labels, self.file.keys
        self.classes, self.fingerprint = self.file.classes, self.file.fingerprint
        self.mean, self.std, self.numbers = self.file.mean, self.file.std, self.file.numbers
        self.native = native.load() is not None
        self._placed: list[_Resident | _Pinned] = []
        self._said: list[str] = []
        self._ring = Ring()

    def sizes(self, rows: Int64[np.ndarray, " b"]) -> Int32[np.ndarray, "b 2"]:
        return self.file.sizes[rows]

    def name(self, row: int) -> str:
        """Where the picture came from, if paths.jsonl tells."""
        return self.file.name(row)

    def record(self, row: int) -> UInt8[np.ndarray, " n"]:
        """The bytes of a picture's tiles or pixels, not checked."""
        return self.file.rows_of(row).reshape(-1)

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        return self.file.picture(row)

    def place(self, rows: Int64[np.ndarray, " n"] | None, device: torch.device) -> None:
        """Say which rows (None: all) will be asked for, and where. A Loader does it, before its first epoch.

        Raises UsageError where the pictures do not fit into the GPU, or are damaged.
        """
        if device.type != "cuda":
            if self.placement != "auto":
                raise UsageError(
                    f"--placement {self.placement} is for a GPU, and this runs on {device}: leave it out, "
                    "or run it with --device cuda"
                )
            return
        if any(placed.device == device and placed.covers(rows) for placed in self._placed):
            return
        if not self._placed:
            self.file.check()
        free, total = torch.cuda.mem_get_info(device)
        wanted = self._bytes(rows)
        chosen = self.chosen = choose(self.placement, wanted, free, total, str(self.path))
        kind = _Resident if chosen == "resident" else _Pinned
        self._placed.append(kind(self.file, rows, device))
        self._said.append(
            f"{wanted / GB:.1f} GB of {self.path} are {PLACES[chosen]} (--placement {chosen}); "
            f"the GPU had {free / GB:.1f} of {total / GB:.1f} GB free"
        )

    def _bytes(self, rows: Int64[np.ndarray, " n"] | None) -> int:
        if rows is None:
            return self.file.tiles.nbytes
        first, width = self.file.first, self.file.tiles.shape[1]
        return int((first[rows + 1] - first[rows]).sum()) * width

    def describe(self) -> list[str]:
        """Where the pictures are, and what decodes them."""
        if self._said:
            return self._said
        if self.native:
            return [f"tiles are decoded by the C++ extension, {native.why()}"]
        return [f"tiles are decoded by PyTorch, without the C++ extension: {native.why()}"]

    def open_reader(self, device: torch.device, workers: int) -> PooledReader:
        if device.type == "cuda":
            return _PlacedReader(self, device, workers)
        fill = partial(_fill, PackTensors(*map(_tensor, self.file.arrays)))
        in_c = self._in_c if self.native else None
        advise = partial(self._look_at, max(1, workers))
        return ThreadedReader(fill, self._ring, device, workers, advise=advise, in_c=in_c)

    def placed_for(
        self, rows: Int64[np.ndarray, " b"], device: torch.device
    ) -> "_Resident | _Pinned":
        """Where these pictures are; all of the data are placed where they are nowhere yet."""
        for placed in self._placed:
            if placed.device == device and placed.covers(rows):
                return placed
        self.place(None, device)
        return self._placed[-1]

    def _look_at(self, threads: int, request: CropRequest) -> list[tuple[int, str]]:
        """Announce a batch, and say which of its pictures lie in a damaged stretch."""
        self.file.announce(request)
        return [*self.file.damage(request.rows[0][:, 0], threads).items()]

    def _in_c(
        self, pool: native.Pool, request: CropRequest, out: list[np.ndarray]
    ) -> list[native.Work]:
        of = *self.file.arrays, self.file.encoding
        return [pool.pack_crops(*of, *each) for each in zip(request.rows, out, strict=True)]


def _fill(
    pack: PackTensors, request: CropRequest, out: tuple[Tensor, ...], places: Iterable[int]
) -> Errors:
    """The crops of some places of a batch, on a CPU without the extension."""
    for rows, crop in zip(request.rows, out, strict=True):
        pixels = crop.numpy()
        for place in places:
            unpack_crop(pack, rows[place], pixels[place])
    return []


# ---- on a GPU ----

PLACES = {"resident": "in GPU memory", "pinned": "in host memory, copied ahead"}


def choose(
    asked: Placement, wanted: int, free: int, total: int, path: str
) -> Literal["resident", "pinned"]:
    """Where `wanted` bytes go, with so many of the GPU's free. Raises UsageError where they do not fit as asked."""
    if asked == "resident" and wanted > free:
        raise UsageError(
            f"--placement resident wants {wanted / GB:.1f} GB of GPU memory for {path}, {(wanted - free) / GB:.1f} GB "
            "more than are free: choose --placement pinned, which keeps it in host memory"
        )
    if asked != "auto":
        return asked
    return "resident" if wanted <= free - KEPT_FOR_TRAINING * total else "pinned"


class _PlacedReader(PooledReader):
    """Crops made on a GPU, each batch from where its pictures are."""

    def __init__(self, data: Pack, device: torch.device, workers: int):
        super().__init__(workers)
        self._data, self._device = data, device

    def begin(self, request: CropRequest) -> Pending:
        placed = self._data.placed_for(request.rows[0][:, 0], self._device)
        return placed.begin(request, self.pool)


class _Resident:
    """Pictures of some rows in the device's memory.

    pack   those pictures
    index  of each row, its number in `pack`, -1 where it is not there; None: the row itself
    """

    def __init__(self, file: PackFile, rows: Int64[np.ndarray, " n"] | None, device: torch.device):
        self.device, self.index, sizes = device, None, file.sizes
        if rows is not None:
            rows = np.unique(rows)
            self.index = np.full(file.rows, -1, np.int64)
            self.index[rows] = np.arange(len(rows))
            sizes = sizes[rows]
        first = layout.firsts(sizes, file.encoding)
        tiles = torch.empty(int(first[-1]), WIDTH[file.encoding], dtype=torch.uint8, device=device)
        at = 0
        for piece in _pieces(file, rows):
            tiles[at : at + len(piece)].copy_(_tensor(piece))
            at += len(piece)
        self.pack = PackTensors(tiles, *(_sent(each, device) for each in (first, sizes)))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: another stream will read it

    def covers(self, rows: Int64[np.ndarray, " n"] | None) -> bool:
        """Whether all these pictures (None: of the data) are here."""
        return self.index is None or (rows is not None and bool((self.index[rows] >= 0).all()))

    def begin(self, request: CropRequest, pool: ThreadPoolExecutor | None) -> Pending:
        rows, at = request.rows, self.index
        boxes = rows if at is None else [_with_index(each, at[each[:, 0]]) for each in rows]
        return Pending(lambda: _unpacked(self.pack, boxes, request.sizes))


class _Pinned:
    """Pictures in the mapped file, of which each batch's are copied to the device."""

    def __init__(self, file: PackFile, rows: Int64[np.ndarray, " n"] | None, device: torch.device):
        self.device, self._file = device, file

    def covers(self, rows: Int64[np.ndarray, " n"] | None) -> bool:
        return True

    def begin(self, request: CropRequest, pool: ThreadPoolExecutor | None) -> Pending:
        """Gather what lies under the boxes, whole rows of tiles: of a batch, a pack of its own."""
        file, index = self._file, request.rows[0][:, 0]
        file.announce(request)
        edge = layout.SIDE if file.encoding == "ycc" else 1
        tops = np.min([rows[:, 1] for rows in request.rows], axis=0)
        ends = np.max([rows[:, 1] + rows[:, 3] for rows in request.rows], axis=0)
        heights, widths = file.sizes[index].astype(np.int64).T
        tops = np.clip(tops, 0, heights - 1) // edge * edge
        ends = np.minimum(-(-np.clip(ends, 1, heights) // edge) * edge, heights)
        across = -(-widths // edge)
        sizes = np.stack([ends - tops, widths], axis=1).astype(np.int32)
        start = file.first[index] + tops // edge * across
        first = layout.firsts(sizes, file.encoding)
        shape, pins = (first[-1], file.tiles.shape[1]), self.device.type == "cuda"
        tiles = torch.empty(shape, dtype=torch.uint8, pin_memory=pins)
        into = tiles.numpy()

        def gather(places: Iterable[int]) -> None:
            for i in places:
                length = first[i + 1] - first[i]
                into[first[i] : first[i + 1]] = file.tiles[start[i] : start[i] + length]

        waits = in_tasks(pool, len(index), gather)
        boxes = [_with_index(rows, np.arange(len(index))) for rows in request.rows]
        for rows in boxes:
            rows[:, 1] -= tops

        def result() -> Decoded:
            for wait in waits:
                wait()
            small = (_sent(each, self.device) for each in (first, sizes))
            pack = PackTensors(tiles.to(self.device, non_blocking=True), *small)
            return _unpacked(pack, boxes, request.sizes)

        return Pending(result)


def _with_index(
    rows: Int64[np.ndarray, "b 6"], index: Int64[np.ndarray, " b"]
) -> Int64[np.ndarray, "b 6"]:
    """The boxes of pictures with other numbers."""
    return np.concatenate([index[:, None], rows[:, 1:]], axis=1)


def _unpacked(pack: PackTensors, boxes: Iterable[np.ndarray], sizes: tuple[int, ...]) -> Decoded:
    """The crops in `boxes`, each int64 [b, 6] by numbers in `pack`, where that is."""
    each = zip(boxes, sizes, strict=True)
    device = pack.tiles.device
    return Decoded(tuple(unpack_crops(pack, _sent(rows, device), size) for rows, size in each), [])


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _pieces(file: PackFile, rows: Int64[np.ndarray, " n"] | None) -> Iterator[np.ndarray]:
    """The tiles of these rows, in order, in pieces of about 64 MB."""
    most = BLOCK // file.tiles.shape[1]
    if rows is None:
        for start in range(0, len(file.tiles), most):
            yield file.tiles[start : start + most]
        return
    ends = np.cumsum(file.first[rows + 1] - file.first[rows])
    for _, some in itertools.groupby(range(len(rows)), lambda i: int(ends[i]) // most):
        yield np.concatenate([file.rows_of(int(rows[i])) for i in some])


def _tensor(array: np.ndarray) -> Tensor:
    """It shares the mapped file's memory, which nobody writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
