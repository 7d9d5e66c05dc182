"""The pictures of a `.beton` as a Source, to be prepared in another format: rows, labels and keys stay what they are."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrot.arrays import Picture
from fastrot.config import UsageError
from fastrot.data.files import BadPicture
from fastrot.data.manifest import UNKNOWN
from fastrot.data.sources.archives import Archive, InFiles
from fastrot.data.sources.records import Listing, Record

PLACE = np.dtype(  # where a picture's bytes lie, and what they are; crc: -1 where none is known
    [
        *(("file", "<i8"), ("offset", "<i8"), ("length", "<i8"), ("crc", "<i8")),
        *(("height", "<i4"), ("width", "<i4"), ("raw", "?")),
    ]
)


@dataclass(kw_only=True)
class BetonRows(InFiles):
    """Rows of `.beton` files, read without their tables and without torch. `places` are PLACE."""

    def read(self, i: int) -> Picture:
        """The pixels of record i. Raises BadPicture where they have changed."""
        import simplejpeg

        file, offset, length, crc, height, width, raw = self.places[i].tolist()
        data = self.bytes_at(file, offset, length)
        if crc >= 0 and zlib.crc32(data) != crc:
            raise BadPicture("its checksum does not agree")
        if raw:
            return np.frombuffer(data, np.uint8).reshape(height, width, 3).copy()
        pixels = np.empty((height, width, 3), np.uint8)
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
        raise UsageError(f"{root} is no .beton, nor parts of one: name what fastrot convert wrote")
    from fastrot.data.beton.read import Beton  # which needs torch

    data = Beton(root)
    labels = data.labels.tolist() if how.labelled else [-1] * data.rows
    names = [data.name(row) for row in range(data.rows)]
    paths = [f"{row:08d}" if name == UNKNOWN else name for row, name in enumerate(names)]
    places = np.empty(data.rows, PLACE)
    every = data._places(np.arange(data.rows))
    places["file"], places["offset"], places["length"] = every
    places["crc"] = -1 if data._crc is None else data._crc
    places["height"], places["width"] = data.contents.sizes.T
    places["raw"] = data.contents.raw
    stay = (
        f"{' and '.join(data.beside)} beside it stay behind: prepare the pictures anew to have them"
    )
    return BetonRows(
        root=root,
        records=[*map(Record, paths, labels)],
        classes=data.classes if how.labelled else (),
        notes=[stay] if data.beside else [],
        numbers=data.numbers,
        keys=data.keys,
        files=[Archive.at(file.path) for file in data._files],
        places=places,
    )
