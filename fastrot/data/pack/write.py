"""A source's pictures into one pack; layout.py says what lies where.

A part's file holds its pictures one after the other: height and width (int32 each), then the tiles or pixels. Whole
parts are put together in a folder that gets the pack's name by one rename (writer.FolderWriter): so a pack is there
with all that belongs to it, or not at all. Its bytes depend on neither workers nor parts.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32, UInt8

from fastrot.config import UsageError
from fastrot.data.manifest import sealed
from fastrot.data.pack import layout
from fastrot.data.pack.file import PackFile
from fastrot.data.pack.layout import BLOCK, BODY, LENGTH, META, WIDTH, Encoding
from fastrot.data.prepare.encode import EncodedPicture, EncodeSpec
from fastrot.data.prepare.options import Options
from fastrot.data.prepare.parts import Part
from fastrot.data.prepare.writer import Converted, FolderWriter
from fastrot.disk import replace_bytes, write_atomically

HEAD = np.dtype(("<i4", 2))  # before a picture's tiles in a part: height, width
PATHS, REJECTS = "paths.jsonl", "rejects.jsonl"
NAMES = {META, *layout.arrays("ycc"), *layout.arrays("raw"), PATHS, REJECTS}  # of a pack's files


@dataclass(frozen=True, kw_only=True)
class PackOptions(Options):
    """Convert pictures into one pack, whose tiles a GPU decodes in its crop kernel; resumable, with checksums."""

    encoding: Encoding = "ycc"  # how pictures are stored; raw: exact, and four times as large
    center_crop: bool = False  # keep the centre square of each picture, after shrinking

    def writer(self) -> "PackWriter":
        return PackWriter(self)

    def check(self) -> None:
        super().check()
        if self.out.suffix != ".pack":
            raise UsageError(f"--out got {self.out}: its name must end in .pack")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(
                f"--out got {self.out}, a file: a pack is a folder; choose another --out"
            )


@dataclass(frozen=True, slots=True)
class Coder:
    """A picture's bytes in a part."""

    encoding: Encoding

    def encode(self, picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
        head = np.array(picture.shape[:2], HEAD.base)
        return head.tobytes() + layout.encode(picture, self.encoding).tobytes()

    def decode(self, data: bytes, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        rows = np.frombuffer(data, np.uint8, offset=HEAD.itemsize)
        return layout.decode(rows.reshape(-1, WIDTH[self.encoding]), height, width)


# ---- the folder ----


def write_folder(
    folder: Path,
    encoding: Encoding,
    converted: Converted,
    sizes: Int32[np.ndarray, "n 2"],
    body: Iterable[bytes | memoryview],
) -> dict[str, Any]:
    """All files of a pack into a folder, meta.json last; what that says.

    `body`: the bytes of the pictures' tiles or pixels, in order, in pieces of any length.
    """
    first = layout.firsts(sizes, encoding)
    contents = {
        BODY[encoding]: ((int(first[-1]), WIDTH[encoding]), body),
        "first.npy": (first.shape, [first.data]),
        "sizes.npy": (sizes.shape, [sizes.data]),
        "labels.npy": (sizes.shape[:1], [converted.labels.data]),
        "keys.npy": (sizes.shape[:1], [converted.keys.data]),
    }
    checksums = {
        name: write_array(folder / name, layout.arrays(encoding)[name][0], shape, pieces)
        for name, (shape, pieces) in contents.items()
    }
    beside = converted.write_beside(folder.joinpath)
    described = {
        "version": layout.VERSION,
        "encoding": encoding,
        LENGTH[encoding]: int(first[-1]),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        **beside,
    }
    manifest = converted.manifest("pack", described)
    manifest["checksums"] = checksums
    replace_bytes(folder / META, sealed(manifest))
    return manifest


def write_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]
) -> list[int]:
    """A `.npy` of a known shape from its bytes in pieces, whole or not at all; the crc32 of each 64 MB of it."""
    crcs: list[int] = []

    def write(file: BinaryIO) -> None:
        checked = _Checked(file, crcs)
        head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(checked, {**head, "shape": shape})
        begins = checked.written
        for piece in pieces:
            checked.write(piece)
        assert checked.written - begins == dtype.itemsize * int(np.prod(shape, dtype=object))

    write_atomically(path, write)
    return crcs


class _Checked:
    """A file that adds up the crc32 of each 64 MB as they are written."""

    def __init__(self, file: BinaryIO, crcs: list[int]):
        self.file, self.crcs, self.written = file, crcs, 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            inside = self.written % BLOCK
            if not inside:
                self.crcs.append(0)
            piece = view[: BLOCK - inside]
            self.crcs[-1] = zlib.crc32(piece, self.crcs[-1])
            self.file.write(piece)
            self.written += len(piece)
            view = view[len(piece) :]


# ---- parts ----


def sizes_in(parts: list[Part], encoding: Encoding) -> Int32[np.ndarray, "n 2"]:
    """Heights and widths of all pictures in whole parts, in order. Raises UsageError as `body_of`."""
    each = ([size for size, _, _ in _pictures(part, encoding)] for part in parts)
    return np.concatenate([np.array(sizes, np.int32).reshape(-1, 2) for sizes in each])


def body_of(parts: list[Part], encoding: Encoding) -> Iterator[memoryview]:
    """The tiles or pixels of all pictures in whole parts, in order, each picture checked on the way.

    Raises UsageError where a part has changed since it was written; it then counts as not made.
    """
    for part in parts:
        for _, picture, crc in _pictures(part, encoding):
            if zlib.crc32(picture) != crc:
                raise part.changed()
            yield picture[HEAD.itemsize :]


def _pictures(part: Part, encoding: Encoding) -> Iterator[tuple[list[int], memoryview, int]]:
    """Height and width, bytes with their head, and crc32 as it was written, of each picture of a whole part."""
    crcs = part.stats().crcs
    if not crcs:
        return
    file, end = np.memmap(part.file, np.uint8, "r").data, 0
    for crc in crcs:
        start, body = end, end + HEAD.itemsize
        size = np.frombuffer(bytes(file[start:body]).ljust(HEAD.itemsize, b"\0"), HEAD.base)
        if size.min() < 1 or size.max() > 65_535:
            raise part.changed()
        end = body + WIDTH[encoding] * int(layout.lengths(size[None], encoding)[0])
        yield size.tolist(), file[start:end], crc
    if end != len(file):
        raise part.changed()


# ---- the conversion ----


class PackWriter(FolderWriter):
    """A folder of arrays."""

    suffix = ".tiles"
    row_bytes = sum(np.dtype(kind).itemsize for kind in ("i8", "i8", "u8"))  # first, label, key
    named = "a pack"
    manifest_name = META
    options: PackOptions

    @property
    def encode_spec(self) -> EncodeSpec:
        o = self.options
        return EncodeSpec(Coder(o.encoding), o.short_side, o.max_side, center_crop=o.center_crop)

    def write_part(self, path: Path, pictures: Iterable[EncodedPicture], room: int) -> None:
        write_atomically(path, lambda file: file.writelines(p.data for p in pictures))

    def ours(self, file: Path) -> bool:
        return file.name in NAMES or file.name.startswith(".")

    def opened(self) -> dict[str, Any]:
        return PackFile(self.out).meta

    def write_files(self, folder: Path, converted: Converted) -> dict[str, Any]:
        parts, encoding = converted.parts, self.options.encoding
        sizes, body = sizes_in(parts, encoding), body_of(parts, encoding)
        return write_folder(folder, encoding, converted, sizes, body)
