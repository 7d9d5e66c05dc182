"""The C++ extension: whole batches of crops, out of `.beton` records and out of packs. Optional.

`setup.py` builds it where there is a compiler and libjpeg-turbo's headers; nothing but ctypes joins it to Python.
It gives the bits that the Python libraries give; FASTROT_NATIVE=0 switches it off, a path names another build of it.

C trusts what it gets, so everything is compared here with the memory that it lies in: types, layouts, numbers
of rows, the bytes of every record. The GIL is free while C works.
"""

import ctypes
import functools
import os
import sysconfig
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32, UInt64

from fastrot.arrays import Boxes, Rows, RowSizes, Sizes

SETTING = "FASTROT_NATIVE"
WANTS = "install g++ and libjpeg-turbo's headers, apt's libjpeg-dev, then fastrot again"
EDITION = 1  # of the C functions' signatures: a library of another one is not used
FINE = 0  # a picture's status; anything else: damaged, or of a kind that others decode
TILE = 48  # bytes of a pack's 8 x 8 pixels

Crops = UInt8[np.ndarray, "b _s _s 3"]
Status = Int32[np.ndarray, " b"]

_P, _N = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "edition": (c_int, []),
    "libjpeg": (c_int, []),
    "wide": (c_int, [c_int]),
    "crc32": (c_uint32, [_P, _N]),
    "pool": (_P, [c_int]),
    "end": (None, [_P]),
    "jpeg_crops": (_P, [_P, _N, _P, _P, _P, _P, _P, c_int, _P, _P, _P, _P]),
    "pack_crops": (_P, [_P, _N, _P, _P, _P, c_int, _P, _N, _P, _P]),
    "wait": (None, [_P, _P]),
}


def load() -> ctypes.CDLL | None:
    """The library; None where it was not built, cannot be loaded, or is switched off."""
    return _opened(os.environ.get(SETTING, ""))[0]


def why() -> str:
    """One phrase: why there is no library, or which one there is."""
    return _opened(os.environ.get(SETTING, ""))[1]


@functools.cache
def _opened(setting: str) -> tuple[ctypes.CDLL | None, str]:
    if setting == "0":
        return None, f"{SETTING}=0 switches it off"
    beside = Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    file = Path(setting) if setting else beside
    if not file.exists():
        return None, f"{file.name} is not there, since it could not be built ({WANTS})"
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"fastrot_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"it cannot be loaded ({' '.join(str(error).split())})"
    if library.fastrot_edition() != EDITION:
        return None, "it was built from other sources: install fastrot again"
    number = library.fastrot_libjpeg()
    version = f"{number // 10**6}.{number // 1000 % 1000}.{number % 1000}"
    return library, f"built with libjpeg-turbo {version}"


class Files:
    """Memory that records lie in, which stays alive with it."""

    def __init__(self, files: Sequence[UInt8[np.ndarray, " _n"]]):
        assert all(file.flags.c_contiguous for file in files)
        self._files = tuple(files)
        self._at = np.array([_address(file) for file in files], np.uint64)
        self._bytes = np.array([len(file) for file in files], np.int64)

    def addresses(self, which: Rows, start: Rows, size: Rows) -> UInt64[np.ndarray, " b"]:
        """Where records begin. Raises IndexError for one that does not lie in its file."""
        known = (which >= 0) & (which < len(self._files))
        ends = self._bytes[np.where(known, which, 0)]
        inside = known & (start >= 0) & (size > 0) & (size <= ends) & (start <= ends - size)
        if not inside.all():
            raise IndexError(f"record {int(np.argmin(inside))} does not lie in its file")
        return self._at[which] + start.astype(np.uint64)


class Records(NamedTuple):
    """The records of a batch, in their files."""

    files: Files
    which: Rows  # of the files
    start: Rows  # the record's first byte
    bytes: Rows
    sizes: RowSizes  # heights and widths that the pictures must have
    raw: Bool[np.ndarray, " b"]  # height x width x 3 bytes as they are; else a JPEG
    crcs: UInt32[np.ndarray, " b"] | None  # crc32 of each; None: JPEGs are read to their ends


class Work:
    """A batch that C has taken on. All that it reads and writes, `kept`, lives until it is done."""

    def __init__(self, pool: "Pool", function: Any, count: int, arguments: list[Any], *kept: Any):
        self._pool, self._kept = pool, kept
        self._status = np.full(count, -1, np.int32)
        pool.under_way.add(self)
        self._batch = function(pool.address, count, *arguments, _address(self._status))
        if self._batch is None:
            pool.under_way.discard(self)
            raise MemoryError

    def wait(self) -> Status:
        """The pictures' states, when all are done: FINE, or not, and then the crop holds anything."""
        if self._batch is not None:
            if self._pool.address is None:
                raise ValueError("its pool was closed before")
            self._pool.library.fastrot_wait(self._pool.address, self._batch)
            self._pool.under_way.discard(self)
            self._batch = self._kept = None
        return self._status


class Pool:
    """Threads that make crops, batch after batch. With 0 threads whoever waits does the work.

    Raises OSError where there is no library.
    """

    def __init__(self, threads: int):
        library = load()
        if library is None:
            raise OSError(f"no C++ extension: {why()}")
        self.library = library
        self.under_way: set[Work] = set()
        self.address: int | None = library.fastrot_pool(threads)
        if self.address is None:
            raise MemoryError

    def close(self) -> None:
        """What is under way is finished, the rest left. No Work may be waited for afterwards."""
        if self.address is not None:
            self.library.fastrot_end(self.address)
            self.address = None
            self.under_way.clear()

    def __del__(self) -> None:
        if getattr(self, "address", None) is not None:
            self.close()  # threads may still write into the arrays of what is under way

    def jpeg_crops(self, records: Records, boxes: Sequence[Boxes], out: Sequence[Crops]) -> Work:
        """Begin a batch: crops of the records into `out`, one array for each crop of the view, as `resample` makes them.

        Raises ValueError for what is not of the form above, IndexError for a record outside its file.
        """
        count = len(records.sizes)
        height, width = records.sizes[records.raw].T.astype(np.int64)
        if (records.bytes[records.raw] != height * width * 3).any():
            raise ValueError("a raw record is not height x width x 3 bytes")
        place = (records.which, records.start, records.bytes)
        which, start, size = (_checked(each, np.int64, (count,)) for each in place)
        columns = [
            records.files.addresses(which, start, size),
            size,
            _checked(records.sizes, np.int32, (count, 2)),
            _checked(records.raw, np.bool_, (count,)),
        ]
        if records.crcs is not None:
            columns.append(_checked(records.crcs, np.uint32, (count,)))
        if not boxes or len(boxes) != len(out):
            raise ValueError(f"{len(boxes)} arrays of boxes and {len(out)} of crops")
        boxes = [_checked(each, np.int64, (count, 6)) for each in boxes]
        sides = np.array([_side_of(each, count) for each in out], np.int64)
        box_at, out_at = (np.array([_address(a) for a in each], np.uint64) for each in (boxes, out))
        arguments = [*map(_address, columns), *[None] * (records.crcs is None)]
        arguments += [len(boxes), *map(_address, (box_at, sides, out_at))]
        kept = (columns, boxes, out, sides, box_at, out_at, records.files)
        return Work(self, self.library.fastrot_jpeg_crops, count, arguments, *kept)

    def pack_crops(
        self,
        data: UInt8[np.ndarray, "t c"],
        first: Int64[np.ndarray, " n1"],
        sizes: Sizes,
        boxes: Boxes,
        out: Crops,
    ) -> Work:
        """Begin a batch: crops of a pack's pictures, decoded, then as `resample` makes them.

        `data` are its tiles or pixels, `first` the first of each picture and the total; a box that lies outside its
        picture is not FINE. Raises ValueError for what is not of this form or does not agree, IndexError for a row
        that there is not.
        """
        tiled = data.shape[1:] == (TILE,)
        data = _checked(data, np.uint8, (len(data), TILE if tiled else 3))
        sizes = _checked(sizes, np.int32, (len(sizes), 2))
        first = _checked(first, np.int64, (len(sizes) + 1,))
        boxes = _checked(boxes, np.int64, (len(boxes), 6))
        side = _side_of(out, len(boxes))
        _check_rows(boxes[:, 0], first, sizes, len(data), 8 if tiled else 1)
        kept = (data, first, sizes, boxes, out)
        data_at, first_at, sizes_at, boxes_at, out_at = map(_address, kept)
        arguments = [data_at, first_at, sizes_at, int(tiled), boxes_at, side, out_at]
        return Work(self, self.library.fastrot_pack_crops, len(boxes), arguments, *kept)


def _check_rows(rows: Rows, first: np.ndarray, sizes: np.ndarray, total: int, side: int) -> None:
    """Raises where a picture of the batch does not lie in the pack: its tiles are `side` pixels a side."""
    if not len(rows):
        return
    if rows.min() < 0 or rows.max() >= len(sizes):
        raise IndexError(f"rows {rows.min()} to {rows.max()} of a pack of {len(sizes)}")
    across = -(-sizes[rows].astype(np.int64) // side)
    begin, end = first[rows], first[rows + 1]
    agree = (across > 0).all(axis=1) & (begin >= 0) & (end <= total)
    agree &= end - begin == across[:, 0] * across[:, 1]
    if not agree.all():
        row = int(rows[np.argmin(agree)])
        raise ValueError(f"the pack is damaged: the size of row {row} is not that of its pixels")


def _side_of(out: np.ndarray, count: int) -> int:
    """Pixels a side of crops that are written into. Raises ValueError where C cannot."""
    side = out.shape[1] if out.ndim == 4 else 0
    fits = side > 0 and out.shape == (count, side, side, 3) and out.dtype == np.uint8
    if not (fits and out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"crops go to uint8 [{count}, s, s, 3], not {out.dtype}{out.shape}")
    return side


def _checked(array: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The array, contiguous. Raises ValueError for another type or shape."""
    if array.dtype != dtype or array.shape != shape:
        wanted = f"{np.dtype(dtype)}{list(shape)}"
        raise ValueError(f"an array is {array.dtype}{list(array.shape)}, not {wanted}")
    return np.ascontiguousarray(array)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
