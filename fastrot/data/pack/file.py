"""Opens a pack: checks what can be checked without reading the pictures, and maps these into memory.

The pictures' array is checked by `check`, or 64 MB at a time where something in them is first asked for.
"""

import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastrot.arrays import Bytes, Picture, Rows
from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord, Data
from fastrot.data.keys import order_fingerprint
from fastrot.data.manifest import Paths, known, unsealed
from fastrot.data.pack import layout
from fastrot.data.pack.layout import BLOCK, BODY, META, VERSION, WIDTH, Tiles
from fastrot.data.readahead import announce
from fastrot.entry import cores

_AGAIN = "copy or prepare it again"
_WANTED = {"rows", "classes", "mean", "std", "fingerprint", "numbers", "checksums"}  # of meta.json


class PackFile(Data):
    """A pack's files, opened. Raises UsageError, in one sentence, where they are not those of a whole pack.

    encoding  "ycc" or "raw"
    array     the file that holds the pictures: tiles.npy or pixels.npy
    map       its memory map, from its first byte on
    tiles     all pictures, one after the other, mapped into memory
    first     int64 [rows + 1]: where each picture begins in `tiles`; the last is its length
    meta      what meta.json says
    """

    format = "pack"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = self._read_meta()
        self.encoding: layout.Encoding = self.meta["encoding"]
        self.rows, self.array = self.meta["rows"], f"{BODY[self.encoding]}.npy"
        self._checksums: dict[str, list[int]] = self.meta["checksums"]
        wanted = layout.arrays(self.encoding, self.rows, self.meta[BODY[self.encoding]])
        opened = {name: self._opened(name, *each) for name, each in wanted.items()}
        body = opened.pop(self.array)
        self.map: Any = vars(body)[
            "_mmap"
        ]  # it begins with the file: the header is shorter than a page
        self._header, self.tiles = body.offset, body.view(np.ndarray)
        self._whole: dict[
            int, bool
        ] = {}  # by block: whether it has its checksum, where it was read
        self._checking = threading.Lock()
        for name in opened:
            self.check(name)
        self.first, self._sizes, self.labels, self.keys = (
            opened[f"{name}.npy"].view(np.ndarray) for name in ("first", "sizes", "labels", "keys")
        )
        self.classes, self.fingerprint = tuple(self.meta["classes"]), self.meta["fingerprint"]
        self.mean, self.std, self.numbers = known(self.meta)  # before encoding
        laid = self.meta.get("beside", {})
        self.beside = {name: (self.path / name, crc) for name, crc in laid.items()}
        self._paths = Paths(self.path / "paths.jsonl")
        self._agree()

    def name(self, row: int) -> str:
        """Where the picture came from, if paths.jsonl tells."""
        return self._paths.of(row)

    def rows_of(self, row: int) -> Tiles:
        """The tiles [t, 48] or pixels [t, 3] of a picture, in the file, not checked."""
        return self.tiles[self.first[row] : self.first[row + 1]]

    def record(self, row: int) -> Bytes:
        """The bytes of a picture's tiles or pixels, not checked."""
        return self.rows_of(row).reshape(-1)

    def picture(self, row: int) -> Picture:
        """The whole picture, from checked bytes. Raises DamagedRecord."""
        if reasons := self.damage(np.array([row])):
            raise DamagedRecord(reasons[0])
        return layout.decode(self.rows_of(row), *self._sizes[row].tolist())

    def places(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """File (0: there is one), first byte and bytes of pictures."""
        width, first = WIDTH[self.encoding], self.first[rows]
        length = (self.first[rows + 1] - first) * width
        return np.zeros_like(rows), self._header + first * width, length

    def announce(self, request: CropRequest) -> None:
        """Tell the system which bytes will be read."""
        announce(request, [self.map], self.places)

    # ---- checksums ----

    def check(self, name: str | None = None) -> None:
        """Read a whole array (None: the pictures') and compare its checksums.

        Raises UsageError, which names the first damaged stretch.
        """
        name = name or self.array
        for block in self.damaged(name):
            why = f"the checksum of {_where(block)} differs"
            raise UsageError(f"{self.path / name} is damaged: {why}; {_AGAIN}")

    def damaged(self, name: str) -> Iterator[int]:
        """The blocks of 64 MB of an array whose checksums differ, in order, by all cores."""
        blocks = range(len(self._checksums[name]))
        with ThreadPoolExecutor(min(len(blocks), cores())) as pool:
            for block, whole in enumerate(pool.map(partial(self._agrees, name), blocks)):
                if name == self.array:
                    self._whole[block] = whole
                if not whole:
                    yield block

    def damage(self, rows: Rows, threads: int = 1) -> dict[int, str]:
        """Which of these pictures lie in a damaged stretch: a sentence, by the place in `rows`.

        Each 64 MB are read once, when something in them is first asked for.
        """
        _, start, length = self.places(rows)
        begin, end = start // BLOCK, (start + length - 1) // BLOCK
        spans = [range(a, b + 1) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
        blocks = set().union(*spans)
        if blocks - self._whole.keys():
            with self._checking:  # else every thread would read the block that all want first
                unread = sorted(blocks - self._whole.keys())
                with ThreadPoolExecutor(threads) as pool:
                    agree = pool.map(partial(self._agrees, self.array), unread)
                    self._whole.update(zip(unread, agree, strict=True))
        damaged = {block for block in blocks if not self._whole[block]}
        found = {}
        for place, span in enumerate(spans):
            if here := damaged.intersection(span):
                row = int(rows[place])
                found[place] = (
                    f"row {row} of {self.path} ({self.name(row)}) may be damaged: the checksum of "
                    f"{_where(min(here))} does not agree; {_AGAIN}, and "
                    f"fastrot look {self.path} --verify names every damaged stretch"
                )
        return found

    def rows_in(self, block: int) -> range:
        """The pictures of which something lies in a block of the pictures' array."""
        begins, ends = (max(b * BLOCK - self._header, 0) for b in (block, block + 1))
        width = WIDTH[self.encoding]
        first = int(np.searchsorted(self.first, begins // width, side="right")) - 1
        stop = int(np.searchsorted(self.first, -(-ends // width), side="left"))
        return range(first, min(stop, self.rows))

    def _agrees(self, name: str, block: int) -> bool:
        """Whether 64 MB of a file have their checksum."""
        crc, piece = 0, min(BLOCK, 2**20)
        with open(self.path / name, "rb") as file:
            file.seek(block * BLOCK)
            for _ in range(BLOCK // piece):
                crc = zlib.crc32(file.read(piece), crc)
        return crc == self._checksums[name][block]

    # ---- opening ----

    def _read_meta(self) -> dict[str, Any]:
        """What meta.json says, checked."""
        file = self.path / META
        if not self.path.is_dir():
            raise UsageError(
                f"{self.path} is no pack: name the folder NAME.pack (fastrot pack writes one)"
            )
        try:
            meta = unsealed(file.read_bytes())
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}): {_AGAIN}") from None
        except ValueError as error:
            raise UsageError(f"{file} has changed since written ({error}): {_AGAIN}") from None
        if meta.get("format") != "pack":
            raise UsageError(f"{file} is of no pack: name a folder that fastrot pack wrote")
        version, encoding = meta.get("version"), meta.get("encoding")
        if version != VERSION or encoding not in BODY:
            raise UsageError(
                f"{self.path} is a pack of version {version}, encoding {encoding!r}, and this program reads "
                f"version {VERSION}, {' or '.join(BODY)}: prepare it again with fastrot pack"
            )
        if missing := {*_WANTED, BODY[encoding]} - meta.keys():
            raise UsageError(f"{file} has no {min(missing)!r}: prepare the pack again")
        return meta

    def _opened(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        """An array, mapped, as meta.json wants it."""
        file = self.path / name
        try:
            array, size = np.load(file, mmap_mode="r", allow_pickle=False), file.stat().st_size
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}): {_AGAIN}") from None
        except (ValueError, EOFError):
            raise UsageError(f"{file} is cut short or damaged: {_AGAIN}") from None
        blocks = len(self._checksums.get(name, ()))
        if size != array.offset + array.nbytes or -(-size // BLOCK) != blocks:
            raise UsageError(f"{file} has {size:,} bytes, which is not what was written: {_AGAIN}")
        if (array.dtype, array.shape) != (dtype, shape) or not array.flags.c_contiguous:
            found, wanted = f"{array.dtype} {list(array.shape)}", f"{dtype} {list(shape)}"
            raise UsageError(f"{file} is {found}, and meta.json wants {wanted}: {_AGAIN}")
        return array

    def _agree(self) -> None:
        """Raises UsageError where the arrays are each whole, but not of one pack."""
        wanted, why = layout.firsts(self._sizes, self.encoding), None
        if (self._sizes < 1).any() or not np.array_equal(self.first, wanted):
            why = "first.npy and sizes.npy do not agree"
        elif wanted[-1] != len(self.tiles):
            why = "its pictures do not fill the array"
        elif order_fingerprint(self.keys, self.labels) != self.fingerprint:
            why = "its keys and labels are not its own"
        if why:
            raise UsageError(f"{self.path} is damaged: {why}; {_AGAIN}")


def _where(block: int) -> str:
    return f"bytes {block * BLOCK:,} to {(block + 1) * BLOCK:,}"
