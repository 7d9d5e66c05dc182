"""Reads `.beton`, ours or FFCV's own: memory-mapped, decoded and resampled in threads.

Two forms of the same work, equal to the bit: the C++ extension (`fastrot.native`), which decodes no more than the
boxes, and, where it was not built, simplejpeg and OpenCV. What the extension leaves alone, since it is damaged or of a
rare kind, goes to the other form: so they agree in what they refuse, too.

Nothing of a picture is read before it is asked for; opening costs a pass over the rows and the table. What can
be checked without decoding is checked at the door, and each record against its crc32 where there is one: a
JPEG with one flipped bit decodes without complaint four times in five.

A set of parts (`to_ffcv.py --keep-parts`) is read as the one file that its parts would be merged into.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32, UInt64

from fastrot import native
from fastrot.config import UsageError
from fastrot.core import DamagedRecord
from fastrot.data.beton.layout import FIELD, HEADER, IMAGE, INT, RAW, TABLE, TYPES, VERSION
from fastrot.data.keys import order_fingerprint
from fastrot.data.manifest import Paths, known, side, unsealed
from fastrot.data.mapped import MappedData, MappedFile, Memory, mapped
from fastrot.data.reader import InC
from fastrot.disk import allow_open_files

LABELS = (b"label", b"labels", b"target", b"class")  # names of an int field that make it the label
NUMBERS = (b"index", b"idx", b"id")  # names that say it is none, even where it is the only one
MOST_CLASSES = 2**20  # an int field that counts further is taken for something else

_BLOB = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_OTHERS = {3: _BLOB, 4: np.dtype("<u8"), 5: _BLOB, 6: np.dtype("<u8")}  # bytes, array, json, tensor
_AGAIN = "copy or prepare it again"
_MENDED = "remove {} and run the same dataprep/to_ffcv.py command, which makes it anew"


class Beton(MappedData):
    """`core.Data` of a `.beton` file, or of a folder of whole parts.

    contents  header, rows and table
    manifest  what FILE.beton.json says; empty where there is none
    native    whether the C++ extension makes the crops
    """

    format = "beton"

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        opened = _opened_set if self.path.is_dir() else _opened_file
        self._files, each, self.contents, beside = opened(self.path)
        self._which = np.repeat(np.arange(len(each)), each)
        self._start, self._bytes = self.contents.ptr, self.contents.size
        self._sizes, self._raw = self.contents.sizes, self.contents.raw
        self.labels = self.contents.labels
        self.rows = len(self.labels)
        self.manifest, self._crc = beside.manifest, beside.crc
        self.keys = np.arange(self.rows, dtype=np.uint64) if beside.keys is None else beside.keys
        self.fingerprint = order_fingerprint(self.keys, self.labels)
        most = int(self.labels.max()) + 1
        counted = map(str, range(most if most <= MOST_CLASSES else 0))
        self.classes = tuple(self.manifest.get("classes", counted))
        self.mean, self.std, self.numbers = known(self.manifest)
        base = self.path / "set" if self.path.is_dir() else self.path
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

    def records(self, rows: Int64[np.ndarray, " b"]) -> native.Records:
        """Where the records of rows lie, for the C++ extension."""
        which, start, size = (each.astype(np.int64) for each in self._places(rows))
        crcs = None if self._crc is None else self._crc[rows]
        of = self._sizes[rows], self._raw[rows], crcs
        return native.Records(self._records_in, which, start, size, *of)

    def _decode(self, row: int, memory: Memory) -> UInt8[np.ndarray, "h w 3"]:
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

    def _damaged(self, row: int, why: str) -> DamagedRecord:
        again, part = _AGAIN, ""
        if self.path.is_dir():
            file = self._file_of(row).path.name
            again, part = f"copy {file} again, or {_MENDED.format(file)}", f", in {file}"
        return DamagedRecord(
            f"row {row} of {self.path} ({self.name(row)}{part}) is damaged, {why}: {again}; "
            f"dataprep/look.py {self.path} --verify names every damaged row"
        )


# ---- the file ----


class Contents(NamedTuple):
    """Header, rows and table, checked."""

    ptr: UInt64[np.ndarray, " n"]
    size: UInt64[np.ndarray, " n"]
    sizes: Int32[np.ndarray, "n 2"]
    raw: Bool[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    fields: tuple[tuple[str, int], ...]  # name, type
    page: int
    crc_rows: int  # of header, fields and rows
    crc_table: int


def _opened_file(path: Path) -> tuple[list[MappedFile], list[int], Contents, "_Side"]:
    """The file; its rows; what is in it and beside it."""
    file = mapped(path, _AGAIN)
    contents = _parse(file.bytes, path)
    return [file], [len(contents.ptr)], contents, _side_files(path, contents)


def _parse(file: UInt8[np.ndarray, " n"], path: Path) -> Contents:
    """All checks that need no decoding. Raises UsageError."""

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
            "prepare the pictures with dataprep/to_ffcv.py"
        )
    start = HEADER.itemsize + FIELD.itemsize * fields
    if not fields or not rows or start > len(file):
        raise damaged(f"its header claims {fields} fields and {rows} rows")
    described = file[HEADER.itemsize : start].view(FIELD)
    names, kinds, types = described["name"].tolist(), described["type"].tolist(), TYPES | _OTHERS
    if unknown := sorted(set(kinds) - set(types)):
        raise UsageError(f"{path} has a field of type {unknown[0]}, which is not FFCV's: {_AGAIN}")
    if IMAGE not in kinds:
        raise UsageError(f"{path} has no image field: name a .beton of pictures")
    row = np.dtype([(f"f{i}", types[kind]) for i, kind in enumerate(kinds)], align=True)
    end = start + row.itemsize * rows
    records = sum(kind == IMAGE or kind in _OTHERS for kind in kinds)
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
    return Contents(
        ptr=ptr,
        size=size,
        sizes=sizes,
        raw=raw,
        labels=_labels(values, names, kinds),
        fields=tuple(zip((name.decode(errors="replace") for name in names), kinds, strict=True)),
        page=page,
        crc_rows=zlib.crc32(file[:end].data),
        crc_table=zlib.crc32(file[at:].data),
    )


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


def _labels(values: np.ndarray, names: list[bytes], kinds: list[int]) -> Int64[np.ndarray, " n"]:
    """The int field that is named like a label, else the first that is no number of a row, else -1."""
    ints = [i for i, kind in enumerate(kinds) if kind == INT and names[i].lower() not in NUMBERS]
    named = [i for i in ints if names[i].lower() in LABELS]
    if not ints:
        return np.full(len(values), -1, np.int64)
    return values[f"f{(named or ints)[0]}"].astype(np.int64)


# ---- what lies beside it ----


_SIDES = ("json", "crc.npy", "keys.npy")


class _Side(NamedTuple):
    manifest: dict[str, Any]
    crc: UInt32[np.ndarray, " n"] | None
    keys: UInt64[np.ndarray, " n"] | None


def _side_files(path: Path, contents: Contents) -> _Side:
    """Manifest, checksums and path hashes: all or none. Raises UsageError where they are of another file."""
    missing = [each for each in map(partial(side, path), _SIDES) if not each.exists()]
    if len(missing) == len(_SIDES):
        return _Side({}, None, None)
    if missing:
        raise UsageError(f"{missing[0]} is missing: copy it too, or move away all {path.name}.*")
    with_all = f"{_AGAIN}, with all {path.name}.*"
    found = _read_side(path, f"what lies beside {path} is damaged: {with_all}")
    crcs = (found.manifest.get("head_crc"), found.manifest.get("table_crc"))
    if crcs != (contents.crc_rows, contents.crc_table):
        raise UsageError(
            f"{path} has changed since it was written, or {path.name}.json is of another file: {with_all}"
        )
    _compare(found, contents, f"{path.name}.keys.npy or .crc.npy is not that of {path}: {with_all}")
    return found


def _read_side(base: Path, refusal: str) -> _Side:
    try:
        manifest = unsealed(side(base, "json").read_bytes())
        crc, keys = (np.load(side(base, name), allow_pickle=False) for name in _SIDES[1:])
    except (ValueError, EOFError):
        raise UsageError(refusal) from None
    return _Side(manifest, crc, keys)


def _compare(found: _Side, contents: Contents, refusal: str) -> None:
    """Raises UsageError where checksums and path hashes are not those of these rows."""
    crc, keys = found.crc, found.keys
    assert crc is not None
    assert keys is not None
    fits = crc.shape == keys.shape == contents.ptr.shape and (crc.dtype, keys.dtype) == ("u4", "u8")
    fingerprint = found.manifest.get("fingerprint")
    if not fits or order_fingerprint(keys, contents.labels) != fingerprint:
        raise UsageError(refusal)


# ---- a set of parts ----


def _opened_set(folder: Path) -> tuple[list[MappedFile], list[int], Contents, _Side]:
    """The parts that set.json lists, each checked as a file is; the rows of each. Raises UsageError, which names the part."""
    base, again = folder / "set", "run the same dataprep/to_ffcv.py command again"
    for name in _SIDES:
        if not side(base, name).exists():
            raise UsageError(
                f"{folder} is no whole set of parts, since it has no set.{name}: {again}"
            )
    damaged = f"{base}.json, .crc.npy or .keys.npy is damaged: copy it again, or {again}"
    found = _read_side(base, damaged)
    files, each = [], []
    listed = found.manifest.get("parts", [])
    allow_open_files(len(listed))
    for part in listed:
        path = folder / part["file"]
        if not path.exists():
            raise UsageError(f"{path} is missing: copy it too, or {again}, which makes it anew")
        files.append(mapped(path, _AGAIN))
        each.append(_parse(files[-1].bytes, path))
        if (part["head_crc"], part["table_crc"]) != (each[-1].crc_rows, each[-1].crc_table):
            raise UsageError(
                f"{path} has changed since it was written: copy it again, or {again}, which makes it anew"
            )
    if not files:
        raise UsageError(damaged)
    arrays = ("ptr", "size", "sizes", "raw", "labels")
    joined = {name: np.concatenate([getattr(c, name) for c in each]) for name in arrays}
    contents = each[0]._replace(**joined, page=max(c.page for c in each), crc_rows=0, crc_table=0)
    _compare(found, contents, damaged)
    return files, [len(c.ptr) for c in each], contents, found
