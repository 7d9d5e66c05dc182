"""A source's pictures into one `.beton`, with what is to be known of them beside it.

    OUT.beton               pictures, labels, index = row number (see layout.py)
    OUT.beton.crc.npy       uint32 [rows]: crc32 of each record's bytes
    OUT.beton.keys.npy      uint64 [rows]: hash of each path
    OUT.beton.paths.jsonl   {"path", "number"} of each row: relative to the source's root; number in the source
    OUT.beton.rejects.jsonl {"path", "reason"} of each picture left out, where there are any
    OUT.beton.json          all else: classes, statistics, fingerprint, options, counts, versions

The .json's head_crc (header, fields and rows) and table_crc name the one .beton that it describes; its own crc is
its last key. All are written under other names before anything old is touched; then one that is replaced goes first,
and the .beton comes last. So a reader that finds a .beton finds its whole set, and a full disk harms nothing.

With --keep-parts the parts are not merged: OUT.beton.set/ holds them, and of the above `set.json` (with a list
`parts` of their names, rows, bytes and crcs instead of the two crcs), `set.crc.npy` and so on. That folder appears
by one rename, is read as one file with the same rows, and is merged by a later start without --keep-parts.

Every picture is encoded anew, also a JPEG that could have been copied: one encoder, one quality, no EXIF, no
surprise. The parts' records are packed in order, so the bytes depend on neither workers nor parts.
"""

import contextlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import UInt8

from fastrot.config import UsageError
from fastrot.data.beton import layout
from fastrot.data.files import BadPicture
from fastrot.data.manifest import named_beside, sealed, side, unsealed
from fastrot.data.prepare import parts as part_files
from fastrot.data.prepare.encode import EncodedPicture, EncodeSpec
from fastrot.data.prepare.options import Options, difference
from fastrot.data.prepare.parts import Part
from fastrot.data.prepare.writer import WAYS, Converted, Existing, FormatWriter
from fastrot.disk import replace_bytes, sync_folder, write_atomically

ROWS_AT = layout.HEADER.itemsize + len(layout.NAMES) * layout.FIELD.itemsize  # 3,147
NEEDED = ("crc.npy", "keys.npy", "paths.jsonl")  # beside the records, besides the .json
BESIDE = (*NEEDED, "rejects.jsonl", "json")
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

    def encode(self, picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
        if self.encoding == "raw":
            if picture.nbytes > LARGEST:
                raise BadPicture(f"{picture.nbytes:,} bytes raw: a record may have {LARGEST:,}")
            return picture.tobytes()
        if max(picture.shape[:2]) > LONGEST:
            height, width = picture.shape[:2]
            raise BadPicture(f"{width}x{height} pixels: a side of a JPEG may have {LONGEST:,}")
        import simplejpeg

        return simplejpeg.encode_jpeg(picture, quality=self.quality, colorsubsampling="420")

    def decode(self, data: bytes, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        if self.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(height, width, 3)
        import simplejpeg

        return simplejpeg.decode_jpeg(data)


# ---- the file ----


class Packer:
    """Packs records into the pages of one open file, in the order given; the header comes last.

    A record larger than the page doubles the page: what lay inside one small page lies inside one large page.
    `room` is the number of rows to leave space for; fewer may come.
    """

    def __init__(self, file: BinaryIO, room: int):
        self.file, self.room = file, room
        self.rows, self.page = 0, layout.PAGE
        self._at = ROWS_AT + room * layout.ROW.itemsize
        beside = os.path.dirname(file.name)  # rows and table of millions of pictures go to disk
        self._rows = tempfile.SpooledTemporaryFile(2**20, dir=beside)  # noqa: SIM115 (closed in finish)
        self._table = tempfile.SpooledTemporaryFile(2**20, dir=beside)  # noqa: SIM115

    def add(self, record: bytes, *, mode: int, height: int, width: int, label: int) -> None:
        size = len(record)
        while self.page < size:
            self.page *= 2
        if self._at // self.page != (self._at + size - 1) // self.page:
            self._at = -(-self._at // self.page) * self.page
        self.file.seek(self._at)
        self.file.write(record)
        row = np.zeros(1, layout.ROW)  # zeros also where the struct has gaps
        row["f0"] = (mode, width, height, self._at)
        row["f1"], row["f2"] = label, self.rows
        self._rows.write(row.tobytes())
        self._table.write(np.array([(self.rows, self._at, size)], layout.TABLE).tobytes())
        self._at += size
        self.rows += 1

    def close(self) -> None:
        self._rows.close()
        self._table.close()

    def finish(self) -> None:
        assert 0 < self.rows <= self.room
        fields = np.zeros(len(layout.NAMES), layout.FIELD)
        for field, (name, kind) in zip(fields, layout.NAMES, strict=True):
            field["name"], field["type"] = name.encode(), kind
        header = np.zeros(1, layout.HEADER)
        header[0] = (layout.VERSION, len(fields), self.page, self.rows, self._at)
        self._move(self._table, self._at)
        self._move(self._rows, ROWS_AT)
        self.file.seek(layout.HEADER.itemsize)
        self.file.write(fields.tobytes())
        self.file.flush()
        self.file.seek(0)
        self.file.write(header.tobytes())

    def _move(self, spool: Any, at: int) -> None:
        spool.seek(0)
        self.file.seek(at)
        shutil.copyfileobj(spool, self.file, 2**20)


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
    with contextlib.closing(Packer(file, rows)) as packer:
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
        return EncodeSpec(Coder(o.encoding, o.quality), o.short_side, o.max_side)

    def write_part(self, path: Path, pictures: Iterable[EncodedPicture], room: int) -> None:
        """A .beton of its own from a part's pictures; `index` counts from 0 in it."""
        mode = layout.JPG if self.options.encoding == "jpg" else layout.RAW

        def write(file: BinaryIO) -> None:
            with contextlib.closing(Packer(file, room)) as packer:
                for p in pictures:
                    packer.add(p.data, mode=mode, height=p.height, width=p.width, label=p.label)
                packer.finish()

        write_atomically(path, write)

    def paths(self, manifest: dict[str, Any]) -> tuple[Path, Path]:
        if "parts" in manifest:
            return self.options.set, self.options.set / "set.rejects.jsonl"
        return self.options.out, side(self.options.out, "rejects.jsonl")

    # what is there

    def existing(self, plan: dict[str, Any], part: int) -> Existing:
        options = self.options
        with contextlib.suppress(OSError):
            options.set.rmdir()  # where it is empty: of a start that was killed at its very end
        begun = part_files.begun_with(options.set)
        if begun is None and options.set.exists():
            raise UsageError(
                f"{options.set} is there, but is no set of ours: remove it or choose another --out"
            )
        if options.overwrite:
            return Existing()
        if options.out.exists():
            manifest = _finished(options.out, plan)
            kept = begun and {k: v for k, v in begun.items() if k != "part"}
            if kept == plan and not options.keep_parts:
                part_files.remove(options.set)  # merged by a start that was killed at its very end
            part_files.remove_if_of(self.parts_folder, {**plan, "part": part})
            return Existing(manifest)
        if begun is None:
            return Existing()
        manifest = self._finished_set(plan, begun)
        if manifest is not None and not options.keep_parts:
            return Existing(None, options.set, begun["part"])  # to be merged
        return Existing(manifest)

    def _finished_set(self, plan: dict[str, Any], begun: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest of a finished set; another plan's is refused.

        One that lacks something becomes the folder of parts again, so that it is mended there: None.
        """
        at, parts = self.options.set, self.parts_folder
        if differs := difference(plan, {k: v for k, v in begun.items() if k != "part"}):
            raise UsageError(f"{at} is there, made {differs}: {WAYS}")
        manifest: dict[str, Any] = {"parts": []}
        with contextlib.suppress(OSError, ValueError):
            manifest = unsealed((at / "set.json").read_bytes())
        changed = [at / each["file"] for each in manifest["parts"] if not _as_listed(at, each)]
        if manifest["parts"] and not changed and _all_beside(at / "set", manifest):
            (at / part_files.LOCK).unlink(missing_ok=True)  # of a start killed at its very end
            return manifest
        if parts.exists() and {*os.listdir(parts)} <= {part_files.PLAN, part_files.LOCK}:
            part_files.remove(parts)  # of a merge that was broken off
        if parts.exists():
            raise UsageError(f"{at} lacks something, and {parts} is there too: remove one of them")
        for file in changed:
            file.with_suffix(".json").unlink(missing_ok=True)
        os.rename(at, parts)
        return None

    # what is made

    def write(self, converted: Converted) -> dict[str, Any]:
        return (self._write_set if self.options.keep_parts else self._write_file)(converted)

    def _write_file(self, converted: Converted) -> dict[str, Any]:
        """Merge the parts and put OUT.beton and all beside it in their places."""
        out, new = self.options.out, self.parts_folder / part_files.NEW
        write_atomically(new, lambda file: merge(converted.parts, len(converted.records), file))
        found = _described(new)
        body = {name: found[name] for name in ("head_crc", "table_crc", "bytes", "page")}
        manifest = _write_beside(new, converted, body)
        theirs = named_beside(side(out, "json"))
        # all of it is on the disk: from here on names change, which needs no space
        out.unlink(missing_ok=True)
        for name in (*sorted({*manifest.get("beside", ()), *theirs}), *BESIDE):
            if side(new, name).exists():
                os.replace(side(new, name), side(out, name))
            else:
                side(out, name).unlink(missing_ok=True)
        sync_folder(out.parent)
        os.replace(new, out)
        sync_folder(out.parent)
        part_files.remove(self.options.set)
        part_files.remove(self.parts_folder)
        return manifest

    def _write_set(self, converted: Converted) -> dict[str, Any]:
        """Add to the folder of parts what makes it a set, and give it its name."""
        options = self.options
        listed = [_described(part.file) for part in converted.parts if part.file.exists()]
        page = max(each.pop("page") for each in listed)
        body = {"parts": listed, "bytes": sum(each["bytes"] for each in listed), "page": page}
        manifest = _write_beside(self.parts_folder / "set", converted, body)
        # what it replaces goes first, as with a file
        beside = named_beside(side(options.out, "json"))
        options.out.unlink(missing_ok=True)
        for name in (*beside, *BESIDE):
            side(options.out, name).unlink(missing_ok=True)
        part_files.remove(options.set)
        os.rename(self.parts_folder, options.set)
        sync_folder(options.out.parent)
        (options.set / part_files.LOCK).unlink(missing_ok=True)
        return manifest


def _write_beside(base: Path, converted: Converted, body: dict[str, Any]) -> dict[str, Any]:
    """Write all that lies beside the records, the .json last; what that says. `body`: of the records' file or files."""
    for name, array in (("crc.npy", converted.crcs), ("keys.npy", converted.keys)):
        write_atomically(side(base, name), lambda file, array=array: np.save(file, array))
    beside = converted.write_beside(lambda name: side(base, name))
    manifest = converted.manifest("beton", body | beside)
    replace_bytes(side(base, "json"), sealed(manifest))
    return manifest


def _all_beside(base: Path, manifest: dict[str, Any]) -> bool:
    """Whether all is there that belongs beside records."""
    return all(side(base, name).exists() for name in (*NEEDED, *manifest.get("beside", ())))


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a finished file; another plan's is refused."""
    try:
        manifest, found = unsealed(side(out, "json").read_bytes()), _described(out)
        same = all(manifest[name] == found[name] for name in ("head_crc", "table_crc"))
        whole, theirs = same and _all_beside(out, manifest), manifest["options"]
    except (OSError, ValueError, KeyError, IndexError):
        whole, manifest, theirs = False, {}, {}
    if not whole:
        raise UsageError(f"{out} is there, but is no whole file of ours: {WAYS}")
    if differs := difference(plan, theirs):
        raise UsageError(f"{out} is there, made {differs}: {WAYS}")
    return manifest


def _as_listed(folder: Path, part: dict[str, Any]) -> bool:
    """Whether a part of a set is what set.json says; its records are not read."""
    file = folder / part["file"]
    if not file.with_suffix(".json").exists():
        return False  # a merge found a record changed
    try:
        return _described(file).items() >= part.items()
    except (OSError, ValueError, IndexError):
        return False


def _described(path: Path) -> dict[str, Any]:
    """What a set's list says of a file, and its page. head_crc: crc32 of header, fields and rows; table_crc: of the table."""
    with open(path, "rb") as file:
        header = np.fromfile(file, layout.HEADER, 1)[0]
        rows, size = int(header["rows"]), path.stat().st_size
        return {
            "file": path.name,
            "rows": rows,
            "bytes": size,
            "head_crc": _crc(file, 0, ROWS_AT + rows * layout.ROW.itemsize),
            "table_crc": _crc(file, int(header["table"]), size),
            "page": int(header["page"]),
        }


def _crc(file: BinaryIO, start: int, stop: int) -> int:
    crc = 0
    file.seek(start)
    while left := stop - file.tell():
        block = file.read(min(left, 2**20))
        if not block:
            raise ValueError("the file ends too early")
        crc = zlib.crc32(block, crc)
    return crc
