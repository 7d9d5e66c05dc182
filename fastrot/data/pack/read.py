"""Reads a pack: on a GPU its pictures are decoded there, by the kernel that cuts the crops; on a CPU in threads.

Where the pictures lie, for a GPU:

    resident  in its memory, those of a view's rows; a batch crosses the bus as boxes, 48 bytes a crop
    pinned    in host memory, which the system keeps the mapped file in; threads gather the tile rows under a
              batch's boxes into pinned memory, which is copied to the GPU and decoded there
    auto      resident where that leaves a third of the GPU's memory to the training, else pinned

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
from torch import Tensor

from fastrot import native
from fastrot.arrays import Boxes, Numbers, Rows
from fastrot.config import Placement, UsageError
from fastrot.core import CropRequest, Decoded, Pending
from fastrot.data.pack import layout
from fastrot.data.pack.file import PackFile
from fastrot.data.pack.layout import BLOCK, WIDTH
from fastrot.data.reader import Errors, PooledReader, ThreadedReader, in_tasks
from fastrot.ops.blocks import PackTensors, unpack_crop, unpack_crops

KEPT_FOR_TRAINING = 1 / 3  # of a GPU's memory, by auto
GB = 1e9


class Pack(PackFile):
    """`core.Data` of a pack. `placement` is as asked for; `place` chooses."""

    def __init__(self, path: str | Path, placement: Placement = "auto"):
        super().__init__(path)
        self.placement: Placement = placement
        self.native = native.load() is not None
        self._placed: list[_Resident | _Pinned] = []
        self._said: list[str] = []

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tiles, first, sizes: what the decoders are given."""
        return self.tiles, self.first, self._sizes

    def place(self, rows: Numbers | None, device: torch.device) -> None:
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
            self.check()
        free, total = torch.cuda.mem_get_info(device)
        sizes = self._sizes if rows is None else self.sizes(rows)
        wanted = int(layout.lengths(sizes, self.encoding).sum()) * WIDTH[self.encoding]
        chosen = self.chosen = choose(self.placement, wanted, free, total, str(self.path))
        kind = _Resident if chosen == "resident" else _Pinned
        self._placed.append(kind(self, rows, device))
        self._said.append(
            f"{wanted / GB:.1f} GB of {self.path} are {PLACES[chosen]} (--placement {chosen}); "
            f"the GPU had {free / GB:.1f} of {total / GB:.1f} GB free"
        )

    def describe(self) -> list[str]:
        """Where the pictures are, and what decodes them."""
        if self._said:
            return self._said
        if self.native:
            return [f"tiles are decoded by the C++ extension, {native.why()}"]
        return [f"tiles are decoded by Pillow, without the C++ extension: {native.why()}"]

    def open_reader(self, device: torch.device, workers: int) -> PooledReader:
        if device.type == "cuda":
            return _PlacedReader(self, device, workers)
        fill = partial(_fill, PackTensors(*map(_tensor, self.arrays)))
        in_c = self._in_c if self.native else None
        advise = partial(self._look_at, max(1, workers))
        return ThreadedReader(fill, device, workers, advise=advise, in_c=in_c)

    def placed_for(self, rows: Rows, device: torch.device) -> "_Resident | _Pinned":
        """Where these pictures are, which were placed."""
        return next(each for each in self._placed if each.device == device and each.covers(rows))

    def _look_at(self, threads: int, request: CropRequest) -> Errors:
        """Announce a batch, and say which of its pictures lie in a damaged stretch."""
        self.announce(request)
        return [*self.damage(request.rows[0][:, 0], threads).items()]

    def _in_c(
        self, pool: native.Pool, request: CropRequest, out: list[np.ndarray]
    ) -> list[native.Work]:
        each = zip(request.rows, out, strict=True)
        return [pool.pack_crops(*self.arrays, rows, crop) for rows, crop in each]


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

    def __init__(self, data: Pack, rows: Numbers | None, device: torch.device):
        self.device, self.index = device, None
        _, first, sizes = data.arrays
        if rows is not None:
            rows = np.unique(rows)
            self.index = np.full(data.rows, -1, np.int64)
            self.index[rows] = np.arange(len(rows))
            sizes = data.sizes(rows)
            first = layout.firsts(sizes, data.encoding)
        tiles = torch.empty(int(first[-1]), WIDTH[data.encoding], dtype=torch.uint8, device=device)
        at = 0
        for piece in _pieces(data, rows):
            tiles[at : at + len(piece)].copy_(_tensor(piece))
            at += len(piece)
        self.pack = PackTensors(tiles, *(_sent(each, device) for each in (first, sizes)))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: another stream will read it

    def covers(self, rows: Numbers | None) -> bool:
        """Whether all these pictures (None: of the data) are here."""
        return self.index is None or (rows is not None and bool((self.index[rows] >= 0).all()))

    def begin(self, request: CropRequest, pool: ThreadPoolExecutor | None) -> Pending:
        rows, at = request.rows, self.index
        boxes = rows if at is None else [_with_index(each, at[each[:, 0]]) for each in rows]
        return Pending(lambda: _unpacked(self.pack, boxes, request.sizes))


class _Pinned:
    """Pictures in the mapped file, of which each batch's are copied to the device."""

    def __init__(self, data: Pack, rows: Numbers | None, device: torch.device):
        self.device, self._data = device, data

    def covers(self, rows: Numbers | None) -> bool:
        return True

    def begin(self, request: CropRequest, pool: ThreadPoolExecutor | None) -> Pending:
        """Gather what lies under the boxes, whole rows of tiles: of a batch, a pack of its own."""
        data, index = self._data, request.rows[0][:, 0]
        data.announce(request)
        edge = layout.SIDE if data.encoding == "ycc" else 1
        tops = np.min([rows[:, 1] for rows in request.rows], axis=0)
        ends = np.max([rows[:, 1] + rows[:, 3] for rows in request.rows], axis=0)
        heights, widths = data.sizes(index).astype(np.int64).T
        tops = np.clip(tops, 0, heights - 1) // edge * edge
        ends = np.minimum(-(-np.clip(ends, 1, heights) // edge) * edge, heights)
        across = -(-widths // edge)
        sizes = np.stack([ends - tops, widths], axis=1).astype(np.int32)
        start = data.first[index] + tops // edge * across
        first = layout.firsts(sizes, data.encoding)
        shape, pins = (first[-1], data.tiles.shape[1]), self.device.type == "cuda"
        tiles = torch.empty(shape, dtype=torch.uint8, pin_memory=pins)
        into = tiles.numpy()

        def gather(places: Iterable[int]) -> None:
            for i in places:
                length = first[i + 1] - first[i]
                into[first[i] : first[i + 1]] = data.tiles[start[i] : start[i] + length]

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


def _with_index(rows: Boxes, index: Rows) -> Boxes:
    """The boxes of pictures with other numbers."""
    return np.concatenate([index[:, None], rows[:, 1:]], axis=1)


def _unpacked(pack: PackTensors, boxes: Iterable[np.ndarray], sizes: tuple[int, ...]) -> Decoded:
    """The crops in `boxes`, each int64 [b, 6] by numbers in `pack`, where that is."""
    each = zip(boxes, sizes, strict=True)
    device = pack.tiles.device
    return Decoded(tuple(unpack_crops(pack, _sent(rows, device), size) for rows, size in each), [])


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = _tensor(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _pieces(data: Pack, rows: Numbers | None) -> Iterator[np.ndarray]:
    """The tiles of these rows, in order, in pieces of about 64 MB."""
    most = BLOCK // data.tiles.shape[1]
    if rows is None:
        for start in range(0, len(data.tiles), most):
            yield data.tiles[start : start + most]
        return
    ends = np.cumsum(data.first[rows + 1] - data.first[rows])
    for _, some in itertools.groupby(range(len(rows)), lambda i: int(ends[i]) // most):
        yield np.concatenate([data.rows_of(int(rows[i])) for i in some])


def _tensor(array: np.ndarray) -> Tensor:
    """It shares the mapped file's memory, which nobody writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
