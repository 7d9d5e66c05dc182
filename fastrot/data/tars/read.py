"""Reads tar shards through their index: memory-mapped, decoded by `pictures.decode`, resampled by OpenCV, in threads."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from fastrot.arrays import Picture
from fastrot.config import UsageError
from fastrot.data import pictures
from fastrot.data.manifest import Paths, known
from fastrot.data.mapped import MappedData, MappedFile, Memory, mapped
from fastrot.data.tars import layout
from fastrot.data.tars.layout import AGAIN, PATHS, ROWS, read_index
from fastrot.disk import allow_open_files


class Tars(MappedData):
    """`core.Data` of a folder of shards that fastrot shards wrote.

    manifest  what shards.json says
    """

    format, again = "tars", AGAIN

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.manifest, index, self.keys = read_index(self.path)
        allow_open_files(len(self.manifest["shards"]))
        self._files = [_shard(self.path, shard) for shard in self.manifest["shards"]]
        self._which, self._start, self._bytes = (index[k] for k in ("shard", "first", "bytes"))
        self._crc = index["crc"]
        self._sizes = np.stack([index["height"], index["width"]], axis=1)
        self.rows, self.labels = len(index), index["label"].astype(np.int64)
        self._compare()
        self.fingerprint = str(self.manifest["fingerprint"])
        self.classes = tuple(self.manifest["classes"])
        self.mean, self.std, self.numbers = known(self.manifest)
        laid = self.manifest.get("beside", {})
        self.beside = {name: (self.path / name, crc) for name, crc in laid.items()}
        self._paths = Paths(self.path / PATHS)

    def _decode(self, row: int, memory: Memory) -> Picture:
        record = self.record(row)
        height, width = self._sizes[row].tolist()
        if pictures.is_upright_jpeg(record, height, width):
            with contextlib.suppress(ValueError):  # where it has a doubt, Pillow decides
                return simplejpeg.decode_jpeg(record, buffer=memory(3 * height * width))
        try:
            picture = pictures.decode(record.tobytes())
        except pictures.BadPicture as error:
            raise self._damaged(row, str(error)) from None
        if picture.shape[:2] != (height, width):
            raise self._damaged(row, "its size is not that of the index")
        return picture

    def _compare(self) -> None:
        """Raises UsageError where the index leads outside of a shard, or not to its pictures."""
        shards = self._which
        if (shards[1:] < shards[:-1]).any():  # never so, as it is written
            raise UsageError(f"{self.path / ROWS} is not in the order of the shards: {AGAIN}")
        begins = np.searchsorted(shards, np.arange(len(self._files) + 1))
        for number, shard in enumerate(self._files):
            mine = slice(begins[number], begins[number + 1])
            first, size = self._start[mine], self._bytes[mine]
            fits = len(first) and (first >= layout.BLOCK).all() and (size > 0).all()
            fits = fits and (first + size <= len(shard.bytes)).all()
            for at in (0, -1) if fits else ():
                block = shard.bytes[first[at] - layout.BLOCK : first[at]].tobytes()
                fits = fits and layout.length_in(block) == size[at]
            if not fits:
                raise UsageError(f"{shard.path} is not the tar that {ROWS} was made for: {AGAIN}")


def _shard(folder: Path, listed: dict[str, Any]) -> MappedFile:
    shard = mapped(folder / listed["file"], AGAIN)
    has, had = len(shard.bytes), listed["bytes"]
    if has != had:
        raise UsageError(f"{shard.path} has {has:,} bytes, and had {had:,}: {AGAIN}")
    return shard
