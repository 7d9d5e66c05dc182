"""Reads tar shards through their index: memory-mapped, decoded by `pictures.decode`, resampled by OpenCV, in threads.

Nothing of a picture is read before it is asked for. At the door each shard's length and the headers of its first and
last picture are compared with the index; each picture against its crc32 when it is read.
"""

import contextlib
import mmap
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord
from fastrot.data import crops, pictures
from fastrot.data.ahead import Begun, Crew, buffers, in_order
from fastrot.data.manifest import Paths
from fastrot.data.readahead import announce
from fastrot.data.ring import Ring
from fastrot.data.tars import layout
from fastrot.data.tars.index import AGAIN, read_index
from fastrot.disk import allow_open_files


class Tars:
    """`core.Data` of a folder of shards that dataprep/to_dali.py wrote.

    numbers   each row's index in torchvision's ImageFolder, where these differ; None: the row itself
    manifest  what shards.json says
    """

    format = "tars"
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest, self._index, self.keys = read_index(self.path)
        allow_open_files(len(self.manifest["shards"]))
        self._shards = [_mapped(self.path, shard) for shard in self.manifest["shards"]]
        self.rows, self.labels = len(self._index), self._index["label"].astype(np.int64)
        self._sizes = np.stack([self._index["height"], self._index["width"]], axis=1)
        self._compare()
        self.fingerprint = str(self.manifest["fingerprint"])
        self.classes = tuple(self.manifest["classes"])
        self.mean, self.std = (tuple(map(float, self.manifest[k])) for k in ("mean", "std"))
        numbers = self.manifest["numbers"]
        self.numbers = None if numbers is None else np.array(numbers, np.int64)
        self._paths = Paths(self.path / layout.PATHS)
        self._ring = {pinned: Ring(pinned=pinned) for pinned in (False, True)}
        self._scratch = threading.local()

    def __len__(self) -> int:
        return self.rows

    def sizes(self, rows: Int64[np.ndarray, " b"]) -> Int32[np.ndarray, "b 2"]:
        """Heights and widths, after EXIF orientation."""
        return self._sizes[rows]

    def name(self, row: int) -> str:
        """Where the picture came from, if paths.jsonl tells."""
        return self._paths.of(row)

    def record(self, row: int) -> UInt8[np.ndarray, " n"]:
        """The bytes of a picture as they lie in the shard, checked against their crc32. Raises DamagedRecord."""
        first, size, *_, crc, shard = self._index[row].tolist()
        data = self._shards[shard].bytes[first : first + size]
        if zlib.crc32(data.data) != crc:
            raise self._damaged(row, "its checksum does not agree")
        return data

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """The whole picture, upright, in memory of its own. Raises DamagedRecord."""
        return self._decoded(row, threading.local())

    def _decoded(self, row: int, scratch: threading.local) -> UInt8[np.ndarray, "h w 3"]:
        """In memory that `scratch` keeps, and that the next picture overwrites."""
        record = self.record(row)
        height, width = self._sizes[row].tolist()
        if pictures.is_upright_jpeg(record, height, width):
            if len(getattr(scratch, "memory", b"")) < 3 * height * width:
                scratch.memory = np.empty(3 * height * width, np.uint8)
            with contextlib.suppress(ValueError):  # where it has a doubt, Pillow decides
                return simplejpeg.decode_jpeg(record, buffer=scratch.memory[: 3 * height * width])
        try:
            picture = pictures.decode(record.tobytes())
        except pictures.BadPicture as error:
            raise self._damaged(row, str(error)) from None
        if picture.shape[:2] != (height, width):
            raise self._damaged(row, "its size is not that of the index")
        return picture

    def pictures(
        self, plan: Iterable[CropRequest], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """See `core.Data`. `workers` threads; 0: the caller's own, nothing read ahead."""
        ring = self._ring[device.type == "cuda"]
        crew = Crew(self._fill, workers, "tars")
        try:
            yield from in_order((self._begin(crew, request, ring) for request in plan), workers)
        finally:
            crew.close()

    def _begin(self, crew: Crew, request: CropRequest, ring: Ring) -> Begun:
        announce(request, [shard.map for shard in self._shards], self._places)
        return crew.begin(request, buffers(ring, request))

    def _places(self, rows: Int64[np.ndarray, " b"]) -> tuple[np.ndarray, ...]:
        """Shard, first byte and bytes of pictures."""
        index = self._index[rows]
        return (
            index["shard"].astype(np.int64),
            index["first"].astype(np.uint64),
            index["bytes"].astype(np.uint64),
        )

    def _fill(self, request: CropRequest, out: tuple[Tensor, ...], start: int, stop: int) -> None:
        """Pictures `start` to `stop` of a batch: decode each once, resample it for each recipe."""
        for place in range(start, stop):
            try:
                picture = self._decoded(int(request.rows[0][place, 0]), self._scratch)
            except DamagedRecord as error:
                request.errors.append((place, str(error)))
                continue
            for rows, crop in zip(request.rows, out, strict=True):
                crops.resample(picture, rows[place], crop[place].numpy())

    def _damaged(self, row: int, why: str) -> DamagedRecord:
        file = self._shards[int(self._index[row]["shard"])].path
        return DamagedRecord(f"row {row} of {file} ({self.name(row)}) is damaged, {why}: {AGAIN}")

    def _compare(self) -> None:
        """Raises UsageError where the index leads outside of a shard, or not to its pictures."""
        index, shards = self._index, self._index["shard"]
        if (shards[1:] < shards[:-1]).any():  # never so, as it is written
            raise UsageError(
                f"{self.path / layout.ROWS} is not in the order of the shards: {AGAIN}"
            )
        begins = np.searchsorted(shards, np.arange(len(self._shards) + 1))
        for number, shard in enumerate(self._shards):
            mine = index[begins[number] : begins[number + 1]]
            ends = mine["first"] + mine["bytes"]
            fits = len(mine) and (mine["first"] >= layout.BLOCK).all() and (mine["bytes"] > 0).all()
            fits = fits and (ends <= len(shard.bytes)).all()
            for first, size, *_ in mine[[0, -1]].tolist() if fits else ():
                block = shard.bytes[first - layout.BLOCK : first].tobytes()
                fits = fits and layout.length_in(block) == size
            if not fits:
                raise UsageError(
                    f"{shard.path} is not the tar that {layout.ROWS} was made for: {AGAIN}"
                )


class _Shard(NamedTuple):
    path: Path
    map: mmap.mmap
    bytes: UInt8[np.ndarray, " n"]


def _mapped(folder: Path, listed: dict[str, Any]) -> _Shard:
    path = folder / listed["file"]
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UsageError(f"{path} is empty: {AGAIN}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from None
    if len(mapped) != listed["bytes"]:
        cut = "is cut short" if len(mapped) < listed["bytes"] else "has grown"
        raise UsageError(
            f"{path} {cut}: it has {len(mapped):,} of {listed['bytes']:,} bytes; {AGAIN}"
        )
    return _Shard(path, mapped, np.frombuffer(mapped, np.uint8))
