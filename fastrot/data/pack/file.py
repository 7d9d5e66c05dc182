"""Opens a pack: checks what can be checked without reading the pictures, and maps these into memory.

The pictures' array is checked by `check`, or 64 MB at a time where something in them is first asked for.
"""

import contextlib
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

from fastrot.config import UsageError
from fastrot.core import CropRequest, DamagedRecord
from fastrot.data.keys import order_fingerprint
from fastrot.data.manifest import Paths, known, unsealed
from fastrot.data.pack import layout
from fastrot.data.pack.layout import BLOCK, BODY, LENGTH, META, VERSION, WIDTH
from fastrot.data.readahead import announce
from fastrot.entry import cores

_AGAIN = "copy or prepare it again"


class PackFile:
    """A pack of pictures, opened. Raises UsageError, in one sentence, where it is none or not whole.

    encoding     "ycc" or "raw"
    array        the file that holds the pictures: tiles.npy or pixels.npy
    map          its memory map, from its first byte on
    tiles        uint8 [tiles, 48] or [pixels, 3]: all pictures, one after the other, mapped into memory
    first        int64 [rows + 1]: where each picture begins in `tiles`; the last is its length
    sizes        int32 [rows, 2]: heights and widths
    labels       int64 [rows]; -1 where there is none
    keys         uint64 [rows]: hash of each path
    mean, std, numbers  as in `core.Data`
    meta         what meta.json says
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = self._read_meta()
        self.encoding: layout.Encoding = self.meta["encoding"]
        self.rows = int(self.meta["rows"])
        self._checksums: dict[str, list[int]] = self.meta["checksums"]
        self.array = BODY[self.encoding]
        arrays = {name: self._opened(name) for name in layout.arrays(self.encoding)}
        self.tiles: UInt8[np.ndarray, "t c"] = arrays[self.array]
        blocks = len(self._checksums[self.array])
        self._read, self._whole = np.zeros(blocks, bool), np.zeros(blocks, bool)
        self._checking = threading.Lock()
        for name in arrays:
            if name != self.array:
                self.check(name)
        self.first: Int64[np.ndarray, " m"] = arrays["first.npy"]
        self.sizes: Int32[np.ndarray, "n 2"] = arrays["sizes.npy"]
        self.labels: Int64[np.ndarray, " n"] = arrays["labels.npy"]
        self.keys: UInt64[np.ndarray, " n"] = arrays["keys.npy"]
        self.classes: tuple[str, ...] = tuple(self.meta["classes"])
        self.fingerprint: str = self.meta["fingerprint"]
        self.mean, self.std, self.numbers = known(self.meta)  # before encoding
        self._paths = Paths(self.path / "paths.jsonl")
        self._agree()

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tiles, first, sizes: what the decoders are given."""
        return self.tiles, self.first, self.sizes

    def rows_of(self, row: int) -> UInt8[np.ndarray, "t c"]:
        """The tiles [t, 48] or pixels [t, 3] of a picture, in the file, not checked."""
        return self.tiles[self.first[row] : self.first[row + 1]]

    def places(self, rows: Int64[np.ndarray, " b"]) -> tuple[np.ndarray, ...]:
        """File (0: there is one), first byte and bytes of pictures."""
        width, first, end = WIDTH[self.encoding], self.first[rows], self.first[rows + 1]
        start, length = (each.astype(np.uint64) for each in (first, end - first))
        return np.zeros_like(rows), start * width + self._offset, length * width

    def announce(self, request: CropRequest) -> None:
        """Tell the system which bytes will be read."""
        announce(request, [self.map], self.places)

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """The whole picture, from checked bytes. Raises DamagedRecord."""
        if reasons := self.damage(np.array([row])):
            raise DamagedRecord(reasons[0])
        return layout.decode(self.rows_of(row), *self.sizes[row].tolist())

    def damage(self, rows: Int64[np.ndarray, " b"], threads: int = 1) -> dict[int, str]:
        """Which of these pictures lie in a damaged stretch: a sentence, by the place in `rows`.

        Each 64 MB are read once, when something in them is first asked for.
        """
        width, at = WIDTH[self.encoding], self._offset
        begin = (at + width * self.first[rows]) // BLOCK
        end = (at + width * self.first[rows + 1] - 1) // BLOCK
        each = [np.arange(a, b + 1) for a, b in zip(begin, end, strict=True)]
        blocks = np.unique(np.concatenate(each))
        if not self._read[blocks].all():
            with self._checking:  # else every thread would read the block that all want first
                unread = blocks[~self._read[blocks]].tolist()
                with ThreadPoolExecutor(threads) as pool:
                    self._whole[unread] = [*pool.map(partial(self._agrees, self.array), unread)]
                self._read[unread] = True
        found = {}
        for block in blocks[~self._whole[blocks]][::-1].tolist():  # the first one is told
            for place in np.flatnonzero((begin <= block) & (block <= end)).tolist():
                row = int(rows[place])
                found[place] = (
                    f"row {row} of {self.path} ({self.name(row)}) may be damaged: the checksum of "
                    f"{self._where(self.array, block)} does not agree; {_AGAIN}, and "
                    f"dataprep/look.py {self.path} --verify names every damaged stretch"
                )
        return found

    def name(self, row: int) -> str:
        """Where the picture came from, if paths.jsonl tells."""
        return self._paths.of(row)

    def check(self, name: str | None = None) -> None:
        """Read a whole array (None: the pictures') and compare its checksums.

        Raises UsageError, which names the first damaged stretch.
        """
        name = name or self.array
        for block in self.damaged(name):
            where = f"the checksum of {self._where(name, block)} differs"
            raise UsageError(f"{self.path / name} is damaged: {where}; {_AGAIN}")

    def damaged(self, name: str) -> Iterator[int]:
        """The blocks of 64 MB of an array whose checksums differ, in order, by all cores."""
        count = len(self._checksums[name])
        with ThreadPoolExecutor(min(count, cores())) as pool:
            for block, fine in enumerate(pool.map(partial(self._agrees, name), range(count))):
                if name == self.array:
                    self._whole[block], self._read[block] = fine, True
                if not fine:
                    yield block

    def rows_in(self, block: int) -> range:
        """The pictures of which something lies in a block of the pictures' array."""
        width, at = WIDTH[self.encoding], self._offset
        begins, ends = (max(b * BLOCK - at, 0) for b in (block, block + 1))
        first = int(np.searchsorted(self.first, begins // width, side="right")) - 1
        stop = int(np.searchsorted(self.first, -(-ends // width), side="left"))
        return range(first, min(stop, self.rows))

    # ---- inside ----

    def _read_meta(self) -> dict[str, Any]:
        """What meta.json says, checked."""
        file = self.path / META
        if not self.path.is_dir():
            raise UsageError(
                f"{self.path} is no pack: name the folder NAME.pack (dataprep/to_pack.py writes one)"
            )
        with _readable(file, f"{self.path} is no whole pack, since it has no {META}"):
            document = file.read_bytes()
        try:
            meta = unsealed(document)
            if b'\n "crc": ' not in document:
                raise ValueError("it has no checksum of its own")
        except ValueError as error:
            raise UsageError(
                f"{file} has changed since it was written ({error}): {_AGAIN}"
            ) from None
        if meta.get("format") != "pack":
            raise UsageError(f"{file} is of no pack: name a folder that dataprep/to_pack.py wrote")
        if meta.get("version") != VERSION:
            raise UsageError(
                f"{self.path} is a pack of version {meta.get('version')}, and this program reads version "
                f"{VERSION}: prepare it again with dataprep/to_pack.py"
            )
        usable = {name: isinstance(meta.get(name), kind) for name, kind in _WANTED.items()}
        usable["encoding"] = meta.get("encoding") in BODY
        for name, fits in usable.items():
            if not fits:
                raise UsageError(f"{file} has no usable {name!r}: prepare the pack again")
        if missing := layout.arrays(meta["encoding"]).keys() - meta["checksums"].keys():
            raise UsageError(f"{file} has no checksums of {min(missing)}: prepare the pack again")
        return meta

    def _opened(self, name: str) -> np.ndarray:
        """An array, mapped, of the shape and length that meta.json asks for."""
        file = self.path / name
        dtype, width = layout.arrays(self.encoding)[name]
        with _readable(file, f"{file} is missing"):
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError):
                raise UsageError(f"{file} is cut short or damaged: {_AGAIN}") from None
            size = file.stat().st_size
        if size != array.offset + array.nbytes or -(-size // BLOCK) != len(self._checksums[name]):
            raise UsageError(f"{file} has {size:,} bytes, which is not what was written: {_AGAIN}")
        length = {self.array: self.meta[LENGTH[self.encoding]], "first.npy": self.rows + 1}
        shape = (length.get(name, self.rows), *([] if width is None else [width]))
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            found, wanted = f"{array.dtype} {list(array.shape)}", f"{dtype} {list(shape)}"
            raise UsageError(f"{file} is {found}, and meta.json wants {wanted}: {_AGAIN}")
        if name == self.array:
            self._offset = array.offset
            self.map = array._mmap  # it begins with the file: the header is shorter than a page
        return array.view(np.ndarray)

    def _agree(self) -> None:
        """Raises UsageError where the arrays are each whole, but not of one pack."""
        wanted, why = layout.firsts(self.sizes, self.encoding), None
        if (self.sizes < 1).any() or not np.array_equal(self.first, wanted):
            why = "first.npy and sizes.npy do not agree"
        elif wanted[-1] != len(self.tiles):
            why = "its pictures do not fill the array"
        elif order_fingerprint(self.keys, self.labels) != self.fingerprint:
            why = "its keys and labels are not its own"
        if why:
            raise UsageError(f"{self.path} is damaged: {why}; {_AGAIN}")

    def _agrees(self, name: str, block: int) -> bool:
        """Whether 64 MB of a file have their checksum."""
        crc, piece = 0, min(BLOCK, 2**20)
        with open(self.path / name, "rb") as file:
            file.seek(block * BLOCK)
            for _ in range(BLOCK // piece):
                crc = zlib.crc32(file.read(piece), crc)
        return crc == self._checksums[name][block]

    def _where(self, name: str, block: int) -> str:
        """A block in words."""
        last = block + 1 == len(self._checksums[name])
        return f"bytes {block * BLOCK:,} to " + ("the end" if last else f"{(block + 1) * BLOCK:,}")


_WANTED = {  # of meta.json, to be read at all
    "rows": int,
    "classes": list,
    "mean": list,
    "std": list,
    "fingerprint": str,
    "numbers": list | None,
    "checksums": dict,
}


@contextlib.contextmanager
def _readable(file: Path, missing: str) -> Iterator[None]:
    """What the system refuses in here is a UsageError; `missing`: what to say where there is no file."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{missing}: copy it too, or prepare the pack again") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}): {_AGAIN}") from None
