"""A source's pictures into one `.beton`, or with --keep-parts a folder of them, and all that lies beside it.

README.md names the files. Readers find all of them or none, and their bytes depend on neither workers nor parts.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import simplejpeg

from fastrot.arrays import Picture
from fastrot.config import UsageError
from fastrot.data.beton import layout
from fastrot.data.files import BadPicture
from fastrot.data.manifest import read_manifest, sealed, side
from fastrot.data.prepare import parts as part_files
from fastrot.data.prepare.encode import EncodedPicture, EncodeSpec
from fastrot.data.prepare.options import WAYS, Options
from fastrot.data.prepare.parts import Part
from fastrot.data.prepare.writer import (
    SKIPPED,
    Converted,
    Existing,
    FormatWriter,
    refuse_other,
    save,
)
from fastrot.disk import replace_bytes, sync_folder, write_atomically

ROWS_AT = layout.HEADER.itemsize + len(layout.NAMES) * layout.FIELD.itemsize  # 3,147
NEEDED = ("crc.npy", "keys.npy", "paths.jsonl")  # beside the records, besides the .json
BESIDE = (*NEEDED, "rejects.jsonl", SKIPPED, "json")
CRCS = ("head_crc", "table_crc")  # of header, fields and rows; of the table
LARGEST = 2**31  # bytes of a record: the largest page that the header can name
LONGEST = 65_500  # pixels a side that libjpeg takes


@dataclass(frozen=True, kw_only=True)
class BetonOptions(Options):
    """Convert pictures into one FFCV .beton file, resumable, with checksums beside it."""

    encoding: Literal["jpg", "raw"] = "jpg"  # how pictures are stored; raw: exact, and large
    quality: int = 90  # of the JPEG, 1 to 100
    keep_parts: bool = False  # no merging: leave the folder OUT.set, read by --data OUT.set

    def writer(self) -> "BetonWriter":
        return BetonWriter(self)

    def check(self) -> None:
        super().check()
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality got {self.quality}: it wants 1 to 100")
        if self.out.suffix != ".beton":
            raise UsageError(f"--out got {self.out}: its name must end in .beton")
        if self.out.is_dir():
            raise UsageError(f"--out got {self.out}, a folder: it wants a file's name")

    @property
    def set(self) -> Path:
        """The folder of whole parts that --keep-parts leaves."""
        return side(self.out, "set")


@dataclass(frozen=True, slots=True)
class Coder:
    """A picture's bytes in the file: JPEG (4:2:0, baseline) or its pixels."""

    encoding: Literal["jpg", "raw"] = "jpg"
    quality: int = 90

    def encode(self, picture: Picture) -> bytes:
        if self.encoding == "raw":
            if picture.nbytes > LARGEST:
                raise BadPicture(f"{picture.nbytes:,} bytes raw: a record may have {LARGEST:,}")
            return picture.tobytes()
        if max(picture.shape[:2]) > LONGEST:
            height, width = picture.shape[:2]
            raise BadPicture(f"{width}x{height} pixels: a side of a JPEG may have {LONGEST:,}")
        return simplejpeg.encode_jpeg(picture, quality=self.quality, colorsubsampling="420")

    def decode(self, data: bytes, height: int, width: int) -> Picture:
        if self.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(height, width, 3)
        return simplejpeg.decode_jpeg(data)


# ---- the file ----


class Packer:
    """Packs records into the pages of one open file, in the order given; the header comes last.

    A record larger than the page doubles the page: what lay inside one small page lies inside one large page.
    `room` is the number of rows to leave space for; fewer may come.
    """

    def __init__(self, file: BinaryIO, room: int):
        self.file, self.rows, self.page = file, 0, layout.PAGE
        self._rows, self._table = np.zeros(room, layout.ROW), np.zeros(room, layout.TABLE)
        self._at = ROWS_AT + self._rows.nbytes

    def add(self, record: bytes, *, mode: int, height: int, width: int, label: int) -> None:
        size = len(record)
        while self.page < size:
            self.page *= 2
        if self._at // self.page != (self._at + size - 1) // self.page:
            self._at = -(-self._at // self.page) * self.page
        self.file.seek(self._at)
        self.file.write(record)
        self._rows[self.rows] = ((mode, width, height, self._at), label, self.rows)
        self._table[self.rows] = (self.rows, self._at, size)
        self._at += size
        self.rows += 1

    def finish(self) -> None:
        assert self.rows
        fields = np.zeros(len(layout.NAMES), layout.FIELD)
        for field, (name, kind) in zip(fields, layout.NAMES, strict=True):
            field["name"], field["type"] = name.encode(), kind
        header = np.zeros(1, layout.HEADER)
        header[0] = (layout.VERSION, len(fields), self.page, self.rows, self._at)
        self.file.seek(self._at)
        self.file.write(self._table[: self.rows].view(np.uint8).data)
        self.file.seek(layout.HEADER.itemsize)
        self.file.write(fields.tobytes())
        self.file.write(self._rows[: self.rows].view(np.uint8).data)
        self.file.flush()
        self.file.seek(0)
        self.file.write(header.tobytes())


def read_part(path: Path) -> Iterator[tuple[np.void, bytes]]:
    """Row and record of every picture of a file that `Packer` wrote, in order."""
    with open(path, "rb") as file:
        header = np.fromfile(file, layout.HEADER, 1)[0]
        rows = np.fromfile(path, layout.ROW, int(header["rows"]), offset=ROWS_AT)
        table = np.fromfile(path, layout.TABLE, len(rows), offset=int(header["table"]))
        for row, entry in zip(rows, table, strict=True):
            file.seek(int(entry["ptr"]))
            yield row, file.read(int(entry["size"]))


def merge(parts: list[Part], rows: int, file: BinaryIO) -> None:
    """Pack the records of all parts into one file, in order, each checked on the way."""
    packer = Packer(file, rows)
    for part in parts:
        for row, record in _unchanged(part):
            mode, width, height, _ = row["f0"].tolist()
            packer.add(record, mode=mode, height=height, width=width, label=int(row["f1"]))
    packer.finish()


def _unchanged(part: Part) -> Iterator[tuple[np.void, bytes]]:
    """Row and record of every picture of a part, each checked. Raises UsageError, and the part counts as not made."""
    crcs = part.stats().crcs
    records = read_part(part.file) if crcs else iter(())
    try:
        for crc, (row, record) in zip(crcs, records, strict=True):
            if zlib.crc32(record) != crc:
                raise ValueError
            yield row, record
    except (ValueError, IndexError):  # or the part is cut, or its rows lead elsewhere
        raise part.changed() from None


# ---- the conversion ----


class BetonWriter(FormatWriter):
    """One file, or with --keep-parts the folder of its parts."""

    suffix = ".beton"
    row_bytes = layout.ROW.itemsize + layout.TABLE.itemsize
    options: BetonOptions

    @property
    def encode_spec(self) -> EncodeSpec:
        o = self.options
        coder = Coder(o.encoding, o.quality)
        return EncodeSpec(coder, o.short_side, o.max_side, o.allow_truncated)

    def write_part(self, path: Path, pictures: Iterable[EncodedPicture], room: int) -> None:
        """A .beton of its own from a part's pictures; `index` counts from 0 in it."""
        mode = layout.JPG if self.options.encoding == "jpg" else layout.RAW

        def write(file: BinaryIO) -> None:
            packer = Packer(file, room)
            for p in pictures:
                packer.add(p.data, mode=mode, height=p.height, width=p.width, label=p.label)
            packer.finish()

        write_atomically(path, write)

    def paths(self, manifest: dict[str, Any]) -> tuple[Path, Callable[[str], Path]]:
        if "parts" in manifest:
            return self.options.set, partial(side, self.options.set / "set")
        return self.options.out, partial(side, self.options.out)

    def existing(self, plan: dict[str, Any], part: int) -> Existing:
        out, kept = self.out, self.options.set
        with contextlib.suppress(OSError):
            kept.rmdir()  # where it is empty: of a start that was killed at its very end
        begun = part_files.begun_with(kept)
        if begun is None and kept.exists():
            raise UsageError(f"{kept} is no set of ours: remove it or choose another --out")
        if self.options.overwrite:
            return Existing()
        own = {**plan, "part": begun.get("part", part) if begun else part}
        if out.exists():
            manifest = read_manifest(side(out, "json"))
            if not _is_whole(out, manifest):
                raise UsageError(f"{out} is there, but is no whole file of ours: {WAYS}")
            refuse_other(out, plan, manifest["options"])
            if begun == own and not self.options.keep_parts:
                part_files.remove(kept)  # merged by a start that was killed at its very end
            part_files.remove_if_of(self.parts_folder, {**plan, "part": part})
            return Existing(manifest)
        if begun is None:
            return Existing()
        refuse_other(kept, own, begun)
        manifest = read_manifest(side(kept / "set", "json"))
        if not _is_whole(kept / "set", manifest):
            self._take_apart(manifest)
            return Existing()
        (kept / part_files.LOCK).unlink(missing_ok=True)  # of a start killed at its very end
        if self.options.keep_parts:
            return Existing(manifest)
        return Existing(None, kept, begun["part"])  # to be merged

    def _take_apart(self, manifest: dict[str, Any]) -> None:
        """A set that lacks something becomes the folder of parts again, so that it is mended there."""
        kept, parts = self.options.set, self.parts_folder
        if parts.exists() and {*os.listdir(parts)} <= {part_files.PLAN, part_files.LOCK}:
            part_files.remove(parts)  # of a merge that was broken off
        if parts.exists():
            raise UsageError(
                f"{kept} lacks something, and {parts} is there too: remove one of them"
            )
        for file in _changed(kept / "set", manifest):
            file.with_suffix(".json").unlink(missing_ok=True)
        os.rename(kept, parts)

    def write(self, converted: Converted) -> dict[str, Any]:
        """Merge the parts, or add to them what makes them a set; put it in its place."""
        out, kept, parts = self.out, self.options.set, self.parts_folder
        new = parts / part_files.NEW
        if self.options.keep_parts:
            files = [part.file for part in converted.parts if part.file.exists()]
            listed = [{"file": file.name, **_described(file)} for file in files]
            page = max(each.pop("page") for each in listed)
            size = sum(each["bytes"] for each in listed)
            body = {"parts": listed, "bytes": size, "page": page}
            manifest = _write_beside(parts / "set", converted, body)
        else:
            write_atomically(new, lambda file: merge(converted.parts, len(converted.records), file))
            found = _described(new)
            body = {name: found[name] for name in (*CRCS, "bytes", "page")}
            manifest = _write_beside(new, converted, body)
        # all of it is on the disk: from here on names change, which needs no space
        beside = {*manifest.get("beside", ()), *read_manifest(side(out, "json")).get("beside", ())}
        out.unlink(missing_ok=True)
        for name in (*sorted(beside), *BESIDE):
            if side(new, name).exists():
                os.replace(side(new, name), side(out, name))
            else:
                side(out, name).unlink(missing_ok=True)
        sync_folder(out.parent)
        if self.options.keep_parts:
            part_files.remove(kept)
            os.rename(parts, kept)
            sync_folder(out.parent)
            (kept / part_files.LOCK).unlink(missing_ok=True)
        else:
            os.replace(new, out)
            sync_folder(out.parent)
            part_files.remove(kept)
            part_files.remove(parts)
        return manifest


def _write_beside(base: Path, converted: Converted, body: dict[str, Any]) -> dict[str, Any]:
    """Write all that lies beside the records, the .json last; what that says. `body`: of the records' file or files."""
    save(side(base, "crc.npy"), converted.crcs)
    save(side(base, "keys.npy"), converted.keys)
    beside = converted.write_beside(lambda name: side(base, name))
    manifest = converted.manifest("beton", body | beside)
    replace_bytes(side(base, "json"), sealed(manifest))
    return manifest


# ---- what is there: a file, or a set of parts, and what lies beside it under `base`.NAME ----


def _is_whole(base: Path, manifest: dict[str, Any]) -> bool:
    """Whether all is there that the manifest names, and as it says."""
    beside = [side(base, name) for name in (*NEEDED, *manifest.get("beside", ()))]
    parts = [base.with_name(part["file"]) for part in manifest.get("parts", ())]
    abouts = [file.with_suffix(".json") for file in parts]  # gone: a merge found a record changed
    there = all(file.exists() for file in (*beside, *abouts))
    return bool(manifest) and there and not _changed(base, manifest)


def _changed(base: Path, manifest: dict[str, Any]) -> list[Path]:
    """The file, or the parts, whose header, rows and table are not those of the manifest; records are not read."""
    changed = []
    for told in manifest.get("parts", [manifest]):
        file = base.with_name(told.get("file", base.name))
        try:
            found = _described(file)
            same = all(found[name] == told[name] for name in CRCS)
        except (OSError, ValueError, KeyError):
            same = False
        if not same:
            changed.append(file)
    return changed


def _described(path: Path) -> dict[str, int]:
    """What a manifest says of a file that `Packer` wrote. Raises ValueError where it has no header."""
    file = np.memmap(path, np.uint8, "r")
    header = file[: layout.HEADER.itemsize].view(layout.HEADER)[0]
    rows, table = int(header["rows"]), int(header["table"])
    return {
        "rows": rows,
        "bytes": len(file),
        "head_crc": zlib.crc32(file[: ROWS_AT + rows * layout.ROW.itemsize].data),
        "table_crc": zlib.crc32(file[table:].data),
        "page": int(header["page"]),
    }
