"""Loader: which rows and boxes make batch k of epoch e on rank r. One class for all formats.

`Data` supplies pixels; order, boxes, clock and the copy to the device are here, so that every format gives
the same batches.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastrot.arrays import Rows
from fastrot.config import UsageError
from fastrot.core import Batch, CropRequest, DamagedRecord, Data, Pending, Reader, View
from fastrot.data import crops, sampler


class Loader:
    """Batches of a view of prepared data, addressed by epoch and batch number.

    images       pictures in the view, over all ranks
    rows         which rows of the data these are, int64; None: all
    fingerprint  of the view's order: of the data, and of the rows looked at
    skipped      the damaged records met so far, a sentence each, where these are skipped

    The same epoch number gives the same batches, whatever the number of workers; `start` skips batches.
    A Batch stays valid after the next one is drawn. In training (`view.shuffled`) the ragged tail is
    dropped; in data order it is kept, and ranks may draw different numbers of batches.

    A record that cannot be read raises DamagedRecord, or is skipped: in training the picture before it in
    its batch stands in for it, with its own index and label, so that shapes stay; in data order it is missing.
    """

    def __init__(
        self,
        data: Data,
        view: View,
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 1,
        enlarge: bool = False,
        on_bad_record: Literal["stop", "skip"] = "stop",
    ):
        self.on_bad_record, self.skipped = on_bad_record, set[str]()
        self._coming: tuple[int, Future[sampler.Sampler]] | None = None  # the next epoch's order
        self.data, self.view, self.batch, self.seed = data, view, batch, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # cuda is not cuda:0 to torch
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rows = None if view.rows is None else _read_rows(view.rows, data.rows)
        self.images = data.rows if self.rows is None else len(self.rows)
        if not self.images:
            raise UsageError(
                "the view holds no pictures: choose other rows, or a smaller --hold-out"
            )
        everything = np.arange(data.rows, dtype=np.int64) if self.rows is None else self.rows
        self._share = everything[rank::world] if view.owned else self.rows
        self._shared_by = {"rank": 0, "world": 1} if view.owned else {"rank": rank, "world": world}
        if view.shuffled and self.images < batch * world:
            raise UsageError(
                f"--batch {batch} on {world} process(es) wants {batch * world} pictures a step, "
                f"but there are {self.images}: set --batch {max(1, self.images // world)} or smaller"
            )
        self._own = self.images if self._share is None else len(self._share)
        if view.shuffled and view.blocks is not None and view.blocks[0] > self._own:
            raise UsageError(
                f"--order-block {view.blocks[0]} is more than the {self._own} pictures that are to be mixed: "
                f"set {self._own} or fewer, or --order full"
            )
        for crop in view.crops:
            crops.check_sizes(crop, data.sizes(everything), enlarge=enlarge, asked=view.asked)
        data.place(self._share, self.device)
        seen = data.fingerprint.encode() + (b"all" if self.rows is None else self.rows.tobytes())
        self.fingerprint = hashlib.blake2b(seen, digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self._batches_of(self.rank)

    @property
    def min_batches(self) -> int:
        """Batches per epoch that every rank draws: the last rank has the fewest."""
        return self._batches_of(self.world - 1)

    def _batches_of(self, rank: int) -> int:
        how = {"batch": self.batch, "rank": rank, "world": self.world}
        return sampler.batches(self.images, **how, ragged=not self.view.shuffled)

    def epoch(self, number: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batches `start`, `start` + 1, ... of an epoch. Closing the iterator ends the workers."""
        with contextlib.closing(self.data.open_reader(self.device, self.workers)) as reader:
            batches = self._batches(reader, number, start)
            on_gpu = self.device.type == "cuda"
            yield from _copied_ahead(batches, self.device) if on_gpu else batches

    def _batches(self, reader: Reader, number: int, start: int) -> Iterator[Batch]:
        rows, ahead = self._order(number), reader.ahead(self.batch)
        pending = deque[tuple[int, CropRequest, Pending]]()
        steps = iter(range(start, len(self)))
        while True:
            for k in itertools.islice(steps, ahead + 1 - len(pending)):
                request = self.request(rows[self._places(k)], number)
                request = replace(request, prefetch=self._prefetch(rows, k, start))
                pending.append((k, request, reader.begin(request)))
                if k == len(self) - 1 and self.view.shuffled:  # .3 s for ImageNet
                    self._coming = (number + 1, _beside(self._sampler, number + 1))
            if not pending:
                return
            yield from self._batch(number, *pending.popleft())

    def request(self, index: np.ndarray, epoch: int) -> CropRequest:
        """Boxes and flips of rows in an epoch, an array for each crop of the view."""
        sizes, address = self.data.sizes(index), {"seed": self.seed, "epoch": epoch}
        rows = (
            crops.boxes(crop, sizes, **address, index=index, view=view)
            for view, crop in enumerate(self.view.crops)
        )
        return CropRequest(tuple(rows), tuple(crop.size for crop in self.view.crops))

    def _batch(self, epoch: int, k: int, request: CropRequest, pending: Pending) -> Iterator[Batch]:
        """Batch `k`; nothing where all its pictures are skipped."""
        cropped, errors = pending.result()
        index = request.rows[0][:, 0].copy()
        if errors:
            places = self._sound_places(len(index), errors)
            if not len(places):
                return
            index = index[places]
            cropped = tuple(each[torch.from_numpy(places).to(each.device)] for each in cropped)
        yield Batch(
            crops=cropped,
            index=torch.from_numpy(index),
            label=torch.from_numpy(self.data.labels[index]),
            epoch_step=torch.tensor([epoch, epoch * len(self) + k], dtype=torch.int64),
        )

    def _sound_places(self, images: int, errors: list[tuple[int, str]]) -> np.ndarray:
        """The places of a batch that its pictures are taken from, where some cannot be read."""
        reasons = [reason for _, reason in sorted(errors)]
        if self.on_bad_record == "stop":
            raise DamagedRecord(f"{reasons[0]}, or leave it out with --on-bad-record skip")
        for reason in reasons:
            if reason not in self.skipped:
                self.skipped.add(reason)
                logging.getLogger("fastrot").warning("skipped: %s", reason)
        places = np.arange(images)
        sound = np.setdiff1d(places, [place for place, _ in errors])
        if not self.view.shuffled:
            return sound
        if not len(sound):
            raise DamagedRecord(f"no picture of a whole batch can be read; the first, {reasons[0]}")
        return sound[np.searchsorted(sound, places, side="right") - 1]  # -1: the last one

    def _order(self, epoch: int) -> sampler.Sampler:
        """An epoch's order: built already where the last batches of the epoch before were asked for."""
        (number, order), self._coming = self._coming or (None, None), None
        return self._sampler(epoch) if order is None or number != epoch else order.result()

    def _sampler(self, epoch: int) -> sampler.Sampler:
        of = self._share if self._share is not None else self.data.rows
        if not self.view.shuffled:
            return sampler.Sampler(of)
        if self.view.blocks is None:
            return sampler.ShuffledSampler(of, seed=self.seed, epoch=epoch)
        block, window = self.view.blocks
        return sampler.BlockSampler(of, seed=self.seed, epoch=epoch, block=block, window=window)

    def _prefetch(self, rows: sampler.Sampler, k: int, start: int) -> Rows | None:
        step = self.batch * self._shared_by["world"]
        return rows.ahead(k * step, (k + 1) * step, since=start * step, **self._shared_by)

    def _places(self, k: int) -> np.ndarray:
        how = {"batch": self.batch, "number": k, **self._shared_by}
        return sampler.places(self._own, **how, ragged=not self.view.shuffled)


def _beside(work: Callable[[int], sampler.Sampler], epoch: int) -> Future[sampler.Sampler]:
    """What `work` gives, computed by a thread that ends with it."""
    thread = ThreadPoolExecutor(1, "order")
    try:
        return thread.submit(work, epoch)
    finally:
        thread.shutdown(wait=False)


def _read_rows(given: Path | np.ndarray, rows: int) -> np.ndarray:
    array = isinstance(given, np.ndarray)
    chosen, why = given if array else np.load(given, allow_pickle=False), None
    if chosen.ndim != 1 or chosen.dtype != np.int64:
        why = f"holds {chosen.dtype}{list(chosen.shape)}: rows are one int64 array"
    elif len(beyond := chosen[(chosen < 0) | (chosen >= rows)]):
        why = f"names row {beyond[0]}, but the data has {rows}: make it from this data"
    elif len(np.unique(chosen)) != len(chosen):
        why = "names a row twice: each row may stand in it once"
    if why:
        raise UsageError(f"{'the array of rows' if array else given} {why}")
    return chosen


@functools.lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: torch keeps the memory of each stream apart, so a new one an epoch would let it grow."""
    return torch.cuda.Stream(device)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Each batch copied to the GPU on a side stream while the one before is used.

    It is handed out as soon as it is drawn, and its step waits on the device for it alone: the host is ahead of the
    device, so that the copy goes beside the step before. It is drawn on the side stream too, where a `Data` may make it
    on the device itself. Pinned host memory comes from torch's caching allocator, which keeps a block until its copy is
    done.
    """
    side = _side_stream(device)
    while True:
        with torch.cuda.stream(side):
            if (host := next(batches, None)) is None:
                return
            batch, there = _to(host, device), side.record_event()
        main = torch.cuda.current_stream(device)
        main.wait_event(there)
        for tensor in (*batch.crops, batch.index, batch.label, batch.epoch_step):
            tensor.record_stream(main)  # whose memory is handed out again when main is done with it
        del host  # its memory is used again when the copy is done
        yield batch


def _to(batch: Batch, device: torch.device) -> Batch:
    def send(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)

    rest = batch.index, batch.label, batch.epoch_step
    return Batch(tuple(map(send, batch.crops)), *map(send, rest))
