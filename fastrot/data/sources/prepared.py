"""The pictures of a `.beton` as a Source, to be prepared in another format: rows, labels and keys stay what they are."""

import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from fastrot.config import UsageError
from fastrot.data.files import BadPicture
from fastrot.data.manifest import UNKNOWN
from fastrot.data.sources.records import Listing, Record, Source


class Place(NamedTuple):
    """Where a picture's bytes lie, and what they are."""

    file: str
    at: int
    size: int
    crc: int | None  # None: nothing lies beside the file
    height: int
    width: int
    raw: bool


@dataclass(frozen=True, slots=True)
class Row(Record):
    """A record that knows its row in the file."""

    row: int = 0


@dataclass(kw_only=True)
class BetonRows(Source):
    """Rows of an opened `.beton`; the opened file never travels, their places do."""

    file: object = field(repr=False)  # Beton: naming it would load torch in every worker

    def part(self, first: int, stop: int) -> "Places":
        records = self.records[first:stop]
        places = [_place(self.file, record.row) for record in records]  # type: ignore[attr-defined]
        return Places(root=self.root, records=records, classes=(), seen=0, places=places)

    def read(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        return self.part(i, i + 1).read(0)


@dataclass(kw_only=True)
class Places(Source):
    """Some rows, read without the file's tables. Raises BadPicture for one that has changed."""

    places: list[Place]

    def read(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        import simplejpeg

        file, at, size, crc, height, width, raw = self.places[i]
        with open(file, "rb") as opened:
            data = os.pread(opened.fileno(), size, at)
        if crc is not None and zlib.crc32(data) != crc:
            raise BadPicture("its checksum does not agree")
        pixels = np.empty((height, width, 3), np.uint8)
        if raw:
            pixels.ravel()[:] = np.frombuffer(data, np.uint8)
            return pixels
        try:  # a JPEG larger than its row says does not fit
            found = simplejpeg.decode_jpeg(data, buffer=pixels)
        except ValueError as error:
            raise BadPicture(str(error)) from None
        if found.shape != pixels.shape:
            raise BadPicture(f"it is not {height} x {width} pixels, as its row says")
        return found


def beton_rows(root: Path, how: Listing) -> BetonRows:
    """All rows of a `.beton`, ours or FFCV's own, or of a folder of its parts; in that one's order."""
    if root.is_dir() and not (root / "set.json").exists():
        raise UsageError(
            f"{root} is no .beton, nor the parts of one: name what dataprep/to_ffcv.py wrote"
        )
    if how.split is not None:
        raise UsageError(f"--split {how.split}: a .beton has no splits; name the file of one")
    from fastrot.data.beton.read import Beton  # which needs torch

    data = Beton(root)
    labels = data.labels.tolist() if how.labelled else [-1] * data.rows
    records: list[Record] = []
    for row, label in enumerate(labels):
        name = data.name(row)
        records.append(Row(f"{row:08d}" if name == UNKNOWN else name, label, row))
    return BetonRows(
        root=root,
        records=records,
        classes=data.classes if how.labelled else (),
        seen=data.rows,
        numbers=data.numbers,
        keys=data.keys,
        file=data,
    )


def _place(data, row: int) -> Place:
    c = data.contents
    height, width = c.sizes[row].tolist()
    crc = None if data._crc is None else int(data._crc[row])
    file = str(data._file_of(row).path)
    return Place(file, int(c.ptr[row]), int(c.size[row]), crc, height, width, bool(c.raw[row]))
