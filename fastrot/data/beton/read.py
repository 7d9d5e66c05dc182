"""Reads `.beton`, ours or FFCV's own: memory-mapped, decoded and resampled in threads; a set of parts as one file.

Two forms of the same work, equal to the bit: the C++ extension (`fastrot.native`), which decodes no more than the
boxes, and, where it was not built, simplejpeg and OpenCV. What the extension leaves alone, since it is damaged or of a
rare kind, goes to the other form: so they agree in what they refuse, too. README.md says what is checked, and when.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Bool, UInt64

from fastrot import native
from fastrot.arrays import Numbers, Picture, Sizes
from fastrot.config import UsageError
from fastrot.data.beton.layout import FIELD, FLOAT, HEADER, IMAGE, INT, RAW, TABLE, TYPES, VERSION
from fastrot.data.keys import order_fingerprint
from fastrot.data.manifest import Paths, known, side, unsealed
from fastrot.data.mapped import MappedData, MappedFile, Memory, mapped
from fastrot.data.reader import InC
from fastrot.disk import allow_open_files

LABELS = (b"label", b"labels", b"target", b"class")  # names of an int field that make it the label
NUMBERS = (b"index", b"idx", b"id")  # names that say it is none, even where it is the only one
MOST_CLASSES = 2**20  # an int field that counts further is taken for something else

_AGAIN = "copy it again, or remove it and run the same fastrot convert command again"


class Beton(MappedData):
    """`core.Data` of a `.beton` file, or of a folder of whole parts.

    contents  rows and table
    manifest  what FILE.beton.json says; empty where there is none
    native    whether the C++ extension makes the crops
    """

    format, again = "beton", _AGAIN

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        base = self.path / "set" if self.path.is_dir() else self.path
        self.manifest, self._crc, keys = _read_beside(base, needed=self.path.is_dir())
        parts = self.manifest.get("parts", [self.manifest])  # a file is the set of itself
        allow_open_files(len(parts))
        names = [part.get("file", base.name) for part in parts]
        self._files = [mapped(base.with_name(name), _AGAIN) for name in names]
        each = [_parse(*of) for of in zip(self._files, parts, strict=True)]
        self._which = np.repeat(np.arange(len(each)), [len(one.ptr) for one in each])
        self.contents = _joined(each)
        self._start, self._bytes, self._sizes, self._raw, self.labels, *_ = self.contents
        self.rows = len(self.labels)
        self.keys = np.arange(self.rows, dtype=np.uint64) if keys is None else keys
        if self._crc is not None:
            fits = self._crc.shape == self.keys.shape == self.labels.shape
            if not fits or (self._crc.dtype, self.keys.dtype) != ("u4", "u8"):
                raise _damaged_beside(base)
        self.fingerprint = order_fingerprint(self.keys, self.labels)
        if self.manifest.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise _damaged_beside(base)
        most = int(self.labels.max()) + 1
        counted = map(str, range(most if most <= MOST_CLASSES else 0))
        self.classes = tuple(self.manifest.get("classes", counted))
        self.mean, self.std, self.numbers = known(self.manifest)
        laid = self.manifest.get("beside", {})
        self.beside = {name: (side(base, name), crc) for name, crc in laid.items()}
        self._paths = Paths(side(base, "paths.jsonl"))
        self._records_in = native.Files([file.bytes for file in self._files])
        self.native = native.load() is not None

    def describe(self) -> list[str]:
        if self.native:
            return [f"crops are decoded by the C++ extension, {native.why()}"]
        return [f"crops are decoded by simplejpeg, without the C++ extension: {native.why()}"]

    def _in_c(self) -> InC | None:
        if not self.native:
            return None
        return lambda pool, request, out: [
            pool.jpeg_crops(self.records(request.rows[0][:, 0]), request.rows, out)
        ]

    def records(self, rows: Numbers) -> native.Records:
        """Where the records of rows lie, for the C++ extension."""
        which, start, size = (each.astype(np.int64) for each in self._places(rows))
        crcs = None if self._crc is None else self._crc[rows]
        of = self._sizes[rows], self._raw[rows], crcs
        return native.Records(self._records_in, which, start, size, *of)

    def _decode(self, row: int, memory: Memory) -> Picture:
        data = self.record(row)
        height, width = self._sizes[row].tolist()
        if self._raw[row]:
            return data.reshape(height, width, 3)
        try:  # a JPEG larger than its row says would not fit, and is refused before it is decoded
            picture = simplejpeg.decode_jpeg(data, buffer=memory(3 * height * width))
        except ValueError as error:
            raise self._damaged(row, str(error)) from None
        if picture.shape != (height, width, 3):
            found = "{} x {}".format(*picture.shape)
            raise self._damaged(row, f"it is {found} pixels, its row says {height} x {width}")
        return picture


# ---- the file ----


class Contents(NamedTuple):
    """Rows and table, checked."""

    ptr: UInt64[np.ndarray, " n"]
    size: UInt64[np.ndarray, " n"]
    sizes: Sizes
    raw: Bool[np.ndarray, " n"]
    labels: Numbers
    fields: tuple[tuple[str, int], ...]  # name, type
    page: int


def _parse(mapping: MappedFile, told: dict[str, Any]) -> Contents:
    """All checks that need no decoding, against what is `told` of the file, if anything. Raises UsageError."""
    path, file = mapping.path, mapping.bytes

    def damaged(why: str) -> UsageError:
        return UsageError(f"{path} is cut short or damaged: {why}; {_AGAIN}")

    if len(file) < HEADER.itemsize:
        raise damaged(f"it has {len(file)} bytes, less than a header")
    header = file[: HEADER.itemsize].view(HEADER)[0]
    version, fields, page, rows, at = (int(header[name]) for name in HEADER.names or ())
    if version == 0:
        raise UsageError(f"{path} was never finished (version 0): {_AGAIN}")
    if version != VERSION:
        raise UsageError(
            f"{path} is no .beton of version {VERSION} (its first bytes say {version}): "
            "prepare the pictures with fastrot convert"
        )
    start = HEADER.itemsize + FIELD.itemsize * fields
    if not fields or not rows or start > len(file):
        raise damaged(f"its header claims {fields} fields and {rows} rows")
    described = file[HEADER.itemsize : start].view(FIELD)
    names, kinds = described["name"].tolist(), described["type"].tolist()
    if unknown := sorted(set(kinds) - set(TYPES)):
        raise UsageError(f"{path} has a field of type {unknown[0]}, which is not FFCV's: {_AGAIN}")
    if IMAGE not in kinds:
        raise UsageError(f"{path} has no image field: name a .beton of pictures")
    row = np.dtype([(f"f{i}", TYPES[kind]) for i, kind in enumerate(kinds)], align=True)
    end = start + row.itemsize * rows
    records = sum(kind not in (INT, FLOAT) for kind in kinds)  # of a row
    if not end <= at or at + TABLE.itemsize * rows * records != len(file):
        raise damaged(f"{rows} rows and a table at byte {at} do not make {len(file)} bytes")
    values, table = file[start:end].view(row), file[at:].view(TABLE)

    image = values[f"f{kinds.index(IMAGE)}"]
    ptr = image["ptr"].astype(np.uint64)
    size = _lengths(ptr, table)
    sizes = np.stack([image["height"], image["width"]], axis=1).astype(np.int32)
    raw = image["mode"] == RAW
    inside = (ptr >= end) & (ptr < at) & (size > 0) & (size <= at - ptr)
    if not inside.all() or not sizes.all() or (image["mode"] > RAW).any():
        raise damaged("its rows and its table do not agree")
    if (size[raw] != 3 * image["height"][raw].astype(np.uint64) * image["width"][raw]).any():
        raise damaged("a raw picture is not 3 x width x height bytes")
    crcs = {"head_crc": zlib.crc32(file[:end].data), "table_crc": zlib.crc32(file[at:].data)}
    if told and not crcs.items() <= told.items():
        raise UsageError(
            f"{path} has changed since it was written, or the .json beside it is of another file: {_AGAIN}"
        )
    described = tuple(zip((name.decode(errors="replace") for name in names), kinds, strict=True))
    return Contents(ptr, size, sizes, raw, _labels(values, names, kinds), described, page)


def _joined(each: list[Contents]) -> Contents:
    """The contents of parts, as of one file."""
    arrays = zip(*(one[:5] for one in each), strict=True)
    ptr, size, sizes, raw, labels = map(np.concatenate, arrays)
    page = max(one.page for one in each)
    return Contents(ptr, size, sizes, raw, labels, each[0].fields, page)


def _lengths(ptr: UInt64[np.ndarray, " n"], table: np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Bytes of each record, from the table, which FFCV leaves in no order; 0 where it does not hold the record."""
    if not (table["size"] > 0).any():
        return np.zeros(len(ptr), np.uint64)
    if len(table) != len(ptr) or not np.array_equal(table["ptr"], ptr):
        table = table[table["size"] > 0]  # an empty blob shares its pointer with what follows
        table = table[np.argsort(table["ptr"], kind="stable")]
        table = table[np.searchsorted(table["ptr"], ptr).clip(max=len(table) - 1)]
    found = (table["ptr"] == ptr) & (table["row"] == np.arange(len(ptr), dtype=np.uint64))
    return np.where(found, table["size"], 0).astype(np.uint64)


def _labels(values: np.ndarray, names: list[bytes], kinds: list[int]) -> Numbers:
    """The int field that is named like a label, else the first that is no number of a row, else -1."""
    ints = [i for i, kind in enumerate(kinds) if kind == INT and names[i].lower() not in NUMBERS]
    named = [i for i in ints if names[i].lower() in LABELS]
    if not ints:
        return np.full(len(values), -1, np.int64)
    return values[f"f{(named or ints)[0]}"].astype(np.int64)


# ---- what lies beside it ----


Beside = tuple[dict[str, Any], np.ndarray | None, np.ndarray | None]


def _read_beside(base: Path, *, needed: bool) -> Beside:
    """Manifest, checksums and path hashes: all or, unless they are needed, none. Raises UsageError."""
    files = [side(base, name) for name in ("json", "crc.npy", "keys.npy")]
    missing = [file for file in files if not file.exists()]
    if len(missing) == len(files) and not needed:
        return {}, None, None
    if missing:
        way = f"move away all {base.name}.*"
        if needed:
            way = "run the same fastrot convert command again"
        raise UsageError(f"{missing[0]} is missing: copy it too, or {way}")
    try:
        crc, keys = (np.load(file, allow_pickle=False) for file in files[1:])
        return unsealed(files[0].read_bytes()), crc, keys
    except (ValueError, EOFError):
        raise _damaged_beside(base) from None


def _damaged_beside(base: Path) -> UsageError:
    return UsageError(
        f"{base}.json, .crc.npy or .keys.npy is damaged, or of another file: copy all of them again, or run "
        "the same fastrot convert command with --overwrite"
    )
