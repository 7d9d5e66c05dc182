"""A source's pictures into one pack.

A part's file holds its pictures one after the other: height and width (int32 each), then the tiles or pixels. A
pack's bytes depend on neither workers nor parts.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastrot.arrays import Picture, Sizes
from fastrot.config import UsageError
from fastrot.data.manifest import sealed
from fastrot.data.pack import layout
from fastrot.data.pack.layout import BLOCK, BODY, META, WIDTH, Encoding
from fastrot.data.prepare.encode import EncodedPicture, EncodeSpec
from fastrot.data.prepare.options import Options
from fastrot.data.prepare.parts import Part
from fastrot.data.prepare.writer import SKIPPED, Converted, FolderWriter
from fastrot.disk import replace_bytes, write_atomically

HEAD = np.dtype(("<i4", 2))  # before a picture's tiles in a part: height, width
NAMES = {META, *layout.arrays("ycc", 0, 0), *layout.arrays("raw", 0, 0)}  # of a pack's files
NAMES |= {"paths.jsonl", "rejects.jsonl", SKIPPED}


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

    def encode(self, picture: Picture) -> bytes:
        head = np.array(picture.shape[:2], HEAD.base)
        return head.tobytes() + layout.encode(picture, self.encoding).tobytes()

    def decode(self, data: bytes, height: int, width: int) -> Picture:
        rows = np.frombuffer(data, np.uint8, offset=HEAD.itemsize)
        return layout.decode(rows.reshape(-1, WIDTH[self.encoding]), height, width)


# ---- the folder ----


def write_folder(
    folder: Path,
    encoding: Encoding,
    converted: Converted,
    sizes: Sizes,
    body: Iterable[bytes | memoryview],
) -> dict[str, Any]:
    """All files of a pack into a folder, meta.json last; what that says.

    `body`: the bytes of the pictures' tiles or pixels, in order, in pieces of any length.
    """
    first = layout.firsts(sizes, encoding)
    contents = {
        "first.npy": [first.data],
        "sizes.npy": [sizes.data],
        "labels.npy": [converted.labels.data],
        "keys.npy": [converted.keys.data],
        f"{BODY[encoding]}.npy": body,
    }
    checksums = {
        name: write_array(folder / name, *each, contents[name])
        for name, each in layout.arrays(encoding, len(sizes), int(first[-1])).items()
    }
    beside = converted.write_beside(folder.joinpath)
    described = {
        "version": layout.VERSION,
        "encoding": encoding,
        BODY[encoding]: int(first[-1]),
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
        for piece in pieces:
            checked.write(piece)

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


def pictures_in(
    parts: list[Part], encoding: Encoding, *, checked: bool
) -> Iterator[tuple[np.ndarray, memoryview]]:
    """Height and width, and tiles or pixels, of all pictures in whole parts, in order; `checked`: by their crc32 too.

    Raises UsageError where a part has changed since it was written; it then counts as not made.
    """
    for part in parts:
        crcs, end = part.stats().crcs, 0
        file = np.memmap(part.file, np.uint8, "r").data if crcs else memoryview(b"")
        for crc in crcs:
            start, body = end, end + HEAD.itemsize
            size = np.frombuffer(bytes(file[start:body]).ljust(HEAD.itemsize, b"\0"), HEAD.base)
            if size.min() < 1 or size.max() > 65_535:
                raise part.changed()
            end = body + WIDTH[encoding] * int(layout.lengths(size[None], encoding)[0])
            if checked and zlib.crc32(file[start:end]) != crc:
                raise part.changed()
            yield size, file[body:end]
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
        sizes = o.short_side, o.max_side
        return EncodeSpec(Coder(o.encoding), *sizes, o.allow_truncated, o.center_crop)

    def write_part(self, path: Path, pictures: Iterable[EncodedPicture], room: int) -> None:
        write_atomically(path, lambda file: file.writelines(p.data for p in pictures))

    def ours(self, file: Path) -> bool:
        return file.name in NAMES or file.name.startswith(".")

    def opened(self) -> dict[str, Any]:
        from fastrot.data.pack.read import Pack  # here: workers do without torch

        return Pack(self.out).meta

    def write_files(self, folder: Path, converted: Converted) -> dict[str, Any]:
        parts, encoding = converted.parts, self.options.encoding
        heads = (size for size, _ in pictures_in(parts, encoding, checked=False))
        body = (picture for _, picture in pictures_in(parts, encoding, checked=True))
        return write_folder(folder, encoding, converted, np.fromiter(heads, HEAD), body)
