"""Data whose pictures' records lie in memory-mapped files: what a .beton and tar shards share."""

import mmap
import threading
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrot.arrays import Bytes, Picture, Rows, Sizes
from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Data, Reader
from fastrot.data.manifest import Paths
from fastrot.data.readahead import announce
from fastrot.data.reader import Errors, InC, ThreadedReader, fill_decoded

Memory = Callable[[int], Bytes]  # gives so many bytes of any content


class MappedFile(NamedTuple):
    path: Path
    map: mmap.mmap
    bytes: Bytes


class MappedData(Data):
    """Records in files, each compared with its crc32 when it is asked for.

    A format says where they lie, and how one is decoded. Arrays hold a number for each row.
    """

    again: str  # what to do about a damaged record
    path: Path
    _files: list[MappedFile]
    _which: np.ndarray  # the file
    _start: np.ndarray  # the record's first byte in it
    _bytes: np.ndarray
    _sizes: Sizes  # the picture's height and width, upright
    _crc: np.ndarray | None  # uint32; None: there are no checksums
    _paths: Paths

    def __init__(self) -> None:
        self._scratch = Scratch()

    def name(self, row: int) -> str:
        """Where the picture came from, if paths.jsonl tells."""
        return self._paths.of(row)

    def record(self, row: int) -> Bytes:
        """The bytes of a picture as they lie in the file, compared with their crc32. Raises DamagedRecord."""
        start = int(self._start[row])
        data = self._file_of(row).bytes[start : start + int(self._bytes[row])]
        if self._crc is not None and zlib.crc32(data.data) != self._crc[row]:
            raise self._damaged(row, "its checksum does not agree")
        return data

    def picture(self, row: int) -> Picture:
        """The whole picture, upright (a raw one: read-only, in the file). Raises DamagedRecord."""
        return self._decode(row, partial(np.empty, dtype=np.uint8))

    @abstractmethod
    def _decode(self, row: int, memory: Memory) -> Picture:
        """The picture, in memory that it asks for. Raises DamagedRecord."""

    def _damaged(self, row: int, why: str) -> DamagedRecord:
        """What is said of a record."""
        return DamagedRecord(
            f"row {row} of {self._file_of(row).path} ({self.name(row)}) is damaged, {why}: {self.again}; "
            f"fastrot look {self.path} --verify names every damaged row"
        )

    def _file_of(self, row: int) -> MappedFile:
        return self._files[self._which[row]]

    def _places(self, rows: Rows) -> tuple[np.ndarray, ...]:
        """File, first byte and bytes of records."""
        return self._which[rows], self._start[rows], self._bytes[rows]

    def open_reader(self, device: torch.device, workers: int) -> Reader:
        how = {"advise": self._announce, "in_c": self._in_c()}
        return ThreadedReader(self.fill, device, workers, **how)

    def _in_c(self) -> InC | None:
        """How the C++ extension begins a batch; None: it cannot."""
        return None

    def fill(self, request: CropRequest, out: tuple[Tensor, ...], places: Iterable[int]) -> Errors:
        """The crops of some places of a batch, decoded in Python; what cannot be read."""

        def decode(place: int) -> Picture:
            return self._decode(int(request.rows[0][place, 0]), self._scratch.take)

        return fill_decoded(decode, request, out, places)

    def _announce(self, request: CropRequest) -> Errors:
        announce(request, [file.map for file in self._files], self._places)
        return []


class Scratch(threading.local):
    """Memory of each thread, of any content, which it uses again."""

    held = np.empty(0, np.uint8)

    def take(self, size: int) -> Bytes:
        if len(self.held) < size:
            self.held = np.empty(size, np.uint8)
        return self.held[:size]


def mapped(path: Path, again: str) -> MappedFile:
    """A file in memory. Raises UsageError, which ends with what to do."""
    try:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UsageError(f"{path} is empty: {again}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): {again}") from None
    return MappedFile(path, memory, np.frombuffer(memory, np.uint8))
